"""A model in some file or folder, opened and not yet read; and the model made of it, one matrix at a time.

A format's reader is a Source: it knows the config and every weight by its published name (`model.layers.0.self_attn.
q_proj.weight`), and gives one weight when asked. What a weight is in its file is one of three things:

  Codes    ternary codes, a byte each, and their scale
  Fifths   the same, five codes a byte (csrc/quant/fifths.h)
  Floats   numbers in f32 or bf16
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bitnet import _core, nn, ops
from bitnet._core import Tensor
from bitnet.config import BitNetConfig
from bitnet.errors import BitnetError, CheckpointError
from bitnet.layout import choose_layout
from bitnet.model import BitNetForCausalLM, Factory

Array = np.ndarray[Any, Any]
Memory = bytes | memoryview | Array
Progress = Callable[[list[str]], Iterable[str]]  # wraps the names of the weights, as tqdm does


@dataclass(frozen=True)
class Codes:
    """codes: int8 (out, in), each -1, 0 or 1; a weight is its code times scale, a positive f32, or that of its row, f32
    (out,)."""

    codes: Array
    scale: float | Array


@dataclass(frozen=True)
class Fifths:
    """The bytes of pack_fifths, row after row; scale as of Codes."""

    data: Memory
    scale: float | Array


@dataclass(frozen=True)
class Floats:
    """Numbers of a tensor, row by row: form "f32" or "bf16" (the upper halves of f32). Memory may be a mapped file."""

    data: Memory
    form: str = "f32"


Stored = Codes | Fifths | Floats


@dataclass(frozen=True)
class Reading:
    """What a reader is told that its file does not say, or says wrong. None: as the file says.

    hidden_act: "silu" or "relu2". linear: "bitlinear" takes the matrices of a full-precision checkpoint as latent
    weights of ternary layers, "linear" those of a ternary one as they are. i2s_order: how I2_S bytes of a GGUF file are
    ordered, "x86" or "arm", which no file tells.
    """

    hidden_act: str | None = None
    linear: str | None = None
    i2s_order: str = "x86"


class Source(Protocol):
    """An opened model.

    is_trainable: whether its weights are masters, all of which become f32 parameters; otherwise its ternary layers are
    prepared for inference, and embedding and output head stay in bf16 if they are. about: what else the model will
    have as attributes: tokenizer (or None), checkpoint (the path), provenance, step, trained_seq_len (or None).
    """

    path: Path
    config: BitNetConfig
    is_trainable: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight by its published name."""

    @property
    def ternary(self) -> Collection[str]:
        """Names of the weights that are stored as codes."""

    def about(self) -> dict[str, Any]:
        """Attributes for the model."""

    def read(self, name: str) -> Stored:
        """One weight, checked. Raises CheckpointError."""

    def release(self, name: str) -> None:
        """Called when a weight that was read is in the model, or a copy of it: its pages have no further use."""


class GivenFactory(Factory):
    """Parts whose matrices exist already: give(name of the weight, rows, cols) returns them."""

    def __init__(self, config: BitNetConfig, seed: int, give: Callable[[str, int, int], Tensor]) -> None:
        super().__init__(config, seed)
        self.give = give

    def matrix(self, name: str, rows: int, cols: int) -> Tensor:
        """The matrix of that name."""
        return self.give(f"{name}.weight", rows, cols)


def assemble(source: Source, layout: str = "auto", progress: Progress | None = None) -> BitNetForCausalLM:
    """The model of a source; layout as for Module.pack. progress: wraps the names of the weights, as tqdm does.

    Raises CheckpointError naming the weight that is missing, superfluous, of another shape or damaged.
    """
    taken: set[str] = set()
    shapes, ternary = source.shapes, source.ternary
    chosen = choose_layout(sum(int(np.prod(shapes[name])) for name in ternary), layout)
    turns = iter((progress or iter)(list(shapes)))

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        found = shapes.get(name)
        if found is None:
            raise CheckpointError(f"{source.path}: it has no {name}, which its config asks for")
        if found != shape:
            raise CheckpointError(f"{source.path}: {name} has shape {found}, but {shape} by its config")
        # linear and embedding read bf16; every other layer wants f32.
        stays = name in ("model.embed_tokens.weight", "lm_head.weight") and not source.config.quantize_head
        try:
            tensor = tensor_of(source.read(name), shape, chosen, stays, source.is_trainable)
        except BitnetError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{source.path}: {name} cannot be read: {error}") from None
        source.release(name)
        taken.add(name)
        next(turns, None)
        return tensor

    try:
        model = BitNetForCausalLM(
            source.config, factory=partial(GivenFactory, give=lambda name, rows, cols: take(name, (rows, cols)))
        )
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                _check_kind(source, f"{path}.weight", module)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # a norm
                parameter.copy_(take(name, parameter.shape))
    except BitnetError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source.path}: it does not fit its config: {error}") from None
    if shapes.keys() - taken:
        raise CheckpointError(f"{source.path}: it has {min(shapes.keys() - taken)}, for which its config has no place")
    for _ in turns:  # lets a progress bar end
        pass
    vars(model).update(source.about())
    return model


def _check_kind(source: Source, name: str, module: nn.Linear | nn.Embedding) -> None:
    """Codes belong to ternary layers, and ternary layers of a model that cannot be trained have nothing but codes."""
    is_ternary = isinstance(module, nn.BitLinear)
    if (module.weight.dtype == "prepared") != is_ternary and not (is_ternary and source.is_trainable):
        form = "ternary codes" if module.weight.dtype == "prepared" else "floats"
        raise CheckpointError(f"{source.path}: {name} is stored as {form}, which its config does not want")
    if isinstance(module, nn.BitLinear) and module.has_channel_scales != source.config.has_channel_scales:
        found = "a scale for each row" if module.has_channel_scales else "one scale"
        raise CheckpointError(
            f"{source.path}: {name} has {found}, but weight_scales is {source.config.weight_scales} in its config"
        )


def _scale(scale: float | Array) -> float | Tensor:
    return _core.from_buffer(scale, "f32", scale.shape) if isinstance(scale, np.ndarray) else scale


def tensor_of(stored: Stored, shape: tuple[int, ...], layout: str, stays: bool, is_trainable: bool) -> Tensor:
    """A weight as a model uses it: codes prepared; floats an f32 parameter, where they lie if that can be.

    stays: bf16 is left as it is, unless the weight is to be trained. is_trainable: its memory is nobody else's.
    """
    if isinstance(stored, Fifths):
        rows, cols = shape
        return _core.prepare_fifths(stored.data, rows, cols, _scale(stored.scale), layout)
    if isinstance(stored, Codes):
        return _core.prepare_ternary(_core.from_buffer(stored.codes, "i8", shape), _scale(stored.scale), layout)
    if is_trainable and stored.form == "f32":
        # A copy: what an optimizer moves into its own memory must not be lent to anyone.
        return nn.Parameter(np.frombuffer(stored.data, np.float32).reshape(shape))
    tensor = _core.from_buffer(stored.data, stored.form, shape)
    if stored.form == "bf16" and stays and not is_trainable:
        return tensor
    with ops.no_grad():
        return nn.Parameter(tensor.to("f32"))

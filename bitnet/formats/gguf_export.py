"""A model into a GGUF file, in the flavour of the program that is to run it.

    flavour      architecture                   projections                       programs
    llama.cpp    bitnet                         tq2_0, tq1_0, f16, bf16, f32      llama.cpp; its graph has SiLU
    bitnet.cpp   bitnet-b1.58, or bitnet with   i2_s, f16, f32                    bitnet.cpp; i2_s and f16 also for
                 SiLU                                                             ik_llama.cpp's own quantizer
    ik           the same                       f16, f32                          ik_llama.cpp
    llama        llama                          tq2_0, tq1_0, f16, bf16, f32,     all, for models without sub-norms
                                                i2_s (bitnet.cpp)

What is exported is what the model computes: the codes of its ternary layers and their scale, not its latent weights.
TQ files, and all but F32 ones of flavour llama.cpp, have a scale beside each matrix (`.scale`, F32), which llama.cpp
multiplies in both architectures: the matrix holds the codes alone, and the scale loses no bit. F32 and I2_S hold it as
it is. F16 and BF16 round it where other programs are to read them, to 11 and 8 bits.

llama.cpp quantizes the activations of TQ layers per 256 values, not per token, and those of float layers not at all, so
its logits are alike and not equal. bitnet.cpp and ik_llama.cpp quantize per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitnet import nn, ops
from bitnet._core import Tensor
from bitnet.config import BitNetConfig
from bitnet.errors import BitnetError, ConfigError
from bitnet.formats.gguf_blocks import I2_S_GROUPS, encode, encode_codes
from bitnet.formats.gguf_config import metadata_of
from bitnet.formats.gguf_file import Part, Value, write
from bitnet.formats.gguf_names import gguf_name, interleaved, is_projection, is_rotated, scale_name
from bitnet.formats.gguf_types import BF16, F16, F32, I2_S, Q8_0, TERNARY, TQ1_0, TQ2_0, TensorType
from bitnet.formats.source import Progress
from bitnet.formats.weights import (
    codes_of,
    floats_of,
    model_weights,
    refuse_adapters,
    refuse_levers,
)
from bitnet.model import BitNetForCausalLM
from bitnet.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
FILE_TYPES = {F32: 0, F16: 1, Q8_0: 7, BF16: 32, TQ1_0: 36, TQ2_0: 37, I2_S: 40}
NAMED = {kind.name.lower(): kind for kind in FILE_TYPES}
WEIGHTS = {
    "llama.cpp": ("tq2_0", "tq1_0", "f16", "bf16", "f32"),
    "bitnet.cpp": ("i2_s", "f16", "f32"),
    "ik": ("f16", "f32"),
    "llama": ("tq2_0", "tq1_0", "f16", "bf16", "f32", "i2_s"),
}  # the first is the default
FULL_PRECISION = ("f16", "bf16", "f32")
ROWS = 4096  # of a table, looked at together: 42 MB where they have 2560 values
EMBEDDINGS = ("f16", "f32", "bf16", "q8_0")


@dataclass(frozen=True)
class Plan:
    """How a model goes into a file. scaled: whether scales stand beside the matrices."""

    arch: str
    weights: TensorType
    embeddings: TensorType
    scaled: bool
    i2s_order: str


def save_gguf(
    model: BitNetForCausalLM,
    path: str | Path,
    *,
    flavour: str,
    weights: str | None = None,
    embeddings: str | None = None,
    i2s_order: str = "x86",
    force_activation: bool = False,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a model, packed or not, as a GGUF file; the model is not changed.

    flavour: llama.cpp, bitnet.cpp, ik or llama. weights: the type of the projections, see above; default the first of
    each flavour, f16 for a full-precision model. embeddings: the type of embeddings and output head: f16, f32, bf16 or
    q8_0. i2s_order: x86 or arm, of i2_s. force_activation: write a model although the program computes another
    activation, and so other logits. tokenizer: default the model's own; without one the file has none. chat_template:
    instead of the tokenizer's. force: replace a file. Raises ConfigError for a model that the flavour cannot say, and
    CheckpointError, leaving no trace.
    """
    refuse_adapters(model)
    plan = plan_of(model.config, flavour, weights, embeddings, i2s_order, force_activation)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    types = {plan.weights, plan.embeddings}
    metadata = metadata_of(
        model.config, plan.arch, Path(path).stem, FILE_TYPES[plan.weights], bool(types & {Q8_0, *TERNARY})
    )
    metadata |= _tokenizer_keys(tokenizer, model.config.vocab_size)
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = Value("str", chat_template)
    parts: list[Part] = []
    for name, weight in model_weights(model):
        parts += _parts(name, weight, plan, model.config, Path(path))
    write(path, metadata, parts, force=force, progress=progress)


def plan_of(
    config: BitNetConfig,
    flavour: str,
    weights: str | None = None,
    embeddings: str | None = None,
    i2s_order: str = "x86",
    force_activation: bool = False,
) -> Plan:
    """How save_gguf() would write a model; ConfigError with the reason if it would not."""
    if flavour not in WEIGHTS:
        raise ConfigError(f"GGUF files have no flavour {flavour!r}; they have {', '.join(WEIGHTS)}")
    refuse_levers(config, "a ternary matrix of GGUF has one for all")
    is_ternary = config.linear == "bitlinear"
    allowed = WEIGHTS[flavour] if is_ternary else FULL_PRECISION
    weights, embeddings = weights or allowed[0], embeddings or "f16"
    for given, known, what in ((weights, allowed, "weights"), (embeddings, EMBEDDINGS, "embeddings"),
                               (i2s_order, I2_S_GROUPS, "i2s_order")):  # fmt: skip
        if given not in known:
            kind = "" if is_ternary else "full-precision "
            raise ConfigError(f"a {kind}GGUF file of flavour {flavour} has no {what} {given!r}; it has "
                              f"{', '.join(known)}")  # fmt: skip
    _refuse_shape(config, flavour)
    runs = "silu" if flavour in ("llama.cpp", "llama") else config.hidden_act
    if config.hidden_act != runs and not force_activation:
        better = "; flavours bitnet.cpp and ik have it" if flavour == "llama.cpp" else ""
        raise ConfigError(f"hidden_act is {config.hidden_act}, and llama.cpp computes silu in architecture "
                          f"{_arch(config, flavour)} whatever the file says{better}")  # fmt: skip
    plan = Plan(
        arch=_arch(config, flavour),
        weights=NAMED[weights],
        embeddings=NAMED[embeddings],
        scaled=is_ternary and (weights in ("tq1_0", "tq2_0") or (flavour == "llama.cpp" and weights != "f32")),
        i2s_order=i2s_order,
    )
    _refuse_rows(config, plan, flavour)
    return plan


def _arch(config: BitNetConfig, flavour: str) -> str:
    if flavour in ("bitnet.cpp", "ik"):
        return "bitnet-b1.58" if config.hidden_act == "relu2" else "bitnet"
    return "bitnet" if flavour == "llama.cpp" else "llama"


def _refuse_shape(config: BitNetConfig, flavour: str) -> None:
    """What no program's graph has, or not that of this flavour."""
    for name, wanted in {"quantize_head": False, "use_rms_norm": False, "input_norms": True}.items():
        if getattr(config, name) != wanted:
            raise ConfigError(
                f"{name} is {not wanted}, for which no architecture of GGUF has a graph; no flavour works"
            )
    if flavour == "llama":
        if config.sub_norms:
            raise ConfigError("sub_norms is True, and architecture llama has none; flavours llama.cpp, bitnet.cpp and "
                              "ik have them")  # fmt: skip
        return
    if config.linear != "bitlinear":
        better = "; no flavour works, as llama has no sub-norms" if config.sub_norms else "; flavour llama works"
        raise ConfigError(f"the model is of full precision (linear is 'linear'), and flavour {flavour} is for ternary "
                          f"ones{better}")  # fmt: skip
    if not config.sub_norms:
        raise ConfigError(f"sub_norms is False, and the architecture of flavour {flavour} requires them; flavour llama "
                          "works")  # fmt: skip
    if not config.tie_word_embeddings:
        raise ConfigError(f"tie_word_embeddings is False, and programs for flavour {flavour} refuse such a file or "
                          "ignore its output head; no flavour with sub-norms has one of its own. A model trained "
                          "with tie_word_embeddings true fits, and hf-packed and onnx take this one")  # fmt: skip


def _refuse_rows(config: BitNetConfig, plan: Plan, flavour: str) -> None:
    block = {I2_S: 128 if plan.i2s_order == "x86" else 64}.get(plan.weights, plan.weights.block)
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(config, name)
        if size % block:
            others = [known for known in WEIGHTS[flavour] if known in FULL_PRECISION]
            raise ConfigError(f"{name} is {size}, no multiple of the {block} values that {plan.weights.name} takes "
                              f"together; weights {' or '.join(others)} have no blocks")  # fmt: skip
    if config.hidden_size % plan.embeddings.block:
        raise ConfigError(f"hidden_size is {config.hidden_size}, no multiple of the {plan.embeddings.block} values "
                          f"that {plan.embeddings.name} takes together; embeddings f16 have no blocks")  # fmt: skip


def _tokenizer_keys(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Value]:
    if tokenizer is None:
        return {"tokenizer.ggml.model": Value("str", "no_vocab")}
    from bitnet.formats.gguf_tokenizer import metadata_of as keys_of

    return keys_of(tokenizer, vocab_size)


def _parts(name: str, weight: nn.BitLinear | Tensor, plan: Plan, config: BitNetConfig, path: Path) -> list[Part]:
    """The tensors of a weight: itself, and its scale."""
    head_dim = config.head_dim if plan.arch == "llama" and is_rotated(name) else None
    if isinstance(weight, nn.BitLinear):
        shape: tuple[int, ...] = (weight.out_features, weight.in_features)
        parts = [Part(gguf_name(name), shape, plan.weights, partial(_ternary, weight, plan, head_dim, path, name))]
        if plan.scaled:
            parts.append(Part(scale_name(name), (1,), F32, partial(_scale, weight)))
        return parts
    kind = F32
    if len(weight.shape) == 2:
        kind = plan.weights if is_projection(name) else plan.embeddings
    return [Part(gguf_name(name), weight.shape, kind, partial(_plain, weight, kind, head_dim, path, name))]


def _ternary(layer: nn.BitLinear, plan: Plan, head_dim: int | None, path: Path, name: str) -> Array:
    found = codes_of(layer)
    codes = found.codes if head_dim is None else interleaved(found.codes, head_dim)
    scale = 1.0 if plan.scaled else float(found.scale)
    try:
        if plan.weights in TERNARY:
            return encode_codes(plan.weights, codes, scale, plan.i2s_order)
        if plan.weights is F16 and scale <= 2**-25:
            raise ValueError(f"the scale {scale:g} is below what F16 holds")
        return encode(plan.weights, codes * np.float32(scale))
    except ValueError as error:
        raise _refusal(path, name, error) from None


def _scale(layer: nn.BitLinear) -> Array:
    return np.array([layer.weight_scale], "<f4")


def _plain(weight: Tensor, kind: TensorType, head_dim: int | None, path: Path, name: str) -> Array:
    data = np.empty(kind.bytes_of(weight.shape), np.uint8)
    at = 0
    try:
        for values in _pieces(weight):
            piece = encode(kind, values if head_dim is None else interleaved(values, head_dim))
            data[at : at + piece.size] = piece
            at += piece.size
    except ValueError as error:
        raise _refusal(path, name, error) from None
    return data


def _pieces(weight: Tensor) -> Iterator[Array]:
    """A tensor's numbers in f32; those of a table in bf16 some rows at a time, as it is twice as large in f32."""
    if weight.dtype != "bf16" or weight.ndim != 2:
        yield floats_of(weight)
        return
    for i in range(0, weight.shape[0], ROWS):
        with ops.no_grad():
            yield ops.embedding(np.arange(i, min(i + ROWS, weight.shape[0])), weight).numpy()


def _refusal(path: Path, name: str, error: ValueError) -> BitnetError:
    return ConfigError(f"{path}: {name} cannot be written: {error}; f32 holds it")

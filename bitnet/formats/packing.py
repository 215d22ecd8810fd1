"""A model into a `.bitnet` file, and out of it: one matrix at a time in memory beside the model itself.

Ternary layers are stored as their codes and scale, so a packed file computes the very bits that the layers of the run
computed. The other matrices (embedding, output head, layers of a full-precision twin) are stored in bf16 where that
loses nothing, else in f32, unless the caller decides; norms always in f32.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitnet import _core, get_threads, nn, ops
from bitnet._core import Tensor
from bitnet.checkpoint import Checkpoint, config_from, config_json
from bitnet.config import BitNetConfig
from bitnet.errors import BitnetError, CheckpointError
from bitnet.formats.bitnet_file import TERNARY, BitnetFile, Content, Part, Section, file_parts, write
from bitnet.layout import choose_layout
from bitnet.model import BitNetForCausalLM, Factory
from bitnet.tokenizer import Tokenizer, load_tokenizer

Array = np.ndarray[Any, Any]
FLOATS = ("bf16", "f32")
CHUNK = 1 << 20  # floats looked at together: a few MB of temporary memory


class GivenFactory(Factory):
    """Parts whose matrices exist already: give(name of the weight, rows, cols) returns them."""

    def __init__(self, config: BitNetConfig, seed: int, give: Callable[[str, int, int], Tensor]) -> None:
        super().__init__(config, seed)
        self.give = give

    def matrix(self, name: str, rows: int, cols: int) -> Tensor:
        """The matrix of that name."""
        return self.give(f"{name}.weight", rows, cols)


# ---- packing --------------------------------------------------------------------------------------------------------


def save_packed(
    model: BitNetForCausalLM,
    path: str | Path,
    *,
    coded: bool = False,
    floats: str | None = None,
    tokenizer: Tokenizer | None = None,
    provenance: dict[str, str] | None = None,
    force: bool = False,
    progress: Callable[[Sequence[Part]], Iterable[Part]] | None = None,
) -> None:
    """Writes a model, packed or not, as a `.bitnet` file; the model is not changed.

    coded: entropy-code each ternary layer that gets smaller by it. floats: the form of the other matrices, bf16 or f32;
    None chooses bf16 where every value is one. tokenizer: default the model's own, if it has one. force: replace a
    file. Raises CheckpointError, leaving no trace.
    """
    if floats not in (None, *FLOATS):
        raise ValueError(f"floats must be one of {', '.join(FLOATS)}, not {floats!r}")
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    parts = file_parts({} if tokenizer is None else _files_of(tokenizer))
    for name, weight in _weights(model):
        if isinstance(weight, nn.BitLinear):
            shape: tuple[int, ...] = (weight.out_features, weight.in_features)
            parts.append(Part(name, shape, partial(_ternary, weight, coded)))
        else:
            form = floats if len(weight.shape) == 2 else "f32"
            parts.append(Part(name, weight.shape, partial(_floats, weight, form)))
    write(path, config_json(model.config, tokenizer), provenance or {}, parts, force=force, progress=progress)


def _weights(model: BitNetForCausalLM) -> Iterator[tuple[str, nn.BitLinear | Tensor]]:
    """Everything a model is made of, by name: ternary layers, and tensors of the others."""
    for path, module in model.named_modules():
        if isinstance(module, nn.BitLinear):
            yield f"{path}.weight", module
            continue
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}", value


def _ternary(layer: nn.BitLinear, coded: bool) -> Content:
    # detach(): the codes that quantizing keeps beside a weight go with this window instead of staying with the model.
    weight = layer.weight if layer.is_packed else layer.weight.detach()
    scale = _core.ternary_stats(weight)[4]
    fifths = _core.pack_fifths(_core.ternary_codes(weight))
    if coded:
        stream = _core.rans_encode(fifths)
        if len(stream) < fifths.size:
            return Content("fifths-coded", stream, scale)
    return Content("fifths", fifths.data, scale)


def _floats(weight: Tensor, form: str | None) -> Content:
    with ops.no_grad():
        values = weight.to("f32").numpy()
    if form is None:
        bits = values.reshape(-1).view(np.uint32)
        exact = values.ndim == 2 and not any((part & 0xFFFF).any() for part in _chunks(bits))
        form = "bf16" if exact else "f32"
    return Content(form, (values if form == "f32" else to_bf16(values)).data)


def _chunks(flat: Array) -> Iterator[Array]:
    return (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))


def to_bf16(values: Array) -> Array:
    """f32 -> the upper halves of the nearest bf16 (ties to even; NaN stays NaN), uint16 of the same shape."""
    out = np.empty(values.size, np.uint16)
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    for source, target in zip(_chunks(bits), _chunks(out), strict=True):
        rounded = (source + (0x7FFF + (source >> 16 & 1))) >> 16
        target[:] = np.where((source & 0x7FFFFFFF) > 0x7F800000, source >> 16 | 0x40, rounded)
    return out.reshape(values.shape)


def _files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {name: Path(folder, name).read_bytes() for name in tokenizer.save(folder)}


def without_copies(saved: Checkpoint) -> BitNetForCausalLM:
    """The model of a checkpoint over the arrays that were read, instead of copies of them."""

    def give(name: str, rows: int, cols: int) -> Tensor:
        array = saved.weights.get(name)
        if array is None or array.shape != (rows, cols) or array.dtype != np.float32:
            found = "nothing" if array is None else f"{array.dtype} of shape {array.shape}"
            raise CheckpointError(
                f"{saved.path} does not fit its config: {name} should be ({rows}, {cols}), not {found}"
            )
        return nn.Parameter(_core.from_buffer(array, "f32", array.shape))

    try:
        model = BitNetForCausalLM(saved.config, factory=partial(GivenFactory, give=give))
        _fill(model, saved.path, saved.weights.keys(), lambda name: saved.weights[name])
    except BitnetError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{saved.path} does not fit its config: {error}") from None
    vars(model).update(tokenizer=saved.tokenizer, checkpoint=saved.path, step=saved.state.get("step"))
    return model


def provenance_of(saved: Checkpoint) -> dict[str, str]:
    """Where the weights come from, as far as the checkpoint tells."""
    from bitnet import __version__

    state, data = saved.state, saved.state.get("data") or {}
    run = saved.path.resolve().parents[1] if saved.path.parent.name == "checkpoints" else saved.path.resolve()
    found = {
        "run": run.name,
        "step": state.get("step"),
        "tokens": state.get("tokens"),
        "val_loss": state.get("val_loss"),
        "seq_len": state.get("config", {}).get("seq_len"),
        "seed": state.get("rng", {}).get("seed"),
        "data_tokens": data.get("tokens"),
        "data_sha256": " ".join(data.get("shards") or []) or None,
        "packed_by": f"bitnet {__version__}",
    }
    return {name: str(value) for name, value in found.items() if value is not None}


# ---- loading --------------------------------------------------------------------------------------------------------


def load_packed(path: str | Path, verify: bool = True, layout: str = "auto") -> BitNetForCausalLM:
    """The packed model in a `.bitnet` file, for inference; layout as for Module.pack.

    Layers are prepared one after the other while other threads verify the checksums of the next ones; matrices in f32
    and bf16 are used where they lie in the mapped file. The model's attributes tokenizer (or None), checkpoint (the
    path), provenance, step and trained_seq_len (or None) say more. Raises CheckpointError naming what is
    missing or damaged.
    """
    file = BitnetFile(path)
    config = config_from(file.config, file.path)
    with ThreadPoolExecutor(get_threads()) as pool:
        tensors = {name: section for name, section in file.sections.items() if section.form != "bytes"}
        checks = {name: pool.submit(_verify, file, section) for name, section in tensors.items()} if verify else {}
        codes = sum(math.prod(section.shape) for section in tensors.values() if section.form in TERNARY)
        try:
            model = _model(file, config, tensors, checks, choose_layout(codes, layout))
        finally:
            pool.shutdown(cancel_futures=True)
    told = file.provenance
    step, seq_len = (_number(told.get(name, "")) for name in ("step", "seq_len"))
    vars(model).update(tokenizer=open_tokenizer(file), checkpoint=file.path, provenance=told, step=step,
                       trained_seq_len=seq_len)  # fmt: skip
    return model


def _verify(file: BitnetFile, section: Section) -> None:
    """verify() runs far ahead of what is prepared, so it leaves no pages behind: memory stays near the model's own."""
    file.verify(section)
    file.release(section)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 19 else None


def _model(
    file: BitnetFile,
    config: BitNetConfig,
    tensors: dict[str, Section],
    checks: dict[str, Future[None]],
    layout: str,
) -> BitNetForCausalLM:
    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        section = tensors.get(name)
        if section is None:
            raise CheckpointError(f"{file.path}: it has no {name}, which its config asks for")
        if section.shape != shape:
            raise CheckpointError(f"{file.path}: {name} has shape {section.shape}, but {shape} by its config")
        if name in checks:
            checks[name].result()
        # linear and embedding read bf16; every other layer wants f32.
        as_bf16 = name in ("model.embed_tokens.weight", "lm_head.weight") and not config.quantize_head
        tensor = read_tensor(file, section, layout, as_bf16)
        file.release(section)
        return tensor

    try:
        model = BitNetForCausalLM(
            config, factory=partial(GivenFactory, give=lambda name, rows, cols: take(name, (rows, cols)))
        )
        for path, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            if (module.weight.dtype == "prepared") != isinstance(module, nn.BitLinear):
                form = tensors[f"{path}.weight"].form
                raise CheckpointError(f"{file.path}: {path}.weight is stored as {form}, which its config does not want")
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        _fill(model, file.path, tensors.keys(), lambda name: take(name, shapes[name]).numpy())
    except BitnetError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: it does not fit its config: {error}") from None
    return model


def read_tensor(file: BitnetFile, section: Section, layout: str, as_bf16: bool) -> Tensor:
    """A section as a model uses it: ternary codes prepared, bf16 as it is if wanted, else floats as an f32 parameter.

    Raises CheckpointError.
    """
    try:
        if section.form in TERNARY:
            rows, cols = section.shape
            assert section.scale is not None
            return _core.prepare_fifths(file.fifths(section), rows, cols, section.scale, layout)
        tensor = _core.from_buffer(file.view(section), section.form, section.shape)
        if section.form == "bf16" and as_bf16:
            return tensor
        with ops.no_grad():
            return nn.Parameter(tensor.to("f32"))
    except BitnetError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {section.name} cannot be read: {error}") from None


def _fill(model: BitNetForCausalLM, path: Path, names: Iterable[str], values: Callable[[str], Array]) -> None:
    """Sets the parameters that are no matrices (norms); refuses names that the model has no place for."""
    given = set(names)
    known = {name for name, _ in _weights(model)}
    if given - known:
        raise CheckpointError(f"{path}: it has {min(given - known)}, for which its config has no place")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            if name not in given:
                raise CheckpointError(f"{path}: it has no {name}, which its config asks for")
            parameter.copy_(values(name))


def open_tokenizer(file: BitnetFile) -> Tokenizer | None:
    """The tokenizer in a file, or None."""
    files = file.tokenizer_files()
    if not files:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        try:
            return load_tokenizer(folder)
        except BitnetError as error:
            raise CheckpointError(f"{file.path} has a tokenizer that cannot be read: {error}") from None

"""A model into a `.bitnet` file, and out of it: one matrix at a time in memory beside the model itself.

Ternary layers are stored as their codes and scale (or scales), so a packed file computes the very bits that the layers
of the run computed. The other matrices (embedding, output head, layers of a full-precision twin) are stored in bf16
where that loses nothing, else in f32, unless the caller decides; norms always in f32.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitnet import _core, get_threads, nn
from bitnet._core import Tensor
from bitnet.checkpoint import Checkpoint
from bitnet.errors import BitnetError, CheckpointError
from bitnet.formats.bitnet_file import TERNARY, BitnetFile, Content, Part, file_parts, write
from bitnet.formats.hf_config import config_from, config_json
from bitnet.formats.source import Fifths, Floats, Progress, Stored, assemble
from bitnet.formats.weights import bf16_of, codes_of, floats_of, is_bf16, model_weights, refuse_adapters
from bitnet.model import BitNetForCausalLM
from bitnet.tokenizer import Tokenizer, load_tokenizer

FLOATS = ("bf16", "f32")


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
    progress: Progress | None = None,
) -> None:
    """Writes a model, packed or not, as a `.bitnet` file; the model is not changed.

    coded: entropy-code each ternary layer that gets smaller by it. floats: the form of the other matrices, bf16 or f32;
    None chooses bf16 where every value is one. tokenizer: default the model's own, if it has one. force: replace a
    file. Raises CheckpointError, leaving no trace.
    """
    if floats not in (None, *FLOATS):
        raise ValueError(f"floats must be one of {', '.join(FLOATS)}, not {floats!r}")
    refuse_adapters(model)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    parts = file_parts({} if tokenizer is None else _files_of(tokenizer))
    for name, weight in model_weights(model):
        if isinstance(weight, nn.BitLinear):
            shape: tuple[int, ...] = (weight.out_features, weight.in_features)
            parts.append(Part(name, shape, partial(_ternary, name, weight, coded)))
        else:
            form = floats if len(weight.shape) == 2 else "f32"
            parts.append(Part(name, weight.shape, partial(_floats, weight, form)))
    write(path, config_json(model.config, tokenizer), provenance or {}, parts, force=force, progress=progress)


def _ternary(name: str, layer: nn.BitLinear, coded: bool) -> Content:
    found = codes_of(layer)
    scales = np.atleast_1d(found.scale)
    bad = np.flatnonzero(~np.isfinite(scales))
    if bad.size:
        where = f" in row {bad[0]}" if isinstance(found.scale, np.ndarray) else ""
        raise CheckpointError(f"{name} has the scale {scales[bad[0]]}{where}, which no file can hold")
    fifths = _core.pack_fifths(_core.from_buffer(found.codes, "i8", found.codes.shape))
    if coded:
        stream = _core.rans_encode(fifths)
        if len(stream) < fifths.size:
            return Content("fifths-coded", stream, found.scale)
    return Content("fifths", fifths.data, found.scale)


def _floats(weight: Tensor, form: str | None) -> Content:
    if form is None and weight.ndim == 2 and (weight.dtype == "bf16" or is_bf16(floats_of(weight))):
        form = "bf16"
    return Content("bf16", bf16_of(weight).data) if form == "bf16" else Content("f32", floats_of(weight).data)


def _files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {name: Path(folder, name).read_bytes() for name in tokenizer.save(folder)}


class SavedSource:
    """The weights of a checkpoint, where the arrays lie that were read."""

    is_trainable = True
    ternary: tuple[str, ...] = ()

    def __init__(self, saved: Checkpoint) -> None:
        self.path, self.config, self._saved = saved.path, saved.config, saved
        self.shapes = {name: array.shape for name, array in saved.weights.items()}

    def about(self) -> dict[str, Any]:
        """See Source."""
        return self._saved.about()

    def read(self, name: str) -> Floats:
        """See Source."""
        array = self._saved.weights[name]
        if array.dtype != np.float32:
            raise CheckpointError(f"{self.path}: {name} is {array.dtype}, not float32")
        return Floats(array)

    def release(self, name: str) -> None:
        """See Source; the checkpoint keeps its arrays."""


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


class PackedSource:
    """A `.bitnet` file as a Source; checks: of sections that are being verified, by name."""

    is_trainable = False

    def __init__(self, file: BitnetFile) -> None:
        self.file, self.path, self.config = file, file.path, config_from(file.config, file.path)
        self.sections = {name: section for name, section in file.sections.items() if section.form != "bytes"}
        self.shapes = {name: section.shape for name, section in self.sections.items()}
        self.ternary = [name for name, section in self.sections.items() if section.form in TERNARY]
        self.checks: dict[str, Future[None]] = {}

    def about(self) -> dict[str, Any]:
        """See Source."""
        told = self.file.provenance
        step, seq_len = (_number(told.get(name, "")) for name in ("step", "seq_len"))
        return {"tokenizer": open_tokenizer(self.file), "checkpoint": self.path, "provenance": told, "step": step,
                "trained_seq_len": seq_len}  # fmt: skip

    def read(self, name: str) -> Stored:
        """See Source."""
        if name in self.checks:
            self.checks[name].result()
        section = self.sections[name]
        if section.form in TERNARY:
            scale = section.scale if section.scale is not None else self.file.scales(section)
            return Fifths(self.file.fifths(section), scale)
        return Floats(self.file.view(section), section.form)

    def release(self, name: str) -> None:
        """See Source."""
        self.file.release(self.sections[name])

    def verify(self, name: str) -> None:
        """Runs far ahead of what is prepared, so it leaves no pages behind: memory stays near the model's own."""
        self.file.verify(self.sections[name])
        self.release(name)


def load_packed(path: str | Path, verify: bool = True, layout: str = "auto") -> BitNetForCausalLM:
    """The packed model in a `.bitnet` file, for inference; layout as for Module.pack.

    Layers are prepared one after the other while other threads verify the checksums of the next ones; matrices in f32
    and bf16 are used where they lie in the mapped file. The model's attributes tokenizer (or None), checkpoint (the
    path), provenance, step and trained_seq_len (or None) say more. Raises CheckpointError naming what is
    missing or damaged.
    """
    source = PackedSource(BitnetFile(path))
    with ThreadPoolExecutor(get_threads()) as pool:
        if verify:
            source.checks = {name: pool.submit(source.verify, name) for name in source.sections}
        try:
            return assemble(source, layout)
        finally:
            pool.shutdown(cancel_futures=True)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 19 else None


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

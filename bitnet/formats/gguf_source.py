"""A model in a GGUF file, as llama.cpp, bitnet.cpp and ik_llama.cpp have them, or as gguf_export.py writes it.

    architecture              what it is                                        activation unless the file tells it
    bitnet                    sub-norms, tied                                   SiLU
    bitnet-b1.58, bitnet-25   sub-norms                                         squared ReLU
    llama                     no sub-norms; rows of q and k interleaved         SiLU

Projections in TQ1_0, TQ2_0 or I2_S are codes, with one scale for the matrix: that of every block (or the tensor), times
that of the tensor `.scale` beside it. So are projections in floats of which each is -s, 0 or s: those of a ternary
model written as t * scale, which ternarizing again would change. Other floats are masters of a ternary model in the
architectures of BitNet, and the weights of a full-precision one in llama. Whether projections in floats are codes is
asked of the first values of each; every one is then held to it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.gguf_blocks import I2_S_GROUPS, as_bf16, block_scales, codes_among, decode, decode_codes
from bitnet.formats.gguf_config import architecture, config_of
from bitnet.formats.gguf_file import Entry, GgufFile
from bitnet.formats.gguf_names import (
    SUB_NORMED,
    gguf_name,
    halved,
    is_projection,
    is_rotated,
    published_name,
    scale_name,
)
from bitnet.formats.gguf_types import BF16, F16, F32, I2_S, TERNARY
from bitnet.formats.source import Codes, Floats, Reading, Stored

Array = np.ndarray[Any, Any]
AS_THE_FILE_SAYS = Reading()
SAMPLE = 8192  # values of each projection that tell whether it is ternary: a multiple of every block


def open_gguf(path: Path, reading: Reading = AS_THE_FILE_SAYS) -> GgufSource:
    """The model in a GGUF file. Raises CheckpointError, and ConfigError for a `reading` that there is not."""
    return GgufSource(GgufFile(path), reading)


class GgufSource:
    """See Source."""

    def __init__(self, file: GgufFile, reading: Reading) -> None:
        if reading.i2s_order not in I2_S_GROUPS:
            raise ConfigError(f"i2s_order must be one of {', '.join(I2_S_GROUPS)}, not {reading.i2s_order!r}")
        for name, known in (("linear", ("bitlinear", "linear")), ("hidden_act", ("silu", "relu2"))):
            if getattr(reading, name) not in (None, *known):
                raise ConfigError(f"{name} must be one of {', '.join(known)}, not {getattr(reading, name)!r}")
        self.file, self.path, self._order = file, file.path, reading.i2s_order
        self._arch = architecture(file.metadata, self.path)
        self._entries = {published_name(name): entry for name, entry in file.tensors.items()}
        if len(self._entries) < len(file.tensors):
            raise CheckpointError(f"{self.path}: two of its tensors are names of one weight")
        self._scales = {name: self._entries.pop(scale_name(name)) for name in list(self._entries)
                        if is_projection(name) and scale_name(name) in self._entries}  # fmt: skip
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        projections = [name for name in self._entries if is_projection(name)]
        coded = bool(projections) and all(self._is_coded(name) for name in projections)
        linear = reading.linear or ("bitlinear" if coded or self._arch in SUB_NORMED else "linear")
        self.is_trainable = linear == "linear" or not coded
        self.ternary = [] if self.is_trainable else projections
        table = self.shapes.get("model.embed_tokens.weight", ())
        if len(table) != 2:
            raise CheckpointError(f"{self.path}: it has no table of embeddings token_embd.weight")
        tied = "lm_head.weight" not in self.shapes
        self.config = config_of(file.metadata, self.path, table[0], tied, linear, reading.hidden_act)

    def about(self) -> dict[str, Any]:
        """See Source."""
        from bitnet.formats.gguf_tokenizer import tokenizer_of

        told = {key: str(value.value) for key, value in self.file.metadata.items()
                if key.startswith("general.") and not value.type_name.startswith("[")}  # fmt: skip
        return {"tokenizer": tokenizer_of(self.file.metadata, self.path), "checkpoint": self.path, "provenance": told,
                "step": None, "trained_seq_len": None}  # fmt: skip

    def read(self, name: str) -> Stored:
        """See Source."""
        entry = self._entries[name]
        try:
            with np.errstate(all="ignore"):  # numbers that are none are the file's, and stay so
                if name in self.ternary:
                    codes, scale = self._codes(name, entry)
                    return Codes(self._rows(name, codes.reshape(entry.shape)), scale)
                return self._floats(name, entry)
        except CheckpointError:
            raise
        except ValueError as error:
            raise self._refusal(entry, f"cannot be read: {error}") from None

    def release(self, name: str) -> None:
        """See Source."""
        self.file.release(self._entries[name])

    def _refusal(self, entry: Entry, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {entry.name} ({entry.type.name}) {what}")

    def _is_coded(self, name: str) -> bool:
        """Whether a projection is, or seems to be, codes with one scale."""
        entry = self._entries[name]
        data = self.file.view(entry)
        if entry.type in TERNARY:
            # A full-precision llama squeezed into ternary blocks has a scale for each; a BitNet must not.
            return self._arch in SUB_NORMED or entry.type is I2_S or _one(block_scales(entry.type, data)) is not None
        return codes_among(entry.type, data[: SAMPLE // entry.type.block * entry.type.bytes]) is not None

    def _codes(self, name: str, entry: Entry) -> tuple[Array, float]:
        data = self.file.view(entry)
        if entry.type in TERNARY:
            codes, scales = decode_codes(entry.type, data, self._order)
            one = _one(scales)
            if one is None:
                raise self._refusal(entry, "has blocks with different scales, so it is no ternary matrix; reading it "
                                           "with linear='linear' takes its values as they are")  # fmt: skip
            if len(scales) > 1:  # where a block's is 0, so are its values, whatever its codes
                codes.reshape(len(scales), -1)[scales == 0] = 0
        else:
            found = codes_among(entry.type, data)
            if found is None:
                raise self._refusal(entry, "has more than one size of values other than 0, where the first ones "
                                           "seemed to be ternary; it is damaged")  # fmt: skip
            codes, one = found
        scale = float(np.float32(one) * np.float32(self._factor(name)))
        if not math.isfinite(scale) or scale < 0:
            raise self._refusal(entry, f"has the scale {scale:g}, which is no positive number")
        if scale == 0:
            codes[:] = 0
        return codes, scale or 1.0

    def _factor(self, name: str) -> float:
        entry = self._scales.get(name)
        if entry is None:
            return 1.0
        if entry.shape != (1,) or entry.type is not F32:
            raise self._refusal(entry, f"has shape {entry.shape}, where one F32 is expected")
        return float(decode(F32, self.file.view(entry))[0])

    def _floats(self, name: str, entry: Entry) -> Floats:
        """In bf16 where they lie, or where that loses nothing; otherwise in f32."""
        data = self.file.view(entry)
        rotated = self._arch == "llama" and is_rotated(name)
        if entry.type is BF16 and not rotated and name not in self._scales:
            return Floats(data, "bf16")
        if entry.type in (F16, F32) and len(entry.shape) == 2 and not self.is_trainable:
            halves = as_bf16(entry.type, data)
            if halves is not None:
                return Floats(halves, "bf16")
        if entry.type in TERNARY:
            codes, scales = decode_codes(entry.type, data, self._order)
            values = (codes.reshape(len(scales), -1) * scales[:, None]).reshape(-1)
        else:
            values = decode(entry.type, data)
        if name in self._scales:
            values = values * np.float32(self._factor(name))
        if rotated:
            return Floats(self._rows(name, values.reshape(entry.shape)))
        return Floats(values)

    def _rows(self, name: str, matrix: Array) -> Array:
        """A matrix with its rows in the order that this package has."""
        if self._arch != "llama" or not is_rotated(name):
            return matrix
        c = self.config
        if matrix.ndim != 2 or matrix.shape[0] % c.head_dim:
            raise CheckpointError(f"{self.path}: {gguf_name(name)} has shape {matrix.shape}, of which the rows are no "
                                  f"multiple of {c.head_dim}, the width of a head")  # fmt: skip
        return halved(matrix, c.head_dim)


def _one(scales: Array) -> float | None:
    """The scale that all blocks share but those of 0; None if there are several."""
    if scales.size == 1:
        return float(scales[0])
    given = scales[scales != 0]
    if not given.size:
        return 0.0
    return float(given[0]) if (given == given[0]).all() else None

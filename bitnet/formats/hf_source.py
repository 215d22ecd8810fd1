"""A Hugging Face folder as a Source: config.json, safetensors, a tokenizer.

What a projection's `weight` is there, in the order it is looked for:

    U8 (ceil(out / 4), in)        packed codes, four rows a byte; `weight_scale` beside it
    floats with a `weight_scale`  codes unpacked, which transformers runs as well
    floats                        masters, or weights of full precision: config.json says which

A packed byte (r, c) holds the codes, plus one, of rows r, r + R, r + 2R, r + 3R from its low bits up, R being the rows
of the packed matrix; rows beyond the last are padding. The scale multiplies under linear_class "autobitlinear"; under
"bitlinear" it divides, and 1 / weight_scale in f32 is what multiplies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bitnet.config import BitNetConfig
from bitnet.errors import BitnetError, CheckpointError
from bitnet.formats import two_bits
from bitnet.formats.hf_config import CONFIG, PROJECTIONS, HfConfig, hf_config, read_json
from bitnet.formats.safetensors_file import SafetensorsFolder
from bitnet.formats.source import Codes, Floats, Reading, Stored
from bitnet.formats.weights import bf16_values, chunks
from bitnet.tokenizer import Tokenizer, load_tokenizer, tokenizer_file

Array = np.ndarray[Any, Any]
FLOATS = ("F32", "F16", "BF16")
SYNONYMS = {".inner_attn_ln.": ".attn_sub_norm.", ".ffn_layernorm.": ".ffn_sub_norm."}
SCALE, BUFFER, INNER_NORM = ".weight_scale", ".rotary_emb.inv_freq", ".rms_norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_hf(folder: Path, reading: Reading | None = None) -> HfSource:
    """The model in a folder of Hugging Face's. Raises CheckpointError with what cannot be read, and why."""
    return HfSource(Path(folder), reading or Reading())


class HfSource:
    """See Source. It is trainable where no layer's codes are stored, but floats alone."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        said = hf_config(read_json(path / CONFIG), path / CONFIG, reading)
        self.tensors = SafetensorsFolder(path)
        self.places, self.scales = self._names()
        if said.config.num_hidden_layers > len(self.places):
            raise self._refusal(f"its {CONFIG} asks for {said.config.num_hidden_layers} layers, but there are only "
                                f"{len(self.places)} tensors")  # fmt: skip
        self.config = self._tied(said.config)
        self.shapes = {name: self.tensors.entries[place].shape for name, place in self.places.items()}
        wanted = projection_shapes(self.config)
        self.ternary = {name for name in self.places if name in self.scales or self._dtype(name) == "U8"}
        self.linear_class = said.linear_class
        self.is_trainable = not self.ternary
        self._check_storage(said, reading, set(wanted))
        for name in self.ternary:
            if self._dtype(name) == "U8":
                self.shapes[name] = self._unpacked_shape(name, wanted[name])
        for name in self.places:
            if self._dtype(name) not in (*FLOATS, "U8"):
                raise self._refusal(f"{name} is {self._dtype(name)}, not one of {', '.join(FLOATS)}")

    def about(self) -> dict[str, Any]:
        """See Source."""
        return {"tokenizer": self._tokenizer(), "checkpoint": self.path,
                "provenance": {"imported_from": self.path.resolve().name}, "step": None,
                "trained_seq_len": None}  # fmt: skip

    def read(self, name: str) -> Stored:
        """See Source."""
        dtype, array = self._dtype(name), self.tensors.array(self.places[name])
        if name in self.ternary:
            codes = self._unpacked(name, array) if dtype == "U8" else self._whole_codes(name, _values(array, dtype))
            return Codes(codes, self._scale(name))
        if dtype == "BF16":
            return Floats(array, "bf16")
        return Floats(array if dtype == "F32" else array.astype(np.float32))

    def release(self, name: str) -> None:
        """See Source."""
        self.tensors.release(self.places[name])

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _dtype(self, name: str) -> str:
        return self.tensors.entries[self.places[name]].dtype

    # ---- names ----

    def _names(self) -> tuple[dict[str, str], dict[str, str]]:
        """The place of each weight by its published name, and of the scale beside it."""
        places: dict[str, str] = {}
        scales: dict[str, str] = {}
        for place in self.tensors.entries:
            if place.endswith(BUFFER):
                continue
            if place.endswith(INNER_NORM):
                self._check_inner_norm(place)
                continue
            name = place
            for theirs, ours in SYNONYMS.items():
                name = name.replace(theirs, ours)
            if name.endswith(SCALE):
                name = name.removesuffix(SCALE) + ".weight"
                scales[name] = place
                continue
            if name in places:
                raise self._refusal(f"{place} and {places[name]} are two names of one weight")
            places[name] = place
        lone = sorted(scales.keys() - places.keys())
        if lone:
            raise self._refusal(f"{scales[lone[0]]} is the scale of a weight that is not there")
        return places, scales

    def _check_inner_norm(self, place: str) -> None:
        """A norm inside a projection (use_rms_norm) has no gain here; transformers has one, 1 unless trained."""
        dtype = self.tensors.entries[place].dtype
        if dtype not in FLOATS or (_values(self.tensors.array(place), dtype) != 1).any():
            raise self._refusal(f"{place} is not 1 everywhere: norms inside projections have no gain here")

    def _tied(self, config: BitNetConfig) -> BitNetConfig:
        """As transformers has it: of two tied matrices one is enough, and two that differ are not tied."""
        if not config.tie_word_embeddings or HEAD not in self.places:
            return config
        if EMBEDDING not in self.places:
            self.places[EMBEDDING] = self.places.pop(HEAD)
            return config
        table, head = (self.tensors.entries[self.places[name]] for name in (EMBEDDING, HEAD))
        if (table.dtype, table.shape) == (head.dtype, head.shape):
            pairs = (chunks(self.tensors.array(entry.name).reshape(-1)) for entry in (table, head))
            if all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True)):
                del self.places[HEAD]
                return config
        return config.replace(tie_word_embeddings=False)

    # ---- ternary layers ----

    def _check_storage(self, said: HfConfig, reading: Reading, projections: set[str]) -> None:
        """That it is the projections that are ternary, all of them or none, and that config.json says how."""
        is_ternary = self.config.linear == "bitlinear"
        if not self.ternary:
            if is_ternary and not said.is_online:
                raise self._refusal(f"its {CONFIG} says that its codes are packed (quantization_mode offline), but its "
                                    "weights are floats without scales; read as masters they may be what was meant, "
                                    "which linear=bitlinear asks for")  # fmt: skip
            return
        first = min(self.ternary)
        strange = sorted(self.ternary - projections)
        if strange:
            raise self._refusal(
                f"{strange[0]} is stored as ternary codes, but is none of the projections of its layers"
            )
        if reading.linear == "linear":
            raise self._refusal(f"{first} is stored as ternary codes, which cannot be read as linear=linear")
        if not is_ternary or self.linear_class is None:
            raise self._refusal(f"{first} is stored as ternary codes, but {CONFIG} has no quantization_config to say "
                                "whether its weight_scale multiplies or divides")  # fmt: skip
        floats = sorted((projections & self.places.keys()) - self.ternary)
        if floats:
            raise self._refusal(f"{floats[0]} is stored as {self._dtype(floats[0])}, but {first} as ternary codes: a "
                                "model of which some projections are ternary is not computed here")  # fmt: skip
        bare = sorted(self.ternary - self.scales.keys())
        if bare:
            raise self._refusal(f"{bare[0]} is packed, but there is no weight_scale beside it")

    def _unpacked_shape(self, name: str, wanted: tuple[int, int]) -> tuple[int, ...]:
        rows, cols = wanted
        packed = self.shapes[name]
        if packed != (-(-rows // 4), cols):
            raise self._refusal(f"{name} has the packed shape {packed}, but {(-(-rows // 4), cols)} for {wanted}")
        return wanted

    def _unpacked(self, name: str, packed: Array) -> Array:
        """uint8 (ceil(out / 4), in) -> int8 codes (out, in)."""
        try:
            return unpack_rows(packed, self.shapes[name][0])
        except ValueError as error:
            raise self._refusal(f"{name} cannot be unpacked: {error}") from None

    def _whole_codes(self, name: str, values: Array) -> Array:
        """Codes that are stored as floats."""
        codes = np.empty(values.shape, np.int8)
        for part, target in zip(chunks(values.reshape(-1)), chunks(codes.reshape(-1)), strict=True):
            if not np.isin(part, (-1, 0, 1)).all():
                raise self._refusal(f"{name} has a weight_scale beside it, but other values than -1, 0 and 1")
            target[:] = part
        return codes

    def _scale(self, name: str) -> float:
        """What multiplies the codes: a positive f32."""
        place = self.scales[name]
        entry = self.tensors.entries[place]
        if entry.dtype not in FLOATS or entry.shape not in ((1,), ()):
            raise self._refusal(f"{place} is {entry.dtype} of shape {entry.shape}, not one number")
        stored = _values(self.tensors.array(place), entry.dtype).reshape(1)
        with np.errstate(all="ignore"):
            scale = float((np.float32(1) / stored if self.linear_class == "bitlinear" else stored)[0])
        if not 0 < scale < float("inf"):
            raise self._refusal(f"{place} is {float(stored[0])!r}, which is no scale")
        return scale

    def _tokenizer(self) -> Tokenizer | None:
        if tokenizer_file(self.path) is None:
            return None
        try:
            return load_tokenizer(self.path)
        except BitnetError as error:
            raise self._refusal(f"its tokenizer cannot be read: {error}") from None


def projection_shapes(config: BitNetConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every projection by the name of its weight."""
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
    sizes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (inner, hidden), (inner, hidden),
             (hidden, inner)]  # fmt: skip
    return {
        f"model.layers.{i}.{name}.weight": size
        for i in range(config.num_hidden_layers)
        for name, size in zip(PROJECTIONS, sizes, strict=True)
    }


def pack_rows(codes: Array) -> Array:
    """int8 codes (out, in) -> uint8 (ceil(out / 4), in); rows beyond the last hold the byte of -1, as theirs do."""
    rows, cols = codes.shape
    quarter = -(-rows // 4)
    if rows % 4:
        codes = np.concatenate([codes, np.full((4 * quarter - rows, cols), -1, np.int8)])
    return two_bits.pack(codes, quarter * cols, high_first=False).reshape(quarter, cols)


def unpack_rows(packed: Array, rows: int) -> Array:
    """uint8 (ceil(rows / 4), in) -> int8 codes (rows, in). ValueError for a code 3."""
    return two_bits.unpack(packed, packed.size, high_first=False).reshape(-1, packed.shape[1])[:rows]


def _values(array: Array, dtype: str) -> Array:
    """A tensor of floats as f32."""
    return bf16_values(array) if dtype == "BF16" else array.astype(np.float32, copy=False)

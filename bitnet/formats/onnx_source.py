"""The weights of an ONNX file that onnx_export wrote, read where they lie; of another's, no graph says what they mean.

What the file computes is not looked at: config and weights are all that is read. Nothing that it says is believed
before it is compared with the size of the file: dimensions with bytes, places with the end, names with each other.
Every refusal is a CheckpointError that names the file. The package onnx is not needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.errors import BitnetError, CheckpointError
from bitnet.formats.hf_config import config_from
from bitnet.formats.mapped import map_file, release
from bitnet.formats.onnx_export import ALIGN, CONFIG_KEY, DATA_SUFFIX, MODEL_FILE
from bitnet.formats.onnx_graph import BFLOAT16, BITS, CONSTANT, FLOAT, INT2, INT8
from bitnet.formats.onnx_model import SCALE, turned, unpack_int2
from bitnet.formats.protobuf import Value, fields, numbers
from bitnet.formats.source import Codes, Floats, Stored
from bitnet.tokenizer import Tokenizer, load_tokenizer, tokenizer_file

Array = np.ndarray[Any, Any]
HIGHEST = 1 << 40  # of a dimension, an offset or a length
# Numbers of the fields that are read, by message.
GRAPH, METADATA, INITIALIZER, SPARSE = 7, 14, 5, 15
DIMS, DTYPE, NAME, RAW_DATA, EXTERNAL_DATA, LOCATION = 1, 2, 8, 9, 13, 14
KEY, VALUE = 1, 2
TENSOR_FIELDS = {DIMS, DTYPE, NAME, RAW_DATA, EXTERNAL_DATA, LOCATION}


@dataclass(frozen=True)
class Tensor:
    """An initializer: its type as a number of onnx_graph, its shape, and where its bytes lie."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    raw: memoryview | None  # None: `length` bytes of the data file at `offset`
    offset: int = 0
    length: int = 0


def open_onnx(path: str | Path) -> OnnxSource:
    """The model in NAME.onnx, or in model.onnx of a folder. Raises CheckpointError."""
    path = Path(path)
    return OnnxSource(path / MODEL_FILE if path.is_dir() else path)


class OnnxSource:
    """An exported model as a Source."""

    is_trainable = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model, self._data = map_file(path, 1, "ONNX"), _Data(path)
        self._metadata: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        try:
            for tensor in self._read_model(memoryview(self._model)):
                if tensor.name in self._tensors:
                    raise ValueError(f"it has two initializers {tensor.name}")
                self._tensors[tensor.name] = tensor
            self._check_places()
            if CONFIG_KEY not in self._metadata:
                raise ValueError(f"it has no metadata {CONFIG_KEY}: only ONNX files that bitnet wrote can be read")
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        try:
            values = json.loads(self._metadata[CONFIG_KEY])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its {CONFIG_KEY} is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: its {CONFIG_KEY} is no object")
        self.config = config_from(values, path)
        positions, head_dim = self.config.max_position_embeddings, self.config.head_dim
        if positions * head_dim * 4 > len(self._model):  # its constants hold the tables of rope
            raise CheckpointError(f"{path}: it is too small to have max_position_embeddings {positions}")
        if self.config.tie_word_embeddings and self.config.quantize_head:
            for name in ("lm_head.weight", "lm_head.weight" + SCALE):  # the codes of the embedding
                self._tensors.pop(name, None)
        self.ternary = [name for name, tensor in self._tensors.items() if tensor.dtype in (INT8, INT2)]
        self._scales = {name: self._scale(name) for name in self.ternary}
        self.shapes = {
            name: tensor.shape[:: -1 if name in self._scales else 1] for name, tensor in self._tensors.items()
        }

    def about(self) -> dict[str, Any]:
        """See Source; the tokenizer is that of the folder, None if the file has been given another name."""
        told = {key: text for key, text in self._metadata.items() if key != CONFIG_KEY}
        return {"tokenizer": self._tokenizer(), "checkpoint": self.path, "provenance": told,
                "step": None, "trained_seq_len": None}  # fmt: skip

    def _tokenizer(self) -> Tokenizer | None:
        folder = self.path.parent
        if self.path.name != MODEL_FILE or tokenizer_file(folder) is None:
            return None
        try:
            return load_tokenizer(folder)
        except BitnetError as error:
            raise CheckpointError(f"{self.path} has a tokenizer beside it that cannot be read: {error}") from None

    def read(self, name: str) -> Stored:
        """See Source."""
        tensor = self._tensors[name]
        data = self._bytes(tensor)
        if tensor.dtype not in (INT8, INT2):
            return Floats(data, "f32" if tensor.dtype == FLOAT else "bf16")
        codes = data.view(np.int8) if tensor.dtype == INT8 else unpack_int2(data, math.prod(tensor.shape))
        if codes.min() < -1 or codes.max() > 1:
            raise CheckpointError(f"{self.path}: {name} has a code that is not -1, 0 or 1")
        return Codes(turned(codes.reshape(tensor.shape)), self._scales[name])

    def release(self, name: str) -> None:
        """See Source; what was read is a copy."""

    def _read_model(self, message: memoryview) -> Iterator[Tensor]:
        """The initializers that are weights; metadata goes to self."""
        graphs = 0
        for number, value in fields(message):
            if number == METADATA:
                key, text = _entry(value)
                if key in self._metadata:
                    raise ValueError(f"it has the metadata {key!r} twice")
                self._metadata[key] = text
            elif number == GRAPH:
                graphs += 1
                if graphs > 1:
                    raise ValueError("it has two graphs")
                for inner, part in fields(_bytes(value)):
                    if inner == SPARSE:
                        raise ValueError("it has a sparse initializer")
                    if inner == INITIALIZER:
                        tensor = self._read_tensor(_bytes(part))
                        if tensor is not None:
                            yield tensor

    def _read_tensor(self, message: memoryview) -> Tensor | None:
        """An initializer, each field checked by itself; None for a constant."""
        dims: list[int] = []
        entries: list[Value] = []
        found: dict[int, Value] = {}
        other: set[int] = set()
        for number, value in fields(message):
            if number == DIMS:
                dims += numbers(value)
            elif number == EXTERNAL_DATA:
                entries.append(value)
            elif number in TENSOR_FIELDS:
                if number in found:
                    raise ValueError(f"an initializer has its field {number} twice")
                found[number] = value
            else:
                other.add(number)
        name = _text(found.get(NAME, 0))
        if name.startswith(CONSTANT):
            return None
        if other:
            raise ValueError(f"{name} has the unknown field {min(other)}")
        dtype = found.get(DTYPE, 0)
        if dtype not in (FLOAT, INT8, BFLOAT16, INT2) or not isinstance(dtype, int):
            raise ValueError(f"{name} has the unknown type {dtype if isinstance(dtype, int) else 'of bytes'}")
        if len(dims) > 2 or not all(0 < dim < HIGHEST for dim in dims):
            raise ValueError(f"{name} has no shape of a matrix, but {dims[:4]}")
        needed = -(-math.prod(dims) * BITS[dtype] // 8)
        if found.get(LOCATION, 0) == 0:
            raw = _bytes(found.get(RAW_DATA, 0))
            if len(raw) != needed or entries:
                raise ValueError(f"{name} has {len(raw)} bytes, but {needed} for its shape {dims}")
            return Tensor(name, dtype, tuple(dims), raw)
        offset, length = self._place(name, entries)
        if length != needed or RAW_DATA in found:
            raise ValueError(f"{name} has {length} bytes of external data, but {needed} for its shape {dims}")
        return Tensor(name, dtype, tuple(dims), None, offset, length)

    def _place(self, name: str, entries: list[Value]) -> tuple[int, int]:
        """Offset and length of external data."""
        said: dict[str, str] = {}
        for entry in entries:
            key, text = _entry(entry)
            if key in said or key not in ("location", "offset", "length"):
                raise ValueError(f"{name} has the external data {key!r} twice, or has no use for it")
            said[key] = text
        if said.get("location") != self._data.path.name:
            raise ValueError(f"{name} is in {said.get('location')!r}, not in {self._data.path.name}")
        places = [said.get(key, "") for key in ("offset", "length")]
        if not all(text.isascii() and text.isdecimal() and len(text) < 13 for text in places):
            raise ValueError(f"{name} has its external data at no place, but {places}")
        return int(places[0]), int(places[1])

    def _check_places(self) -> None:
        """External data lie at multiples of ALIGN, apart from each other, and end with their file."""
        end = 0
        placed = [tensor for tensor in self._tensors.values() if tensor.raw is None]
        for tensor in sorted(placed, key=lambda tensor: tensor.offset):
            if tensor.offset < end or tensor.offset % ALIGN:
                raise ValueError(f"{tensor.name} begins at {tensor.offset}, which is no multiple of {ALIGN} from {end}")
            end = tensor.offset + tensor.length
        if placed and end != self._data.size:
            raise ValueError(f"its last external data end at {end}, {self._data.path.name} at {self._data.size}")

    def _scale(self, name: str) -> float:
        """Takes the scale of a ternary matrix out of the tensors."""
        tensor = self._tensors.pop(name + SCALE, None)
        if tensor is None or (tensor.dtype, tensor.shape) != (FLOAT, ()):
            raise CheckpointError(f"{self.path}: {name} has no scale")
        if len(self._tensors[name].shape) != 2:
            raise CheckpointError(f"{self.path}: {name} is no matrix")
        scale = float(self._bytes(tensor).view(np.float32)[0])
        if not 0 < scale < math.inf:
            raise CheckpointError(f"{self.path}: {name} has the scale {scale}")
        return scale

    def _bytes(self, tensor: Tensor) -> Array:
        """A copy: initializers inside a message lie at any address."""
        if tensor.raw is None:
            return self._data.copy(tensor.offset, tensor.length)
        shared = np.frombuffer(tensor.raw, np.uint8)
        data = np.array(shared)
        # The pages that are this tensor's alone have no further use.
        start = shared.ctypes.data - np.frombuffer(self._model, np.uint8).ctypes.data
        release(self._model, start, start + shared.size)
        return data


class _Data:
    """NAME.onnx.data, read a piece at a time."""

    def __init__(self, model: Path) -> None:
        self.path = model.with_name(model.name + DATA_SUFFIX)

    @property
    def size(self) -> int:
        """Bytes of the file. ValueError if there is none."""
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise ValueError(f"{self.path.name} cannot be read: {error.strerror or error}") from None

    def copy(self, offset: int, length: int) -> Array:
        """Bytes of the file."""
        out = np.empty(length, np.uint8)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(offset)
                at = 0
                while at < length:
                    count = file.readinto(out[at:].data)
                    if not count:
                        raise CheckpointError(f"{self.path} is cut off")
                    at += count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from None
        return out


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it is no ONNX file: a message or its bytes are missing")
    return value


def _text(value: Value) -> str:
    text = str(_bytes(value), "utf-8")
    if not text:
        raise ValueError("a name is empty")
    return text


def _entry(value: Value) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    found: dict[int, str] = {}
    for number, part in fields(_bytes(value)):
        if number not in (KEY, VALUE) or number in found:
            raise ValueError("an entry has something else than one key and one value")
        found[number] = str(_bytes(part), "utf-8")
    return found.get(KEY, ""), found.get(VALUE, "")

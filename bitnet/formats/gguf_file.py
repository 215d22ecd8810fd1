"""The GGUF container: metadata with types, and tensors of ggml's types, in one file that is mapped, not read.

    "GGUF"       4 bytes
    version      u32: 3, or 2, which differs in nothing here; all numbers are little-endian
    tensors      u64, how many
    values       u64, how many
    value        key, type (u32), then a number, a string, or an array: type of elements (u32), count (u64), elements
    tensor       name, dimensions (u32), sizes (u64 each, that of a row first), type (u32), offset (u64)
                 zeros up to a multiple of general.alignment, else of 32: the data begins, where offsets count from
                 tensors, each at a multiple of the alignment

    string       length (u64), UTF-8

There are no checksums. The reader trusts no number: every count, length and offset is compared with the bytes that are
there before anything is made of it, and sizes are multiplied without wrapping. Every refusal is a CheckpointError that
names the file and the place.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.durable import whole_file
from bitnet.errors import CheckpointError
from bitnet.formats.gguf_types import OTHERS, TYPES, TensorType
from bitnet.formats.mapped import map_file, release
from bitnet.formats.source import Memory, Progress

MAGIC = b"GGUF"
VERSION = 3
READS = (2, 3)
PREFIX = struct.Struct("<4sIQQ")
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
ALIGN = 32
ALIGN_MAX = 1 << 20
HEADER_MAX = 64 << 20  # eight times the header of a model with 128256 tokens and 280147 merges
NESTING = 4  # arrays in arrays: no key has any
NAME_MAX, KEY_MAX = 64, 65535  # of ggml, and of the specification
STRING, ARRAY = 8, 9
KINDS = {0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 10: "u64", 11: "i64",
         12: "f64"}  # fmt: skip
IDS = {name: id for id, name in KINDS.items()} | {"str": STRING}
FORMATS = {"u8": "<u1", "i8": "<i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4", "f32": "<f4",
           "bool": "<u1", "u64": "<u8", "i64": "<i8", "f64": "<f8"}  # fmt: skip
DTYPES = {name: np.dtype(code) for name, code in FORMATS.items()}


@dataclass(frozen=True)
class Value:
    """A typed value of the metadata.

    type_name: u8 i8 u16 i16 u32 i32 u64 i64 (value: int), f32 f64 (float), bool, str; an array is the name of its
    elements' type in brackets, "[str]" or "[i32]", and its value a list of them; arrays nest: "[[u8]]".
    """

    type_name: str
    value: Any


@dataclass(frozen=True)
class Entry:
    """A tensor in the file. shape: rows first, as NumPy has it; offset: in the file."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def bytes(self) -> int:
        """How many bytes it takes, without what fills it up to the alignment."""
        return self.type.bytes_of(self.shape)

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.bytes


# ---- reading --------------------------------------------------------------------------------------------------------


class GgufFile:
    """An open file: all of its metadata is read, and its tensors' types, sizes and places are checked.

    path, version, metadata (by key), tensors (by name, in the order of the file), alignment.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = map_file(self.path, PREFIX.size, "GGUF")
        magic, version, tensors, values = PREFIX.unpack_from(self._map)
        if magic != MAGIC:
            raise self._refusal(f"it is no GGUF file: it begins with {magic!r}")
        if version not in READS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in READS:
                raise self._refusal("it is a big-endian GGUF file; only little-endian ones are read")
            raise self._refusal(f"it is a GGUF file of version {version}; this program reads 2 and 3")
        self.version: int = version
        header = _Header(self.path, self._map, PREFIX.size)
        header.check_count(values, 4 + U64.size + 1, "it has {} values")
        self.metadata: dict[str, Value] = {}
        for _ in range(values):
            key = header.name("a key", KEY_MAX)
            if key in self.metadata:
                raise self._refusal(f"it has the key {key!r} twice")
            self.metadata[key] = header.value(header.u32(), key, 0)
        header.check_count(tensors, 2 * U64.size + 2 * U32.size + U64.size, "it has {} tensors")
        told = [header.tensor() for _ in range(tensors)]
        self.alignment = self._alignment()
        begin = -(-header.at // self.alignment) * self.alignment
        self.tensors: dict[str, Entry] = {}
        for name, shape, type_id, offset in told:
            if name in self.tensors:
                raise self._refusal(f"it has two tensors {name}")
            self.tensors[name] = self._entry(name, shape, type_id, offset, begin)
        self._check_layout()

    def view(self, entry: Entry) -> memoryview:
        """The bytes of a tensor as they lie in the file: shared and read-only."""
        return memoryview(self._map)[entry.offset : entry.end]

    def release(self, entry: Entry) -> None:
        """Takes the tensor's pages out of this process's memory; who looks at them again has them again."""
        release(self._map, entry.offset, entry.end)

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _alignment(self) -> int:
        given = self.metadata.get("general.alignment", Value("u32", ALIGN))
        size = given.value
        # Eight, which the specification asks for, lets every number be read where it lies.
        if given.type_name != "u32" or not 8 <= size <= ALIGN_MAX or size & (size - 1):
            raise self._refusal(f"its general.alignment is {size!r} ({given.type_name}), which is no power of two from "
                                f"8 to {ALIGN_MAX} (u32)")  # fmt: skip
        return int(size)

    def _entry(self, name: str, shape: tuple[int, ...], type_id: int, offset: int, begin: int) -> Entry:
        """A tensor as it is told, each number checked by itself and against the file's size."""
        if type_id not in TYPES:
            what = f"the type {OTHERS[type_id]}, which is not read" if type_id in OTHERS else f"unknown type {type_id}"
            known = ", ".join(known.name for known in TYPES.values())
            raise self._refusal(f"{name} has {what}; known are {known}")
        kind = TYPES[type_id]
        unit = prod(shape) if kind.tail else shape[-1]  # what blocks may not cross
        if min(shape) < 1 or unit % kind.block:
            raise self._refusal(f"{name} has shape {shape}, which {kind.name} in blocks of {kind.block} cannot have")
        if offset % self.alignment:
            raise self._refusal(f"{name} has the offset {offset}, which is no multiple of {self.alignment}")
        entry = Entry(name, shape, kind, begin + offset)
        if entry.end > len(self._map):
            raise self._refusal(f"it is cut off: {name} ends at {entry.end}, the file at {len(self._map)}")
        return entry

    def _check_layout(self) -> None:
        ordered = sorted(self.tensors.values(), key=lambda entry: entry.offset)
        for before, after in pairwise(ordered):
            if after.offset < before.end:
                raise self._refusal(f"{after.name} begins at {after.offset}, inside {before.name}")


class _Header:
    """Reads what comes before the data, from `at` on; every refusal names the file."""

    def __init__(self, path: Path, data: mmap.mmap, at: int) -> None:
        self.path, self.data, self.at = path, data, at
        self.size = min(len(data), HEADER_MAX)

    def refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def take(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin, which are there."""
        at, end = self.at, self.at + count
        if end > self.size:
            limit = "its header may have" if self.size < len(self.data) else "the file has"
            raise self.refusal(f"{what} at {at} needs {count} bytes, but {limit} {self.size}")
        self.at = end
        return at

    def check_count(self, count: int, least: int, what: str) -> None:
        """Before anything is counted up to: `count` things of at least `least` bytes must fit."""
        if count * least > self.size - self.at:
            raise self.refusal(
                f"{what.format(count)}, for which the {self.size - self.at} bytes that follow are too few"
            )

    def u32(self) -> int:
        return int(U32.unpack_from(self.data, self.take(U32.size, "a number"))[0])

    def u64(self) -> int:
        return int(U64.unpack_from(self.data, self.take(U64.size, "a number"))[0])

    def strings(self, count: int, what: str) -> list[str]:
        """The inner loop of reading vocabularies, so it stands by itself."""
        data, size, at, length_of = self.data, self.size, self.at, U64.unpack_from
        found: list[str] = []
        begin = at
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + length_of(data, at)[0]
                if at > size:
                    break
                found.append(data[begin:at].decode())
        except UnicodeDecodeError:
            raise self.refusal(f"{what}: {data[begin:at][:40]!r} is no UTF-8") from None
        except struct.error:
            begin = at = size + 1
        if at > size:
            raise self.refusal(f"{what}: string {len(found)} of {count} is longer than what follows")
        self.at = at
        return found

    def name(self, what: str, most: int) -> str:
        at = self.at
        [found] = self.strings(1, f"{what} at {at}")
        if not 1 <= self.at - at - U64.size <= most or not found.isprintable():
            raise self.refusal(f"{what} at {at} is {found[:80]!r}, not 1 to {most} printable bytes")
        return found

    def value(self, type_id: int, key: str, depth: int) -> Value:
        if type_id == STRING:
            return Value("str", self.strings(1, key)[0])
        if type_id in KINDS:
            kind = KINDS[type_id]
            return Value(kind, self.numbers(kind, 1, key)[0])
        if type_id == ARRAY:
            inner, count = self.u32(), self.u64()
            name, found = self.array(inner, count, key, depth + 1)
            return Value(f"[{name}]", found)
        raise self.refusal(f"{key} has the unknown type {type_id}")

    def array(self, type_id: int, count: int, key: str, depth: int) -> tuple[str, list[Any]]:
        """Name of the elements' type, and the elements."""
        if depth > NESTING:
            raise self.refusal(f"{key} has arrays in arrays, more than {NESTING} deep")
        if type_id in KINDS:
            return KINDS[type_id], self.numbers(KINDS[type_id], count, key)
        if type_id == STRING:
            self.check_count(count, U64.size, f"{key} has {{}} strings")
            return "str", self.strings(count, key)
        if type_id != ARRAY:
            raise self.refusal(f"{key} has elements of the unknown type {type_id}")
        self.check_count(count, U32.size + U64.size, f"{key} has {{}} arrays")
        rows = [self.array(self.u32(), self.u64(), key, depth + 1) for _ in range(count)]
        names = {name for name, _ in rows} or {"u8"}
        if len(names) > 1:
            raise self.refusal(f"{key} has arrays of {' and of '.join(sorted(names))} in one array")
        return f"[{names.pop()}]", [row for _, row in rows]

    def numbers(self, kind: str, count: int, key: str) -> list[Any]:
        dtype = DTYPES[kind]
        at = self.take(count * dtype.itemsize, f"{key} ({count} of {kind})")
        array = np.frombuffer(self.data, dtype, count, at)
        if kind != "bool":
            return array.tolist()
        if (array > 1).any():
            raise self.refusal(f"{key} is {array.max()}, which is no bool")
        return array.astype(bool).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (rows first), type and offset, as they are told."""
        name = self.name("the name of a tensor", NAME_MAX)
        dimensions = self.u32()
        if not 1 <= dimensions <= 4:
            raise self.refusal(f"{name} has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self.u64() for _ in range(dimensions))[::-1]
        return name, shape, self.u32(), self.u64()


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A tensor to be: `make` is called once, when its turn has come, and gives the bytes of its type and shape."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    make: Callable[[], Memory]


def write(
    path: str | Path,
    metadata: Mapping[str, Value],
    parts: Sequence[Part],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a file of version 3 that is either complete or not there; one tensor at a time is in memory.

    force: replace a file that exists. progress: wraps the names of the tensors, as tqdm does. Raises CheckpointError (a
    full disk, a value that its type cannot hold), leaving no trace.
    """
    head = [PREFIX.pack(MAGIC, VERSION, len(parts), len(metadata))]
    for key, value in metadata.items():
        try:
            head += [_string(key), *_typed(value)]
        except (AttributeError, OverflowError, struct.error, KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: {key} cannot be {str(value.value)[:40]} ({value.type_name})") from None
    offset = 0
    for part in parts:
        head += [_string(part.name), U32.pack(len(part.shape)), *(U64.pack(size) for size in reversed(part.shape)),
                 U32.pack(part.type.id), U64.pack(offset)]  # fmt: skip
        offset += _aligned(part.type.bytes_of(part.shape))
    names = iter((progress or iter)([part.name for part in parts]))
    with whole_file(Path(path), force) as file:
        begin = b"".join(head)
        file.write(begin.ljust(_aligned(len(begin)), b"\0"))
        for part in parts:
            made: Any = part.make()
            data = memoryview(made).cast("B")
            if data.nbytes != part.type.bytes_of(part.shape):
                raise CheckpointError(f"{path}: {part.name} was made of {data.nbytes} bytes, not "
                                      f"{part.type.bytes_of(part.shape)}")  # fmt: skip
            file.write(data)
            file.write(bytes(_aligned(data.nbytes) - data.nbytes))
            del data, made  # before the next is made
            next(names, None)
        for _ in names:  # lets a progress bar end
            pass


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _string(text: str) -> bytes:
    data = text.encode()
    return U64.pack(len(data)) + data


def _typed(value: Value) -> list[bytes]:
    """Type and content."""
    if not value.type_name.startswith("["):
        return [U32.pack(IDS[value.type_name]), *_contents(value.type_name, [value.value])]
    return [U32.pack(ARRAY), *_array(value.type_name, value.value)]


def _array(type_name: str, values: Sequence[Any]) -> list[bytes]:
    inner = type_name[1:-1]
    start = U32.pack(ARRAY if inner.startswith("[") else IDS[inner]) + U64.pack(len(values))
    return [start, *_contents(inner, values)]


def _contents(type_name: str, values: Sequence[Any]) -> list[bytes]:
    if type_name.startswith("["):
        return [piece for value in values for piece in _array(type_name, value)]
    if type_name == "str":
        return [_string(text) for text in values]
    if type_name[0] in "ui" and not all(isinstance(value, int | np.integer) for value in values):
        raise TypeError(type_name)
    return [np.array(values, bool if type_name == "bool" else DTYPES[type_name]).tobytes()]

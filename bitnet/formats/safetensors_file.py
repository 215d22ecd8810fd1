"""The `.safetensors` file, or several with an index: tensors by name, mapped, not read; and the writer of them.

    0  8  length N of the header, at most 100 000 000                                       u64, little-endian
    8  N  header: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...}, and "__metadata__" {text: text};
          spaces may follow it
          the tensors, row by row, little-endian; offsets count from here; no holes, no overlaps, the last ends the file

Several files: `model.safetensors.index.json` says in its "weight_map" which file has which tensor.

The format says nothing of alignment, so a tensor whose place does not fit its numbers is copied. No size is believed
before it is compared with that of the file. Every refusal is a CheckpointError that names file and tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet.errors import CheckpointError
from bitnet.formats.mapped import is_size, map_file, release, strict_json

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from bitnet.formats.source import Progress

Array = np.ndarray[Any, Any]
LENGTH = struct.Struct("<Q")
HEADER_MAX = 100_000_000
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# How NumPy holds each; it has no bf16, whose bits are a u16.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "BOOL": "?"}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file, and how to read it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


# ---- reading --------------------------------------------------------------------------------------------------------


class SafetensorsFile:
    """One open file: its header is checked, nothing else is read. path, entries (by name), metadata."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = map_file(self.path, LENGTH.size, "safetensors")
        header, begin = self._read_header()
        self.metadata = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or any(not isinstance(value, str) for value in self.metadata.values()):
            raise self._refusal("its __metadata__ is no object of texts")
        self.entries = {name: self._entry(name, fields, begin) for name, fields in header.items()}
        self._check_layout(begin)

    def array(self, name: str) -> Array:
        """A tensor, as it lies in the file and read-only where it is aligned; BF16 as uint16.

        CheckpointError for a file that was written to since it was opened.
        """
        if self._map.has_changed:
            raise self._refusal(f"it changed while it was read; {name} may not be what its header says")
        entry = self.entries[name]
        dtype = np.dtype(DTYPES[entry.dtype])
        count = (entry.end - entry.begin) // dtype.itemsize
        if not count:
            return np.zeros(entry.shape, dtype)
        array = np.frombuffer(self._map, dtype, count, entry.begin).reshape(entry.shape)
        return array if array.flags.aligned else array.copy()

    def release(self, name: str) -> None:
        """Takes the tensor's pages out of this process's memory; who looks at them again has them again."""
        release(self._map, self.entries[name].begin, self.entries[name].end)

    def arrays(self) -> Mapping[str, Array]:
        """All tensors by name; the pages of the one given before leave this process's memory when the next is given."""
        return _OneByOne(self)

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """The header, and the offset of its end."""
        rest = len(self._map) - LENGTH.size
        (length,) = LENGTH.unpack_from(self._map)
        if length > HEADER_MAX or length > rest:
            raise self._refusal(f"its header should have {length} bytes, but {rest} follow and {HEADER_MAX} are read")
        text = self._map[LENGTH.size : LENGTH.size + length]
        if not text.startswith(b"{"):
            raise self._refusal(f"its header begins with {text[:8]!r}, not with a brace")
        try:
            header = strict_json(text)
        except (ValueError, RecursionError) as error:
            raise self._refusal(f"its header is no JSON: {error}") from None
        return header, LENGTH.size + length

    def _entry(self, name: str, fields: Any, start: int) -> Entry:
        """A tensor of the header, each of its fields checked by itself."""
        if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._refusal(f"{name} has not just dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._refusal(f"{name} has the dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > 8 or not all(is_size(d) and d < 2**63 for d in shape):
            raise self._refusal(f"{name} has no shape of at most 8 sizes, but {str(shape)[:80]}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(x) and x < 2**63 for x in offsets):
            raise self._refusal(f"{name} has no two offsets, but {str(offsets)[:80]}")
        begin, end = offsets
        needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if end - begin != needed:
            raise self._refusal(f"{name} has {end - begin} bytes, but {needed} for {dtype} of shape {shape}")
        return Entry(name, dtype, tuple(shape), start + begin, start + end)

    def _check_layout(self, start: int) -> None:
        """In the order of their offsets, each tensor begins where the one before ends, and the last ends the file."""
        end, size = start, len(self._map)
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.begin, entry.end)):
            if entry.begin != end:
                raise self._refusal(f"{entry.name} begins at {entry.begin}, but the tensor before it ends at {end}")
            if entry.end > size:
                raise self._refusal(f"it is cut off: {entry.name} ends at {entry.end}, the file at {size}")
            end = entry.end
        if end != size:
            raise self._refusal(f"its last tensor ends at {end}, the file at {size}")


class _OneByOne(Mapping[str, Array]):
    """See SafetensorsFile.arrays."""

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file
        self._given: str | None = None

    def __getitem__(self, name: str) -> Array:
        array = self._file.array(name)
        if self._given is not None:
            self._file.release(self._given)
        self._given = name
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.entries)

    def __len__(self) -> int:
        return len(self._file.entries)


class SafetensorsFolder:
    """All tensors of a model's folder, in one file or several. path, files and entries (by name of the tensor)."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        if (self.path / WEIGHTS).is_file():
            file = SafetensorsFile(self.path / WEIGHTS)
            self.files = dict.fromkeys(file.entries, file)
        elif (self.path / INDEX).is_file():
            self.files = self._indexed(self.path / INDEX)
        else:
            raise CheckpointError(f"{self.path} has no {WEIGHTS} and no {INDEX}{self._others()}")
        self.entries = {name: file.entries[name] for name, file in self.files.items()}

    def array(self, name: str) -> Array:
        """See SafetensorsFile."""
        return self.files[name].array(name)

    def release(self, name: str) -> None:
        """See SafetensorsFile."""
        self.files[name].release(name)

    def _others(self) -> str:
        found = sorted(path.name for path in self.path.glob("pytorch_model*.bin"))
        return f"; {found[0]} is a program that makes weights, and is not run" if found else ""

    def _indexed(self, index: Path) -> dict[str, SafetensorsFile]:
        """The files of an index, each of which has the tensors that the index says, and no others."""
        try:
            if index.stat().st_size > HEADER_MAX:
                raise CheckpointError(f"{index} has more than the {HEADER_MAX} bytes that are read")
            fields = strict_json(index.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{index} cannot be read: {error}") from None
        places = fields.get("weight_map") if isinstance(fields, dict) else None
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise CheckpointError(f"{index} has no weight_map of texts")
        opened: dict[str, SafetensorsFile] = {}
        for place in sorted(set(places.values())):
            if Path(place).name != place or not place.endswith(".safetensors") or "\\" in place or "\0" in place:
                raise CheckpointError(f"{index} names {place!r}, which is no safetensors file of its folder")
            opened[place] = SafetensorsFile(self.path / place)
        for place, file in opened.items():
            for name in file.entries:
                if places.get(name) != place:
                    where = f"has it in {places[name]}" if name in places else "does not know it"
                    raise CheckpointError(f"{file.path} has the tensor {name}, but {index.name} {where}")
        for name, place in places.items():
            if name not in opened[place].entries:
                raise CheckpointError(f"{opened[place].path} has no tensor {name}, which {index.name} has there")
        return {name: opened[place] for name, place in places.items()}


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPart:
    """A tensor to be: `make` gives its bytes, once, when its turn has come; one tensor at a time is in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Buffer | Array]  # NumPy's own stubs call an array a Buffer from Python 3.12 on

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def view(self) -> memoryview:
        """What `make` gives, of whatever shape."""
        made = self.make()
        return made.data if isinstance(made, np.ndarray) else memoryview(made)

    def copied(self) -> TensorPart:
        """The same of bytes that are copied now, whatever `make` would give later."""
        with self.view() as data:
            copy = data.tobytes()
        return replace(self, make=lambda: copy)


def parts_of(arrays: Mapping[str, Array]) -> list[TensorPart]:
    """Arrays as tensors to be, each looked up again when its turn has come. ValueError for a type that has no name."""
    names = {np.dtype(kind): name for name, kind in DTYPES.items() if name != "BF16"}
    parts = []
    for name, array in arrays.items():
        if array.dtype not in names:
            raise ValueError(f"{name} is an array of {array.dtype}; known are {', '.join(map(str, names))}")

        def make(name: str = name) -> Array:
            return np.ascontiguousarray(arrays[name])

        parts.append(TensorPart(name, names[array.dtype], array.shape, make))
    return parts


def write_safetensors(
    folder: Path,
    parts: Sequence[TensorPart],
    *,
    max_shard_size: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes model.safetensors into a folder, or, where that would pass max_shard_size bytes, several and their index.

    Within a file wide numbers come first, so that all are aligned. A tensor larger than max_shard_size has a file of
    its own. progress: wraps the names in the order of writing.
    """
    shards: list[list[TensorPart]] = [[]]
    filled = 0
    for part in parts:
        if shards[-1] and filled + part.bytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += part.bytes
    shards = [_in_order(shard) for shard in shards]
    names = [part.name for shard in shards for part in shard]
    turns = iter(names if progress is None else progress(names))
    count = len(shards)
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = WEIGHTS if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        _write_in_order(folder / file, shard, turns)
        places |= {part.name: file for part in shard}
    if count > 1:
        total = sum(part.bytes for part in parts)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for _ in turns:  # lets a progress bar end
        pass


def write_file(path: Path, parts: Sequence[TensorPart]) -> None:
    """Writes one file of any name; wide numbers come first."""
    _write_in_order(path, _in_order(parts), iter(()))


def _in_order(parts: Sequence[TensorPart]) -> list[TensorPart]:
    return sorted(parts, key=lambda part: (-np.dtype(DTYPES[part.dtype]).itemsize, part.name))


def _write_in_order(path: Path, parts: Sequence[TensorPart], turns: Iterator[str]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        header[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [end, end + part.bytes]}
        end += part.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(LENGTH.pack(len(text)) + text)
        for part in parts:
            next(turns, None)
            with part.view() as data:  # let go before the next is made, and where writing fails
                if data.nbytes != part.bytes:
                    raise ValueError(f"{part.name} has {data.nbytes} bytes, not {part.bytes}")
                file.write(data.cast("B") if data.nbytes else b"")

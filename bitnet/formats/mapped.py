"""Files not to be trusted: mapped instead of read, and JSON in which every name has one meaning."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

from bitnet.errors import CheckpointError


class MappedFile(mmap.mmap):
    """A file's bytes, read-only, and whether they may be others than when it was opened."""

    _descriptor: int
    _opened: tuple[int, int]

    def __new__(cls, descriptor: int) -> MappedFile:
        mapped = super().__new__(cls, descriptor, 0, access=mmap.ACCESS_READ)
        mapped._descriptor, mapped._opened = os.dup(descriptor), _state(descriptor)
        weakref.finalize(mapped, os.close, mapped._descriptor)
        return mapped

    @property
    def has_changed(self) -> bool:
        """Whether the file was written to since: bytes that were cut off would end this process when looked at."""
        return _state(self._descriptor) != self._opened


def _state(descriptor: int) -> tuple[int, int]:
    """What changes when a file does: its size, and when it was written to. One removed or replaced stays as it was."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def map_file(path: Path, least: int, kind: str) -> MappedFile:
    """A file's bytes, read-only. CheckpointError if it cannot be read or has fewer than `least` bytes of a `kind`."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < least:
                raise CheckpointError(f"{path}: it is no {kind} file: it has {size} bytes")
            return MappedFile(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def release(mapped: mmap.mmap, begin: int, end: int) -> None:
    """Takes the whole pages of begin..end out of this process's memory; who looks at them again has them again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            mapped.madvise(mmap.MADV_DONTNEED, first, length)


def strict_json(text: bytes) -> Any:
    """JSON in UTF-8 without a name that comes twice and without NaN. ValueError or RecursionError otherwise."""
    return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)


def is_size(value: Any) -> bool:
    """Whether a value of JSON is a whole number, at least 0."""
    return type(value) is int and value >= 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"a name comes twice: {counts.most_common(1)[0][0]!r}")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")

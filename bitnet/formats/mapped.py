"""Files not to be trusted: mapped instead of read, and JSON in which every name has one meaning."""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from pathlib import Path
from typing import Any

from bitnet.errors import CheckpointError


def map_file(path: Path, least: int, kind: str) -> mmap.mmap:
    """A file's bytes, read-only. CheckpointError if it cannot be read or has fewer than `least` bytes of a `kind`."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < least:
                raise CheckpointError(f"{path}: it is no {kind} file: it has {size} bytes")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
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

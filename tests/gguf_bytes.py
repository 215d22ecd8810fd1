"""GGUF files written a number at a time, so that each can be a lie."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U32, STRING, ARRAY = 4, 8, 9


def text(value: bytes | str, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: bytes | str, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def array(kind: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + content


def info(name: bytes | str, dims: Sequence[int], kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    """dims: as in the file, the row's first."""
    told = struct.pack("<I", len(dims) if count is None else count) + b"".join(struct.pack("<Q", d) for d in dims)
    return text(name) + told + struct.pack("<IQ", kind, offset)


def file(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    tensors: int | None = None,
    values: int | None = None,
    align: int = 32,
) -> bytes:
    counts = (len(infos) if tensors is None else tensors, len(pairs) if values is None else values)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(infos)
    return head.ljust(-(-len(head) // align) * align, b"\0") + data

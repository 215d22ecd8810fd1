"""Packed tokens on disk: a shard is one file of token ids, a pack is a folder of shards with a manifest.

A shard, all little-endian:

    offset  bytes  what
    0       8      magic "BNSHARD\\0"
    8       4      version, 1
    12      4      header length, 128
    16      4      bytes per token, 2 or 4
    20      4      vocabulary size; every token is below it
    24      8      number of tokens
    32      8      number of documents
    40      32     SHA-256 fingerprint of the tokenizer
    72      32     SHA-256 of everything after the header
    104     20     zero
    124     4      CRC-32 of the 124 bytes before
    128            tokens, then zeros up to a multiple of 64, then the first token of each document, 8 bytes each

Document starts begin at 0 and rise strictly. The file ends with the last of them, so its length is known from the
header and compared before anything is read. Ids are checked against the vocabulary whenever they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bitnet.durable import sync
from bitnet.errors import DataError

MAGIC = b"BNSHARD\0"
VERSION = 1
HEADER = struct.Struct("<8sIIIIQQ32s32s20s")  # and the CRC-32 that follows
HEADER_BYTES = HEADER.size + 4
MAX_VOCAB = 2**31 - 1  # ids are handed out as int32
SUFFIX = ".shard"
SUFFIXES = (SUFFIX,)
MANIFEST = "manifest.json"
MANIFEST_FORMAT = "bitnet pack 1"


class ShardWriter:
    """Writes one shard under a temporary name; `close` makes it durable and gives it its own name.

    As a context manager, leaving with an exception leaves nothing behind.
    """

    def __init__(self, path: str | Path, vocab_size: int, fingerprint: str) -> None:
        if not 0 < vocab_size <= MAX_VOCAB:
            raise DataError(f"a shard's vocabulary size must be 1 to {MAX_VOCAB}, not {vocab_size}")
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.tokens = 0
        self.sha256 = ""  # of the payload, known after close
        if not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise DataError(f"a fingerprint is 64 hex digits, not {fingerprint!r}")
        self._fingerprint = bytes.fromhex(fingerprint)
        self._dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
        self._starts = array("Q")
        self._digest = hashlib.sha256()
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file: BinaryIO | None = open(self._partial, "wb")  # noqa: SIM115 (closed by close or discard)
        self._file.write(bytes(HEADER_BYTES))  # no magic yet: an unfinished file is not a shard

    @property
    def documents(self) -> int:
        return len(self._starts)

    def append(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Add one document; an empty one is passed over. Raises DataError for an id outside the vocabulary."""
        ids = np.asarray(tokens)
        if ids.size == 0:
            return
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"a document is a flat sequence of integers, not {ids.dtype} of shape {ids.shape}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise DataError(f"token {bad} does not fit the vocabulary of {self.vocab_size} in {self.path}")
        self._starts.append(self.tokens)
        self.tokens += ids.size
        self._write(ids.astype(self._dtype).tobytes())

    def close(self) -> None:
        if self._file is None:
            return
        self._write(bytes(-self.tokens * self._dtype.itemsize % 64))
        self._write(np.asarray(self._starts, dtype="<u8").tobytes())
        self.sha256 = self._digest.hexdigest()
        header = HEADER.pack(
            MAGIC,
            VERSION,
            HEADER_BYTES,
            self._dtype.itemsize,
            self.vocab_size,
            self.tokens,
            self.documents,
            self._fingerprint,
            self._digest.digest(),
            bytes(20),
        )
        self._file.seek(0)
        self._file.write(header + struct.pack("<I", zlib.crc32(header)))
        _finish(self._file, self._partial, self.path)
        self._file = None

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._partial.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise DataError(f"{self.path} is already closed")
        self._digest.update(data)
        self._file.write(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class Shard:
    """A shard opened for reading, mapped rather than loaded. `Shard.open` raises DataError if the file is not one."""

    def __init__(
        self,
        path: Path,
        vocab_size: int,
        fingerprint: str,
        sha256: str,
        data: npt.NDArray[Any],
        starts: npt.NDArray[Any],
    ) -> None:
        self.path = path
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.sha256 = sha256
        self.starts = starts  # (documents,) u64: the first token of each document
        self._data = data  # (tokens,) u16 or u32

    def __len__(self) -> int:
        return len(self._data)

    @classmethod
    def open(cls, path: str | Path) -> Shard:
        path = Path(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(HEADER_BYTES)
        except OSError as error:
            raise DataError(f"shard {path} cannot be read: {error.strerror}") from None
        if len(head) < HEADER_BYTES:
            raise DataError(f"shard {path} is cut short: {size} bytes cannot hold its {HEADER_BYTES}-byte header")
        fields = HEADER.unpack_from(head)
        magic, version, header_bytes, width, vocab, tokens, count, fingerprint, sha256, zeros = fields
        if magic != MAGIC:
            raise DataError(f"{path} is not a shard: it begins with {magic!r}")
        if version != VERSION:
            raise DataError(f"shard {path} has version {version}, this reader knows version {VERSION}")
        if zlib.crc32(head[: HEADER.size]) != int.from_bytes(head[HEADER.size :], "little"):
            raise DataError(f"shard {path} has a damaged header: its checksum differs")
        if header_bytes != HEADER_BYTES or any(zeros):
            raise DataError(f"shard {path} claims a header of {header_bytes} bytes or fills bytes that should be zero")
        if width not in (2, 4) or not 0 < vocab <= (65536 if width == 2 else MAX_VOCAB):
            raise DataError(f"shard {path} claims a vocabulary of {vocab} in {width}-byte tokens")
        if count > tokens or (count == 0 and tokens > 0):
            raise DataError(f"shard {path} claims {count} documents in {tokens} tokens")
        # Python integers: claims near 2**64 cannot wrap around to the true size.
        end = HEADER_BYTES + tokens * width
        starts_at = end + -(tokens * width) % 64
        if size != starts_at + 8 * count:
            raise DataError(f"shard {path} has {size} bytes where its header promises {starts_at + 8 * count}")
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        starts = raw[starts_at:].view("<u8")
        if count and (starts[0] != 0 or (starts[1:] <= starts[:-1]).any() or starts[-1] >= tokens):
            raise DataError(f"shard {path} has document starts that do not rise from 0 to below {tokens}")
        return cls(path, vocab, fingerprint.hex(), sha256.hex(), raw[HEADER_BYTES:end].view(f"<u{width}"), starts)

    def read(self, begin: int, end: int) -> npt.NDArray[np.int32]:
        """Tokens begin..end as a new int32 array. Raises DataError for an id outside the vocabulary."""
        if not 0 <= begin <= end <= len(self):
            raise DataError(f"shard {self.path} has tokens 0..{len(self)}, not {begin}..{end}")
        part = self._data[begin:end]
        if part.size and int(part.max()) >= self.vocab_size:
            raise DataError(f"shard {self.path} holds token {part.max()}, outside its vocabulary of {self.vocab_size}")
        return part.astype(np.int32)

    def verify(self) -> None:
        """Read the whole file: raises DataError unless its checksum holds and every id is in the vocabulary."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(HEADER_BYTES)
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != self.sha256:
            raise DataError(f"shard {self.path} has a damaged payload: its checksum differs")
        for begin in range(0, len(self), 1 << 20):
            self.read(begin, min(begin + (1 << 20), len(self)))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Manifest of a pack, its fields checked for presence and type, its file names for staying inside the folder.

    {"format", "key", "source", "tokenizer": {"name", "vocab_size", "fingerprint", "files"},
    "splits": {"train": {"tokens", "documents", "text_bytes", "files": [{"file", "tokens", "documents", "sha256"}]}}}.
    Raises DataError if it is anything else.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes().decode())
    except OSError:
        raise DataError(f"{folder} is not a pack: it has no readable {MANIFEST}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise DataError(f"{path} is not a manifest of format {MANIFEST_FORMAT!r}")
    try:
        _check(manifest, {"key": str, "tokenizer": dict, "splits": dict})
        _check(manifest["tokenizer"], {"name": str, "vocab_size": int, "fingerprint": str, "files": list})
        names = list(manifest["tokenizer"]["files"])
        for split in manifest["splits"].values():
            _check(split, {"tokens": int, "documents": int, "text_bytes": int, "files": list})
            for entry in split["files"]:
                _check(entry, {"file": str, "tokens": int, "documents": int, "sha256": str})
                names.append(entry["file"])
        for name in names:
            if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
                raise ValueError(f"{name!r} is not the name of a file in its folder")
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from None
    return manifest


def _check(fields: Any, kinds: dict[str, type]) -> None:
    for name, kind in kinds.items():
        if not isinstance(fields, dict) or not isinstance(fields.get(name), kind):
            raise ValueError(f"{name!r} is missing or not of type {kind.__name__}")


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, last of all files, so that a folder that has one is complete."""
    path = Path(folder) / MANIFEST
    partial = path.with_name(MANIFEST + ".partial")
    file = open(partial, "wb")  # noqa: SIM115 (closed by _finish)
    file.write((json.dumps({"format": MANIFEST_FORMAT, **manifest}, indent=1) + "\n").encode())
    _finish(file, partial, path)


def _finish(file: BinaryIO, partial: Path, path: Path) -> None:
    """Make the bytes durable before the name, and the name before returning."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(partial, path)
    sync(path.parent)

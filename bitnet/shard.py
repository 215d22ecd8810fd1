"""Packed tokens on disk: a shard is two files that other trainers read too, a pack a folder of shards with a manifest.

NAME.bin holds the tokens, little-endian, behind the 1024-byte header of llm.c, which asks for no more than its first
three words and the file's length; what it leaves free tells this reader the rest:

    offset  bytes  what
    0       4      20240520 for tokens of 2 bytes, 20240801 for 4
    4       4      1, or 7 with 4
    8       4      number of tokens, below 2^31
    12      4      "BNSH"
    16      4      vocabulary size; every token is below it
    20      4      number of documents
    24      32     SHA-256 fingerprint of the tokenizer
    56      32     SHA-256 of the tokens
    88      32     SHA-256 of NAME.idx
    120     900    zero
    1020    4      CRC-32 of the 1020 bytes before
    1024           tokens

NAME.idx is the index of a Megatron dataset, each document a sequence of its own. Its pointers are offsets in NAME.bin,
so Megatron passes over the header without knowing of it:

    0       9      "MMIDIDX\\0\\0"
    9       8      version, 1
    17      1      8 for tokens of 2 bytes (uint16), 4 for 4 (int32)
    18      8      number of documents n
    26      8      n + 1
    34      4 n    tokens of each document
    34+4n   8 n    byte of NAME.bin at which it begins
    34+12n  8 n+8  0, 1, ... n: the first sequence of each document, and the end

Both files' lengths are known from the headers and compared before anything is read. Documents lie end to end and none
is empty. Ids are checked against the vocabulary whenever they are read.
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

KINDS = {2: (20240520, 1, 8), 4: (20240801, 7, 4)}  # bytes a token: magic and version of .bin, token type of .idx
TAG = b"BNSH"
HEADER = struct.Struct("<III4sII32s32s32s900s")  # and the CRC-32 that follows
HEADER_BYTES = HEADER.size + 4
MAX_TOKENS = 2**31 - 1
INDEX_MAGIC = b"MMIDIDX\0\0"
INDEX_HEADER = struct.Struct("<9sQBQQ")
MAX_VOCAB = 2**31 - 1  # ids are handed out as int32
SUFFIX, INDEX_SUFFIX = ".bin", ".idx"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = "bitnet pack 2"


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
        self.sha256 = self.index_sha256 = ""  # of the tokens and of the index, known after close
        if not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise DataError(f"a fingerprint is 64 hex digits, not {fingerprint!r}")
        self._fingerprint = bytes.fromhex(fingerprint)
        self._dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
        self._lengths = array("i")  # tokens of each document
        self._digest = hashlib.sha256()
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file: BinaryIO | None = open(self._partial, "wb")  # noqa: SIM115 (closed by close or discard)
        self._file.write(bytes(HEADER_BYTES))  # no magic yet: an unfinished file is not a shard

    @property
    def documents(self) -> int:
        return len(self._lengths)

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
        if self.tokens + ids.size > MAX_TOKENS:
            raise DataError(f"{self.path} would have {self.tokens + ids.size} tokens: a shard holds {MAX_TOKENS}")
        self._lengths.append(ids.size)
        self.tokens += ids.size
        self._write(ids.astype(self._dtype).tobytes())

    def close(self) -> None:
        if self._file is None:
            return
        index = index_bytes(np.asarray(self._lengths, np.int64), self._dtype.itemsize)
        self.sha256 = self._digest.hexdigest()
        self.index_sha256 = hashlib.sha256(index).hexdigest()
        magic, version, _ = KINDS[self._dtype.itemsize]
        header = HEADER.pack(
            magic,
            version,
            self.tokens,
            TAG,
            self.vocab_size,
            self.documents,
            self._fingerprint,
            self._digest.digest(),
            bytes.fromhex(self.index_sha256),
            bytes(900),
        )
        # The index first: a .bin under its own name has its index beside it.
        path = self.path.with_suffix(INDEX_SUFFIX)
        partial = path.with_name(path.name + ".partial")
        file = open(partial, "wb")  # noqa: SIM115 (closed by _finish)
        file.write(index)
        _finish(file, partial, path)
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


def index_bytes(lengths: npt.NDArray[np.int64], width: int) -> bytes:
    """The index of documents of so many tokens each, of `width` bytes."""
    count = len(lengths)
    pointers = HEADER_BYTES + width * (np.cumsum(lengths) - lengths)
    header = INDEX_HEADER.pack(INDEX_MAGIC, 1, KINDS[width][2], count, count + 1)
    parts = (lengths.astype("<i4"), pointers.astype("<i8"), np.arange(count + 1, dtype="<i8"))
    return header + b"".join(part.tobytes() for part in parts)


class Shard:
    """A shard opened for reading, mapped rather than loaded. `Shard.open` raises DataError if the files are not one."""

    def __init__(
        self,
        path: Path,
        vocab_size: int,
        fingerprint: str,
        sha256: str,
        index_sha256: str,
        data: npt.NDArray[Any],
        pointers: npt.NDArray[Any],
    ) -> None:
        self.path = path
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.sha256, self.index_sha256 = sha256, index_sha256
        self.documents = len(pointers)
        self._data = data  # (tokens,) u16 or u32
        self._pointers = pointers  # (documents,) i64

    def __len__(self) -> int:
        return len(self._data)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """(documents,) the first token of each document."""
        return (self._pointers.astype(np.int64) - HEADER_BYTES) // self._data.itemsize

    @classmethod
    def open(cls, path: str | Path) -> Shard:
        path = Path(path)
        head, size = _head(path, HEADER_BYTES)
        fields = HEADER.unpack_from(head)
        magic, version, tokens, tag, vocab, count, fingerprint, sha256, index_sha256, zeros = fields
        width = {kind[0]: width for width, kind in KINDS.items()}.get(magic)
        if width is None:
            raise DataError(f"{path} is not a shard: it begins with {head[:4]!r}")
        if version != KINDS[width][1]:
            raise DataError(f"shard {path} has version {version}, this reader knows version {KINDS[width][1]}")
        if tag != TAG:
            raise DataError(f"{path} is not a shard of this package: pack its text with `bitnet data`")
        if zlib.crc32(head[: HEADER.size]) != int.from_bytes(head[HEADER.size :], "little"):
            raise DataError(f"shard {path} has a damaged header: its checksum differs")
        if any(zeros):
            raise DataError(f"shard {path} fills bytes that should be zero")
        if not 0 < vocab <= (65536 if width == 2 else MAX_VOCAB):
            raise DataError(f"shard {path} claims a vocabulary of {vocab} in {width}-byte tokens")
        if tokens > MAX_TOKENS or count > tokens or (count == 0 and tokens > 0):
            raise DataError(f"shard {path} claims {count} documents in {tokens} tokens")
        if size != HEADER_BYTES + tokens * width:
            raise DataError(f"shard {path} has {size} bytes where its header promises {HEADER_BYTES + tokens * width}")
        pointers = _read_index(path.with_suffix(INDEX_SUFFIX), count, tokens, width)
        data = np.memmap(path, dtype=np.uint8, mode="r")[HEADER_BYTES:].view(f"<u{width}")
        return cls(path, vocab, fingerprint.hex(), sha256.hex(), index_sha256.hex(), data, pointers)

    def read(self, begin: int, end: int) -> npt.NDArray[np.int32]:
        """Tokens begin..end as a new int32 array. Raises DataError for an id outside the vocabulary."""
        if not 0 <= begin <= end <= len(self):
            raise DataError(f"shard {self.path} has tokens 0..{len(self)}, not {begin}..{end}")
        part = self._data[begin:end]
        if part.size and int(part.max()) >= self.vocab_size:
            raise DataError(f"shard {self.path} holds token {part.max()}, outside its vocabulary of {self.vocab_size}")
        return part.astype(np.int32)

    def verify(self) -> None:
        """Read both files whole: raises DataError unless their checksums hold and every id is in the vocabulary."""
        index = self.path.with_suffix(INDEX_SUFFIX)
        for path, skip, sha256 in ((self.path, HEADER_BYTES, self.sha256), (index, 0, self.index_sha256)):
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                file.seek(skip)
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != sha256:
                raise DataError(f"shard {path} has a damaged payload: its checksum differs")
        for begin in range(0, len(self), 1 << 20):
            self.read(begin, min(begin + (1 << 20), len(self)))


def _head(path: Path, length: int) -> tuple[bytes, int]:
    """The first bytes of a file, and its size."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(length)
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}") from None
    if len(head) < length:
        raise DataError(f"shard {path} is cut short: {size} bytes cannot hold its {length}-byte header")
    return head, size


def _read_index(path: Path, count: int, tokens: int, width: int) -> npt.NDArray[Any]:
    """The pointers of an index (documents,), once all of it is known to describe documents laid end to end."""
    head, size = _head(path, INDEX_HEADER.size)
    if head != INDEX_HEADER.pack(INDEX_MAGIC, 1, KINDS[width][2], count, count + 1):
        raise DataError(f"shard {path} is not the index of {count} documents in {width}-byte tokens")
    promised = INDEX_HEADER.size + 20 * count + 8
    if size != promised:
        raise DataError(f"shard {path} has {size} bytes where its header promises {promised}")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    at = INDEX_HEADER.size
    lengths = raw[at : at + 4 * count].view("<i4").astype(np.int64)
    pointers = raw[at + 4 * count : at + 12 * count].view("<i8")
    if (lengths < 1).any() or int(lengths.sum()) != tokens:
        raise DataError(f"shard {path} has documents that are empty or do not add up to {tokens} tokens")
    if (pointers != HEADER_BYTES + width * (np.cumsum(lengths) - lengths)).any():
        raise DataError(f"shard {path} has documents that do not lie end to end")
    if (raw[at + 12 * count :].view("<i8") != np.arange(count + 1)).any():
        raise DataError(f"shard {path} has documents of several sequences")
    return pointers


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Manifest of a pack, its fields checked for presence and type, its file names for staying inside the folder.

    {"format", "key", "source", "tokenizer": {"name", "vocab_size", "fingerprint", "files"},
    "splits": {"train": {"tokens", "documents", "text_bytes", "files": [{"file", "tokens", "documents", "sha256",
    "index_sha256"}]}}}.
    A file of conversations also has "answers": {"file", "sha256", "index_sha256"}, a shard of the vocabulary 0, 1
    beside it: see rows.Conversations.
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
                _check(entry, {"file": str, "tokens": int, "documents": int, "sha256": str, "index_sha256": str})
                names.append(entry["file"])
                if "answers" in entry:
                    _check(entry["answers"], {"file": str, "sha256": str, "index_sha256": str})
                    names.append(entry["answers"]["file"])
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

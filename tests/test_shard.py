"""What a shard holds comes back, and a shard that lies, at any byte, is refused with one sentence."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.errors import DataError
from bitnet.shard import HEADER, HEADER_BYTES, INDEX_HEADER, Shard, ShardWriter, read_manifest, write_manifest

PRINT = "ab" * 32
DOCUMENTS = [[1, 2, 3], [4], [999, 0, 7, 7, 8]]


def write(path: Path, documents: list[list[int]], vocab_size: int = 1000) -> Path:
    with ShardWriter(path, vocab_size, PRINT) as writer:
        for document in documents:
            writer.append(document)
    return path


NAMES = "magic version tokens tag vocab documents fingerprint sha256 index_sha256 zeros".split()


def edit(path: Path, **fields: Any) -> None:
    """Change header fields, or bytes of the tokens or the index, and make every checksum agree with the lie."""
    data, index = bytearray(path.read_bytes()), bytearray(path.with_suffix(".idx").read_bytes())
    header = dict(zip(NAMES, HEADER.unpack_from(data), strict=True))
    for target, name in ((data, "payload"), (index, "index")):
        for offset, value in fields.pop(name, {}).items():
            target[offset : offset + len(value)] = value
    header["sha256"] = hashlib.sha256(data[HEADER_BYTES:]).digest()
    header["index_sha256"] = hashlib.sha256(index).digest()
    head = HEADER.pack(*(header | fields).values())
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)) + data[HEADER_BYTES:])
    path.with_suffix(".idx").write_bytes(index)


def read_llmc(path: Path) -> list[int]:
    """A shard as the loader of llm.c reads it: three words, the length, then tokens."""
    header = np.fromfile(path, "<i4", 256)
    dtype, version = {20240520: ("<u2", 1), 20240801: ("<u4", 7)}[int(header[0])]
    assert header[1] == version
    assert path.stat().st_size == 256 * 4 + int(header[2]) * np.dtype(dtype).itemsize
    return np.fromfile(path, dtype, offset=1024).tolist()


def read_megatron(path: Path) -> list[list[int]]:
    """The documents as Megatron's IndexedDataset reads them: header, lengths, pointers into the .bin, documents."""
    index = path.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    dtype = np.dtype({8: np.uint16, 4: np.int32}[code])
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    pointers = np.frombuffer(index, np.int64, sequences, 34 + lengths.nbytes)
    documents = np.frombuffer(index, np.int64, boundaries, 34 + lengths.nbytes + pointers.nbytes)
    assert len(index) == 34 + lengths.nbytes + pointers.nbytes + documents.nbytes
    assert len(lengths) == documents[-1]
    data = path.read_bytes()
    reads = [np.frombuffer(data, dtype, length, start) for length, start in zip(lengths, pointers, strict=True)]
    return [np.concatenate(reads[a:b]).tolist() for a, b in pairwise(documents)]


@settings(deadline=None)  # it waits for the disk
@given(
    documents=st.lists(st.lists(st.integers(0, 299), max_size=50), max_size=20), vocab=st.sampled_from([300, 1 << 20])
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab: int) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    shard = Shard.open(write(path, documents, vocab))
    flat = [token for document in documents for token in document]
    lengths = [len(document) for document in documents if document]
    assert shard.read(0, len(shard)).tolist() == flat
    assert shard.starts.tolist() == np.cumsum([0, *lengths])[:-1].tolist()
    assert (shard.vocab_size, shard.fingerprint, len(shard)) == (vocab, PRINT, len(flat))
    assert read_llmc(shard.path) == flat
    assert read_megatron(shard.path) == [document for document in documents if document]
    shard.verify()


@pytest.mark.parametrize(("vocab", "width"), [(1, 2), (65536, 2), (65537, 4), (2**31 - 1, 4)])
def test_width_follows_the_vocabulary(tmp_path: Path, vocab: int, width: int) -> None:
    tokens = [0, vocab - 1]
    shard = Shard.open(write(tmp_path / "a.bin", [tokens], vocab))
    assert shard.read(0, 2).tolist() == tokens
    assert shard.read(0, 2).dtype == np.int32
    assert shard.path.stat().st_size == HEADER_BYTES + 2 * width


def test_layout_is_pinned(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", DOCUMENTS)
    tokens = np.array([1, 2, 3, 4, 999, 0, 7, 7, 8], dtype="<u2").tobytes()
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    index += struct.pack("<3i", 3, 1, 5) + struct.pack("<3q", 1024, 1030, 1032) + struct.pack("<4q", 0, 1, 2, 3)
    header = struct.pack("<iii", 20240520, 1, 9) + b"BNSH" + struct.pack("<II", 1000, 3) + bytes.fromhex(PRINT)
    header += hashlib.sha256(tokens).digest() + hashlib.sha256(index).digest() + bytes(900)
    assert path.read_bytes() == header + struct.pack("<I", zlib.crc32(header)) + tokens
    assert path.with_suffix(".idx").read_bytes() == index


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_cut_at_every_byte(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / "a.bin", DOCUMENTS)
    file = path.with_suffix(suffix)
    data = file.read_bytes()
    for size in range(len(data)):
        file.write_bytes(data[:size])
        with pytest.raises(DataError, match=rf"a\{suffix}"):
            Shard.open(path)
    file.write_bytes(data + b"\0")
    with pytest.raises(DataError, match=f"has {len(data) + 1} bytes where its header promises {len(data)}"):
        Shard.open(path)
    file.unlink()
    with pytest.raises(DataError, match=rf"a\{suffix} cannot be read"):
        Shard.open(path)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_every_flipped_bit_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / "a.bin", DOCUMENTS)
    file = path.with_suffix(suffix)
    data = bytearray(file.read_bytes())
    # The zeros of the header are one kind of byte: one in fifty of their bits stands for all.
    bits = [
        bit for bit in range(8 * len(data)) if not (suffix == ".bin" and 8 * 120 <= bit < 8 * 1020) or bit % 50 == 0
    ]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.(bin|idx)"):
            Shard.open(path).verify()
        data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    Shard.open(path).verify()


LENGTHS, POINTERS, BOUNDARIES = 34, 34 + 12, 34 + 36  # where they stand in the index of three documents


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"magic": 20240521}, "not a shard"),
        ({"version": 2}, "version 2, this reader knows version 1"),
        ({"magic": 20240801}, "version 1, this reader knows version 7"),
        ({"tag": b"\0\0\0\0"}, "not a shard of this package"),
        ({"zeros": bytes(899) + b"\1"}, "should be zero"),
        ({"vocab": 0}, "vocabulary of 0"),
        ({"vocab": 65537}, "vocabulary of 65537 in 2-byte"),
        ({"magic": 20240801, "version": 7, "vocab": 2**31}, "vocabulary of 2147483648"),
        ({"magic": 20240801, "version": 7}, "promises"),
        ({"tokens": 10**6}, "promises"),
        ({"tokens": 2**31 + 9}, "documents in 2147483657 tokens"),
        ({"tokens": 2**32 - 1}, "documents in 4294967295 tokens"),
        ({"documents": 10}, "10 documents in 9 tokens"),
        ({"documents": 0}, "0 documents in 9 tokens"),
        ({"documents": 2}, r"a\.idx is not the index of 2 documents"),
        ({"index": {0: b"m"}}, "is not the index of 3 documents"),
        ({"index": {9: struct.pack("<Q", 2)}}, "is not the index of 3 documents"),
        ({"index": {17: b"\4"}}, "is not the index of 3 documents in 2-byte tokens"),
        ({"index": {18: struct.pack("<Q", 2**61 + 3)}}, "is not the index of 3 documents"),
        ({"index": {LENGTHS: struct.pack("<iii", 9, 1, -1)}}, "empty or do not add up to 9"),
        ({"index": {LENGTHS: struct.pack("<iii", 8, 1, 0)}}, "empty or do not add up to 9"),
        ({"index": {LENGTHS: struct.pack("<iii", 3, 1, 6)}}, "empty or do not add up to 9"),
        ({"index": {LENGTHS: struct.pack("<iii", 2**31 - 1, 2**31 - 1, 11)}}, "empty or do not add up to 9"),
        ({"index": {LENGTHS: struct.pack("<iii", 1, 3, 5)}}, "do not lie end to end"),
        ({"index": {POINTERS: struct.pack("<q", 1022)}}, "do not lie end to end"),
        ({"index": {POINTERS: struct.pack("<q", 0)}}, "do not lie end to end"),
        ({"index": {POINTERS + 16: struct.pack("<q", -(2**63))}}, "do not lie end to end"),
        ({"index": {BOUNDARIES + 8: struct.pack("<q", 2)}}, "several sequences"),
    ],
)
def test_a_lie_with_good_checksums_is_refused(tmp_path: Path, fields: dict[str, Any], match: str) -> None:
    path = write(tmp_path / "a.bin", DOCUMENTS)
    edit(path)
    Shard.open(path).verify()  # the edit itself is sound
    assert INDEX_HEADER.size == LENGTHS
    edit(path, **fields)
    with pytest.raises(DataError, match=match):
        Shard.open(path)


def test_ids_outside_the_vocabulary_are_never_handed_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", DOCUMENTS)
    edit(path, payload={HEADER_BYTES + 2: struct.pack("<H", 1000)})
    shard = Shard.open(path)
    assert shard.read(2, 9).tolist() == [3, 4, 999, 0, 7, 7, 8]
    for begin in (0, 1):
        with pytest.raises(DataError, match="token 1000, outside its vocabulary of 1000"):
            shard.read(begin, 4)
    with pytest.raises(DataError, match="token 1000"):
        shard.verify()


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (0, 10), (5, 4)])
def test_reading_outside_is_refused(tmp_path: Path, begin: int, end: int) -> None:
    with pytest.raises(DataError, match=r"tokens 0\.\.9"):
        Shard.open(write(tmp_path / "a.bin", DOCUMENTS)).read(begin, end)


@pytest.mark.parametrize(
    ("tokens", "match"), [([1000], "token 1000"), ([3, -1], "token -1"), ([0.5], "float64"), ([[1]], r"shape \(1, 1\)")]
)
def test_writer_refuses_bad_ids_and_leaves_nothing(tmp_path: Path, tokens: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        write(tmp_path / "a.bin", [[1, 2], tokens])
    assert list(tmp_path.iterdir()) == []


def test_unfinished_shard_is_not_one(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.bin", 1000, PRINT)
    for _ in range(100):
        writer.append(np.arange(1000))  # enough to fill the buffer of the file several times
    (partial,) = tmp_path.iterdir()
    assert partial.name == "a.bin.partial"
    with pytest.raises(DataError, match="is not a shard"):
        Shard.open(partial)
    writer.close()
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    with pytest.raises(DataError, match="already closed"):
        writer.append([1])


def test_writer_refuses_bad_settings(tmp_path: Path) -> None:
    for vocab in (0, 2**31):
        with pytest.raises(DataError, match="vocabulary size"):
            ShardWriter(tmp_path / "a.bin", vocab, PRINT)
    for fingerprint in ("abcd", "not hex"):
        with pytest.raises(DataError, match="64 hex digits"):
            ShardWriter(tmp_path / "a.bin", 10, fingerprint)
    with pytest.raises(DataError, match="cannot be read"):
        Shard.open(tmp_path / "absent.bin")


GOOD = {
    "key": "k",
    "tokenizer": {"name": "bytes", "vocab_size": 257, "fingerprint": PRINT, "files": ["bitnet_tokenizer.json"]},
    "splits": {
        "train": {
            "tokens": 9,
            "documents": 3,
            "text_bytes": 9,
            "files": [{"file": "a.bin", "tokens": 9, "documents": 3, "sha256": PRINT, "index_sha256": PRINT}],
        }
    },
}


def test_manifest_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, GOOD)
    manifest = read_manifest(tmp_path)
    assert manifest == {"format": "bitnet pack 2", **GOOD}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"bitnet pack 2"', '"other"', "not a manifest of format"),
        ('"key": "k"', '"key": 1', "'key' is missing or not of type str"),
        ('"text_bytes": 9', '"text_byte": 9', "'text_bytes' is missing"),
        ('"vocab_size": 257', '"vocab_size": "257"', "'vocab_size'"),
        ('"a.bin"', '"../a.bin"', "'../a.bin' is not the name of a file"),
        ('"a.bin"', '".."', "is not the name of a file"),
        ('"bitnet_tokenizer.json"', '"/etc/passwd"', "is not the name of a file"),
        ("{", "[", "is not JSON"),
    ],
)
def test_manifest_lies(tmp_path: Path, old: str, new: str, match: str) -> None:
    text = json.dumps({"format": "bitnet pack 2", **GOOD})
    assert old in text
    (tmp_path / "manifest.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DataError, match=match):
        read_manifest(tmp_path)


def test_manifest_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a pack"):
        read_manifest(tmp_path)

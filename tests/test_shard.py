"""What a shard holds comes back, and a shard that lies, at any byte, is refused with one sentence."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet.errors import DataError
from bitnet.shard import HEADER, HEADER_BYTES, Shard, ShardWriter, read_manifest, write_manifest

PRINT = "ab" * 32
DOCUMENTS = [[1, 2, 3], [4], [999, 0, 7, 7, 8]]


def write(path: Path, documents: list[list[int]], vocab_size: int = 1000) -> Path:
    with ShardWriter(path, vocab_size, PRINT) as writer:
        for document in documents:
            writer.append(document)
    return path


def edit(path: Path, keep_checksum: bool = False, **fields: Any) -> None:
    """Change header fields, or bytes of the payload, and make every checksum agree with the lie."""
    data = bytearray(path.read_bytes())
    names = ("magic", "version", "header", "width", "vocab", "tokens", "documents", "fingerprint", "sha256", "zeros")
    header = dict(zip(names, HEADER.unpack_from(data), strict=True))
    for offset, value in fields.pop("payload", {}).items():
        data[offset : offset + len(value)] = value
    if not keep_checksum:
        header["sha256"] = hashlib.sha256(data[HEADER_BYTES:]).digest()
    head = HEADER.pack(*(header | fields).values())
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)) + data[HEADER_BYTES:])


@given(
    documents=st.lists(st.lists(st.integers(0, 299), max_size=50), max_size=20), vocab=st.sampled_from([300, 1 << 20])
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab: int) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.shard"
    shard = Shard.open(write(path, documents, vocab))
    flat = [token for document in documents for token in document]
    lengths = [len(document) for document in documents if document]
    assert shard.read(0, len(shard)).tolist() == flat
    assert shard.starts.tolist() == np.cumsum([0, *lengths])[:-1].tolist()
    assert (shard.vocab_size, shard.fingerprint, len(shard)) == (vocab, PRINT, len(flat))
    shard.verify()


@pytest.mark.parametrize(("vocab", "width"), [(1, 2), (65536, 2), (65537, 4), (2**31 - 1, 4)])
def test_width_follows_the_vocabulary(tmp_path: Path, vocab: int, width: int) -> None:
    tokens = [0, vocab - 1]
    shard = Shard.open(write(tmp_path / "a.shard", [tokens], vocab))
    assert shard.read(0, 2).tolist() == tokens
    assert shard.read(0, 2).dtype == np.int32
    assert shard.path.stat().st_size == HEADER_BYTES + 64 + 8
    assert HEADER.unpack_from(shard.path.read_bytes())[3] == width


def test_layout_is_pinned(tmp_path: Path) -> None:
    data = write(tmp_path / "a.shard", DOCUMENTS).read_bytes()
    tokens = np.array([1, 2, 3, 4, 999, 0, 7, 7, 8], dtype="<u2").tobytes()
    payload = tokens.ljust(64, b"\0") + np.array([0, 3, 4], dtype="<u8").tobytes()
    header = b"BNSHARD\0" + struct.pack("<IIIIQQ", 1, 128, 2, 1000, 9, 3)
    header += bytes.fromhex(PRINT) + hashlib.sha256(payload).digest() + bytes(20)
    assert data == header + struct.pack("<I", zlib.crc32(header)) + payload


def test_cut_at_every_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.shard", DOCUMENTS)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"a\.shard"):
            Shard.open(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(DataError, match=f"has {len(data) + 1} bytes where its header promises {len(data)}"):
        Shard.open(path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.shard", DOCUMENTS)
    data = bytearray(path.read_bytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.shard"):
            Shard.open(path).verify()
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    Shard.open(path).verify()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"magic": b"SHARD\0\0\0"}, "not a shard"),
        ({"version": 2}, "version 2"),
        ({"header": 64}, "header of 64 bytes"),
        ({"zeros": b"\1" + bytes(19)}, "should be zero"),
        ({"width": 3}, "3-byte"),
        ({"vocab": 0}, "vocabulary of 0"),
        ({"vocab": 65537}, "vocabulary of 65537 in 2-byte"),
        ({"width": 4, "vocab": 2**31}, "vocabulary of 2147483648"),
        ({"tokens": 10**6}, "promises"),
        ({"tokens": 2**63 + 9}, "promises"),  # twice this is 18 in 64 bits: the size of nine tokens
        ({"tokens": 2**64 - 1, "documents": 2**61 + 3}, "promises"),
        ({"documents": 10}, "10 documents in 9 tokens"),
        ({"documents": 0}, "0 documents in 9 tokens"),
        ({"payload": {192: struct.pack("<QQQ", 1, 3, 4)}}, "rise from 0"),
        ({"payload": {192: struct.pack("<QQQ", 0, 4, 4)}}, "rise from 0"),
        ({"payload": {192: struct.pack("<QQQ", 0, 4, 3)}}, "rise from 0"),
        ({"payload": {192: struct.pack("<QQQ", 0, 3, 9)}}, "below 9"),
        ({"payload": {192: struct.pack("<QQQ", 0, 3, 2**64 - 1)}}, "below 9"),
    ],
)
def test_a_lie_with_good_checksums_is_refused(tmp_path: Path, fields: dict[str, Any], match: str) -> None:
    path = write(tmp_path / "a.shard", DOCUMENTS)
    edit(path)
    Shard.open(path).verify()  # the edit itself is sound
    edit(path, **fields)
    with pytest.raises(DataError, match=match):
        Shard.open(path)


def test_ids_outside_the_vocabulary_are_never_handed_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.shard", DOCUMENTS)
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
        Shard.open(write(tmp_path / "a.shard", DOCUMENTS)).read(begin, end)


@pytest.mark.parametrize(
    ("tokens", "match"), [([1000], "token 1000"), ([3, -1], "token -1"), ([0.5], "float64"), ([[1]], r"shape \(1, 1\)")]
)
def test_writer_refuses_bad_ids_and_leaves_nothing(tmp_path: Path, tokens: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        write(tmp_path / "a.shard", [[1, 2], tokens])
    assert list(tmp_path.iterdir()) == []


def test_unfinished_shard_is_not_one(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.shard", 1000, PRINT)
    for _ in range(100):
        writer.append(np.arange(1000))  # enough to fill the buffer of the file several times
    (partial,) = tmp_path.iterdir()
    assert partial.name == "a.shard.partial"
    with pytest.raises(DataError, match="is not a shard"):
        Shard.open(partial)
    writer.close()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.shard"]
    with pytest.raises(DataError, match="already closed"):
        writer.append([1])


def test_writer_refuses_bad_settings(tmp_path: Path) -> None:
    for vocab in (0, 2**31):
        with pytest.raises(DataError, match="vocabulary size"):
            ShardWriter(tmp_path / "a.shard", vocab, PRINT)
    for fingerprint in ("abcd", "not hex"):
        with pytest.raises(DataError, match="64 hex digits"):
            ShardWriter(tmp_path / "a.shard", 10, fingerprint)
    with pytest.raises(DataError, match="cannot be read"):
        Shard.open(tmp_path / "absent.shard")


GOOD = {
    "key": "k",
    "tokenizer": {"name": "bytes", "vocab_size": 257, "fingerprint": PRINT, "files": ["bitnet_tokenizer.json"]},
    "splits": {
        "train": {
            "tokens": 9,
            "documents": 3,
            "text_bytes": 9,
            "files": [{"file": "a.shard", "tokens": 9, "documents": 3, "sha256": PRINT}],
        }
    },
}


def test_manifest_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, GOOD)
    manifest = read_manifest(tmp_path)
    assert manifest == {"format": "bitnet pack 1", **GOOD}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"bitnet pack 1"', '"other"', "not a manifest of format"),
        ('"key": "k"', '"key": 1', "'key' is missing or not of type str"),
        ('"text_bytes": 9', '"text_byte": 9', "'text_bytes' is missing"),
        ('"vocab_size": 257', '"vocab_size": "257"', "'vocab_size'"),
        ('"a.shard"', '"../a.shard"', "'../a.shard' is not the name of a file"),
        ('"a.shard"', '".."', "is not the name of a file"),
        ('"bitnet_tokenizer.json"', '"/etc/passwd"', "is not the name of a file"),
        ("{", "[", "is not JSON"),
    ],
)
def test_manifest_lies(tmp_path: Path, old: str, new: str, match: str) -> None:
    text = json.dumps({"format": "bitnet pack 1", **GOOD})
    assert old in text
    (tmp_path / "manifest.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DataError, match=match):
        read_manifest(tmp_path)


def test_manifest_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a pack"):
        read_manifest(tmp_path)

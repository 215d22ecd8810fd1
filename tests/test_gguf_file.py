"""The GGUF container: what was written comes back, here and in gguf-py; what lies is refused, with its place named."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf_bytes as raw
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_at_a_time import Single

from bitnet.errors import CheckpointError
from bitnet.formats import gguf_file, gguf_types
from bitnet.formats.gguf_file import GgufFile, Part, Value, write

METADATA = {
    "general.architecture": Value("str", "bitnet"),
    "a.u8": Value("u8", 255),
    "a.i8": Value("i8", -128),
    "a.u16": Value("u16", 65535),
    "a.i16": Value("i16", -3),
    "a.u32": Value("u32", 2**32 - 1),
    "a.i32": Value("i32", -(2**31)),
    "a.f32": Value("f32", 0.5),
    "a.bool": Value("bool", True),
    "a.u64": Value("u64", 2**64 - 1),
    "a.i64": Value("i64", -(2**63)),
    "a.f64": Value("f64", 0.1),
    "a.text": Value("str", "Grüße \u2581\0\n"),
    "a.texts": Value("[str]", ["", "ä", "x" * 300]),
    "a.numbers": Value("[i32]", [-1, 0, 7]),
    "a.reals": Value("[f32]", [0.25, -1.0]),
    "a.bools": Value("[bool]", [True, False]),
    "a.none": Value("[u16]", []),
}
NESTED = {
    "a.nested": Value("[[u8]]", [[1, 2], [], [3]]),
    "a.deeper": Value("[[[str]]]", [[["a"], []], [["b"]]]),
}
FLOATS = np.arange(6, dtype=np.float32).reshape(2, 3) - 1.5
HALVES = np.arange(40, dtype=np.float16)


def parts() -> list[Part]:
    return [
        Part("floats", (2, 3), gguf_types.F32, lambda: FLOATS),
        Part("halves", (40,), gguf_types.F16, lambda: HALVES.data),
        Part("blocks", (3, 64), gguf_types.Q8_0, lambda: bytes(range(204))),
    ]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.durable.sync", lambda path: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "x.gguf"
    write(target, METADATA | NESTED, parts())
    return target


def refused(path: Path, data: bytes, sentence: str) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)


# ---- what is there ----


def test_what_was_written_comes_back(path: Path) -> None:
    file = GgufFile(path)
    assert file.metadata == METADATA | NESTED
    assert (file.version, file.alignment) == (3, 32)
    assert {name: (entry.shape, entry.type.name) for name, entry in file.tensors.items()} == {
        "floats": ((2, 3), "F32"),
        "halves": ((40,), "F16"),
        "blocks": ((3, 64), "Q8_0"),
    }
    for part in parts():
        entry = file.tensors[part.name]
        assert entry.offset % 32 == 0
        assert bytes(file.view(entry)) == memoryview(part.make()).tobytes()
        file.release(entry)
    assert path.stat().st_size % 32 == 0


def test_gguf_py_reads_what_is_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write(tmp_path / "x.gguf", METADATA, parts())
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, value in METADATA.items():
        if value.value != []:  # it fails at an empty array of its own
            assert reader.fields[key].contents() == value.value, key
    found = {tensor.name: tensor for tensor in reader.tensors}
    np.testing.assert_array_equal(found["floats"].data, FLOATS)
    np.testing.assert_array_equal(found["halves"].data, HALVES)
    assert found["blocks"].data.tobytes() == bytes(range(204))
    assert found["blocks"].tensor_type.name == "Q8_0"


@pytest.mark.parametrize("align", [32, 64, 4096])
def test_what_gguf_py_writes_is_read(tmp_path: Path, align: int) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "bitnet")
    writer.add_custom_alignment(align)
    kinds = {name: kind for kind, name in gguf_types_of(gguf).items()}
    for key, value in METADATA.items():
        if key == "general.architecture" or value.value == []:
            continue
        if value.type_name.startswith("["):
            writer.add_key_value(key, value.value, gguf.GGUFValueType.ARRAY, kinds[value.type_name[1:-1]])
        else:
            writer.add_key_value(key, value.value, kinds[value.type_name])
    writer.add_tensor("floats", FLOATS)
    writer.add_tensor("halves", HALVES)
    writer.add_tensor("blocks", np.arange(204, dtype=np.uint8).reshape(3, 68), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert file.alignment == align
    for key, value in METADATA.items():
        assert value.value == [] or file.metadata[key] == value
    for part in parts():
        assert bytes(file.view(file.tensors[part.name])) == memoryview(part.make()).tobytes()
        assert file.tensors[part.name].shape == part.shape


def gguf_types_of(gguf: Any) -> dict[Any, str]:
    t = gguf.GGUFValueType
    return {t.UINT8: "u8", t.INT8: "i8", t.UINT16: "u16", t.INT16: "i16", t.UINT32: "u32", t.INT32: "i32",
            t.FLOAT32: "f32", t.BOOL: "bool", t.STRING: "str", t.UINT64: "u64", t.INT64: "i64",
            t.FLOAT64: "f64"}  # fmt: skip


def test_version_2_is_read(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    assert GgufFile(path).metadata == METADATA | NESTED


json_like = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: Value("u32", n)),
    st.integers(-(2**63), 2**63 - 1).map(lambda n: Value("i64", n)),
    st.floats(width=32, allow_nan=False).map(lambda x: Value("f32", x)),
    st.floats(allow_nan=False).map(lambda x: Value("f64", x)),
    st.booleans().map(lambda b: Value("bool", b)),
    st.text().map(lambda t: Value("str", t)),
    st.lists(st.text(max_size=9), max_size=5).map(lambda t: Value("[str]", t)),
    st.lists(st.integers(-128, 127), max_size=9).map(lambda n: Value("[i8]", n)),
    st.lists(st.lists(st.booleans(), max_size=3), min_size=1, max_size=3).map(lambda n: Value("[[bool]]", n)),
)
keys = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="._-"), min_size=1, max_size=20)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(keys, json_like, max_size=6), st.dictionaries(keys, shapes, max_size=4))
def test_anything_of_these_types_comes_back(
    tmp_path: Path, metadata: dict[str, Value], tensors: dict[str, tuple[int, ...]]
) -> None:
    metadata.pop("general.alignment", None)
    made = {name: np.random.default_rng(1).random(shape, np.float32) for name, shape in tensors.items()}
    write(
        tmp_path / "x",
        metadata,
        [Part(name, array.shape, gguf_types.F32, lambda array=array: array) for name, array in made.items()],
        force=True,
    )
    file = GgufFile(tmp_path / "x")
    assert file.metadata == metadata
    for name, array in made.items():
        np.testing.assert_array_equal(
            np.frombuffer(file.view(file.tensors[name]), "<f4").reshape(file.tensors[name].shape), array
        )


def test_a_large_vocabulary_is_read_at_once(tmp_path: Path) -> None:
    tokens, merges = [f"token {i}" for i in range(128256)], [f"left{i} right{i}" for i in range(280147)]
    write(tmp_path / "x", {"t": Value("[str]", tokens), "m": Value("[str]", merges)}, [])
    begin = time.perf_counter()
    file = GgufFile(tmp_path / "x")
    assert time.perf_counter() - begin < 5  # a quarter of a second where nothing else runs
    assert file.metadata["t"].value == tokens
    assert file.metadata["m"].value == merges


# ---- writing ----


def test_writing_is_all_or_nothing(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"x\.gguf exists already; --force replaces it"):
        write(path, {}, parts())

    def fail() -> bytes:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"x\.gguf could not be written: No space left on device"):
        write(path, {}, [*parts(), Part("last", (1,), gguf_types.F32, fail)], force=True)
    with pytest.raises(CheckpointError, match=r"x\.gguf: last was made of 3 bytes, not 4"):
        write(path, {}, [Part("last", (1,), gguf_types.F32, lambda: b"abc")], force=True)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["x.gguf"]


@pytest.mark.parametrize(
    "value",
    [
        Value("u8", 256), Value("u32", -1), Value("i8", 0.5), Value("u32", "a"), Value("nothing", 1),
        Value("[str]", [1]), Value("str", 3), Value("[u32]", 3), Value("u32", None), Value("[]", [1]),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_their_types_cannot_hold(tmp_path: Path, value: Value) -> None:
    with pytest.raises(CheckpointError, match="a key cannot be "):
        write(tmp_path / "x", {"a key": value}, [])
    assert os.listdir(tmp_path) == []


def test_one_part_at_a_time_is_made_and_progress_sees_each(tmp_path: Path) -> None:
    seen: list[str] = []

    def bar(names: list[str]) -> Any:
        for name in names:
            yield name
            seen.append(name)

    write(tmp_path / "x", {}, [Part(f"{i}", (16,), gguf_types.F32, Single) for i in range(5)], progress=bar)
    assert seen == ["0", "1", "2", "3", "4"]
    assert len(GgufFile(tmp_path / "x").tensors) == 5


# ---- files that lie: one test for each way in which loaders of this format were broken ----


def test_a_string_length_that_wraps_around(tmp_path: Path) -> None:
    """Length + 1 for a terminator is 0 in 64 bits: a buffer of no bytes."""
    for length in (2**64 - 1, 2**63, 2**32, 100):
        pair = raw.text("a", length) + struct.pack("<II", raw.U32, 1)
        refused(tmp_path / "x", raw.file([pair], data=bytes(64)), "a key at 24.* is longer than what follows")
        pair = raw.pair("key", raw.STRING, raw.text("abc", 2**64 - 9))
        refused(tmp_path / "x", raw.file([pair], data=bytes(64)), "key: string 0 of 1 is longer than what follows")
        refused(tmp_path / "x", raw.file([], [raw.text("t", length)]), "longer than what follows|too few")


def test_counts_of_values_and_tensors_without_end(tmp_path: Path) -> None:
    """Count times size of an entry wraps to a small allocation, or is one that no machine has."""
    for count in (2**64 - 1, 2**63, 2**40, 2**64 // 48 + 1, 3):
        refused(tmp_path / "x", raw.file(values=count), f"it has {count} values, for which the 8 bytes")
        refused(tmp_path / "x", raw.file(tensors=count), f"it has {count} tensors, for which the 8 bytes")


@pytest.mark.parametrize("kind", [0, 4, 6, 7, 8, 9, 12])
def test_counts_of_array_elements_without_end(tmp_path: Path, kind: int) -> None:
    for count in (2**64 - 1, 2**62, 2**61 + 1, 2**32, 100):
        pair = raw.pair("key", raw.ARRAY, raw.array(kind, count, bytes(16)))
        tracemalloc.start()
        refused(tmp_path / "x", raw.file([pair]), "key .*needs|key has .* too few")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_types_of_values_that_there_are_not(tmp_path: Path) -> None:
    for kind in (13, 255, 2**32 - 1):
        refused(tmp_path / "x", raw.file([raw.pair("key", kind, bytes(8))]), f"key has the unknown type {kind}$")
        pair = raw.pair("key", raw.ARRAY, raw.array(kind, 1, bytes(8)))
        refused(tmp_path / "x", raw.file([pair]), f"key has elements of the unknown type {kind}$")


def test_arrays_in_arrays_without_end(tmp_path: Path) -> None:
    for depth in (5, 100, 100_000):
        content = raw.array(raw.ARRAY, 1, b"") * depth + raw.array(0, 1, b"\0")
        refused(tmp_path / "x", raw.file([raw.pair("key", raw.ARRAY, content)]), "key has arrays in arrays")
    wide = raw.array(raw.ARRAY, 2**60, raw.array(0, 0, b""))
    refused(tmp_path / "x", raw.file([raw.pair("key", raw.ARRAY, wide)]), "key has 1152921504606846976 arrays, for")
    mixed = raw.array(raw.ARRAY, 2, raw.array(0, 1, b"\0") + raw.array(8, 1, raw.text("a")))
    refused(tmp_path / "x", raw.file([raw.pair("key", raw.ARRAY, mixed)]), "key has arrays of str and of u8 in one")


def test_sizes_whose_product_wraps_around(tmp_path: Path) -> None:
    for dims in ([2**32, 2**32], [2**16] * 4, [2**62, 4], [2**63, 2, 3], [2**64 - 1], [2**61, 8], [1 << 40]):
        for kind in (0, 1, 35, 36):
            refused(tmp_path / "x", raw.file([], [raw.info("t", dims, kind)], bytes(64)), "t ends at|t has shape")


def test_sizes_of_zero(tmp_path: Path) -> None:
    for dims in ([0], [4, 0], [0, 2**63]):
        refused(tmp_path / "x", raw.file([], [raw.info("t", dims)], bytes(64)), r"t has shape .*0")


def test_numbers_of_dimensions(tmp_path: Path) -> None:
    for count in (0, 5, 2**31, 2**32 - 1):
        data = raw.file([], [raw.info("t", [1, 1], count=count)], bytes(64))
        refused(tmp_path / "x", data, f"t has {count} dimensions, not 1 to 4")


def test_types_of_tensors_that_are_unknown_or_gone(tmp_path: Path) -> None:
    for kind in (4, 5, 31, 250, 2**32 - 1):
        refused(tmp_path / "x", raw.file([], [raw.info("t", [256], kind)], bytes(512)), f"t has unknown type {kind};")
    for kind, name in {2: "Q4_0", 13: "Q5_K", 39: "TL2", 135: "IQ2_BN"}.items():
        refused(tmp_path / "x", raw.file([], [raw.info("t", [256], kind)], bytes(512)), f"t has the type {name}")


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    for kind, row in ((8, 48), (14, 128), (34, 255), (35, 64), (36, 63)):
        data = raw.file([], [raw.info("t", [row, 3], kind)], bytes(4096))
        refused(tmp_path / "x", data, rf"t has shape \(3, {row}\), which")


def test_offsets_outside_the_file(tmp_path: Path) -> None:
    for offset in (2**64 - 32, 2**63, 64, 1 << 40):
        refused(tmp_path / "x", raw.file([], [raw.info("t", [4], 0, offset)], bytes(64)), "it is cut off: t ends at")
    refused(tmp_path / "x", raw.file([], [raw.info("t", [17])], bytes(64)), "it is cut off: t ends at")


def test_offsets_that_are_not_aligned(tmp_path: Path) -> None:
    for offset in (1, 16, 33):
        data = raw.file([], [raw.info("t", [4], 0, offset)], bytes(128))
        refused(tmp_path / "x", data, f"t has the offset {offset}, which is no multiple of 32")


def test_tensors_that_overlap(tmp_path: Path) -> None:
    for first, second in ((0, 0), (0, 32), (64, 32)):
        infos = [raw.info("a", [16], 0, first), raw.info("b", [16], 0, second)]
        refused(tmp_path / "x", raw.file([], infos, bytes(128)), "(a|b) begins at .*, inside (b|a)$")
    infos = [raw.info("a", [4], 0, 32), raw.info("b", [4], 0, 0)]  # out of order, but apart
    (tmp_path / "x").write_bytes(raw.file([], infos, bytes(range(64))))
    assert bytes(GgufFile(tmp_path / "x").view(GgufFile(tmp_path / "x").tensors["a"])) == bytes(range(32, 48))


def test_names_that_come_twice(tmp_path: Path) -> None:
    pairs = [raw.pair("key", raw.U32, bytes(4))] * 2
    refused(tmp_path / "x", raw.file(pairs), "it has the key 'key' twice")
    infos = [raw.info("t", [4], 0, 0), raw.info("t", [4], 0, 32)]
    refused(tmp_path / "x", raw.file([], infos, bytes(64)), "it has two tensors t")


def test_names_that_are_none(tmp_path: Path) -> None:
    for name in (b"", b"a\0b", b"a\nb", b"x" * 70000):
        refused(tmp_path / "x", raw.file([raw.pair(name, raw.U32, bytes(4))]), "a key at 24 is .* printable bytes")
    for name in (b"", b"a\0b", b"x" * 65):
        data = raw.file([], [raw.info(name, [1])], bytes(64))
        refused(tmp_path / "x", data, "the name of a tensor at 24 is .* printable bytes")
    refused(tmp_path / "x", raw.file([raw.pair(b"\xff\xfe", raw.U32, bytes(4))]), r"a key at 24: .* is no UTF-8")
    bad = raw.pair("key", raw.ARRAY, raw.array(raw.STRING, 2, raw.text("fine") + raw.text(b"\xe2\x96")))
    refused(tmp_path / "x", raw.file([bad]), r"key: b'\\xe2\\x96' is no UTF-8")


@pytest.mark.parametrize("align", [0, 1, 4, 24, 33, 2**21, 2**31, 2**32 - 1])
def test_alignments_that_divide_by_zero_or_do_not_divide(tmp_path: Path, align: int) -> None:
    pair = raw.pair("general.alignment", raw.U32, struct.pack("<I", align))
    refused(tmp_path / "x", raw.file([pair], [raw.info("t", [1])], bytes(64)), f"alignment is {align} .*power of two")


def test_an_alignment_of_another_type(tmp_path: Path) -> None:
    for kind, content in ((10, struct.pack("<Q", 32)), (8, raw.text("32")), (6, struct.pack("<f", 32))):
        refused(tmp_path / "x", raw.file([raw.pair("general.alignment", kind, content)]), "no power of two")


def test_bools_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "x", raw.file([raw.pair("key", 7, b"\2")]), "key is 2, which is no bool")
    refused(tmp_path / "x", raw.file([raw.pair("key", 9, raw.array(7, 3, b"\0\xff\1"))]), "key is 255, which is no")


def test_a_header_longer_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.formats.gguf_file.HEADER_MAX", 1000)
    pair = raw.pair("key", raw.ARRAY, raw.array(0, 2000, bytes(2000)))
    refused(tmp_path / "x", raw.file([pair]), "needs 2000 bytes, but its header may have 1000")


def test_what_is_no_such_file(tmp_path: Path) -> None:
    for content, sentence in [
        (b"", "it is no GGUF file: it has 0 bytes"),
        (b"GGUF\3\0\0\0", "it is no GGUF file: it has 8 bytes"),
        (b"\x89BITNET\n" + bytes(100), "it is no GGUF file: it begins with"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "of version 1; this program reads 2 and 3"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(100), "of version 4"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "it is a big-endian GGUF file"),
        (b"FUGG" + struct.pack(">I", 3) + bytes(100), "it begins with"),
    ]:
        refused(tmp_path / "x", content, sentence)
    with pytest.raises(CheckpointError, match="nothing cannot be read: No such file"):
        GgufFile(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path)


# ---- files that are damaged anywhere ----


def test_every_truncation_is_refused(path: Path) -> None:
    end = max(entry.end for entry in GgufFile(path).tensors.values())
    for length in reversed(range(end)):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"x\.gguf: "):
            GgufFile(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused_or_read(tmp_path: Path, content: bytes, has_prefix: bool) -> None:
    (tmp_path / "x").write_bytes(raw.file(values=1, tensors=1) + content if has_prefix else content)
    read_or_refuse(tmp_path / "x")


def read_or_refuse(path: Path) -> bool:
    """Whether it was read."""
    try:
        file = GgufFile(path)
        assert all(file.view(entry).nbytes == entry.bytes for entry in file.tensors.values())
    except CheckpointError:
        return False
    return True


def test_mutations_of_a_valid_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte flipped and replaced, then pieces moved, doubled and cut: refused, or read within the file."""
    data = path.read_bytes()
    header = min(entry.offset for entry in GgufFile(path).tensors.values())
    rng = np.random.default_rng(0)
    read = 0

    def try_bytes(given: bytes) -> bool:
        monkeypatch.setattr(gguf_file, "map_file", lambda *_: given)  # as a file would be, and faster
        return read_or_refuse(path)

    for at in range(header):
        for byte in (data[at] ^ 1 << at % 8, 0xFF):
            read += try_bytes(data[:at] + bytes([byte]) + data[at + 1 :])
    for _ in range(5000):
        a, b, c = sorted(rng.integers(0, header, 3))
        pieces = [data[:a], data[a:b], data[b:c], data[c:]]
        kind = rng.integers(4)
        if kind == 0:
            pieces[1:3] = pieces[2:0:-1]
        elif kind == 1:
            pieces.insert(1, pieces[2])
        elif kind == 2:
            del pieces[1]
        else:
            pieces[1] = rng.bytes(min(8, b - a)) + pieces[1][8:]
        read += try_bytes(b"".join(pieces))
    assert read > 100  # what changes a name or a number alone is still a file

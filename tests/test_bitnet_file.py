"""The `.bitnet` container: what was written comes back; whatever else a file holds is refused, with its place named."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_at_a_time import Single

from bitnet import _core
from bitnet.errors import CheckpointError
from bitnet.formats import bitnet_file
from bitnet.formats.bitnet_file import ALIGN, BitnetFile, Content, Part, write

Array = np.ndarray[Any, Any]
FLOATS = np.arange(6, dtype=np.float32).reshape(2, 3) - 1.5
CODES = np.random.default_rng(0).choice(np.array([-1, 0, 1], np.int8), (30, 41), p=[0.1, 0.8, 0.1])
SCALE = float(np.float32(0.1))
NOTE = 60 * "Grüße "  # room in the header for longer lies


def parts() -> list[Part]:
    fifths = _core.pack_fifths(_core.Tensor(CODES))
    return [
        *bitnet_file.file_parts({"words.json": b"{}"}),
        Part("floats", (2, 3), lambda: Content("f32", FLOATS.data)),
        Part("halves", (3,), lambda: Content("bf16", b"\0\0\x80\x3f\0\0")),
        Part("plain", CODES.shape, lambda: Content("fifths", fifths.data, SCALE)),
        Part("coded", CODES.shape, lambda: Content("fifths-coded", _core.rans_encode(fifths), SCALE)),
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "x.bitnet"
    write(target, {"hidden_size": 2}, {"run": "nowhere", "note": NOTE}, parts())
    return target


def test_what_was_written_comes_back(path: Path) -> None:
    file = BitnetFile(path)
    assert (file.config, file.provenance) == ({"hidden_size": 2}, {"run": "nowhere", "note": NOTE})
    assert list(file.sections) == ["tokenizer/words.json", "floats", "halves", "plain", "coded"]
    assert [section.form for section in file.sections.values()] == ["bytes", "f32", "bf16", "fifths", "fifths-coded"]
    assert all(file.is_whole(section) for section in file.sections.values())
    assert file.tokenizer_files() == {"words.json": b"{}"}
    assert bytes(file.view(file.sections["floats"])) == FLOATS.tobytes()
    for name in ("plain", "coded"):
        section = file.sections[name]
        assert (section.shape, section.scale) == (CODES.shape, SCALE)
        np.testing.assert_array_equal(_core.unpack_fifths(file.fifths(section), *CODES.shape).numpy(), CODES)
    assert file.sections["plain"].bytes == -(-CODES.size // 5)
    assert file.sections["coded"].bytes < file.sections["plain"].bytes


def test_the_bytes_are_those_that_are_told(path: Path) -> None:
    data = path.read_bytes()
    assert data[:12] == b"\x89BITNET\n\1\0\0\0"
    crc32, length = struct.unpack_from("<IQ", data, 12)
    text = data[24 : 24 + length]
    assert (24 + length) % 64 == 0
    assert zlib.crc32(text) == crc32
    end = 24 + length
    for section in json.loads(text)["sections"]:
        begin = section["offset"]
        assert begin == -(-end // 64) * 64
        assert not any(data[end:begin])
        end = begin + section["bytes"]
        assert zlib.crc32(data[begin:end]) == section["crc32"]
    assert end == len(data)


def test_a_view_is_aligned_shared_and_read_only(path: Path) -> None:
    file = BitnetFile(path)
    array = np.asarray(file.view(file.sections["floats"]))
    assert array.ctypes.data % ALIGN == 0
    assert not array.flags.writeable
    del file
    np.testing.assert_array_equal(array.view(np.float32).reshape(2, 3), FLOATS)


def test_writing_is_all_or_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"x\.bitnet exists already; --force replaces it"):
        write(path, {}, {}, parts())
    made: list[str] = []

    def fail() -> Content:
        made.append("last")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"x\.bitnet could not be written: No space left on device"):
        write(path, {}, {}, [*parts(), Part("last", (1,), fail)], force=True)
    monkeypatch.setattr(os, "fsync", lambda _: fail())
    with pytest.raises(CheckpointError, match="No space left"):
        write(path, {}, {}, parts(), force=True)
    monkeypatch.undo()
    assert made == ["last", "last"]
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["x.bitnet"]
    write(path, {}, {"other": "one"}, parts(), force=True, progress=as_a_bar_does)
    assert BitnetFile(path).provenance == {"other": "one"}
    (path.parent / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"folder exists already$"):
        write(path.parent / "folder", {}, {}, [], force=True)
    with pytest.raises(CheckpointError, match="could not be written: No such file"):
        write(path.parent / "no" / "x.bitnet", {}, {}, [])


def as_a_bar_does(ordered: Any) -> Any:
    return iter(ordered)


def test_one_part_at_a_time_is_made(tmp_path: Path) -> None:
    write(tmp_path / "x", {}, {}, [Part(f"{i}", (16,), lambda: Content("f32", Single())) for i in range(5)])
    assert len(BitnetFile(tmp_path / "x").sections) == 5


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_every_truncation_is_refused(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=f"its last section ends at {size}, the file at {size + 1}"):
        BitnetFile(path)
    for length in reversed(range(size)):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"x\.bitnet: it"):
            BitnetFile(path)


def test_a_cut_names_the_section_that_is_missing(path: Path) -> None:
    data = path.read_bytes()
    cut = path.with_name("cut.bitnet")
    for section in BitnetFile(path).sections.values():
        for length in (section.offset, section.offset + 1, section.end - 1):
            cut.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match=f"cut off: {section.name} ends at {section.end}, .* {length}$"):
                BitnetFile(cut)


def test_a_flipped_bit_anywhere_is_found_and_placed(path: Path) -> None:
    data = path.read_bytes()
    sections = BitnetFile(path).sections
    with open(path, "r+b", buffering=0) as writer:
        for at in range(len(data)):
            os.pwrite(writer.fileno(), bytes([data[at] ^ 1 << at % 8]), at)
            inside = [section for section in sections.values() if section.offset <= at < section.end]
            if inside:
                file = BitnetFile(path)
                assert [s.name for s in file.sections.values() if not file.is_whole(s)] == [inside[0].name]
                with pytest.raises(CheckpointError, match=f"{inside[0].name} is damaged: its checksum differs"):
                    file.verify(inside[0])
            else:
                with pytest.raises(CheckpointError, match=r"x\.bitnet: (it is|its header|the space before)"):
                    BitnetFile(path)
            os.pwrite(writer.fileno(), data[at : at + 1], at)
    assert path.read_bytes() == data


def test_codes_that_do_not_decode_are_refused_without_checksums(path: Path) -> None:
    section = BitnetFile(path).sections["coded"]
    data = bytearray(path.read_bytes())
    data[section.end - 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.bitnet: coded cannot be decoded: block 0 of 1"):
        BitnetFile(path).fifths(section)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    for content, sentence in [
        (b"", "it is no .bitnet file: it has 0 bytes"),
        (b"\x89BITNET\n", "it has 8 bytes"),
        (b"GGUF" + bytes(100), r"it begins with b'GGUF"),
        (b"\x89BITNET\r\n" + bytes(100), "it begins with"),
        (b"\x89BITNET\n" + struct.pack("<IIQ", 2, 0, 0) + bytes(64), "of version 2; this program reads version 1"),
        (b"\x89BITNET\n" + struct.pack("<IIQ", 1, 0, 2**64 - 1) + bytes(64), "18446744073709551615 bytes, but 64"),
        (b"\x89BITNET\n" + struct.pack("<IIQ", 1, 0, 65) + bytes(64), "should have 65 bytes, but 64 follow"),
        (b"\x89BITNET\n" + struct.pack("<IIQ", 1, 1, 64) + bytes(64), "header is damaged: its checksum differs"),
    ]:
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CheckpointError, match=sentence):
            BitnetFile(tmp_path / "x")
    with pytest.raises(CheckpointError, match="nothing cannot be read: No such file"):
        BitnetFile(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        BitnetFile(tmp_path)


def with_header(path: Path, text: bytes) -> None:
    """Puts another header, with the checksum that it has, into the same room."""
    data = path.read_bytes()
    room = struct.unpack_from("<Q", data, 16)[0]
    text = text.ljust(room)
    path.write_bytes(data[:12] + struct.pack("<IQ", zlib.crc32(text), len(text)) + text + data[24 + room :])


def lie(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    header = json.loads(data[24 : 24 + struct.unpack_from("<Q", data, 16)[0]])
    change(header)
    with_header(path, json.dumps(header, separators=(",", ":")).encode())


def change(number: int, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["sections"][number].update(fields)


LIES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda h: h.pop("config"), "header is no object with config, provenance, sections"),
    (lambda h: h.update(sections={}), "header is no object with"),
    (lambda h: h.update(provenance={"a": 1}), "its provenance 'a' is no text, but 1"),
    (lambda h: h["sections"].append(3), "section 5 of its header has no name"),
    (lambda h: h["sections"][1].pop("name"), "section 1 of its header has no name"),
    (change(1, name=""), "section 1 of its header has no name"),
    (change(2, name="floats"), "it has two sections floats"),
    (change(1, form="f64"), "floats has the unknown form 'f64'"),
    (change(1, form=["f32"]), "floats has the unknown form"),
    (change(1, more=1), "floats has an unknown field 'more'"),
    (change(1, shape=[]), "floats has no shape of positive sizes"),
    (change(1, shape=[6, 0]), "floats has no shape"),
    (change(1, shape=[-2, -3]), "floats has no shape"),
    (change(1, shape=[True, 6]), "floats has no shape"),
    (change(1, shape=[2.0, 3]), "floats has no shape"),
    (change(1, shape=[1] * 9), "floats has no shape"),
    (change(1, shape="23"), "floats has no shape"),
    (change(1, shape=[2, 4]), "floats has 24 bytes, but 32 for its shape"),
    (change(1, shape=[2**62, 2**62]), "floats has 24 bytes, but"),
    (change(3, shape=[30, 42]), "plain has 246 bytes, but 252"),
    (change(3, shape=[30 * 41]), "plain has ternary codes of shape .*, which is no matrix"),
    (change(4, bytes=0), "coded has 0 bytes, but at least 1"),
    (change(1, offset=-64), "floats has offset -64, which is no number below"),
    (change(1, offset=2**63), "floats has offset 9223372036854775808, which"),
    (change(1, offset="64"), "floats has offset '64'"),
    (change(1, crc32=2**32), "floats has crc32 4294967296"),
    (lambda h: h["sections"][1].pop("crc32"), "floats has crc32 None"),
    (lambda h: h["sections"][1].update(offset=h["sections"][1]["offset"] + 64), "floats begins at .* not at the next"),
    (lambda h: h["sections"][2].update(offset=h["sections"][1]["offset"]), "halves begins at"),
    (lambda h: h["sections"].reverse(), "coded begins at"),
    (lambda h: h["sections"].pop(), "its last section ends at"),
    (lambda h: h["sections"].clear(), "its last section ends at"),
    (lambda h: h["sections"][4].update(bytes=h["sections"][4]["bytes"] + 1), "it is cut off: coded ends at"),
    (change(4, bytes=2**63 - 1), "it is cut off: coded ends at"),
    (change(1, scale=1.0), r"floats \(f32\) has the scale 1.0"),
    (lambda h: h["sections"][3].pop("scale"), r"plain \(fifths\) has the scale None"),
    (change(3, scale=0), "has the scale 0"),
    (change(3, scale=-0.5), "has the scale -0.5"),
    (change(3, scale=True), "has the scale True"),
    (change(3, scale=0.1), "has the scale 0.1"),
    (change(3, scale="1"), "has the scale '1'"),
    (change(3, scale=1e39), "has the scale 1e"),
    (change(0, name="words"), "'words' is no name of a section of form bytes"),
    (change(0, name="tokenizer/../words"), "is no name of a section"),
    (change(0, name="tokenizer/.."), "is no name of a section"),
    (change(0, name="tokenizer/"), "is no name of a section"),
    (change(0, name="tokenizer/a\n"), "is no name of a section"),
    (change(1, name="tokenizer/floats"), "is no name of a section of form f32"),
]


@pytest.mark.parametrize(("change", "sentence"), LIES, ids=range(len(LIES)))
def test_headers_that_lie(path: Path, change: Callable[[dict[str, Any]], Any], sentence: str) -> None:
    lie(path, change)
    with pytest.raises(CheckpointError, match=sentence):
        BitnetFile(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[1, 2]", "is no object with"),
        (b'{"config": {}, "config": {}}', "is no JSON: a name comes twice: 'config'"),
        (b'{"config": {"a": NaN}}', "is no JSON: NaN is no number"),
        (b"[" * 700, "is no JSON"),
        (b"1" * 700 + b"}", "is no JSON"),
    ],
)
def test_headers_that_are_none(path: Path, text: bytes, sentence: str) -> None:
    with_header(path, text)
    with pytest.raises(CheckpointError, match=sentence):
        BitnetFile(path)


def test_numbers_and_nesting_without_end(tmp_path: Path) -> None:
    for text in (b"[" * 200_000, b'{"config": ' + b"1" * 100_000 + b"}"):
        (tmp_path / "x").write_bytes(bitnet_file.PREFIX.pack(b"\x89BITNET\n", 1, zlib.crc32(text), len(text)) + text)
        with pytest.raises(CheckpointError, match="is no JSON"):
            BitnetFile(tmp_path / "x")


def test_a_count_that_no_stream_could_hold_takes_no_memory(path: Path) -> None:
    lie(path, change(4, shape=[2**31, 2**31]))
    file = BitnetFile(path)
    with pytest.raises(CheckpointError, match=r"coded cannot be decoded: a coded stream of \d+ bytes cannot"):
        file.fifths(file.sections["coded"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(tmp_path: Path, content: bytes, has_prefix: bool) -> None:
    if has_prefix:
        content = bitnet_file.PREFIX.pack(b"\x89BITNET\n", 1, zlib.crc32(content), len(content)) + content
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError):
        BitnetFile(tmp_path / "x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2**70) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


FIELDS = ["name", "form", "shape", "offset", "bytes", "crc32", "scale"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 4), field=st.sampled_from(FIELDS), value=json_values)
def test_any_field_may_hold_anything(path: Path, number: int, field: str, value: Any) -> None:
    """Refused; or, for what no other field contradicts, taken as it is said."""
    data = path.read_bytes()
    lie(path, lambda header: (header["provenance"].clear(), change(number, **{field: value})(header)))
    try:
        file = BitnetFile(path)
        assert all(file.view(section).nbytes == section.bytes for section in file.sections.values())
    except CheckpointError:
        pass
    path.write_bytes(data)

"""The `.safetensors` container: what others write is read, what is written others read; whatever lies is refused."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_at_a_time import Single

from bitnet.config import BitNetConfig
from bitnet.errors import CheckpointError
from bitnet.formats import safetensors_file
from bitnet.formats.safetensors_file import (
    SafetensorsFile,
    SafetensorsFolder,
    TensorPart,
    parts_of,
    write_file,
    write_safetensors,
)
from bitnet.model import BitNetForCausalLM
from bitnet.optim import AdamW

Array = np.ndarray[Any, Any]
ARRAYS: dict[str, tuple[str, Array]] = {
    "floats": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
    "halves": ("F16", np.arange(3, dtype=np.float16)),
    "bf16": ("BF16", np.array([[0x3F80, 0xC040]], np.uint16)),
    "codes": ("U8", np.arange(5, dtype=np.uint8)),
    "signed": ("I8", np.array([-1, 0, 1], np.int8)),
    "ints": ("I32", np.array([1, -2], np.int32)),
    "longs": ("I64", np.array([2**40], np.int64)),
    "flags": ("BOOL", np.array([True, False])),
    "Größe": ("F32", np.array(2.5, np.float32)),
    "none": ("F32", np.zeros((0, 4), np.float32)),
}


def parts() -> list[TensorPart]:
    return [TensorPart(n, dtype, a.shape, lambda a=a: a) for n, (dtype, a) in ARRAYS.items()]  # type: ignore[misc]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_safetensors(tmp_path, parts())
    return tmp_path / "model.safetensors"


def check(file: SafetensorsFile | SafetensorsFolder) -> None:
    assert file.entries.keys() == ARRAYS.keys()
    for name, (dtype, array) in ARRAYS.items():
        got = file.array(name)
        assert (file.entries[name].dtype, got.shape) == (dtype, array.shape)
        np.testing.assert_array_equal(got, array)


# ---- reading and writing --------------------------------------------------------------------------------------------


def test_what_was_written_comes_back(path: Path) -> None:
    file = SafetensorsFile(path)
    check(file)
    assert file.metadata == {"format": "pt"}
    floats = file.array("floats")
    assert floats.flags.aligned and not floats.flags.writeable
    file.release("floats")
    np.testing.assert_array_equal(floats, ARRAYS["floats"][1])
    del file
    np.testing.assert_array_equal(floats, ARRAYS["floats"][1])


def test_the_library_reads_and_writes_the_same_bytes(path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    found = load_file(path)
    tensors = {}
    for name, (dtype, array) in ARRAYS.items():
        tensor = torch.from_numpy(array.view(np.int16) if dtype == "BF16" else array)
        tensors[name] = tensor.view(torch.bfloat16) if dtype == "BF16" else tensor
        assert found[name].dtype == tensors[name].dtype
        assert torch.equal(found[name], tensors[name])
    other = path.with_name("other.safetensors")
    save_file(tensors, other, {"format": "pt"})
    check(SafetensorsFile(other))
    assert other.stat().st_size == path.stat().st_size


def test_shards_and_their_index(tmp_path: Path) -> None:
    names: list[list[str]] = []
    progress = lambda given: names.append(given) or given  # noqa: E731
    write_safetensors(tmp_path, parts(), max_shard_size=20, progress=progress)
    check(SafetensorsFolder(tmp_path))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert sorted(names[0]) == sorted(ARRAYS)
    sizes = [sum(e.end - e.begin for e in SafetensorsFile(tmp_path / file).entries.values()) for file in files]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) == 24, "the largest tensor has a file of its own"


def test_a_tensor_out_of_place_is_copied(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    (tmp_path / "x").write_bytes(raw(header, b"\7" + np.array([1.5, -2], np.float32).tobytes()))
    array = SafetensorsFile(tmp_path / "x").array("b")
    assert array.flags.aligned
    assert array.tolist() == [1.5, -2]


def test_one_tensor_at_a_time_is_made(tmp_path: Path) -> None:
    write_safetensors(tmp_path, [TensorPart(f"{i}", "F32", (16,), Single) for i in range(5)])  # type: ignore[arg-type]
    assert len(SafetensorsFolder(tmp_path).entries) == 5


def test_a_part_of_another_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a has 3 bytes, not 4"):
        write_safetensors(tmp_path, [TensorPart("a", "F32", (1,), lambda: b"abc")])


def test_arrays_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    kinds = ("F32", "I64", "U8")  # those of checkpoints; others of one width the library orders by type
    arrays = {name: array for name, (dtype, array) in ARRAYS.items() if dtype in kinds}
    save_file(arrays, tmp_path / "theirs", {"format": "pt"})
    write_file(tmp_path / "ours", parts_of(arrays))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_file(tmp_path / "across", parts_of({"a": arrays["floats"].T}))
    np.testing.assert_array_equal(SafetensorsFile(tmp_path / "across").array("a"), arrays["floats"].T)
    with pytest.raises(ValueError, match="a is an array of uint16"):
        parts_of({"a": np.zeros(2, np.uint16)})


def test_a_part_is_what_it_is_when_written_or_copied(tmp_path: Path) -> None:
    array = np.array([1, 2], np.float32)
    (part,) = parts_of({"a": array})
    copy = part.copied()
    array[0] = 5
    for made, first in ((part, 5), (copy, 1)):
        write_file(tmp_path / "x", [made])
        assert SafetensorsFile(tmp_path / "x").array("a").tolist() == [first, 2]


def test_arrays_given_one_by_one_stay_whole(path: Path) -> None:
    arrays = SafetensorsFile(path).arrays()
    assert len(arrays) == len(ARRAYS)
    for name, array in list(arrays.items()):
        np.testing.assert_array_equal(array, ARRAYS[name][1])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no disk that is always full")
def test_a_write_that_fails_lets_go_of_what_it_wrote() -> None:
    model = BitNetForCausalLM(BitNetConfig(257, 64, 96, 1, 2, max_position_embeddings=64))
    with pytest.raises(OSError, match="No space left on device") as told:
        write_file(Path("/dev/full"), model.parts())
    AdamW(model)  # refuses to move a weight that NumPy looks at
    assert told.value.errno == 28


# ---- lies -----------------------------------------------------------------------------------------------------------


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        SafetensorsFile(tmp_path / "x")


def test_size_overflow_in_the_header_length(tmp_path: Path) -> None:
    for length in (2**64 - 1, 2**63, 2**64 - 8, 100_000_001, 3):
        refused(tmp_path, raw(b"{}", length=length), f"header should have {length} bytes, but 2 follow")


def test_unbounded_counts_and_strings(tmp_path: Path) -> None:
    refused(tmp_path, raw({"a": entry("F32", [2**62], 0, 2**64)}), "a has no two offsets")
    refused(tmp_path, raw({"a": entry("F32", [2**61], 0, 2**63 - 1)}), "a has 9223372036854775807 bytes, but")
    refused(tmp_path, raw({"a": entry("U8", [2**62], 0, 2**62)}), "it is cut off: a ends at")
    refused(tmp_path, raw({"a": entry("U8", [1] * 9, 0, 1)}, b"\0"), "a has no shape of at most 8 sizes")
    refused(tmp_path, raw({"a": entry("U8", [1] * 100_000, 0, 1)}, b"\0"), "a has no shape of at most 8 sizes")
    refused(tmp_path, raw({"a": entry("A" * 100_000, [1], 0, 1)}, b"\0"), "a has the dtype 'A{40}'")
    refused(tmp_path, raw(b'{"a": ' + b"1" * 100_000 + b"}"), "is no JSON")
    refused(tmp_path, raw(b'{"a":' + b"[" * 200_000), "is no JSON")


def test_a_header_of_many_tensors_takes_time_in_proportion(tmp_path: Path) -> None:
    count = 30_000
    (tmp_path / "model.safetensors").write_bytes(raw({f"{i}": entry("U8", [0], 0, 0) for i in range(count)}))
    began = time.process_time()
    assert len(SafetensorsFolder(tmp_path).entries) == count
    assert time.process_time() - began < 10, "a quadratic loop takes minutes"


def test_zero_wrapping_products(tmp_path: Path) -> None:
    for shape in ([2**32, 2**32], [2**62, 4], [2**21, 2**21, 2**22], [2**62, 2]):
        refused(tmp_path, raw({"a": entry("F32", shape, 0, 0)}), "a has 0 bytes, but")
    refused(tmp_path, raw({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4)), "a has no shape")


def test_unknown_types(tmp_path: Path) -> None:
    for dtype in ("F64", "F8_E4M3", "f32", "", None, 4, ["F32"], {}):
        refused(tmp_path, raw({"a": entry(dtype, [1], 0, 4)}, bytes(4)), "a has the dtype .*; known are F32, F16, BF16")


def test_offsets_that_overlap_leave_holes_or_lie_outside(tmp_path: Path) -> None:
    four = entry("U8", [4], 0, 4)
    refused(tmp_path, raw({"a": four, "b": entry("U8", [4], 2, 6)}, bytes(6)), "b begins at .*before it ends at")
    refused(tmp_path, raw({"a": four, "b": four}, bytes(4)), "b begins at")
    refused(tmp_path, raw({"a": four, "b": entry("U8", [4], 5, 9)}, bytes(9)), "b begins at")
    refused(tmp_path, raw({"a": entry("U8", [4], 1, 5)}, bytes(5)), "a begins at")
    refused(tmp_path, raw({"a": entry("U8", [4], -4, 0)}, bytes(4)), "a has no two offsets")
    refused(tmp_path, raw({"a": entry("U8", [4], 4, 0)}, bytes(4)), "a has -4 bytes, but 4")
    refused(tmp_path, raw({"a": four}, bytes(3)), "it is cut off: a ends at")
    refused(tmp_path, raw({"a": four}, bytes(5)), "its last tensor ends at")
    refused(tmp_path, raw({}, bytes(5)), "its last tensor ends at")
    refused(tmp_path, raw({"a": entry("U8", [4], True, 5)}, bytes(5)), "a has no two offsets")
    refused(tmp_path, raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"\0"), "a has no two")


def test_names_twice(tmp_path: Path) -> None:
    one = json.dumps(entry("U8", [1], 0, 1))
    refused(tmp_path, raw(f'{{"a": {one}, "a": {one}}}'.encode(), b"\0"), "is no JSON: a name comes twice: 'a'")
    refused(tmp_path, raw(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "a name comes twice: 'dtype'")


def test_headers_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path, b"", "it is no safetensors file: it has 0 bytes")
    refused(tmp_path, raw(b""), "begins with b'', not with a brace")
    refused(tmp_path, raw(b" {}"), "begins with b' {}', not with a brace")
    refused(tmp_path, raw(b"[]"), "not with a brace")
    refused(tmp_path, raw(b"{\xff}"), "is no JSON")
    refused(tmp_path, raw(b'{"a": NaN}'), "is no JSON: NaN is no number")
    refused(tmp_path, raw({"a": 1}), "a has not just dtype, shape and data_offsets")
    refused(tmp_path, raw({"a": entry("U8", [1], 0, 1) | {"more": 1}}, b"\0"), "a has not just")
    refused(tmp_path, raw({"__metadata__": {"a": 1}}), "__metadata__ is no object of texts")
    refused(tmp_path, raw({"__metadata__": []}), "__metadata__ is no object of texts")
    with pytest.raises(CheckpointError, match="nothing cannot be read: No such file"):
        SafetensorsFile(tmp_path / "nothing")


def test_indexes_that_lie(tmp_path: Path) -> None:
    one = raw({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 1, 2)}, b"ab")
    (tmp_path / "x.safetensors").write_bytes(one)
    (tmp_path / "y.safetensors").write_bytes(raw({"c": entry("U8", [1], 0, 1)}, b"c"))
    places = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    index = tmp_path / "model.safetensors.index.json"

    def refuse(places: Any, sentence: str) -> None:
        index.write_bytes(places if isinstance(places, bytes) else json.dumps({"weight_map": places}).encode())
        with pytest.raises(CheckpointError, match=sentence):
            SafetensorsFolder(tmp_path)

    index.write_text(json.dumps({"weight_map": places}))
    assert SafetensorsFolder(tmp_path).entries.keys() == {"a", "b", "c"}
    refuse(b"{", r"index.json cannot be read")
    refuse(b"[]", r"index.json has no weight_map")
    refuse(b"[" * 200_000, r"index.json cannot be read")
    refuse(b'{"weight_map": {"a": "x", "a": "y"}}', "a name comes twice")
    refuse({"a": 1}, "has no weight_map of texts")
    for name in ("../x.safetensors", "/etc/x.safetensors", "x\0.safetensors", "a\\x.safetensors", "x.bin", ""):
        refuse(places | {"c": name}, "which is no safetensors file of its folder")
    refuse(places | {"c": "z.safetensors"}, "z.safetensors cannot be read: No such file")
    refuse(places | {"c": "x.safetensors"}, "x.safetensors has no tensor c, which")
    refuse(places | {"d": "y.safetensors"}, "y.safetensors has no tensor d, which")
    refuse({"a": "x.safetensors", "c": "y.safetensors"}, "has the tensor b, but .* does not know it")
    refuse({**places, "b": "y.safetensors"}, "x.safetensors has the tensor b, but .* has it in y.safetensors")
    index.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors .*pytorch_model.bin is a program"):
        SafetensorsFolder(tmp_path)


def test_every_damage_is_refused_or_read(path: Path) -> None:
    """Every bit flipped in turn, every truncation, and pieces put elsewhere: refused, or tensors within the file."""
    good = path.read_bytes()
    rng = random.Random(5)
    header = 8 + struct.unpack_from("<Q", good)[0]
    cases = [good[:n] for n in range(len(good))]
    cases += [good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1 :] for i in range(len(good))]
    for _ in range(1500):
        a, b = sorted(rng.sample(range(header), 2))
        at = rng.randrange(header)
        cases.append(good[:at] + good[a:b] + good[rng.choice((at, at + b - a)) :])
    target = path.with_name("damaged")
    seen = 0
    for case in cases:
        target.unlink(missing_ok=True)  # some file systems wait for the disk where a file is cut to nothing
        target.write_bytes(case)
        try:
            file = SafetensorsFile(target)
        except CheckpointError:
            continue
        seen += 1
        assert sum(file.array(name).nbytes for name in file.entries) <= len(case)
    assert 0 < seen < len(cases)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2**70) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["dtype", "shape", "data_offsets"]), json_values)
def test_any_field_may_hold_anything(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "x").write_bytes(raw({"a": entry("U8", [4], 0, 4) | {field: value}}, bytes(4)))
    with suppress(CheckpointError):
        assert SafetensorsFile(tmp_path / "x").array("a").nbytes == 4


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=9).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(safetensors_file.DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    st.integers(1, 100),
)
def test_any_tensors_go_through(tmp_path: Path, wanted: dict[str, tuple[str, list[int]]], limit: int) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        name: (dtype, rng.integers(0, 2, shape).astype(safetensors_file.DTYPES[dtype]))
        for name, (dtype, shape) in wanted.items()
    }
    for file in tmp_path.iterdir():
        os.remove(file)
    made: list[Callable[[], Array]] = [lambda a=a: a for _, a in arrays.values()]  # type: ignore[misc]
    write_safetensors(
        tmp_path,
        [TensorPart(n, d, a.shape, make) for (n, (d, a)), make in zip(arrays.items(), made, strict=True)],
        max_shard_size=limit,
    )
    folder = SafetensorsFolder(tmp_path)
    assert folder.entries.keys() == arrays.keys()
    for name, (_, array) in arrays.items():
        np.testing.assert_array_equal(folder.array(name), array)

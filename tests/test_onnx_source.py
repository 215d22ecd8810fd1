"""Reading our own ONNX files: what was written comes back, and a file that lies is refused with a sentence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", minversion="1.20", reason="ONNX files are made and checked by it")

from bitnet import BitNetConfig, BitNetForCausalLM, ops  # noqa: E402
from bitnet.errors import CheckpointError, ConfigError  # noqa: E402
from bitnet.formats import onnx_export, protobuf  # noqa: E402
from bitnet.formats.onnx_export import save_onnx  # noqa: E402
from bitnet.formats.onnx_model import pack_int2, unpack_int2  # noqa: E402
from bitnet.formats.onnx_source import open_onnx  # noqa: E402
from bitnet.formats.source import Codes, assemble  # noqa: E402
from bitnet.formats.weights import codes_of  # noqa: E402
from bitnet.tokenizer import ByteTokenizer  # noqa: E402

TINY = BitNetConfig(11, 8, 12, 1, 2, 1, "relu2", 8, tie_word_embeddings=True)
NAME = "model.layers.0.mlp.up_proj.weight"
CONFIGS = [
    TINY,
    TINY.replace(tie_word_embeddings=False),
    TINY.replace(tie_word_embeddings=False, quantize_head=True),
    TINY.replace(quantize_head=True),
    TINY.replace(linear="linear", sub_norms=False),
]
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def logits(model: BitNetForCausalLM) -> np.ndarray:
    with ops.no_grad():
        return model(TOKENS).numpy()


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models as if they were large."""
    monkeypatch.setattr(onnx_export, "SINGLE_MAX", 1000)
    monkeypatch.setattr(onnx_export, "EXTERNAL_MIN", 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_onnx(BitNetForCausalLM(TINY, seed=2), tmp_path / "x.onnx")
    return tmp_path / "x.onnx"


# ---- what was written comes back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("is_large", [False, True])
def test_export_import_export_is_the_same_bytes(
    config: BitNetConfig, is_large: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if is_large:
        request.getfixturevalue("small_limit")
    model = BitNetForCausalLM(config, seed=1)
    for form in ("int8", "int2"):
        if form == "int2" and config.linear == "linear":
            continue
        for name in ("a", "b", "c"):
            (tmp_path / name).mkdir(exist_ok=True)
        save_onnx(model, tmp_path / "a" / "x.onnx", weights=form, force=True)
        save_onnx(model, tmp_path / "b" / "x.onnx", weights=form, force=True)
        again = assemble(open_onnx(tmp_path / "a" / "x.onnx"))
        assert again.config == config
        np.testing.assert_array_equal(logits(again), logits(model))
        save_onnx(again, tmp_path / "c" / "x.onnx", weights=form, force=True)
        files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("a", "b", "c")]
        assert files[0] == files[1] == files[2]
        assert len(files[0]) == 1 + is_large


def test_codes_and_scale_are_those_of_the_layer(tmp_path: Path) -> None:
    model = BitNetForCausalLM(TINY, seed=2)
    want = codes_of(model.model.layers[0].mlp.up_proj)  # type: ignore[attr-defined]
    for form in ("int8", "int2"):
        save_onnx(model, tmp_path / "x.onnx", weights=form, force=True)
        source = open_onnx(tmp_path / "x.onnx")
        found = source.read(NAME)
        assert isinstance(found, Codes)
        np.testing.assert_array_equal(found.codes, want.codes)
        assert found.scale == want.scale
        assert source.shapes[NAME] == want.codes.shape
        assert NAME in source.ternary
        assert source.about()["provenance"] == {"bitnet.weights": form}


def test_a_folder_brings_its_tokenizer(tmp_path: Path) -> None:
    model = BitNetForCausalLM(TINY.replace(vocab_size=300), seed=2)
    save_onnx(model, tmp_path / "x", tokenizer=ByteTokenizer())
    again = assemble(open_onnx(tmp_path / "x"))
    assert isinstance(again.tokenizer, ByteTokenizer)
    save_onnx(again, tmp_path / "y")
    assert [sorted((f.name, f.read_bytes()) for f in (tmp_path / name).iterdir()) for name in "xy"] == [
        sorted((f.name, f.read_bytes()) for f in (tmp_path / "x").iterdir())
    ] * 2
    save_onnx(model, tmp_path / "none")
    assert open_onnx(tmp_path / "none").about()["tokenizer"] is None


@given(st.lists(st.integers(-2, 1), max_size=40))
def test_int2_both_ways(codes: list[int]) -> None:
    values = np.array(codes, np.int8)
    packed = pack_int2(values)
    assert packed.size == -(-len(codes) // 4)
    np.testing.assert_array_equal(unpack_int2(packed, len(codes)), values)


# ---- the wire format ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1), st.binary(max_size=200), st.integers(1, 2**29 - 1))
def test_fields_are_read_as_written(number: int, data: bytes, field: int) -> None:
    message = protobuf.opening(field, len(data)) + data + protobuf.varint(field << 3) + protobuf.varint(number)
    assert list(protobuf.fields(memoryview(message))) == [(field, data), (field, number)]
    packed = protobuf.varint(number) + protobuf.varint(7)
    assert protobuf.numbers(memoryview(packed)) == [number, 7]


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert all(isinstance(value, int) or len(value) <= len(data) for _, value in protobuf.fields(memoryview(data)))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\x08", "a number is cut off"),
        (b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", "is no number below 2^64".replace("^", r"\^")),
        (b"\x08" + b"\x80" * 10 + b"\x00", r"is no number below 2\^64"),
        (b"\x0a\x05abcd", "field 1 should have 5 bytes, but 4 follow"),
        (b"\x0a" + protobuf.varint(2**64 - 1), "field 1 should have 18446744073709551615 bytes, but 0 follow"),
        (b"\x09abcdefg", "field 1 should have 8 bytes, but 7 follow"),
        (b"\x0b\x0c", "field 1 has the unknown wire type 3"),
        (b"\x00\x00", "field number 0 is not between"),
    ],
)
def test_messages_that_are_none(data: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        list(protobuf.fields(memoryview(data)))


# ---- files that lie -------------------------------------------------------------------------------------------------


def tensor(model: Any, name: str = NAME) -> Any:
    return next(t for t in model.graph.initializer if t.name == name)


def told(model: Any, text: str) -> None:
    model.metadata_props[0].value = text


def config(model: Any, **fields: Any) -> None:
    told(model, json.dumps({**json.loads(model.metadata_props[0].value), **fields}))


def add(model: Any, name: str) -> None:
    model.graph.initializer.add(name=name, data_type=1, raw_data=b"abcd")


def twice(model: Any) -> None:
    model.graph.initializer.add().CopyFrom(tensor(model))


def dims(*sizes: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        del tensor(model).dims[:]
        tensor(model).dims.extend(sizes)

    return change


def scale(value: float) -> Callable[[Any], None]:
    return lambda model: setattr(tensor(model, NAME + "_scale"), "raw_data", np.float32(value).tobytes())


LIES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "size overflow": (dims(2**32, 2**32), "96 bytes, but 18446744073709551616 for its shape"),
    "zero-wrapping product": (dims(2**39, 2**39), "96 bytes, but 302231454903657293676544 for its shape"),
    "negative size": (dims(-8, -12), "has no shape of a matrix"),
    "size of zero": (dims(0, 12), "has no shape of a matrix"),
    "too many dimensions": (dims(*[1] * 5000), "has no shape of a matrix"),
    "no dimensions": (dims(), "96 bytes, but 1 for its shape"),
    "one dimension": (dims(96), "is no matrix"),
    "another shape": (dims(12, 8), r"has shape \(8, 12\), but \(12, 8\) by its config"),
    "unknown type": (lambda m: setattr(tensor(m), "data_type", 99), "has the unknown type 99"),
    "another type": (lambda m: setattr(tensor(m), "data_type", 1), "96 bytes, but 384 for"),
    "too few bytes": (lambda m: setattr(tensor(m), "raw_data", b"ab"), "2 bytes, but 96 for"),
    "numbers instead of bytes": (lambda m: tensor(m).int32_data.append(1), "has the unknown field 5"),
    "duplicate name": (twice, f"it has two initializers {NAME}"),
    "duplicate key": (lambda m: m.metadata_props.add(key="bitnet.weights"), "has the metadata 'bitnet.weights' twice"),
    "empty name": (lambda m: setattr(tensor(m), "name", ""), r"a name is empty|its bytes are missing"),
    "missing weight": (lambda m: m.graph.initializer.remove(tensor(m)), "up_proj.weight"),
    "superfluous weight": (lambda m: add(m, "more"), "has more, for"),
    "missing scale": (lambda m: m.graph.initializer.remove(tensor(m, NAME + "_scale")), "up_proj.weight has no scale"),
    "scale of zero": (scale(0), "has the scale 0.0"),
    "negative scale": (scale(-1), "has the scale -1.0"),
    "scale that is no number": (scale(np.nan), "has the scale nan"),
    "infinite scale": (scale(np.inf), "has the scale inf"),
    "code of two": (lambda m: setattr(tensor(m), "raw_data", b"\2" * 96), "has a code that is not -1, 0 or 1"),
    "sparse": (lambda m: m.graph.sparse_initializer.add(), "it has a sparse initializer"),
    "no config": (lambda m: m.metadata_props.pop(0), "only ONNX files that bitnet wrote can be read"),
    "config that is no JSON": (lambda m: told(m, "{"), "bitnet.config is no JSON: Exp"),
    "config without end": (lambda m: told(m, "[" * 99999), "bitnet.config is no JSON: max"),
    "config that is no object": (lambda m: told(m, "[]"), "its bitnet.config is no object"),
    "config of another model": (lambda m: config(m, hidden_size=16), "but .* by its config"),
    "config of a twin": (lambda m: config(m, linear="linear"), "stored as ternary codes, which its config does not"),
    "layers without end": (lambda m: config(m, num_hidden_layers=2**60), "which its config asks for"),
    "positions without end": (lambda m: config(m, max_position_embeddings=2**40), "made for at most 1048576"),
    "more positions than bytes": (lambda m: config(m, max_position_embeddings=2**20), "too small to have max_position"),
    "external data elsewhere": (lambda m: place(m, location="../y"), r"is in '\.\./y', not in x\.onnx\.data"),
    "external data of no file": (lambda m: place(m), r"x\.onnx\.data cannot be read"),
    "external data of another size": (lambda m: place(m, length="97"), "97 bytes of external data, but 96"),
    "external data and bytes": (lambda m: (place(m), setattr(tensor(m), "raw_data", b"a")), "of external data, but"),
}  # fmt: skip


def place(model: Any, **changes: str) -> None:
    """Says that a weight is external data."""
    at = tensor(model)
    at.ClearField("raw_data")
    at.data_location = at.EXTERNAL
    del at.external_data[:]
    for key, value in {"location": "x.onnx.data", "offset": "0", "length": "96", **changes}.items():
        at.external_data.add(key=key, value=value)


def read_all(path: Path) -> BitNetForCausalLM:
    return assemble(open_onnx(path))


@pytest.mark.parametrize("lie", LIES, ids=LIES)
def test_a_file_that_lies(path: Path, lie: str) -> None:
    change, sentence = LIES[lie]
    model = onnx.load(str(path))
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_all(path)
    assert "x.onnx" in str(caught.value)


PLACES: dict[str, tuple[dict[str, str], str]] = {
    "outside": ({"offset": "655360"}, r"data end at 655456, x.onnx.data at"),
    "bad alignment": ({"offset": "1"}, "begins at 1, which is no multiple of 65536|begins at"),
    "overlapping": ({"offset": "0"}, "begins at 0, which is no multiple of 65536 from"),
    "negative": ({"offset": "-65536"}, "has its external data at no place"),
    "a number without end": ({"offset": "9" * 5000}, "has its external data at no place"),
    "no number": ({"offset": "١"}, "has its external data at no place"),
    "a key more": ({"checksum": "a"}, "has the external data 'checksum' twice, or has no use for it"),
}


@pytest.mark.parametrize("lie", PLACES, ids=PLACES)
def test_external_data_that_lie(tmp_path: Path, small_limit: None, lie: str) -> None:
    path = tmp_path / "x.onnx"
    save_onnx(BitNetForCausalLM(TINY, seed=2), path)
    read_all(path)
    changes, sentence = PLACES[lie]
    model = onnx.load(str(path), load_external_data=False)
    place(model, **changes)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=sentence):
        read_all(path)


def test_external_data_that_are_cut_off_or_gone(tmp_path: Path, small_limit: None) -> None:
    path, data = tmp_path / "x.onnx", tmp_path / "x.onnx.data"
    save_onnx(BitNetForCausalLM(TINY, seed=2), path)
    source = open_onnx(path)
    whole = data.read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        data.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"its last external data end at \d+, x.onnx.data at"):
            read_all(path)
    with pytest.raises(CheckpointError, match=r"x\.onnx\.data is cut off"):
        assemble(source)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"x\.onnx\.data cannot be read: No such file"):
        read_all(path)


def test_two_graphs_are_refused(path: Path) -> None:
    """Protocol buffers would join them, and the sizes of the first with the weights of the second."""
    path.write_bytes(path.read_bytes() + protobuf.opening(7, 0))
    with pytest.raises(CheckpointError, match="it has two graphs"):
        read_all(path)


def test_counts_without_end_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "FIELDS_MAX", 1000)
    path = tmp_path / "x.onnx"
    sizes = protobuf.opening(1, 1001) + b"\1" * 1001
    for graph in (b"\x0a\x00" * 1001, protobuf.opening(5, len(sizes)) + sizes):
        path.write_bytes(protobuf.opening(7, len(graph)) + graph)
        with pytest.raises(CheckpointError, match=r"has more than 1000 (fields|numbers)"):
            open_onnx(path)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    for content, sentence in [
        (b"", "x.onnx: it is no ONNX file: it has 0 bytes"),
        (b"GGUF", "x.onnx: field 8 has the unknown wire type 7"),
        (b"\x89BITNET\n", "x.onnx: "),
        (b"{}", "x.onnx: field 15 has the unknown wire type 3"),
    ]:
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(CheckpointError, match=sentence):
            open_onnx(tmp_path / "x.onnx")
    with pytest.raises(CheckpointError, match=r"no\.onnx cannot be read: No such file"):
        open_onnx(tmp_path / "no.onnx")
    with pytest.raises(CheckpointError, match=r"model.onnx cannot be read: No such file"):
        open_onnx(tmp_path)


def mutations(data: bytes, count: int) -> Iterator[bytes]:
    """Valid files with a byte changed, bytes cut out, put in, doubled, or the end gone."""
    rng = np.random.default_rng(11)
    for _ in range(count):
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
        kind = rng.integers(6)
        if kind < 3:
            yield data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        elif kind == 3:
            yield data[:at]
        elif kind == 4:
            yield data[:at] + data[at + length :]
        else:
            other = int(rng.integers(len(data)))
            yield data[:at] + data[other : other + length] + data[at:]


@pytest.mark.parametrize("form", ["int8", "int2", "external"])
def test_any_damage_is_refused_or_read(tmp_path: Path, form: str, request: pytest.FixtureRequest) -> None:
    """Never another exception; of values of weights the reader cannot know that they changed."""
    if form == "external":
        request.getfixturevalue("small_limit")
    path = tmp_path / "x.onnx"
    save_onnx(BitNetForCausalLM(TINY, seed=2), path, weights=form if form == "int2" else "int8")
    model = onnx.load(str(path), load_external_data=False)
    del model.graph.node[:]  # which are not read, so that most damage is where it matters
    data, refused = model.SerializeToString(), 0
    for damaged in mutations(data, 700):
        path.write_bytes(damaged)
        try:
            read_all(path)
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > 200

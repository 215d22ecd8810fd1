"""Blocks of ggml's types: published bytes, the bytes that gguf-py makes, and codes that mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.formats import gguf_blocks, gguf_types
from bitnet.formats.gguf_blocks import codes_among, decode, decode_codes, encode, encode_codes
from bitnet.formats.gguf_types import BF16, F16, F32, I2_S, Q4_K, Q6_K, Q8_0, TQ1_0, TQ2_0, TensorType

EXAMPLE = np.array([(i * i + i // 5) % 3 - 1 for i in range(256)], np.int8)  # with scale 0.5
PUBLISHED = [
    (TQ1_0, "x86", "2c70825087ee95c8bf573d05b70e252c70825087ee95c8bf573d05b70e252c70"
                   "1339ac050d27786735a1e2a5eeca5c13369872390038"),
    (TQ2_0, "x86", "54a19568251a89062201484012508454a19568251a89062201484012508454a1"
                   "2201484012508454a19568251a89062201484012508454a19568251a89062201" "0038"),
    (I2_S, "x86", "154a562958a4629088402101840512154a562958a4629088402101840512154a"
                  "88402101840512154a562958a4629088402101840512154a562958a462908840" "0000003f" + 28 * "00"),
    (I2_S, "arm", "14514619669a69a49042082080010514669a69a4904208208001051451461966"
                  "9042082080010514514619669a69a49080010514514619669a69a49042082080" "0000003f" + 28 * "00"),
]  # fmt: skip
TERNARY = pytest.mark.parametrize("kind", [TQ1_0, TQ2_0, I2_S], ids=lambda kind: kind.name)


def random_codes(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (rows, cols)).astype(np.int8)


def wide(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Rows of very different sizes, one of zeros, one with ties of rounding to eight bits."""
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(rows, cols)) * np.exp(rng.normal(size=(rows, 1)) * 3)).astype(np.float32)
    values[0] = 0
    values[1] = np.arange(cols) % 2 + 0.5
    values[1, ::32] = 127
    return values


@pytest.mark.parametrize(("kind", "order", "data"), PUBLISHED, ids=["tq1_0", "tq2_0", "i2_s x86", "i2_s arm"])
def test_published_bytes(kind: TensorType, order: str, data: str) -> None:
    assert encode_codes(kind, EXAMPLE, 0.5, order).tobytes().hex() == data
    assert kind.bytes_of((256,)) == len(data) // 2
    codes, scales = decode_codes(kind, memoryview(bytes.fromhex(data)), order)
    np.testing.assert_array_equal(codes, EXAMPLE)
    assert scales.tolist() == [0.5]


@TERNARY
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 99), st.sampled_from(["x86", "arm"]))
def test_codes_come_back(kind: TensorType, rows: int, seed: int, order: str) -> None:
    codes = random_codes(rows, 256, seed)
    data = encode_codes(kind, codes, 0.25, order)
    assert data.nbytes == kind.bytes_of(codes.shape)
    found, scales = decode_codes(kind, memoryview(data), order)
    np.testing.assert_array_equal(found, codes.reshape(-1))
    assert (scales == 0.25).all()


def test_every_sum_of_five_digits_comes_back() -> None:
    digits = np.array([[q // 3 ** (4 - n) % 3 - 1 for n in range(5)] for q in range(243)], np.int8)
    blocks = np.resize(digits, (8, 32, 5)).swapaxes(1, 2).reshape(8, 160)
    codes = np.concatenate([blocks, np.zeros((8, 96), np.int8)], 1)
    data = encode_codes(TQ1_0, codes, 1.0, "x86")
    np.testing.assert_array_equal(decode_codes(TQ1_0, memoryview(data), "x86")[0], codes.reshape(-1))
    stored = gguf_blocks.TQ1_BYTES
    assert (stored[0], stored[121], stored[242]) == (0x00, 0x80, 0xFF)
    assert encode_codes(TQ1_0, np.zeros(256, np.int8), 1.0, "x86").tobytes()[48:] == bytes.fromhex("7f7f7f7f0000")
    assert encode_codes(TQ1_0, np.ones(256, np.int8), 1.0, "x86").tobytes()[48:52] == bytes.fromhex("fdfdfdfd")


def test_ternary_blocks_are_those_of_gguf_py() -> None:
    quants = pytest.importorskip("gguf.quants")
    codes = random_codes(40, 1024)
    codes[3], codes[4, :256] = 0, 0
    for kind in (TQ1_0, TQ2_0):
        for scale in (1.0, 0.5, float(np.float32(0.0137)), 3e-5, 700.0):
            theirs = quants.quantize(codes * np.float32(scale), quants.GGMLQuantizationType[kind.name])
            assert encode_codes(kind, codes, scale, "x86").tobytes() == theirs.tobytes()
            found, scales = decode_codes(kind, memoryview(theirs).cast("B"), "x86")
            values = found.reshape(-1, 256) * scales[:, None]
            wanted = quants.dequantize(theirs, quants.GGMLQuantizationType[kind.name])
            np.testing.assert_array_equal(values.reshape(codes.shape), wanted)


def test_q8_0_blocks_are_those_of_gguf_py() -> None:
    quants = pytest.importorskip("gguf.quants")
    values = wide(200, 512)
    theirs = quants.quantize(values, quants.GGMLQuantizationType.Q8_0)
    assert encode(Q8_0, values).tobytes() == theirs.tobytes()
    wanted = quants.dequantize(theirs, quants.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(decode(Q8_0, memoryview(theirs).cast("B")), wanted.reshape(-1))


@pytest.mark.parametrize(("kind", "halves"), [(Q4_K, (1, 3)), (Q6_K, (209,))], ids=["q4_k", "q6_k"])
def test_values_are_those_of_gguf_py(kind: TensorType, halves: tuple[int, ...]) -> None:
    quants = pytest.importorskip("gguf.quants")
    blocks = np.random.default_rng(0).integers(0, 256, (300, kind.bytes)).astype(np.uint8)
    blocks[:, halves] &= 0x3B  # a number
    wanted = quants.dequantize(blocks, quants.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(decode(kind, memoryview(blocks.reshape(-1))), wanted.reshape(-1))


@pytest.mark.parametrize("kind", [F32, F16, BF16], ids=lambda kind: kind.name)
def test_floats_come_back_as_far_as_their_type_holds_them(kind: TensorType) -> None:
    values = wide(20, 33)
    data = encode(kind, values)
    assert data.nbytes == kind.bytes_of(values.shape)
    found = decode(kind, memoryview(data)).reshape(values.shape)
    error = {F32: 0.0, F16: 2**-11, BF16: 2**-8}[kind]
    assert (np.abs(found - values) <= error * np.abs(values) + 2**-25).all()
    assert encode(kind, found).tobytes() == data.tobytes()


def test_eight_bits_written_again_are_the_same() -> None:
    data = encode(Q8_0, wide(200, 512))
    assert encode(Q8_0, decode(Q8_0, memoryview(data))).tobytes() == data.tobytes()


def test_pieces_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    values = wide(30, 256)
    whole = {kind: encode(kind, values).tobytes() for kind in (F16, Q8_0)}
    codes = random_codes(30, 256)
    monkeypatch.setattr(gguf_blocks, "VALUES", 1024)
    for kind, data in whole.items():
        assert encode(kind, values).tobytes() == data
    np.testing.assert_array_equal(
        codes_among(F32, memoryview(encode(F32, codes * np.float32(0.3))))[0], codes.reshape(-1)  # type: ignore[index]
    )  # fmt: skip


def test_numbers_that_halves_do_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="70000 is beyond what F16 holds, which ends at 65504"):
        encode(F16, np.array([1, -70000], np.float32))
    with pytest.raises(ValueError, match="beyond what F16 holds"):
        encode(Q8_0, np.full(32, 1e8, np.float32))
    with pytest.raises(ValueError, match="beyond what F16 holds"):
        encode_codes(TQ2_0, EXAMPLE, 1e5, "x86")
    with pytest.raises(ValueError, match="the scale 1e-09 is below what F16 holds"):
        encode_codes(TQ1_0, EXAMPLE, 1e-9, "x86")


@pytest.mark.parametrize("kind", [TQ2_0, I2_S], ids=lambda kind: kind.name)
def test_the_unused_code_is_refused(kind: TensorType) -> None:
    data = encode_codes(kind, EXAMPLE, 0.5, "x86")
    data[5] |= 0xC0
    with pytest.raises(ValueError, match=r"byte 5 of its codes is 0x.., which holds a 3"):
        decode_codes(kind, memoryview(data), "x86")


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", [0.25, 0.01, 1.0])
def test_codes_are_found_among_floats(kind: TensorType, scale: float) -> None:
    codes = random_codes(3, 256)
    codes[0, :100] = 0
    data = encode(kind, codes * np.float32(scale))
    found = codes_among(kind, memoryview(data))
    assert found is not None
    np.testing.assert_array_equal(found[0], codes.reshape(-1))
    assert found[1] == np.abs(decode(kind, memoryview(data))).max()
    assert found[1] == pytest.approx(scale, rel=2**-8)


@pytest.mark.parametrize("kind", [F32, F16, BF16], ids=lambda kind: kind.name)
def test_other_floats_are_no_codes(kind: TensorType) -> None:
    values = random_codes(3, 256) * np.float32(0.25)
    values[1, 7] = 0.3
    assert codes_among(kind, memoryview(encode(kind, values))) is None
    none = codes_among(kind, memoryview(encode(kind, np.zeros(9, np.float32))))
    assert none is not None and none[1] == 0 and not none[0].any()
    signed = codes_among(kind, memoryview(encode(kind, np.array([0.0, -0.0, -2.0], np.float32))))
    assert signed is not None and signed[0].tolist() == [0, 0, -1] and signed[1] == 2


def test_types_have_the_sizes_of_gguf_py() -> None:
    gguf = pytest.importorskip("gguf")
    for kind in gguf_types.TYPES.values():
        if kind is not I2_S:  # which it does not know
            theirs = gguf.GGMLQuantizationType(kind.id)
            assert (theirs.name, gguf.GGML_QUANT_SIZES[theirs]) == (kind.name, (kind.block, kind.bytes))

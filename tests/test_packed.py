"""Packed layers: codes in 2 or 1.6 bits a weight give the bits that latent weights give, in far less memory."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, ShapeError, _core, layout, ops
from bitnet.decoding import Decoder
from bitnet.layout import LAYOUTS

SMALL = BitNetConfig(50, 48, 80, 2, 4, 2, max_position_embeddings=64)
LAYOUT = st.sampled_from(LAYOUTS)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 700), st.integers(1, 120), st.booleans(), st.integers(0, 99), LAYOUT)
def test_the_same_bits(rows: int, inner: int, outer: int, with_residual: bool, seed: int, name: str) -> None:
    """For few rows, whose codes are taken apart in registers, and for many, which go through blocks."""
    rng = np.random.default_rng(seed)
    x = bitnet.tensor(rng.normal(size=(rows, inner)).astype(np.float32))
    layer = bitnet.nn.BitLinear(inner, outer)
    codes, stats, scale = layer.codes().numpy(), layer.ternary_stats(), layer.weight_scale
    residual = bitnet.tensor(rng.normal(size=(rows, outer)).astype(np.float32)) if with_residual else None
    want = layer(x, residual).numpy()
    layer.pack(name)
    with ops.no_grad():
        np.testing.assert_array_equal(layer(x, residual).numpy(), want)
    np.testing.assert_array_equal(layer.codes().numpy(), codes)
    assert (layer.ternary_stats(), layer.weight_scale) == (stats, scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_every_instruction_set(isa: str, layout: str) -> None:
    """One width has whole groups of five tiles, one a rest of tiles, one neither."""
    rng = np.random.default_rng(5)
    for rows, width in itertools.product((1, 2, 3, 5, 8, 9, 33), (200, 640, 1000)):
        x = bitnet.tensor(rng.normal(size=(rows, width)).astype(np.float32))
        layer = bitnet.nn.BitLinear(width, 117)
        want = layer(x).numpy()
        layer.pack(layout)
        with ops.no_grad():
            np.testing.assert_array_equal(layer(x).numpy(), want, err_msg=isa)


def fifths(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Five codes a byte as kernels.h has them: byte j of m holds codes j, j + m, ..., j + 4 m in base 3."""
    part = -(-codes.size // 5)
    digits = np.zeros(5 * part, np.int64)
    digits[: codes.size] = codes.ravel() + 1
    return (digits.reshape(5, part) * 3 ** np.arange(5)[:, None]).sum(0).astype(np.uint8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 700), st.integers(0, 99), LAYOUT)
def test_fifths_are_prepared_like_codes(rows: int, cols: int, seed: int, layout: str) -> None:
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, cols), np.int8)
    weight = _core.prepare_fifths(fifths(codes), rows, cols, 0.25, layout)
    np.testing.assert_array_equal(_core.ternary_codes(weight).numpy(), codes)
    counts = [int((codes == code).sum()) for code in (-1, 0, 1)]
    assert _core.ternary_stats(weight) == (*counts, 0, 0.25)
    assert _core.ternary_layout(weight) == layout


def test_every_byte_of_fifths() -> None:
    """All 256: those above 242 are no codes."""
    for byte in range(256):
        data = np.full(64, byte, np.uint8)
        if byte > 242:
            with pytest.raises(ValueError, match="row 0 of a ternary weight has 64 bytes above 242"):
                _core.prepare_fifths(data, 5, 64, 1.0)
        else:
            want = np.repeat([byte // 3**k % 3 - 1 for k in range(5)], 64).reshape(5, 64)
            np.testing.assert_array_equal(_core.ternary_codes(_core.prepare_fifths(data, 5, 64, 1.0)).numpy(), want)


def test_fifths_of_another_size_are_refused() -> None:
    for rows, cols in ((5, 65), (0, 64), (-5, -64), (1 << 40, 1 << 22)):
        with pytest.raises(ShapeError, match="64 bytes are not the fifths"):
            _core.prepare_fifths(np.zeros(64, np.uint8), rows, cols, 1.0)
    with pytest.raises(ValueError, match=r"2 or 1\.6"):
        _core.prepare_fifths(np.zeros(64, np.uint8), 5, 64, 1.0, "3")


def test_the_layout_is_tried_where_the_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROWS", 640), ("COLS", 640), ("LEAST_CODES", 1000)):
        monkeypatch.setattr(f"bitnet.layout.{name}", value)
    layout.measured_layout.cache_clear()
    chosen = layout.choose_layout(1000)
    assert chosen in LAYOUTS and layout.choose_layout(999) == "2" and layout.choose_layout(1, "1.6") == "1.6"
    model = BitNetForCausalLM(SMALL)
    model.pack()
    assert {_core.ternary_layout(layer.weight) for _, layer in model.bitlinears()} == {chosen}
    layout.measured_layout.cache_clear()
    with pytest.raises(ValueError, match=r"a layout is auto, 2 or 1\.6, not '3'"):
        model.pack("3")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["silu", "relu2"])
def test_a_packed_model_decodes_the_same_logits(act: str, layout: str) -> None:
    model = BitNetForCausalLM(SMALL.replace(hidden_act=act))
    latent, before = Decoder(model, batch=2), model.num_parameters()
    prompts = [[1, 2, 3, 4, 5], [7, 8]]
    want = [latent.prefill(prompts), *(latent.step([token, token + 1]) for token in range(6))]
    ternary = sum(layer.weight.size for _, layer in model.bitlinears())
    assert model.pack(layout) is model
    assert model.num_parameters() == before - ternary
    packed = Decoder(model, batch=2)
    got = [packed.prefill(prompts), *(packed.step([token, token + 1]) for token in range(6))]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_as_many_bits_a_weight(layout: str) -> None:
    layer = bitnet.nn.BitLinear(1280, 4096)
    before = _core.memory_stats()["in_use"]
    layer.pack(layout)
    codes = 1280 * 4096
    assert _core.memory_stats()["in_use"] <= before - 4 * codes + codes * float(layout) / 8 + (1 << 17)


def test_what_a_packed_layer_refuses() -> None:
    layer = bitnet.nn.BitLinear(64, 32)
    layer.pack()
    x = bitnet.tensor(np.ones((2, 64), np.float32), requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient back to x"):
        layer(x)
    with pytest.raises((TypeError, BufferError), match="prepared"):
        layer.weight.numpy()
    with pytest.raises(TypeError, match="this layer is packed and has no latent weights"):
        layer.state_dict()
    assert layer.pack().is_packed
    with pytest.raises(TypeError, match="weight is prepared"):
        ops.linear(x, layer.weight)
    with pytest.raises(ValueError, match="code 1 of a ternary weight is 2"):
        _core.prepare_ternary(bitnet.tensor(np.array([[1, 2]], np.int8)), 1.0)
    with pytest.raises(TypeError, match="not from f32"):
        _core.prepare_ternary(bitnet.tensor(np.ones((2, 2), np.float32)), 1.0)

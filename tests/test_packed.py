"""Packed layers: codes in two bits a weight give the bits that latent weights give, in a sixteenth of the memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, _core, ops
from bitnet.decoding import Decoder

SMALL = BitNetConfig(50, 48, 80, 2, 4, 2, max_position_embeddings=64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 120), st.booleans(), st.integers(0, 99))
def test_the_same_bits(rows: int, inner: int, outer: int, with_residual: bool, seed: int) -> None:
    """For few rows, whose codes are taken apart in registers, and for many, which go through blocks."""
    rng = np.random.default_rng(seed)
    x = bitnet.tensor(rng.normal(size=(rows, inner)).astype(np.float32))
    layer = bitnet.nn.BitLinear(inner, outer)
    codes, stats, scale = layer.codes().numpy(), layer.ternary_stats(), layer.weight_scale
    residual = bitnet.tensor(rng.normal(size=(rows, outer)).astype(np.float32)) if with_residual else None
    want = layer(x, residual).numpy()
    layer.pack()
    with ops.no_grad():
        np.testing.assert_array_equal(layer(x, residual).numpy(), want)
    np.testing.assert_array_equal(layer.codes().numpy(), codes)
    assert (layer.ternary_stats(), layer.weight_scale) == (stats, scale)


def test_on_every_instruction_set(isa: str) -> None:
    rng = np.random.default_rng(5)
    for rows in (1, 2, 3, 5, 8, 9, 33):
        x = bitnet.tensor(rng.normal(size=(rows, 200)).astype(np.float32))
        layer = bitnet.nn.BitLinear(200, 117)
        want = layer(x).numpy()
        layer.pack()
        with ops.no_grad():
            np.testing.assert_array_equal(layer(x).numpy(), want, err_msg=isa)


@pytest.mark.parametrize("act", ["silu", "relu2"])
def test_a_packed_model_decodes_the_same_logits(act: str) -> None:
    model = BitNetForCausalLM(SMALL.replace(hidden_act=act))
    latent, before = Decoder(model, batch=2), model.num_parameters()
    prompts = [[1, 2, 3, 4, 5], [7, 8]]
    want = [latent.prefill(prompts), *(latent.step([token, token + 1]) for token in range(6))]
    ternary = sum(layer.weight.size for _, layer in model.bitlinears())
    assert model.pack() is model
    assert model.num_parameters() == before - ternary
    packed = Decoder(model, batch=2)
    got = [packed.prefill(prompts), *(packed.step([token, token + 1]) for token in range(6))]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_is_a_quarter_of_a_byte_a_weight() -> None:
    layer = bitnet.nn.BitLinear(1024, 4096)
    before = _core.memory_stats()["in_use"]
    layer.pack()
    assert _core.memory_stats()["in_use"] <= before - 4 * 1024 * 4096 + 1024 * 4096 // 4 + (1 << 17)


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

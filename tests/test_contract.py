"""The numeric contract at its edges: ties, floors, zeros, NaN, saturation and the table of codes.

Quantized values are seen from outside through probes: an identity weight returns the int8 codes of the activations,
identity activations return the ternary codes of the weights.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from reference import quantize

import bitnet

F = np.float32


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return bitnet.ops.bitlinear(bitnet.tensor(x.astype(F)), bitnet.tensor(w.astype(F))).numpy()


def activation_codes(x: np.ndarray) -> np.ndarray:
    """int8 codes of x (rows, n): n times the identity has mean magnitude 1, so its codes are the identity, scale 1."""
    n = x.shape[-1]
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), F(1e-5)).astype(F) / F(127)
    q = product(x, n * np.eye(n)) / scale
    np.testing.assert_allclose(q, np.rint(q), atol=1e-4)  # y is an integer times the scale, to one rounding
    return np.rint(q).astype(int)


def weight_codes(w: np.ndarray) -> tuple[np.ndarray, float]:
    """Ternary codes and scale of w (out, n): rows of 127 times the identity have q = 127 and act_scale = 1."""
    y = product(127 * np.eye(w.shape[1]), w).T / F(127)
    magnitudes = np.unique(np.abs(y[y != 0]))
    assert len(magnitudes) <= 1, "every code is multiplied by one scale"
    return np.sign(y).astype(int), float(magnitudes[0]) if len(magnitudes) else 0.0


def test_activations_round_half_to_even(isa: str) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, 0.49999997, 0.50000006]], F)
    assert activation_codes(x).tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, 126, 0, 1]]


def test_weights_at_exactly_half_the_scale_are_zero(isa: str) -> None:
    """Mean magnitude 1 over multiples of g = 2^-20 whose partial sums stay below 16: exact in any order of float32."""
    g = 2.0**-20
    w = [0.5, -1.5, -0.5, 1.5, 0.5 + g, 1.5 - g, -0.5 - g, -1.5 + g, 0.5 - g, 1.5 + g, 2, 0, 1, -1, -2, 0]
    codes, scale = weight_codes(np.array([w]))
    assert scale == 1.0
    assert codes.tolist() == [[0, -1, 0, 1, 1, 1, -1, -1, 0, 1, 1, 0, 1, -1, -1, 0]]


def test_both_quantizers_multiply_by_a_rounded_reciprocal(isa: str) -> None:
    """The formulas take a reciprocal and multiply; beside a tie that is not the same as dividing."""
    odd, top = np.arange(1, 254, 2, dtype=F), np.arange(3, 60, dtype=F)[:, None]
    x = np.concatenate([top, odd / 2 * top / F(127)], 1)
    wanted = quantize.absmax_int8(x)[0]
    assert (wanted != np.rint(x / (top / F(127)))).any()
    np.testing.assert_array_equal(activation_codes(x), wanted)

    above = np.nextafter(F(20.5), F(21))  # mean magnitude 41: above / 41 > 0.5, but above * (1 / 41) is 0.5
    assert above / F(41) > 0.5
    codes, scale = weight_codes(np.array([[above, -61.5] * 8]))
    assert scale == 41.0
    assert codes.tolist() == [[0, -1] * 8]


def test_saturation_ends_at_127_and_never_at_minus_128(isa: str) -> None:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(64, 33)) * 10.0 ** rng.integers(-3, 30, (64, 1))).astype(F)
    q = activation_codes(x)
    assert q.min() == -127
    assert q.max() == 127
    assert (np.abs(q).max(-1) == 127).all()  # the largest magnitude of every row lands on the limit
    np.testing.assert_array_equal(q, quantize.absmax_int8(x)[0])


def test_weights_saturate_at_one(isa: str) -> None:
    """A weight of many scales is still one code; one of 1e-34, as dead dimensions of published models hold, is none."""
    w = np.full((4, 8), 1e-34, F)
    w[0, 0], w[2, 3] = 3e4, -3e4
    codes, scale = weight_codes(w)
    assert scale == 6e4 / 32
    assert codes[0, 0] == 1
    assert codes[2, 3] == -1
    assert np.count_nonzero(codes) == 2


def test_absmax_floor(isa: str) -> None:
    """Below absmax 1e-5 the step stays 1e-5 / 127: faint rows fade to zero instead of being blown up to full range."""
    x = np.array([[1e-5, -1e-5], [5e-6, 1e-7], [1e-8, -1e-8]], F)
    assert activation_codes(x).tolist() == [[127, -127], [64, 1], [0, 0]]  # 63.5 is a tie here: 63.500003 in float32


def test_absmean_floor(isa: str) -> None:
    """Below mean 1e-5 the scale stays 1e-5: weights under half of it are zero, and the product is a true zero."""
    assert (product(np.ones((2, 3)), np.full((5, 3), 4e-6)) == 0).all()
    codes, scale = weight_codes(np.full((5, 3), 6e-6))
    assert scale == F(1e-5)
    assert (codes == 1).all()


def test_zero_rows_and_zero_weights(isa: str) -> None:
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(3, 20)).astype(F), rng.normal(size=(7, 20)).astype(F)
    whole = product(x, w)
    x[1] = 0
    got = product(x, w)
    assert (got[1] == 0).all()
    np.testing.assert_array_equal(got[[0, 2]], whole[[0, 2]])
    assert (product(x, np.zeros((7, 20))) == 0).all()
    assert (bitnet.ops.rmsnorm(bitnet.tensor(np.zeros((2, 5), F))).numpy() == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_activation_spoils_its_own_row_only(isa: str, bad: float) -> None:
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(3, 70)).astype(F), rng.normal(size=(18, 70)).astype(F)
    whole = product(x, w)
    x[1, 69] = bad
    got = product(x, w)
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[[0, 2]], whole[[0, 2]])


def test_a_bad_weight_spoils_the_whole_product(isa: str) -> None:
    """The scale is one mean over the matrix: plausible numbers from a broken matrix would be worse than NaN."""
    w = np.ones((4, 6), F)
    w[2, 3] = math.nan
    assert np.isnan(product(np.ones((2, 6)), w)).all()


def test_nan_passes_through_every_activation(isa: str) -> None:
    x = bitnet.tensor(np.array([math.nan, -1.0, 2.0], F))
    one = bitnet.tensor(np.ones(3, F))
    for op in (bitnet.ops.relu2, bitnet.ops.swiglu):
        assert np.isnan(op(x, one).numpy()).tolist() == [True, False, False]
    assert np.isnan(bitnet.ops.softmax(x).numpy()).all()
    assert np.isnan(bitnet.ops.rmsnorm(x).numpy()).all()


def test_straight_through_ignores_clip_and_scale(isa: str) -> None:
    """A weight far beyond the clip, and a row's own largest activation, still get the plain linear gradient."""
    x, w = np.array([[127.0, 3.0, -64.0]], F), np.array([[100.0, 0.5, -1.0], [0.25, -2.0, 0.0]], F)
    tx, tw = bitnet.tensor(x, requires_grad=True), bitnet.tensor(w, requires_grad=True)
    bitnet.ops.bitlinear(tx, tw).sum().backward()
    codes, scale = quantize.ternary(w)
    np.testing.assert_allclose(tx.grad.numpy(), [codes.sum(0) * scale], rtol=1e-6)
    np.testing.assert_array_equal(tw.grad.numpy(), np.repeat(x, 2, 0))  # act_scale is 1: q = x


def test_ternary_stats_counts() -> None:
    layer = bitnet.nn.BitLinear(16, 2)
    rng = np.random.default_rng(4)
    w = rng.permutation([1.0] * 8 + [-1.0] * 4 + [2.0, -2.0] + [0.25] * 16 + [0.0] * 2).reshape(2, 16).astype(F)
    layer.load_state_dict({"weight": w})
    stats = layer.ternary_stats()
    codes, _ = quantize.ternary(w)
    counts = [int((codes == c).sum()) for c in (-1, 0, 1)]
    assert [stats.minus, stats.zero, stats.plus] == counts == [5, 18, 9]
    share = np.array(counts) / w.size
    assert stats.entropy == pytest.approx(float(-(share * np.log2(share)).sum()), rel=1e-6)


def test_entropy_of_a_weight_with_one_code_is_zero() -> None:
    layer = bitnet.nn.BitLinear(4, 4)
    layer.load_state_dict({"weight": np.ones((4, 4), F)})
    assert layer.ternary_stats().plus == 16
    assert layer.ternary_stats().entropy == 0.0


def test_table_of_packed_codes() -> None:
    """Four codes a byte, value + 1, the first in the lowest bits: 00 = -1, 01 = 0, 10 = 1."""
    codes = np.array([-1, 0, 1, 1, 0, -1, 1, 0, 1], np.int8)
    packed = bitnet.pack_ternary(bitnet.tensor(codes))
    assert (packed.dtype, packed.shape, packed.nbytes) == ("ternary2", (9,), 3)
    np.testing.assert_array_equal(packed.to("i8").numpy(), codes)
    np.testing.assert_array_equal(packed.to("f32").numpy(), codes.astype(F))
    with pytest.raises(ValueError, match="2"):
        bitnet.pack_ternary(bitnet.tensor(np.array([0, 2], np.int8)))


def test_cross_entropy_without_a_target_is_zero_and_flat(isa: str) -> None:
    x = bitnet.tensor(np.ones((2, 3), F), requires_grad=True)
    w = bitnet.tensor(np.ones((4, 3), F), requires_grad=True)
    loss = bitnet.ops.cross_entropy(x, w, bitnet.tensor(np.full(2, -100, np.int32)))
    loss.backward()
    assert loss.item() == 0.0
    assert (x.grad.numpy() == 0).all()
    assert (w.grad.numpy() == 0).all()


def test_bfloat16_rounds_half_to_even() -> None:
    """bf16 keeps 8 bits: at 256 the step is 2, so 257 is a tie between 256 and 258."""
    x = bitnet.tensor(np.array([257, 259, 257.01, -257, 3.4e38, math.inf, math.nan], F)).to("bf16")
    got = x.to("f32").numpy()
    assert got[:4].tolist() == [256, 260, 258, -256]
    assert got[5] == math.inf
    assert math.isnan(got[6])

"""Every op, forward and backward, against NumPy in float64 and against PyTorch; integer products for equality."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import adamw, attention, bitlinear, linear, quantize, rmsnorm
from reference.cases import Case, U, all_cases, grid_weight, off_ties

import bitnet
from bitnet import ShapeError, ops

CASES = list(all_cases())


def run(case: Case, dy: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The op's result and the gradients of sum(dy * y)."""
    tensors = [bitnet.tensor(x, requires_grad=i in case.differentiable) for i, x in enumerate(case.inputs)]
    y = getattr(bitnet.ops, case.op)(*tensors, *case.plain)
    value = y.numpy().copy()
    if case.differentiable:
        (y * bitnet.tensor(dy.astype(np.float32))).sum().backward()
    return value, [tensors[i].grad.numpy() for i in case.differentiable]


def assert_within(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_numpy(case: Case) -> None:
    """Tolerance: Case.tolerance, (chain length + 16) float32 roundings of the largest result."""
    inputs = case.in_float64()
    want = case.forward(*inputs)
    dy = np.random.default_rng(6).normal(size=want.shape).astype(np.float32)
    got, gradients = run(case, dy)
    assert_within(got, want, case.tolerance(want))
    if case.differentiable:
        for gradient, expected in zip(gradients, case.backward(dy.astype(np.float64), *inputs), strict=True):
            assert_within(gradient, expected, case.tolerance(expected))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch(case: Case) -> None:
    """The same in PyTorch's float32: twice the tolerance, since either side may err by one."""
    torch = pytest.importorskip("torch", reason="PyTorch is the second opinion")
    from reference.torch_ops import OPS

    tensors = [torch.from_numpy(x.copy()) for x in case.inputs]
    for index in case.differentiable:
        tensors[index].requires_grad_()
    y = OPS[case.op](*tensors, *case.plain)
    want = y.detach().numpy()
    dy = np.random.default_rng(7).normal(size=want.shape).astype(np.float32)
    got, gradients = run(case, dy)
    assert_within(got, want, 2 * case.tolerance(want))
    if case.differentiable:
        (y * torch.from_numpy(np.asarray(dy))).sum().backward()
    for index, gradient in zip(case.differentiable, gradients, strict=True):
        expected = tensors[index].grad.numpy()
        assert_within(gradient, expected, 2 * case.tolerance(expected))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_bitlinear_is_an_exact_integer_product(rows: int, inner: int, outer: int, seed: int) -> None:
    """Equal to NumPy, not close: same int8 and ternary codes (ties included), exact sum, one float epilogue.

    A third of the activations sit on a tie: an integer and a half in a row whose absmax is 127. The weights' mean
    magnitude is exact in float32, so the order of its sum cannot matter.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inner)).astype(np.float32)
    x[::3] = rng.integers(-126, 126, x[::3].shape) + np.float32(0.5)
    x[::3, 0] = 127
    w = grid_weight(rng, (outer, inner), 0.0234375)
    got = bitnet.ops.bitlinear(bitnet.tensor(x), bitnet.tensor(w)).numpy()
    np.testing.assert_array_equal(got, bitlinear.forward(x, w))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.booleans(), st.integers(0, 2**32 - 1))
def test_int8_gives_an_exact_integer_dx(rows: int, inner: int, outer: int, twice: bool, seed: int) -> None:
    """In precision int8, dx is a BitLinear of dy by the transposed codes: equal to NumPy, and so is its accumulation.
    dW is the one of fast, dx of a full-precision linear too."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.normal(size=(rows, n)).astype(np.float32) for n in (inner, outer))
    w = grid_weight(rng, (outer, inner), 0.0234375)

    def gradients(op: str, precision: str) -> list[np.ndarray]:
        a, b, c = bitnet.tensor(x, requires_grad=True), bitnet.tensor(w, requires_grad=True), bitnet.tensor(dy)
        with ops.precision(precision):
            for _ in range(1 + twice):
                (getattr(ops, op)(a, b) * c).sum().backward()
        return [a.grad.numpy().copy(), b.grad.numpy().copy()]

    q, scale = quantize.absmax_int8(dy)
    codes, weight_scale = quantize.ternary(w)
    once = (q @ codes).astype(np.float32) * (scale * weight_scale)
    dx, dw = gradients("bitlinear", "int8")
    np.testing.assert_array_equal(dx, once + once if twice else once)
    np.testing.assert_array_equal(dw, gradients("bitlinear", "fast")[1])
    for one, other in zip(gradients("linear", "int8"), gradients("linear", "fast"), strict=True):
        np.testing.assert_array_equal(one, other)


lengths, few = st.integers(1, 80), st.integers(1, 3)


@settings(max_examples=25, deadline=None)
@given(lengths, lengths, lengths, st.sampled_from(["linear", "bitlinear"]), st.integers(0, 2**32 - 1))
def test_products_of_any_shape(rows: int, inner: int, outer: int, op: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = off_ties(rng.normal(size=(rows, inner)).astype(np.float32)), grid_weight(rng, (outer, inner), 0.5)
    test_against_numpy(Case(op, (x, w), max(rows, inner, outer), (0, 1)))


@settings(max_examples=25, deadline=None)
@given(few, st.integers(1, 140), few, few, st.integers(1, 20), st.integers(0, 99))
def test_attention_of_any_shape(batch: int, time: int, kv: int, group: int, half: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(batch, time, h, 2 * half)).astype(np.float32) for h in (kv * group, kv, kv))
    test_against_numpy(Case("attention", (q, k, v), (time + 2 * half) * group, (0, 1, 2)))


def attention_gradients(
    precision: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray
) -> list[np.ndarray]:
    inputs = [bitnet.tensor(x, requires_grad=True) for x in (q, k, v)]
    with bitnet.ops.precision(precision):
        (bitnet.ops.attention(*inputs) * bitnet.tensor(dy)).sum().backward()
    return [x.grad.numpy() for x in inputs]


@cache
def attention_case(batch: int, time: int, heads: int, kv: int, dim: int) -> tuple[list[np.ndarray], ...]:
    """q, k, v and dy, the exact gradients, and how far fast ones may be from them: made once for all instruction sets.

    Each factor of a product is rounded to bf16, by at most u = 2^-8 of itself; sums in f32 are exact beside that.
    Of a score s = scale q k that is 2 u S, S = scale |q| |k|; of p = exp(s - m) / l, 2 u S of itself, u / 50 for exp,
    and u more when p is a factor. Of dp = dy v it is 2 u A, A = |dy| |v|; so of ds = scale p (dp - delta), scale p
    (2 u A + (2 S + 1.02) u |dp - delta|). The other factor of dv, dk and dq adds a u. A tenth covers the squares of u.
    """
    rng = np.random.default_rng(time)
    q, dy = (rng.normal(size=(batch, time, heads, dim)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(batch, time, kv, dim)).astype(np.float32) for _ in range(2))
    q64, k64, v64, dy64 = (x.astype(np.float64) for x in (q, k, v, dy))
    group, scale, u = heads // kv, 1 / np.sqrt(dim), 2.0**-8
    p = attention.probabilities(q64, k64, None)
    dp = np.einsum("bthd,bshd->bhts", dy64, np.repeat(v64, group, 2))
    centred = np.abs(dp - np.sum(dp * p, -1, keepdims=True))
    aq, ak, av, ady = (np.abs(x) for x in (q64, np.repeat(k64, group, 2), np.repeat(v64, group, 2), dy64))
    scores, products = (np.einsum("bthd,bshd->bhts", x, y) for x, y in ((aq * scale, ak), (ady, av)))
    of_p = p * (2 * scores + 2.02)
    of_ds = scale * p * (2 * products + (2 * scores + 2.02) * centred)
    shared = (batch, time, kv, group, dim)
    bounds = (
        np.einsum("bhts,bshd->bthd", of_ds, ak),
        np.einsum("bhts,bthd->bshd", of_ds, aq).reshape(shared).sum(3),
        np.einsum("bhts,bthd->bshd", of_p, ady).reshape(shared).sum(3),
    )
    return [q, k, v, dy], list(attention.backward(dy64, q64, k64, v64)), [1.1 * u * b + 1e-30 for b in bounds]


@pytest.mark.parametrize(
    "shape", [(2, 1, 2, 1, 2), (2, 37, 4, 2, 6), (1, 130, 4, 2, 64), (1, 300, 2, 2, 32), (1, 530, 2, 1, 256)]
)
def test_fast_attention_gradients(isa: str, shape: tuple[int, int, int, int, int]) -> None:
    """Within the roundings of their factors to bf16 of the exact ones, and other numbers than those of fp32."""
    inputs, exact, bounds = attention_case(*shape)
    fast, fp32 = (attention_gradients(precision, *inputs) for precision in ("fast", "fp32"))
    for gradient, want, same, bound in zip(fast, exact, fp32, bounds, strict=True):
        assert np.all(np.abs(gradient - want) <= bound)
        assert shape[1] == 1 or not np.array_equal(gradient, same)


def test_fast_attention_is_the_same_on_any_number_of_threads(isa: str) -> None:
    rng = np.random.default_rng(3)
    q, dy = (rng.normal(size=(2, 300, 6, 48)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(2, 300, 3, 48)).astype(np.float32) for _ in range(2))
    runs, before = [], bitnet.get_threads()
    for count in (1, 2, 5):
        bitnet.set_threads(count)
        runs.append(attention_gradients("fast", q, k, v, dy))
    bitnet.set_threads(before)
    for run in runs[1:]:
        for gradient, first in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(gradient, first)


def test_fast_attention_with_huge_scores_stays_finite(isa: str) -> None:
    """Rounded factors lift scores of 1e6 by thousands over the maximum of the exact ones: p is cut to 1 / l."""
    rng = np.random.default_rng(4)
    q, k, v, dy = (rng.normal(size=(1, 40, 2, 16)).astype(np.float32) for _ in range(4))
    for gradient in attention_gradients("fast", 1000 * q, 1000 * k, v, dy):
        assert np.all(np.isfinite(gradient))


def test_attention_with_huge_scores_does_not_overflow() -> None:
    rng = np.random.default_rng(8)
    q, k, v = (rng.normal(size=(1, 100, 2, 8)).astype(np.float32) * s for s in (1e3, 1e3, 1))
    got = bitnet.ops.attention(bitnet.tensor(q), bitnet.tensor(k), bitnet.tensor(v)).numpy()
    # Scores reach 1e6, where one float32 rounding is 0.06: a softmax over them is good to that, not better.
    np.testing.assert_allclose(got, attention.forward(*(x.astype(float) for x in (q, k, v))), atol=0.3)


def test_a_value_used_twice_gets_both_gradients() -> None:
    rng = np.random.default_rng(9)
    x, w = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(4, 4)).astype(np.float32)
    tx, tw = bitnet.tensor(x, requires_grad=True), bitnet.tensor(w, requires_grad=True)
    h = bitnet.ops.linear(tx, tw)
    (h * h + bitnet.ops.linear(h, tw)).sum().backward()
    x64, w64 = x.astype(float), w.astype(float)
    y = linear.forward(x64, w64)
    dh, dw = linear.backward(np.ones((3, 4)), y, w64)
    dx, dw_first = linear.backward(dh + 2 * y, x64, w64)
    np.testing.assert_allclose(tx.grad.numpy(), dx, atol=40 * U * np.abs(dx).max())
    np.testing.assert_allclose(tw.grad.numpy(), dw + dw_first, atol=40 * U * np.abs(dw + dw_first).max())


def test_backward_adds_into_a_leaf() -> None:
    gain = bitnet.tensor(np.ones(5, np.float32), requires_grad=True)
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    total = np.zeros(5)
    for factor in (1, 3):
        bitnet.ops.rmsnorm(bitnet.tensor(factor * x), gain).sum().backward()
        total += rmsnorm.backward(np.ones((2, 5)), factor * x.astype(float), np.ones(5))[1]
        np.testing.assert_allclose(gain.grad.numpy(), total, rtol=1e-6)


def test_operators_and_methods_are_the_ops() -> None:
    rng = np.random.default_rng(10)
    a, b = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    ta, tb = bitnet.tensor(a), bitnet.tensor(b)
    np.testing.assert_array_equal((ta + tb).numpy(), a + b)
    np.testing.assert_array_equal((ta - tb).numpy(), a - b)
    np.testing.assert_array_equal((ta * tb).numpy(), a * b)
    np.testing.assert_array_equal((ta * 3.0).numpy(), a * np.float32(3))
    np.testing.assert_array_equal((2.0 * ta).numpy(), a * np.float32(2))
    np.testing.assert_array_equal((ta / 4).numpy(), a / np.float32(4))
    np.testing.assert_array_equal((-ta).numpy(), -a)
    np.testing.assert_array_equal(ta.transpose().numpy(), a.T)
    np.testing.assert_array_equal(ta.reshape(5, 3).numpy(), a.reshape(5, 3))
    np.testing.assert_array_equal(ta.softmax().numpy(), bitnet.ops.softmax(ta).numpy())
    np.testing.assert_array_equal((ta @ tb.transpose()).numpy(), bitnet.ops.matmul(ta, tb.transpose()).numpy())
    assert ta.sum().item() == bitnet.ops.sum(ta).item()
    assert ta.mean().item() == bitnet.ops.mean(ta).item()


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_adamw_against_numpy(max_norm: float) -> None:
    """Ten clipped steps. Each update is lr times a ratio near one, good to some ten roundings; the rest adds up."""
    rng = np.random.default_rng(11)
    start = {"matrix": rng.normal(size=(7, 9)), "gain": rng.normal(size=33)}
    want = {name: value.astype(np.float32).astype(np.float64) for name, value in start.items()}
    params = {name: bitnet.nn.Parameter(value.astype(np.float32)) for name, value in want.items()}
    states = {name: adamw.State(np.zeros(value.shape), np.zeros(value.shape)) for name, value in want.items()}
    optimizer = bitnet.optim.AdamW(list(params.items()), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(10):
        grads = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in want.items()}
        optimizer.zero_grad()
        for name, p in params.items():
            (p * bitnet.tensor(grads[name])).sum().backward()
        norm, factor = adamw.clip_factor([g.astype(np.float64) for g in grads.values()], max_norm)
        assert optimizer.clip_grad_norm(max_norm) == pytest.approx(norm, rel=1e-6)
        optimizer.step()
        for name, g in grads.items():
            decay = 0.1 if g.ndim == 2 else 0.0  # matrices only
            want[name] = adamw.step(want[name], g * factor, states[name], 0.01, weight_decay=decay)
            np.testing.assert_allclose(params[name].numpy(), want[name], rtol=0, atol=100 * U)


@pytest.mark.parametrize("make", ["rmsnorm", "gainless", "swiglu", "relu2"])
def test_a_quantized_result_is_what_bitlinear_would_quantize(make: str, isa: str) -> None:
    rng = np.random.default_rng(1)
    for channels in (5, 64, 100):
        x, up = (rng.standard_normal((3, 7, channels)).astype(np.float32) for _ in range(2))
        gain = rng.standard_normal(channels).astype(np.float32)
        weight = rng.standard_normal((33, channels)).astype(np.float32)
        residual = rng.standard_normal((3, 7, 33)).astype(np.float32)
        results = []
        for fused in (False, True):
            leaves = [bitnet.tensor(a, requires_grad=True) for a in (x, up, gain, weight, residual)]
            a, b, g, w, r = leaves
            if make == "rmsnorm":
                h = ops.rmsnorm(a, g, quantized=fused)
            elif make == "gainless":
                h = ops.rmsnorm(a, quantized=fused)
            else:
                h = getattr(ops, make)(a, b, quantized=fused)
            y = ops.bitlinear(h, w, r) if fused else ops.bitlinear(h, w) + r
            ops.sum(y * y).backward()
            if fused:
                assert h.dtype == "q8"
                error = np.abs(h.to("f32").numpy() - results[0][0]).max(-1)
                assert (error <= np.abs(results[0][0]).max(-1) / 127 * 0.5000001).all()  # half a step of int8
            values = [leaf.grad.numpy().copy() for leaf in leaves if leaf.grad is not None]
            results.append([h.to("f32").numpy().copy() if fused else h.numpy().copy(), y.numpy().copy(), *values])
        assert len(results[0]) == len(results[1])
        for plain, fused in zip(results[0][1:], results[1][1:], strict=True):
            assert np.array_equal(plain, fused)


def test_a_quantized_result_refuses_what_it_is_not() -> None:
    h = ops.rmsnorm(bitnet.tensor(np.ones((2, 64), np.float32)), quantized=True)
    assert "q8" in repr(h)
    wrongs = (lambda: h.numpy(), lambda: h + h, lambda: h.reshape(128), lambda: ops.linear(h, h), lambda: memoryview(h))
    for wrong in wrongs:
        with pytest.raises((TypeError, BufferError), match="q8"):
            wrong()
    with pytest.raises(ShapeError, match="524288"):
        ops.rmsnorm(ops.zeros((1, 524289)), quantized=True)

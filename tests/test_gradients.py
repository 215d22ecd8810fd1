"""The references are right: their gradients are those of finite differences and of PyTorch, all in float64."""

from __future__ import annotations

import numpy as np
import pytest
from reference import adamw, bitlinear, quantize
from reference.cases import Case, all_cases

CASES = list(all_cases())
SMALL = [c for c in CASES if c.differentiable and c.op != "bitlinear" and sum(x.size for x in c.inputs) < 3000]


def directional(case: Case, inputs: tuple[np.ndarray, ...], dy: np.ndarray, rng: np.random.Generator) -> None:
    """sum(dy * y) along random directions: the slope by central differences against that of the gradient.

    Step h = 1e-5 leaves a truncation error of h^2 = 1e-10 times a third derivative and a rounding error of 1e-16 / h.
    Each direction moves every element of one input, so a single wrong element shows.
    """
    gradients = case.backward(dy, *inputs)
    for index, gradient in zip(case.differentiable, gradients, strict=True):
        for _ in range(3):
            direction = rng.normal(size=gradient.shape)
            ends = []
            for h in (1e-5, -1e-5):
                moved = list(inputs)
                moved[index] = inputs[index] + h * direction
                ends.append(np.sum(dy * case.forward(*moved)))
            slope, want = (ends[0] - ends[1]) / 2e-5, np.sum(gradient * direction)
            assert slope == pytest.approx(want, rel=1e-6, abs=1e-9 + 1e-6 * np.linalg.norm(gradient)), index


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_against_central_differences(case: Case) -> None:
    rng = np.random.default_rng(2)
    inputs = case.in_float64()
    dy = rng.normal(size=case.forward(*inputs).shape)
    directional(case, inputs, dy, rng)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_against_torch(case: Case) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is the second opinion")
    from reference.torch_ops import OPS

    inputs = case.in_float64()
    tensors = [torch.from_numpy(x.copy()) for x in inputs]
    for index in case.differentiable:
        tensors[index].requires_grad_()
    y = OPS[case.op](*tensors, *case.plain)
    want = case.forward(*inputs)
    # 1e-10: float64 sums of a few hundred terms in another order, with five digits to spare.
    np.testing.assert_allclose(y.detach().numpy(), want, rtol=1e-10, atol=1e-10)
    if not case.differentiable:
        return
    dy = np.random.default_rng(3).normal(size=want.shape)
    y.backward(torch.from_numpy(dy) if want.shape else torch.tensor(float(dy), dtype=torch.float64))
    for index, gradient in zip(case.differentiable, case.backward(dy, *inputs), strict=True):
        np.testing.assert_allclose(tensors[index].grad.numpy(), gradient, rtol=1e-10, atol=1e-10)


def test_straight_through_is_the_slope_with_rounding_held_fixed() -> None:
    """STE by finite differences: y(x, w) with both rounding residuals frozen has exactly the STE's gradients."""
    rng = np.random.default_rng(4)
    x, w, dy = rng.normal(size=(5, 17)), rng.normal(size=(9, 17)), rng.normal(size=(5, 9))
    xq, wq = bitlinear.dequantized(x, w)
    dx, dw = bitlinear.backward(dy, x, w)

    def surrogate(x_moved: np.ndarray, w_moved: np.ndarray) -> float:
        return float(np.sum(dy * ((x_moved + (xq - x)) @ (w_moved + (wq - w)).T)))

    assert surrogate(x, w) == pytest.approx(np.sum(dy * bitlinear.forward(x, w)), rel=1e-12)
    h = 1e-4  # bilinear: central differences have no truncation error
    for i in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[i] = h
        assert (surrogate(x + e, w) - surrogate(x - e, w)) / (2 * h) == pytest.approx(dx[i], abs=1e-9)
    for i in np.ndindex(w.shape):
        e = np.zeros_like(w)
        e[i] = h
        assert (surrogate(x, w + e) - surrogate(x, w - e)) / (2 * h) == pytest.approx(dw[i], abs=1e-9)


def test_quantizers_on_an_example_worked_by_hand() -> None:
    codes, scale = quantize.ternary(np.array([[0.5, -1.5, 0.25], [1.0, 0.75, -2.0]]))
    assert scale == 1.0  # (0.5 + 1.5 + 0.25 + 1 + 0.75 + 2) / 6
    assert codes.tolist() == [[0, -1, 0], [1, 1, -1]]  # 0.5 is a tie and goes to even
    q, act_scale = quantize.absmax_int8(np.array([[127.0, -0.5, 1.5, 2.5], [0.0, 0.0, 0.0, 0.0]]))
    assert q.tolist() == [[127, 0, 2, 2], [0, 0, 0, 0]]
    assert act_scale[:, 0].tolist() == [1.0, 1e-5 / 127]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_reference_against_torch(weight_decay: float) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is the second opinion")
    rng = np.random.default_rng(5)
    p = rng.normal(size=40)
    other = torch.from_numpy(p.copy()).requires_grad_()
    optimizer = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    state = adamw.State(np.zeros(40), np.zeros(40))
    for _ in range(12):
        g = rng.normal(size=40) * 3
        other.grad = torch.from_numpy(g.copy())
        norm = torch.nn.utils.clip_grad_norm_([other], 1.0)
        optimizer.step()
        want_norm, factor = adamw.clip_factor([g], 1.0)
        assert float(norm) == pytest.approx(want_norm, rel=1e-12)
        p = adamw.step(p, g * factor, state, 0.01, weight_decay=weight_decay)
        np.testing.assert_allclose(other.detach().numpy(), p, rtol=1e-12, atol=1e-14)

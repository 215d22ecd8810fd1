"""AdamW's flat buffers and state, clipping, the schedules; its arithmetic is compared in test_ops and test_parity."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet import nn, ops, optim


def model() -> nn.Module:
    made = nn.Module()
    made.norm = nn.RMSNorm(5)
    made.layer = nn.Linear(3, 7, bias=True)
    return made


def set_gradients(of: nn.Module, seed: int = 0) -> float:
    """Random gradients for all; returns their norm."""
    rng = np.random.default_rng(seed)
    squares = 0.0
    for parameter in of.parameters():
        wanted = rng.standard_normal(parameter.shape).astype(np.float32)
        (parameter * ops.tensor(wanted)).sum().backward()
        squares += float((wanted.astype(np.float64) ** 2).sum())
    return squares**0.5


def test_parameters_lie_flat_matrices_first_on_cache_lines() -> None:
    m = model()
    before = m.state_dict()
    optimizer = optim.AdamW(m)
    assert list(optimizer.parameters) == ["layer.weight", "norm.weight", "layer.bias"]
    assert optimizer.flat.shape == (32 + 16 + 16,)
    flat = optimizer.flat.numpy()
    assert flat[:21].tolist() == before["layer.weight"].ravel().tolist()
    flat[0] = 42.0  # one memory
    assert m.layer.weight.numpy()[0, 0] == 42.0
    set_gradients(m)
    assert np.array_equal(optimizer.flat_grad.numpy()[:21].reshape(7, 3), m.layer.weight.grad.numpy())
    for _ in range(3):
        optimizer.step()
    gaps = np.r_[21:32, 37:48, 55:64]
    for buffer in (optimizer.flat, optimizer.flat_grad, optimizer.m, optimizer.v):
        assert not buffer.numpy()[gaps].any(), "gaps stay zero"


def test_weights_with_views_are_not_moved() -> None:
    m = model()
    view = m.layer.weight.numpy()
    with pytest.raises(RuntimeError, match="views"):
        optim.AdamW(m)
    del view
    optim.AdamW(m)


def test_only_matrices_decay() -> None:
    m = model()
    optimizer = optim.AdamW(m, lr=0.1, weight_decay=0.5)
    before = m.state_dict()
    optimizer.step()  # no gradient at all: only the decay is left
    after = m.state_dict()
    np.testing.assert_allclose(after["layer.weight"], before["layer.weight"] * 0.95, rtol=1e-6)
    assert np.array_equal(after["norm.weight"], before["norm.weight"])


@pytest.mark.parametrize("max_norm", [0.0, 1e9, 0.5])
def test_clipping_scales_the_next_step_only(max_norm: float) -> None:
    clipped, plain = model(), model()
    plain.load_state_dict(clipped.state_dict())
    a, b = optim.AdamW(clipped, lr=0.1, eps=1.0), optim.AdamW(plain, lr=0.1, eps=1.0)
    norm = set_gradients(clipped)
    set_gradients(plain)
    assert a.clip_grad_norm(max_norm) == pytest.approx(norm, rel=1e-6)
    a.step()
    b.step()
    # With eps = 1 a smaller gradient makes a smaller step.
    same = all(
        np.array_equal(x, y) for x, y in zip(clipped.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert same == (max_norm != 0.5)
    factor = 0.5 / norm if max_norm == 0.5 else 1.0
    np.testing.assert_allclose(a.m.numpy(), b.m.numpy() * factor, rtol=1e-5)


def test_state_goes_on_where_it_stopped() -> None:
    whole, first = model(), model()
    first.load_state_dict(whole.state_dict())
    a, b = optim.AdamW(whole), optim.AdamW(first)
    for step in range(2):
        for m, optimizer in ((whole, a), (first, b)):
            optimizer.zero_grad()
            set_gradients(m, step)
            optimizer.step()
    second = model()
    c = optim.AdamW(second)
    second.load_state_dict(first.state_dict())
    c.load_state_dict(b.state_dict())
    for m, optimizer in ((whole, a), (second, c)):
        optimizer.zero_grad()
        set_gradients(m, 9)
        optimizer.step()
    assert all(
        np.array_equal(x, y) for x, y in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )
    broken = b.state_dict()
    del broken["v.norm.weight"]
    with pytest.raises(KeyError, match=r"v\.norm\.weight"):
        c.load_state_dict(broken)


def test_gradient_accumulates_until_zeroed() -> None:
    m = model()
    optimizer = optim.AdamW(m)
    set_gradients(m)
    once = optimizer.flat_grad.numpy().copy()
    set_gradients(m)
    assert np.array_equal(optimizer.flat_grad.numpy(), 2 * once)
    optimizer.zero_grad()
    assert m.layer.weight.grad.numpy().any() == np.False_
    set_gradients(m)
    assert np.array_equal(optimizer.flat_grad.numpy(), once)


def test_schedules() -> None:
    cosine = [optim.warmup_cosine(step, 100, 1.0, 0.1, 10) for step in range(101)]
    assert cosine[0] == pytest.approx(0.1)
    assert cosine[9] == pytest.approx(1.0)
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[100] == pytest.approx(0.1)
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    stages = [optim.two_stage(step, 100, 1.5e-3, 1e-3, 10, 0.1) for step in range(100)]
    assert stages[9] == (pytest.approx(1.5e-3), 0.1)
    assert stages[49] == (pytest.approx(1.5e-3 * (1 - 39 / 90)), 0.1)
    assert stages[50] == (pytest.approx(1e-3 * (1 - 40 / 90)), 0.0)
    assert 0 < stages[99][0] < 2e-5

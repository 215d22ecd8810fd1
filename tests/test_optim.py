"""AdamW's flat buffers and state, clipping, the schedules; its arithmetic is compared in test_ops and test_parity."""

from __future__ import annotations

import numpy as np
import pytest
from reference import adamw as reference

from bitnet import _core, nn, ops, optim


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


# ---- moments in bf16 ----


def flat_model(n: int) -> nn.Module:
    """One vector of n parameters."""
    made = nn.Module()
    made.values = nn.Parameter(np.random.default_rng(0).standard_normal(n).astype(np.float32))
    return made


def give(of: nn.Module, gradient: np.ndarray) -> None:
    (of.values * ops.tensor(gradient)).sum().backward()


def test_bf16_moments_are_the_f32_ones_rounded_by_the_documented_bits(isa: str, threads: int) -> None:
    """Bit for bit: from equal bf16 moments one step gives equal parameters, and moments that differ by the rounding."""
    n = 4096 + 48
    narrow, wide = flat_model(n), flat_model(n)
    a, b = optim.AdamW(narrow, moments="bf16"), optim.AdamW(wide)
    assert (a.m.dtype, a.v.dtype, a.m.nbytes) == ("bf16", "bf16", 2 * n)
    for step in range(1, 6):
        gradient = np.random.default_rng(step).standard_normal(n).astype(np.float32)
        wide.load_state_dict(narrow.state_dict())
        b.load_state_dict(a.state_dict())
        for m, optimizer in ((narrow, a), (wide, b)):
            optimizer.zero_grad()
            give(m, gradient)
            optimizer.step()
        assert np.array_equal(narrow.values.numpy(), wide.values.numpy())
        words = reference.rounding_words(step, n)
        for got, exact, r in ((a.m, b.m, words & np.uint32(0xFFFF)), (a.v, b.v, words >> np.uint32(16))):
            assert np.array_equal(got.to("f32").numpy(), reference.round_at_random(exact.numpy(), r))


def test_bf16_moments_do_not_stall() -> None:
    """v under a constant gradient: the mean over elements follows 1 - beta2^t, where rounding to nearest stands still.

    Rounding errors are independent with mean 0 and at most 2^-8 v of deviation a step (half of a bf16 step of 2^-7 v),
    damped by beta2 a step: deviation at most 2^-8 / sqrt(1 - beta2^2) in v = 1; of the mean of n, divided by sqrt(n).
    Six of those.
    """
    n, beta2, steps = 1 << 14, 0.999, 2500
    m = flat_model(n)
    optimizer = optim.AdamW(m, lr=0.0, betas=(0.9, beta2), moments="bf16")
    give(m, np.ones(n, np.float32))
    for _ in range(steps):
        optimizer.step()
    exact = 1 - beta2**steps
    bound = 6 * 2**-8 / (1 - beta2**2) ** 0.5 / n**0.5
    values = optimizer.v.to("f32").numpy()
    assert abs(values.mean() - exact) < bound
    nearest = np.float32(0)
    for _ in range(steps):
        after = np.float32(beta2) * nearest + np.float32(1 - beta2)
        bits = after.view(np.uint32)
        nearest = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(
            np.float32
        )
    assert nearest < exact - 10 * bound  # the way not taken


def test_bf16_state_goes_on_where_it_stopped() -> None:
    whole, first, second = (flat_model(100) for _ in range(3))
    a, b, c = (optim.AdamW(m, moments="bf16") for m in (whole, first, second))
    gradients = np.random.default_rng(0).standard_normal((6, 100)).astype(np.float32)

    def run(m: nn.Module, optimizer: optim.AdamW, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            give(m, gradients[step])
            optimizer.step()

    run(whole, a, range(6))
    run(first, b, range(3))
    second.load_state_dict(first.state_dict())
    state = b.state_dict()
    assert all(values.dtype == np.float32 for name, values in state.items() if name != "steps")
    c.load_state_dict(state)
    run(second, c, range(3, 6))
    assert np.array_equal(whole.values.numpy(), second.values.numpy())
    ended, expected = c.state_dict(), a.state_dict()
    assert all(np.array_equal(ended[name], expected[name]) for name in expected)


def test_an_infinity_and_a_nan_stay_what_they_are() -> None:
    m = flat_model(64)
    optimizer = optim.AdamW(m, lr=0.0, moments="bf16")
    gradient = np.zeros(64, np.float32)
    gradient[3], gradient[5] = np.inf, np.nan
    gradient[7:8] = np.array([0x7FFFFFFF], np.uint32).view(np.float32)  # all ones: adding to it would change its sign
    give(m, gradient)
    optimizer.step()
    values = optimizer.v.to("f32").numpy()
    assert values[3] == np.inf
    assert np.isnan(values[[5, 7]]).all()
    assert np.isfinite(np.delete(values, [3, 5, 7])).all()


def test_other_moments_are_refused() -> None:
    with pytest.raises(ValueError, match="moments must be one of f32, bf16, not 'f16'"):
        optim.AdamW(model(), moments="f16")
    x, wrong = ops.zeros((16,)), ops.zeros((16,), "i8")
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    for m, v, words in ((wrong, wrong, "moments are f32 or bf16, not i8"), (x, wrong, "v is i8, expected f32")):
        with pytest.raises(TypeError, match=words):
            _core.adamw(x, x, m, v, x, step=1, decay_end=0, **numbers)

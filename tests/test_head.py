"""Output heads: bf16 has the bits of rounded f32, int8 and int6 those of their formulas, a screen loses nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet
from bitnet import _core, ops
from bitnet.head import HEADS, Head

Array = np.ndarray[Any, Any]


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> bitnet.Tensor:
    return bitnet.tensor(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def linear(x: bitnet.Tensor, weight: bitnet.Tensor) -> Array:
    with ops.no_grad():
        return ops.linear(x, weight).numpy()


def compact(x: bitnet.Tensor, weight: bitnet.Tensor, top: int = 0) -> Array:
    with ops.no_grad():
        return ops.compact_linear(x, weight, top).numpy()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 150), st.integers(0, 99))
def test_bf16_has_the_bits_of_rounded_f32(rows: int, inner: int, outer: int, seed: int) -> None:
    """Few rows read the matrix where it lies, many have it widened."""
    x, weight = random((rows, inner), seed), ops.convert(random((outer, inner), seed + 1), "bf16")
    np.testing.assert_array_equal(linear(x, weight), linear(x, ops.convert(weight, "f32")))


def test_bf16_on_every_instruction_set(isa: str) -> None:
    for rows, inner, outer in ((1, 100, 50), (3, 64, 16), (4, 33, 17), (7, 31, 1100)):
        x, weight = random((rows, inner), 1), ops.convert(random((outer, inner), 2), "bf16")
        np.testing.assert_array_equal(linear(x, weight), linear(x, ops.convert(weight, "f32")), err_msg=isa)


def test_a_bf16_table_of_embeddings() -> None:
    table = ops.convert(random((11, 37), 0), "bf16")
    np.testing.assert_array_equal(
        ops.embedding([[3, 10], [0, 3]], table).numpy(), ops.convert(table, "f32").numpy()[[[3, 10], [0, 3]]]
    )


def rounded(weight: Array, bits: int) -> tuple[Array, Array]:
    """(q, scale) of kernels.h, compact_rows, in the f32 operations it is written in."""
    most = np.float32(2 ** (bits - 1) - 1)
    absmax = np.maximum(np.abs(weight).max(1), np.float32(1e-30))
    q = np.clip(np.rint(weight * (most / absmax)[:, None]), -most, most)
    return q.astype(np.int64), absmax / most


def split(x: Array) -> tuple[Array, Array, Array]:
    """(high, low, act_scale) of kernels.h, split_rows."""
    absmax = np.maximum(np.abs(x).max(1), np.float32(1e-30))
    whole = np.rint(x * (np.float32(32512) / absmax)[:, None]).astype(np.int64)
    high = (whole + 128) // 256
    return high, whole - 256 * high, absmax / np.float32(32512)


@pytest.mark.parametrize("bits", [8, 6])
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 200), st.integers(1, 60), st.integers(0, 99))
def test_compact_products_are_their_formula(bits: int, rows: int, inner: int, outer: int, seed: int) -> None:
    """Equal but for the last fused multiply-add, which NumPy rounds in float64 and then once more."""
    x, weight = random((rows, inner), seed), random((outer, inner), seed + 1)
    q, scale = rounded(weight.numpy(), bits)
    high, low, act_scale = split(x.numpy())
    upper, lower = (high @ q.T).astype(np.float32), (low @ q.T).astype(np.float32)
    whole = (upper.astype(np.float64) * 256 + lower).astype(np.float32)
    want = whole * (act_scale[:, None] * scale)
    np.testing.assert_array_equal(compact(x, _core.compact(weight, bits, False)), want)


@pytest.mark.parametrize("bits", [8, 6])
def test_compact_on_every_instruction_set(isa: str, bits: int) -> None:
    x, weight = random((3, 333), 1), random((77, 333), 2)
    weight.numpy()[0] = 1.0  # bytes of 255 and 63 in a row, where narrow sums would saturate
    x.numpy()[0] = -1.0
    q, scale = rounded(weight.numpy(), bits)
    high, low, act_scale = split(x.numpy())
    whole = ((high @ q.T).astype(np.float32).astype(np.float64) * 256 + (low @ q.T)).astype(np.float32)
    got = compact(x, _core.compact(weight, bits, False))
    np.testing.assert_array_equal(got, whole * (act_scale[:, None] * scale), err_msg=isa)


def require_screened(x: bitnet.Tensor, weight: bitnet.Tensor, top: int, bits: int = 8) -> float:
    """The screen's results against the full head; returns the share of outputs that it computed."""
    full, got = linear(x, weight), compact(x, _core.compact(weight, bits, True), top)
    made = got > -np.inf
    np.testing.assert_array_equal(got[made], full[made])
    for row, kept in zip(full, made, strict=True):
        order = np.argsort(-row, kind="stable")[:top]
        assert kept[order].all()
        assert kept[row == row[order[-1]]].all()  # and whatever equals the last of them
    np.testing.assert_array_equal(got.argmax(1), full.argmax(1))
    return float(made.mean())


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("top", [1, 5, 40])
def test_a_screen_keeps_the_largest(isa: str, top: int, bits: int) -> None:
    weight = ops.convert(random((1000, 160), 3), "bf16")
    share = require_screened(random((3, 160), 4), weight, top, bits)
    assert share < (0.5 if bits == 8 else 1.01), isa


def test_a_wide_screen_leaves_few_to_compute() -> None:
    """The claim that makes it worth while: of random rows of 2560 columns, some tens in ten thousand."""
    assert require_screened(random((2, 2560), 1), ops.convert(random((8000, 2560), 2, 0.02), "bf16"), 1) < 0.01


ADVERSARIAL = {
    "equal rows": lambda w: np.repeat(w[:1], len(w), 0),
    "rows an ulp apart": lambda w: np.repeat(w[:1], len(w), 0) * (1 + np.arange(len(w))[:, None] * 2.0**-9),
    "one huge weight a row": lambda w: w + 1e4 * np.eye(len(w), w.shape[1]),
    "wild scales": lambda w: w * 10.0 ** np.random.default_rng(0).uniform(-20, 15, (len(w), 1)),
    "zeros": lambda w: w * 0,
    "tiny": lambda w: w * 1e-36,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("top", [1, 7])
def test_adversarial_matrices(name: str, top: int) -> None:
    rng = np.random.default_rng(5)
    weight = bitnet.tensor(np.asarray(ADVERSARIAL[name](rng.normal(size=(200, 96))), np.float32))
    hidden = rng.normal(size=(3, 96)).astype(np.float32)
    hidden[1, 7] = 1e4
    hidden[2] = 0
    require_screened(bitnet.tensor(hidden), ops.convert(weight, "bf16"), top)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 150), st.integers(0, 999), st.floats(-6, 6))
def test_screens_of_any_shape(inner: int, outer: int, top: int, seed: int, power: float) -> None:
    weight = random((outer, inner), seed)
    near = weight.numpy().copy()
    near[outer // 2 :] = near[: outer - outer // 2] * (1 + 2.0**-7)  # every row has a neighbour
    require_screened(
        random((2, inner), seed + 1, 10.0**power), ops.convert(bitnet.tensor(near), "bf16"), min(top, outer)
    )


def test_what_is_not_finite_decides_nothing_away() -> None:
    weight = random((64, 32), 0).numpy().copy()
    weight[5, 3] = np.nan
    weight[9, 0] = np.inf
    table = ops.convert(bitnet.tensor(weight), "bf16")
    x = np.ones((2, 32), np.float32)
    x[1, 4] = np.nan
    got, full = compact(bitnet.tensor(x), _core.compact(table, 8, True), 3), linear(bitnet.tensor(x), table)
    assert np.isnan(got[0, 5]) and got[0, 9] == full[0, 9] and np.isnan(got[1]).all()


def test_what_compact_matrices_refuse() -> None:
    x, weight = random((2, 8), 0), random((5, 8), 1)
    with pytest.raises(TypeError, match="made from bf16"):
        _core.compact(weight, 8, True)
    with pytest.raises(ValueError, match="8 or 6 bits a weight, not 4"):
        _core.compact(weight, 4, False)
    with pytest.raises(bitnet.ShapeError, match="1 to 65536 columns, not 65537"):
        _core.compact(ops.zeros((1, 65537)), 8, False)
    with pytest.raises(RuntimeError, match="without its exact form"):
        compact(x, _core.compact(weight, 8, False), 1)
    with pytest.raises(bitnet.ShapeError, match="x has 7 channels, weight expects 8"):
        compact(random((2, 7), 0), _core.compact(weight, 8, False))
    with pytest.raises(RuntimeError, match="no gradient flows through a compact matrix"):
        ops.compact_linear(
            bitnet.tensor(np.ones((1, 8), np.float32), requires_grad=True), _core.compact(weight, 8, False)
        )
    with pytest.raises(RuntimeError, match="a bf16 weight passes no gradient"):
        ops.linear(bitnet.tensor(np.ones((1, 8), np.float32), requires_grad=True), ops.convert(weight, "bf16"))
    with pytest.raises(TypeError, match="takes no residual"), ops.no_grad():
        ops.linear(x, ops.convert(weight, "bf16"), random((2, 5), 2))
    with pytest.raises(ValueError, match="a head is one of f32, bf16, int8, int6, screened, not 'int4'"):
        Head(weight, "int4")


@pytest.mark.parametrize("form", HEADS)
def test_heads(form: str) -> None:
    weight, hidden = random((300, 64), 0), random((2, 1, 64), 1)
    head = Head(weight, form)
    with ops.no_grad():
        got, largest = head.logits(hidden).numpy(), head.logits(hidden, 4).numpy()
    exact = ops.convert(head.exact, "f32").numpy()
    assert got.shape == largest.shape == (2, 1, 300)
    step = {"int8": 1 / 254, "int6": 1 / 62}.get(form, 0) * np.abs(exact).max(1) + 2.0**-15
    bound = np.abs(hidden.numpy()).sum(-1)[..., None] * step
    assert (np.abs(got - hidden.numpy() @ exact.T) <= bound).all()
    np.testing.assert_array_equal(largest.argmax(-1), got.argmax(-1))
    assert np.isinf(largest).any() == (form == "screened")


def test_a_model_with_another_head() -> None:
    """A tied embedding is rounded with it; greedy decoding by a screen is that of the bf16 head."""
    config = bitnet.BitNetConfig(300, 48, 80, 1, 4, 2, max_position_embeddings=16, tie_word_embeddings=True)
    logits = {}
    for form in HEADS:
        model = bitnet.BitNetForCausalLM(config, seed=1).pack(head=form)
        with ops.no_grad():
            logits[form] = model([[1, 2, 3]]).numpy()
            if form == "screened":
                top = model.logits(model.head_input([[1, 2, 3]]), 1).numpy()
        if form != "f32":
            assert model.model.embed_tokens.weight.dtype == "bf16"
            with pytest.raises(TypeError, match="packed"):
                model.state_dict()
    np.testing.assert_array_equal(logits["screened"], logits["bf16"])
    np.testing.assert_array_equal(top.argmax(-1), logits["bf16"].argmax(-1))
    untied = bitnet.BitNetForCausalLM(config.replace(tie_word_embeddings=False)).pack(head="int8")
    assert untied.model.embed_tokens.weight.dtype == "f32" and untied.head_weight.dtype == "bf16"
    ternary = bitnet.BitNetForCausalLM(config.replace(quantize_head=True, tie_word_embeddings=False))
    with pytest.raises(ValueError, match="head is ternary: it has no form bf16"):
        ternary.pack(head="bf16")

"""Attention over long pasts and over caches: the same bits for few queries or many, on any slots, in any dtype."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from reference import attention, quantize

import bitnet
from bitnet import ops
from bitnet._core import ShapeError

SPAN = 1024  # keys whose softmax is one chain: BN_ATTENTION_SPAN
DTYPES = ("f32", "bf16", "i8")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(seed: int, batch: int, time: int, heads: int, kv: int, dim: int) -> list[np.ndarray]:
    """q, k and v, with keys so large that the maximum keeps growing."""
    growing = np.linspace(0.3, 2, time, dtype=np.float32)[:, None, None]
    shapes = ((batch, time, heads, dim), (batch, time, kv, dim), (batch, time, kv, dim))
    q, k, v = (normal(seed + i, *shape) for i, shape in enumerate(shapes))
    return [q, k * growing, v]


class Cache:
    """Keys or values in slots, as the op takes them."""

    def __init__(self, slots: int, capacity: int, kv: int, dim: int, dtype: str) -> None:
        self.dtype = dtype
        self.data = ops.zeros((slots, capacity, kv, dim), dtype)
        self.scale = ops.zeros((slots, capacity, kv)) if dtype == "i8" else None

    def append(self, x: np.ndarray, start: list[int], slot: list[int] | None = None) -> bitnet.Tensor:
        return ops.cache_append(bitnet.tensor(x), self.data, start, slot, self.scale)

    def numpy(self) -> np.ndarray:
        data = ops.convert(self.data, "f32").numpy()
        return data if self.scale is None else data * self.scale.numpy()[..., None]


def attend(q: np.ndarray, k: Cache, v: Cache, start: list[int], slot: list[int] | None = None) -> np.ndarray:
    return ops.attention(bitnet.tensor(q), k.data, v.data, start, slot, k.scale, v.scale).numpy()


def filled(dtype: str, k: np.ndarray, v: np.ndarray) -> list[Cache]:
    """Caches that hold k and v, a slot for each sequence."""
    caches = [Cache(*k.shape, dtype) for _ in range(2)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache.append(x, [0] * len(x))
    return caches


def whole(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    return ops.attention(*(bitnet.tensor(x) for x in (q, k, v))).numpy()


# ---- spans ---------------------------------------------------------------------------------------------------------


def counted(key: int, *shape: int) -> np.ndarray:
    """Numbers in [-2, 2) that every version of NumPy makes alike."""
    n = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(key << 32)
    n = (n * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (n.astype(np.float32) * np.float32(2.0**-22) - 2).reshape(shape)


def test_one_span_keeps_its_bits(isa: str) -> None:
    """Up to 1024 keys are one chain. The digest is of the results when there were no spans at all."""
    out = whole(counted(1, 1, SPAN, 4, 20), counted(2, 1, SPAN, 2, 20), counted(3, 1, SPAN, 2, 20))
    assert hashlib.sha256(out.tobytes()).hexdigest()[:16] == "385fcdc5cdfc5a22"


@pytest.mark.parametrize(("heads", "kv", "dim"), [(3, 1, 6), (2, 2, 2)])
def test_few_queries_equal_many(isa: str, heads: int, kv: int, dim: int) -> None:
    """One query, a handful, as many as one unit takes, and more, before, across and after the joints of spans."""
    time = 2 * SPAN + 20
    q, k, v = inputs(1, 1, time, heads, kv, dim)
    expected = whole(q, k, v)
    caches = filled("f32", k, v)
    few = [(n, at) for n in (1, 5, 64 * kv // heads) for at in (0, SPAN - 3, SPAN - 1, SPAN, 2 * SPAN - 3, time - n)]
    for count, first in (*few, (100, SPAN - 70), (200, 2 * SPAN - 190)):
        rows = slice(first, min(first + count, time))
        assert np.array_equal(attend(q[:, rows], *caches, [first]), expected[:, rows]), (count, first)


def test_threads_share_a_past(threads: int) -> None:
    q, k, v = inputs(2, 2, 3 * SPAN, 4, 2, 8)
    caches = filled("f32", k, v)
    starts = [3 * SPAN - 1, SPAN + 300]
    got = attend(np.stack([q[0, -1:], q[1, SPAN + 300 : SPAN + 301]]), *caches, starts)
    assert np.array_equal(got[:, 0], whole(q, k, v)[[0, 1], starts])


def test_long_pasts_against_numpy() -> None:
    """p sums to one, so out errs by what p does: scores up to 20 in f32 by 20 * 2^-23, and a sum in blocks by less."""
    q, k, v = inputs(3, 1, 2 * SPAN + 9, 1, 1, 8)
    expected = attention.forward(*(x.astype(np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(whole(q, k, v), expected, atol=2e-5)
    got = attend(q[:, -3:], *filled("f32", k, v), [q.shape[1] - 3])
    np.testing.assert_allclose(got, expected[:, -3:], atol=2e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("fast", 0.03)])
def test_gradients_through_several_spans(precision: str, tolerance: float) -> None:
    q, k, v = inputs(4, 1, SPAN + 70, 2, 1, 4)
    dy = normal(9, *q.shape)
    tensors = [bitnet.tensor(x, requires_grad=True) for x in (q, k, v)]
    with ops.precision(precision):
        (ops.attention(*tensors) * bitnet.tensor(dy)).sum().backward()
    expected = attention.backward(*(x.astype(np.float64) for x in (dy, q, k, v)))
    for tensor, want in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), want, atol=tolerance * np.abs(want).max())


def test_infinite_scores_stay_with_their_query(isa: str) -> None:
    """A query that overflows gives NaNs, and its neighbours what they would have given beside another."""
    q, k, v = inputs(5, 1, SPAN + 40, 2, 1, 4)
    expected = whole(q, k, v)
    q[0, SPAN + 10, 0] = np.inf
    caches = filled("f32", k, v)
    for got in (whole(q, k, v)[:, SPAN:], attend(q[:, SPAN : SPAN + 20], *caches, [SPAN])):
        assert np.isnan(got[0, 10, 0]).all()
        got[0, 10, 0] = expected[0, SPAN + 10, 0]
        assert np.array_equal(got, expected[:, SPAN : SPAN + got.shape[1]])


# ---- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 16, 30, 80])
def test_what_a_cache_holds(isa: str, dtype: str, dim: int) -> None:
    """Written codes and scales are NumPy's; a head with an infinity is NaN in int8, and alone in that."""
    x = normal(6, 2, 5, 3, dim) * np.float32(3)
    x[0, 1, 2] = 1e-7
    x[1, 3, 0] = 0
    x[1, 4, 1, 0] = np.inf
    cache = Cache(2, 9, 3, dim, dtype)
    cache.append(x, [0, 4])
    finite = np.where(np.isinf(x), np.float32(0), x)
    expected = attention.cached(x if dtype != "i8" else finite, dtype)
    got = cache.numpy()
    if dtype == "i8":
        expected[1, 4, 1] = np.nan
        codes = quantize.absmax_int8(finite)[0]
        codes[1, 4, 1] = 0
        assert np.array_equal(cache.data.numpy()[1, 4:], codes[1])
    assert np.array_equal(got[0, :5], expected[0], equal_nan=True)
    assert np.array_equal(got[1, 4:], expected[1], equal_nan=True)
    assert not got[0, 5:].any()
    assert not got[1, :4].any()


def test_bf16_ties_go_to_even(isa: str) -> None:
    halfway = (np.arange(-(2**11), 2**11) << 15).astype(np.int32)
    x = (halfway + np.int32(0x3F800000)).view(np.float32).reshape(1, 32, 2, 64)
    cache = Cache(1, 32, 2, 64, "bf16")
    cache.append(x, [0])
    assert np.array_equal(cache.numpy(), attention.bf16(x))
    nan = np.full((1, 1, 2, 64), np.nan, np.float32)
    cache.append(nan, [3])
    assert np.isnan(cache.numpy()[0, 3]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv", "dim"), [(4, 2, 16), (2, 1, 22)])
def test_a_cache_equals_its_values_in_f32(isa: str, dtype: str, heads: int, kv: int, dim: int) -> None:
    """Few queries and many, within a span and beyond it."""
    time = SPAN + 60
    q, k, v = inputs(7, 1, time, heads, kv, dim)
    caches = filled(dtype, k, v)
    expected = whole(q, attention.cached(k, dtype), attention.cached(v, dtype))
    for first, count in ((0, 1), (17, 3), (SPAN - 2, 5), (time - 1, 1), (0, 90), (SPAN - 40, 100)):
        rows = slice(first, first + count)
        assert np.array_equal(attend(q[:, rows], *caches, [first]), expected[:, rows]), (first, count)


# ---- slots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots(isa: str, dtype: str) -> None:
    """Three sequences of different lengths in slots 4, 0 and 2 of five; nothing else is written."""
    q, k, v = inputs(8, 3, 40, 4, 2, 12)
    caches = [Cache(5, 50, 2, 12, dtype) for _ in range(2)]
    slots, starts = [4, 0, 2], [0, 9, 33]
    for cache, x in zip(caches, (k, v), strict=True):
        for row, slot, start in zip(x, slots, starts, strict=True):
            cache.append(row[None, :start], [0], [slot])
        cache.append(np.stack([row[start : start + 7] for row, start in zip(x, starts, strict=True)]), starts, slots)
        assert not cache.numpy()[[1, 3]].any()
    new = np.stack([row[start : start + 7] for row, start in zip(q, starts, strict=True)])
    got = attend(new, *caches, starts, slots)
    expected = whole(q, attention.cached(k, dtype), attention.cached(v, dtype))
    for row, want, start in zip(got, expected, starts, strict=True):
        assert np.array_equal(row, want[start : start + 7])
    subset = attend(new[[2, 0]], *caches, [starts[2], starts[0]], [slots[2], slots[0]])
    assert np.array_equal(subset, got[[2, 0]])


def test_a_recorded_step_goes_on_in_other_slots() -> None:
    """Slot, position and scales are read when the op runs."""
    cache = Cache(4, 10, 1, 8, "i8")
    x, q = ops.zeros((2, 1, 1, 8)), bitnet.tensor(normal(1, 2, 1, 2, 8))
    start, slot = ops.zeros((2,), "i32"), bitnet.tensor([0, 1])
    with ops.no_grad(), bitnet.Tape() as tape:
        kept = ops.cache_append(x, cache.data, start, slot, cache.scale)
        out = ops.attention(q, kept, kept, start, slot, cache.scale, cache.scale)
    values = normal(2, 2, 1, 1, 8)
    x.copy_(values)
    start.copy_([5, 0])
    slot.copy_([3, 2])
    tape.replay()
    assert np.array_equal(cache.numpy()[[3, 2], [5, 0]], attention.cached(values, "i8")[:, 0])
    assert np.array_equal(out.numpy()[1, 0], np.repeat(attention.cached(values, "i8")[1, 0], 2, 0))
    for place, error, sentence in (
        ([3, 4], IndexError, r"slot 4 at place 1 is outside \[0, 4\)"),
        ([-1, 2], IndexError, "slot -1 at place 0"),
        ([2, 2], ValueError, "slot 2 at place 1 has been named before"),
    ):
        slot.copy_(place)
        with pytest.raises(error, match=sentence):
            tape.replay()


def test_refusals() -> None:
    x, q = bitnet.tensor(normal(1, 2, 3, 1, 8)), bitnet.tensor(normal(1, 2, 3, 2, 8))
    cache, codes, scale = ops.zeros((2, 5, 1, 8)), ops.zeros((2, 5, 1, 8), "i8"), ops.zeros((2, 5, 1))
    for call, error, sentence in (
        (lambda: ops.cache_append(x, cache, [0, 3]), IndexError, r"position 5 at place 1 is outside \[0, 5\)"),
        (lambda: ops.cache_append(x, cache, [0]), ShapeError, "1 starts for 2 sequences"),
        (lambda: ops.cache_append(x, cache, [0, 0], [1]), ShapeError, "1 slots for 2 sequences"),
        (lambda: ops.cache_append(x, ops.zeros((1, 5, 1, 8)), [0, 0]), ShapeError, "1 slots for 2 sequences"),
        (lambda: ops.cache_append(x, ops.zeros((2, 5, 2, 8)), [0, 0]), ShapeError, r"\(2, 3, 1, 8\) does not fit"),
        (lambda: ops.cache_append(x, ops.zeros((2, 5, 1, 8), "i32"), [0, 0]), TypeError, "f32, bf16 or i8"),
        (lambda: ops.cache_append(x, codes, [0, 0]), ValueError, "i8 and needs its scales"),
        (lambda: ops.cache_append(x, cache, [0, 0], None, scale), ValueError, "f32 and has no scales"),
        (lambda: ops.cache_append(x, codes, [0, 0], None, ops.zeros((2, 4, 1))), ShapeError, r"scales \(2, 4, 1\)"),
        (lambda: ops.attention(q, codes, codes, [0, 0], None, scale), ValueError, "v is i8 and needs its scales"),
        (lambda: ops.attention(q, cache, cache, None, [0, 1]), ShapeError, "3 queries over 5 keys need `start`"),
        (lambda: ops.attention(q, x, x, None, [0, 1]), ValueError, "`slot` without `start`"),
        (lambda: ops.attention(q, cache, cache, [0, 0], [0, 2]), IndexError, "slot 2 at place 1"),
        (lambda: ops.attention(q, cache, ops.zeros((3, 5, 1, 8)), [0, 0]), ShapeError, "differ"),
    ):
        with ops.no_grad(), pytest.raises(error, match=sentence):
            call()

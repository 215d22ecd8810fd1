"""KVCache: sequences join, leave and share their beginnings, and each gets the logits it gets alone."""

from __future__ import annotations

import numpy as np
import pytest

import bitnet
from bitnet import ops
from bitnet.cache import KVCache
from bitnet.errors import ConfigError

CONFIG = bitnet.BitNetConfig(257, 48, 80, 2, 6, 3, max_position_embeddings=48, initializer_range=0.3)
TOKENS = np.random.default_rng(3).integers(0, 257, (3, 40)).astype(np.int32)
DTYPES = ("f32", "bf16", "int8")


@pytest.fixture(scope="module")
def model() -> bitnet.BitNetForCausalLM:
    return bitnet.BitNetForCausalLM(CONFIG, seed=1)


def run(
    model: bitnet.BitNetForCausalLM, cache: KVCache, tokens: np.ndarray, start: list[int], slot: list[int]
) -> np.ndarray:
    """Logits of a pass of tokens (B, T) from these positions on, in these slots."""
    step = cache.step(len(tokens))
    step.start.copy_(start)
    step.slot.copy_(slot)
    with bitnet.no_grad():
        logits: np.ndarray = model(tokens, cache=step).numpy()
    return logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_cut_gives_the_same_logits(isa: str, dtype: str, model: bitnet.BitNetForCausalLM) -> None:
    """At once, in pieces, a token at a time, alone or beside others: bit for bit; in f32 those without a cache."""
    cache = KVCache(CONFIG, 4, 48, dtype)
    expected = run(model, cache, TOKENS, [0] * 3, [0, 1, 2])
    pieces = []
    for first, last in ((0, 7), (7, 30), (30, 31), (31, 40)):
        pieces.append(run(model, cache, TOKENS[:, first:last], [first] * 3, [3, 0, 1]))
    assert np.array_equal(np.concatenate(pieces, 1), expected)
    alone = run(model, cache, TOKENS[1:2, :20], [0], [2])
    singly = [run(model, cache, TOKENS[1:2, at : at + 1], [at], [2]) for at in range(20, 26)]
    assert np.array_equal(np.concatenate([alone, *singly], 1), expected[1:2, :26])
    if dtype == "f32":
        with bitnet.no_grad():
            assert np.array_equal(expected, model(TOKENS).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_join_and_leave(dtype: str, model: bitnet.BitNetForCausalLM) -> None:
    """Two recorded steps, for one and for two sequences, serve whoever is there."""
    cache = KVCache(CONFIG, 3, 48, dtype)
    expected = run(model, cache, TOKENS, [0] * 3, [0, 1, 2])
    lengths = np.array([5, 11, 3])
    slots = np.array([1, 2, 0])
    for row, length, slot in zip(TOKENS, lengths, slots, strict=True):
        run(model, cache, row[None, :length], [0], [slot])
    tapes = {}
    for members in ([0, 1], [0, 1], [1], [2, 1], [2], [0], [2, 0], [1, 2]):
        step, tokens, tape, logits = tapes.get(len(members), (cache.step(len(members)), None, None, None))
        now = TOKENS[members, lengths[members], None]
        step.start.copy_(lengths[members])
        step.slot.copy_(slots[members])
        if tape is None:
            tape, tokens = bitnet.Tape(), bitnet.tensor(now)
            with bitnet.no_grad(), tape:
                logits = model(tokens, cache=step)
            tapes[len(members)] = step, tokens, tape, logits
        else:
            tokens.copy_(now)
            tape.replay()
        assert np.array_equal(logits.numpy()[:, 0], expected[members, lengths[members]])
        lengths[members] += 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copied_beginning_is_shared(dtype: str, model: bitnet.BitNetForCausalLM) -> None:
    cache = KVCache(CONFIG, 3, 48, dtype)
    first = np.concatenate([TOKENS[0, :10], TOKENS[1, 10:20]])
    expected = run(model, cache, np.stack([TOKENS[0, :20], first]), [0, 0], [0, 1])
    cache.copy(0, 2, 10)
    assert np.array_equal(run(model, cache, first[None, 10:], [10], [2])[0], expected[1, 10:])
    kept = [tensor.nbytes for layer in cache.layers for tensor in layer.tensors]
    cache.copy(1, 1, 48)
    cache.copy(0, 1, 0)
    again = run(model, cache, first[None, 19:], [19], [1])
    assert np.array_equal(again[0, 0], expected[1, 19])
    assert sum(kept) == cache.bytes_per_position * 3 * 48


def test_bytes_per_position() -> None:
    """Two layers, keys and values, three heads of eight channels."""
    expected = {"f32": 2 * 2 * 3 * 8 * 4, "bf16": 2 * 2 * 3 * 8 * 2, "int8": 2 * 2 * 3 * (8 + 4)}
    for dtype, count in expected.items():
        assert KVCache(CONFIG, 2, 5, dtype).bytes_per_position == count


def test_rounding_costs_little(model: bitnet.BitNetForCausalLM) -> None:
    """Beside what a token changes: the more so, the fewer bits are kept."""
    logits = [run(model, KVCache(CONFIG, 1, 48, dtype), TOKENS[:1], [0], [0])[0] for dtype in DTYPES]
    spread = logits[0].std()
    errors = [np.abs(x - logits[0]).mean() / spread for x in logits[1:]]
    assert 0 < errors[0] < errors[1] < 0.1


def test_a_step_begins_in_the_first_slots() -> None:
    cache = KVCache(CONFIG, 4, 8)
    step = cache.step(3)
    assert step.slot.numpy().tolist() == [0, 1, 2]
    assert step.start.numpy().tolist() == [0, 0, 0]
    assert (cache.slots, cache.capacity, cache.dtype, step.batch) == (4, 8, "f32", 3)


def test_refusals() -> None:
    cache = KVCache(CONFIG, 2, 8)
    for call, error, sentence in (
        (lambda: KVCache(CONFIG, 2, 8, "f16"), ConfigError, "f32, bf16, int8, not 'f16'"),
        (lambda: KVCache(CONFIG, 0, 8), ConfigError, "not 0 and 8"),
        (lambda: cache.step(3), ConfigError, "1 to 2 sequences.*not 3"),
        (lambda: cache.copy(0, 2, 3), IndexError, "slot 0 to 2, of 2 slots of 8 positions"),
        (lambda: cache.copy(-1, 0, 3), IndexError, "slot -1"),
        (lambda: cache.copy(0, 1, 9), IndexError, "9 positions"),
        (lambda: bitnet._core.cache_copy(ops.zeros((3,)), 0, 1, 1), ValueError, "is no cache"),
    ):
        with pytest.raises(error, match=sentence):
            call()

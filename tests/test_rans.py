"""The entropy coder: what was coded comes back, in no more bytes than the distribution asks; damage is refused."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet import _core

Array = np.ndarray[Any, Any]
BLOCK = 65536


def frequencies_of(weights: list[int]) -> list[int]:
    """4096 slots in proportion to the weights, one at a time where it is worth most: exact arithmetic throughout."""
    total = sum(weights)
    out = [max(1, w * 4096 // total) if w else 0 for w in weights]
    while sum(out) != 4096:
        step = 1 if sum(out) < 4096 else -1
        open_to_change = [s for s, w in enumerate(weights) if w and (step > 0 or out[s] > 1)]
        worth = {s: weights[s] * 10**30 // out[s] for s in open_to_change}
        best = max(worth, key=lambda s: worth[s]) if step > 0 else min(worth, key=lambda s: worth[s])
        out[best] += step
    return out


def number(stream: bytes, at: int) -> tuple[int, int]:
    if stream[at] < 128:
        return stream[at], at + 1
    return stream[at] & 127 | stream[at + 1] << 7, at + 2


def decoded(stream: bytes, size: int) -> bytes:
    """The format as csrc/formats/rans.h tells it, one byte after the other."""
    kind, at, numbers = stream[0], 1, []
    for _ in range(256 if kind else 3):
        value, at = number(stream, at)
        numbers.append(value)
    if kind == 0:
        digits = [[s // 3**k % 3 for k in range(5)] for s in range(243)]
        numbers = frequencies_of([math.prod(numbers[d] for d in five) for five in digits])
    symbols = [s for s, f in enumerate(numbers) for _ in range(f)]
    starts = np.cumsum([0, *numbers])
    blocks = -(-size // BLOCK)
    lengths = [int.from_bytes(stream[at + 4 * i : at + 4 * i + 4], "little") for i in range(blocks - 1)]
    at += 4 * (blocks - 1)
    lengths.append(len(stream) - at - sum(lengths))
    out = bytearray()
    for length in lengths:
        block, at = stream[at : at + length], at + length
        states = [int.from_bytes(block[4 * k : 4 * k + 4], "little") for k in range(4)]
        word = 16
        count = min(BLOCK, size - len(out))
        for i in range(count if count < 8 else count - 8):
            x = states[i % 4]
            symbol = symbols[x % 4096]
            x = numbers[symbol] * (x // 4096) + x % 4096 - int(starts[symbol])
            if x < 2**16:
                x = x << 16 | int.from_bytes(block[word : word + 2], "little")
                word += 2
            states[i % 4] = x
            out.append(symbol)
        assert word == length
        assert all(x >> 16 == 1 for x in states)
        if count < 8:
            assert states == [2**16] * 4
        else:
            out += b"".join((x & 0xFFFF).to_bytes(2, "little") for x in states)
    assert at == len(stream)
    return bytes(out)


def skewed(size: int, zeros: float, seed: int = 0) -> Array:
    """Bytes of independent codes, of which a share is zero."""
    p = [(1 - zeros) / 2, zeros, (1 - zeros) / 2]
    codes = np.random.default_rng(seed).choice(np.array([-1, 0, 1], np.int8), (5, size), p=p)
    return _core.pack_fifths(_core.Tensor(codes))


def entropy_bytes(data: Array) -> float:
    shares = np.bincount(data, minlength=1) / data.size
    return float(-sum(p * math.log2(p) for p in shares if p)) * data.size / 8


@pytest.mark.parametrize(
    "data",
    [
        np.zeros(1, np.uint8),
        np.full(3000, 242, np.uint8),
        np.arange(256, dtype=np.uint8),
        np.arange(3001).astype(np.uint8),
        skewed(3000, 0.4),
        skewed(9, 0.5),
        np.repeat(np.array([7, 200], np.uint8), [4999, 1]),
    ],
    ids=["one", "constant", "each", "repeating", "codes", "few", "rare"],
)
def test_the_format_is_the_one_that_is_told(data: Array) -> None:
    stream = _core.rans_encode(data)
    assert decoded(stream, data.size) == data.tobytes()
    np.testing.assert_array_equal(_core.rans_decode(stream, data.size), data)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_come_back(data: bytes) -> None:
    assert _core.rans_decode(_core.rans_encode(data), len(data)).tobytes() == data


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 7, 8, 9, 255, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 13]),
    st.integers(1, 256),
    st.floats(0.2, 8.0),
    st.integers(0, 99),
)
def test_distributions_of_every_shape_come_back(size: int, symbols: int, power: float, seed: int) -> None:
    data = (np.random.default_rng(seed).random(size) ** power * symbols).astype(np.uint8)
    stream = _core.rans_encode(data)
    np.testing.assert_array_equal(_core.rans_decode(stream, size), data)


def test_the_stream_does_not_depend_on_threads(threads: int) -> None:
    data = skewed(5 * BLOCK + 100, 0.37)
    stream = _core.rans_encode(data)
    assert hash(stream) == hash(_core.rans_encode(bytes(data)))
    np.testing.assert_array_equal(_core.rans_decode(stream, data.size), data)
    assert stream[:1] == b"\0"  # independent codes: three counts say all


@pytest.mark.parametrize("zeros", [0.0, 0.2, 1 / 3, 0.5, 0.8, 0.99, 1.0])
def test_size_is_near_the_entropy(zeros: float) -> None:
    """20 bytes a block, a table, and what 4096 slots lose: rare bytes take one each, 243 at the very most."""
    data = skewed(4 * BLOCK, zeros)
    stream = _core.rans_encode(data)
    assert len(stream) <= entropy_bytes(data) + 4 * 20 + 10 + 4 * BLOCK * math.log2(4096 / (4096 - 243)) / 8
    if 0.2 <= zeros <= 0.5:
        assert len(stream) <= 1.001 * entropy_bytes(data) + 4 * 20 + 10


def test_dependent_codes_get_a_table_of_their_own() -> None:
    data = np.random.default_rng(0).choice(np.array([0, 121, 242], np.uint8), 3000)
    stream = _core.rans_encode(data)
    assert stream[:1] == b"\1"
    assert len(stream) <= entropy_bytes(data) + 16 + 1 + 256 + 6


def test_nothing_is_nothing() -> None:
    assert _core.rans_encode(b"") == b""
    assert _core.rans_decode(b"", 0).size == 0
    with pytest.raises(ValueError, match="1 bytes cannot hold 0 bytes"):
        _core.rans_decode(b"\0", 0)


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_every_truncation_and_every_extension() -> None:
    data = skewed(700, 0.4)
    for payload in (data, data + np.uint8(10)):  # both kinds of table
        stream = _core.rans_encode(payload)
        for length in range(len(stream)):
            with pytest.raises(ValueError, match="coded stream"):
                _core.rans_decode(stream[:length], 700)
        with pytest.raises(ValueError, match="block 0 of 1 of a coded stream is damaged"):
            _core.rans_decode(stream + b"\0", 700)


def test_sizes_that_cannot_be() -> None:
    stream = _core.rans_encode(skewed(700, 0.4))
    for size in (60 * BLOCK, 2**40, 2**62, 2**63 - 1):
        with pytest.raises(ValueError, match=f"cannot hold {size} bytes"):
            _core.rans_decode(stream, size)
    for size in (1, 699, 701, BLOCK):
        with pytest.raises(ValueError, match="block 0 of 1 of a coded stream is damaged"):
            _core.rans_decode(stream, size)
    with pytest.raises(ValueError, match="not negative: -1"):
        _core.rans_decode(stream, -1)


def test_a_damaged_block_is_named() -> None:
    data = skewed(3 * BLOCK, 0.4)
    stream = bytearray(_core.rans_encode(data))
    stream[-40] ^= 4
    with pytest.raises(ValueError, match="block 2 of 3 of a coded stream is damaged"):
        _core.rans_decode(stream, data.size)
    stream[len(stream) // 2] ^= 4
    with pytest.raises(ValueError, match="block 1 of 3"):
        _core.rans_decode(stream, data.size)


@pytest.mark.parametrize(
    ("stream", "sentence"),
    [
        (b"\2" + b"\1" * 60, "its kind, 0 or 1, not with 2"),
        (b"\0\0\0\0" + b"\0" * 60, "three counts of a coded stream are 0"),
        (b"\0\1\xff\x7f\1" + b"\0" * 60, "digit 1 of a coded stream has no count from 0 to 1023"),
        (b"\1" + b"\x80\x80\x80" * 100, "breaks off at frequency 0"),
        (b"\1" + b"\xff\x7f" * 256 + b"\0" * 60, "sum to 4194048, not 4096"),
        (b"\1" + b"\x10" * 255 + b"\x11" + b"\0" * 60, "sum to 4097"),
        (b"\1" + b"\x10" * 256 + b"\0" * 15, "block 0 of 1 of a coded stream has 15 bytes"),
        (b"\1" + b"\x10" * 254, "breaks off at frequency 254"),
    ],
)
def test_streams_that_lie(stream: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _core.rans_decode(stream, 5)


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        (b"\x0f\0\0\0" + b"\0" * 60, "block 0 of 2 of a coded stream has 15 bytes"),
        (b"\xff\xff\xff\xff" + b"\0" * 60, "has 4294967295 bytes; 60 are left"),
        (b"\x2d\0\0\0" + b"\0" * 60, "block 1 of 2 of a coded stream has 15 bytes"),
        (b"\x10\0", "259 bytes ends before the lengths of its 2 blocks"),
    ],
)
def test_lengths_that_lie(lengths: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _core.rans_decode(b"\1" + b"\x10" * 256 + lengths, BLOCK + 5)


def attempt(stream: bytes, size: int) -> tuple[Array | None, str]:
    """What the stream decodes to, or None and what was said instead."""
    try:
        return _core.rans_decode(stream, size), ""
    except ValueError as error:
        return None, str(error)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600), st.integers(0, 2 * BLOCK))
def test_hostile_bytes_are_refused(stream: bytes, size: int) -> None:
    """The sanitized run of this suite sees that nothing outside is read or written."""
    got, said = attempt(stream, size)
    assert "coded stream" in said if got is None else got.size == size


HOSTILE_TABLES = [b"\0\1\1\1", b"\0\xff\7\0\xff\7", b"\1" + b"\x10" * 256, b"\1\x80\x20" + b"\0" * 255]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HOSTILE_TABLES), st.binary(min_size=16, max_size=400), st.integers(1, 2000))
def test_hostile_blocks_are_refused_or_decode(table: bytes, block: bytes, size: int) -> None:
    """As above, with a table that is right, so that the states and words are what is made up."""
    stream = table + block
    got, said = attempt(stream, size)
    if got is None:
        assert "block 0 of 1 of a coded stream is damaged" in said
    else:
        assert got.tobytes() == decoded(stream, size)


def test_flipped_bits_give_other_bytes_or_an_error() -> None:
    data = skewed(400, 0.4)
    stream = _core.rans_encode(data)
    for bit in random.Random(0).sample(range(8 * 7, 8 * len(stream)), 400):  # counts a little off may mean the same
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        got, _ = attempt(bytes(damaged), 400)
        assert got is None or not np.array_equal(got, data)

"""Five codes a byte: the definition in NumPy, both ways, and what neither way accepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet
from bitnet import _core

Array = np.ndarray[Any, Any]


def packed(codes: Array) -> Array:
    """The definition: byte j holds the codes j, j + m, .. j + 4m, plus one, in base three."""
    m = -(-codes.size // 5)
    digits = np.zeros(5 * m, int)
    digits[: codes.size] = codes.ravel() + 1
    return (digits.reshape(5, m) * (3 ** np.arange(5))[:, None]).sum(0).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.integers(0, 70), st.integers(0, 999))
def test_round_trip_and_definition(rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, cols), np.int8)
    got = _core.pack_fifths(_core.Tensor(codes))
    np.testing.assert_array_equal(got, packed(codes))
    np.testing.assert_array_equal(_core.unpack_fifths(got, rows, cols).numpy(), codes)


def test_every_byte_and_many_pieces(threads: int) -> None:
    values = np.arange(243, dtype=np.uint8)
    np.testing.assert_array_equal(_core.pack_fifths(_core.unpack_fifths(values, 5, 243)), values)
    codes = np.random.default_rng(0).integers(-1, 2, (701, 1003), np.int8)
    got = _core.pack_fifths(_core.Tensor(codes))
    np.testing.assert_array_equal(got, packed(codes))
    np.testing.assert_array_equal(_core.unpack_fifths(got.tobytes(), 701, 1003).numpy(), codes)


def test_what_packing_refuses() -> None:
    for value in (-2, 2, -128, 127):
        codes = np.zeros((3, 7), np.int8)
        codes[2, 6] = value
        with pytest.raises(ValueError, match=f"code 20 is {value}; only -1, 0 and 1 can be packed"):
            _core.pack_fifths(_core.Tensor(codes))
    with pytest.raises(TypeError, match="codes are f32, expected i8"):
        _core.pack_fifths(_core.Tensor(np.zeros((2, 2), np.float32)))


def test_what_unpacking_refuses() -> None:
    good = _core.pack_fifths(_core.Tensor(np.zeros((3, 7), np.int8)))
    for value in (243, 255):
        bad = good.copy()
        bad[3] = value
        with pytest.raises(ValueError, match=f"byte 3 of packed codes is {value}; five codes are 0 to 242"):
            _core.unpack_fifths(bad, 3, 7)
    bad = good.copy()
    bad[4] += 81  # 5 bytes for 21 codes: bytes 1 to 4 have no fifth
    with pytest.raises(ValueError, match="byte 4 of packed codes holds a code beyond the last of 21"):
        _core.unpack_fifths(bad, 3, 7)
    for rows, cols in [(3, 9), (2, 7), (-3, -7), (2**62, 2), (2**40, 2**40), (-1, 5), (0, 0)]:
        with pytest.raises(bitnet.ShapeError, match=f"5 bytes are not the codes of a matrix {rows} x {cols}"):
            _core.unpack_fifths(good, rows, cols)
    with pytest.raises((TypeError, BufferError, ValueError)):
        _core.unpack_fifths(np.zeros(10, np.uint8)[::2], 5, 5)

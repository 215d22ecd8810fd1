"""Four ternary codes in a byte: what packed Hugging Face files, TQ2_0 and I2_S have in common.

A group of G bytes holds 4G codes, each stored as code + 1 (3 is unused): code i*G + m is in bits of byte m, the pair of
bits i counted from the low end, or from the high end.

    layout                        G                   pairs counted from
    Hugging Face U8, a matrix     rows / 4 * cols     low      (the first quarter of the rows)
    TQ2_0                         32                  low
    I2_S on x86                   32                  high
    I2_S on ARM                   16                  high
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def pack(codes: Array, group: int, high_first: bool) -> Array:
    """codes: int8 -1, 0 or 1 of any shape, a multiple of 4 * group in all -> uint8 (codes.size / 4,)."""
    _check_size(codes.size, 4 * group, "codes")
    parts = np.ascontiguousarray(codes).view(np.uint8).reshape(-1, 4, group)
    out = np.zeros((len(parts), group), np.uint8)
    for i, shift in enumerate(_shifts(high_first)):
        out |= (parts[:, i] + np.uint8(1)) << shift
    return out.reshape(-1)


def unpack(data: Array, group: int, high_first: bool) -> Array:
    """data: uint8 of any shape, a multiple of `group` in all -> int8 (4 * data.size,). ValueError for the code 3."""
    _check_size(data.size, group, "bytes")
    given = np.ascontiguousarray(data).reshape(-1, group)
    if (given & given >> 1 & 0x55).any():
        at = int(np.argmax(given & given >> 1 & 0x55 != 0))
        raise ValueError(
            f"byte {at} of its codes is {given.flat[at]:#04x}, which holds a 3; only 0, 1 and 2 have a meaning"
        )
    out = np.empty((len(given), 4, group), np.uint8)
    for i, shift in enumerate(_shifts(high_first)):
        np.right_shift(given, shift, out=out[:, i])
    out &= 3
    out -= 1  # 255 is -1
    return out.view(np.int8).reshape(-1)


def _shifts(high_first: bool) -> list[np.uint8]:
    return [np.uint8(6 - shift if high_first else shift) for shift in (0, 2, 4, 6)]


def _check_size(size: int, unit: int, what: str) -> None:
    if size % unit:
        raise ValueError(f"{size} {what} are no multiple of {unit}")

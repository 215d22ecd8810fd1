"""Blocks of ggml's types to numbers and back, in NumPy: the bytes are those that gguf-py and ggml make.

    F32, F16, BF16    a number each
    Q8_0              32 values: f16 d, then 32 i8; a value is d * i8
    Q4_K              256 values: f16 d, f16 m, eight scales and minima of six bits each, four bits of each; read only
    Q6_K              256 values: low four bits of each, high two, sixteen i8 scales, f16 d; read only
    TQ2_0             256 codes, four a byte (two_bits.py), then f16 d
    TQ1_0             256 codes, five a byte and the last sixteen four a byte, then f16 d

    TQ1_0 bytes       codes, most significant digit first
    m < 32            m, 32 + m, 64 + m, 96 + m, 128 + m
    32 + m, m < 16    160 + m, 176 + m, 192 + m, 208 + m, 224 + m
    48 + m, m < 4     240 + m, 244 + m, 248 + m, 252 + m, and a digit 0

Five digits u = code + 1 make q = sum u_n 3^(4-n) < 243, stored as ceil(q * 256 / 243): digit n is then the product with
3^n, of whose low byte three times is looked at in the ninth bit and above, and no division is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bitnet.formats import two_bits
from bitnet.formats.gguf_types import BF16, F16, F32, I2_S, Q4_K, Q6_K, Q8_0, TQ2_0, TensorType
from bitnet.formats.weights import bf16_bits, bf16_values, is_bf16

Array = np.ndarray[Any, Any]
VALUES = 1 << 20  # made of blocks at a time: a few MB of temporary memory
HALF, SINGLE = np.dtype("<f2"), np.dtype("<f4")
I2_S_GROUPS = {"x86": 32, "arm": 16}
TQ1_PARTS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))  # bytes from, to; digits in each
TQ1_BYTES = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)  # of q
TQ1_CODES = ((np.arange(256) * 3 ** np.arange(5)[:, None] % 256 * 3 >> 8) - 1).astype(np.int8)  # of digit, byte

# ---- floats ---------------------------------------------------------------------------------------------------------


def decode(kind: TensorType, data: memoryview) -> Array:
    """Bytes of F32, F16, BF16, Q8_0, Q4_K or Q6_K -> f32, flat; of F32 where they lie."""
    if kind is F32:
        return np.frombuffer(data, SINGLE)
    if kind is F16:
        with np.errstate(invalid="ignore"):
            return np.frombuffer(data, HALF).astype(np.float32)
    if kind is BF16:
        return bf16_values(np.frombuffer(data, "<u2"))
    blocks = np.frombuffer(data, np.uint8).reshape(-1, kind.bytes)
    values = np.empty((len(blocks), kind.block), np.float32)
    for some in _pieces(len(blocks), kind):
        values[some] = FROM_BLOCKS[kind](blocks[some])
    return values.reshape(-1)


def as_bf16(kind: TensorType, data: memoryview) -> Array | None:
    """Bytes of F32 or F16 -> the upper halves of bf16, uint16, flat; None if that loses anything."""
    out = np.empty(len(data) // kind.bytes, np.uint16)
    for i in range(0, out.size, VALUES):
        values = decode(kind, data[i * kind.bytes : (i + VALUES) * kind.bytes])
        if not is_bf16(values):
            return None
        out[i : i + VALUES] = values.view(np.uint32) >> 16
    return out


def encode(kind: TensorType, values: Array) -> Array:
    """f32 -> the bytes of F32, F16, BF16 or Q8_0. ValueError for a number that F16 cannot hold."""
    flat = np.ascontiguousarray(values, SINGLE).reshape(-1)
    if kind is F32:
        return flat.view(np.uint8)
    if kind is F16:
        return _halves(flat).view(np.uint8)
    if kind is BF16:
        return bf16_bits(flat).astype("<u2", copy=False).view(np.uint8)
    assert kind is Q8_0
    blocks = flat.reshape(-1, kind.block)
    data = np.empty((len(blocks), kind.bytes), np.uint8)
    for some in _pieces(len(blocks), kind):
        data[some] = _q8_0_bytes(blocks[some])
    return data.reshape(-1)


def _pieces(blocks: int, kind: TensorType) -> Iterator[slice]:
    step = VALUES // kind.block
    return (slice(i, i + step) for i in range(0, blocks, step))


def _halves(values: Array) -> Array:
    """f16 of f32. ValueError if a number becomes infinite by it."""
    out = np.empty(values.shape, HALF)
    flat, target = values.reshape(-1), out.reshape(-1)
    for i in range(0, flat.size, VALUES):
        with np.errstate(over="ignore"):
            target[i : i + VALUES] = flat[i : i + VALUES]
        if np.isinf(target[i : i + VALUES]).any():
            most = np.abs(flat[i : i + VALUES]).max()
            raise ValueError(f"{most:g} is beyond what F16 holds, which ends at 65504")
    return out


def _q8_0_values(blocks: Array) -> Array:
    with np.errstate(invalid="ignore"):  # an infinite d
        return blocks[:, 2:].view(np.int8) * blocks[:, :2].copy().view(HALF).astype(np.float32)


def _q8_0_bytes(blocks: Array) -> Array:
    d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    halves = _halves(d)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(d < 1e-38, np.float32(0), 1 / d)  # as for 0 where 1 / d would be infinite
    scaled = blocks * inverse
    whole = np.floor(np.abs(scaled))  # half away from zero, exactly: adding 0.5 first would round twice
    whole += np.floor(2 * (np.abs(scaled) - whole))
    codes = (np.sign(scaled) * whole).astype(np.int8)
    return np.concatenate([halves.view(np.uint8), codes.view(np.uint8)], 1)


def _q4_k_values(blocks: Array) -> Array:
    d, m = blocks[:, :4].copy().view(HALF).astype(np.float32).T[:, :, None]
    first, second, third = (blocks[:, 4 * i + 4 : 4 * i + 8] for i in range(3))
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], 1)  # of 32 values each
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], 1)
    codes = blocks[:, 16:].reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    with np.errstate(invalid="ignore"):  # an infinite d
        values = (d * scales)[:, :, None] * codes.reshape(-1, 8, 32) - (m * minima)[:, :, None]
    return values.reshape(-1, 256)


def _q6_k_values(blocks: Array) -> Array:
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    scales, d = blocks[:, 192:208].view(np.int8), blocks[:, 208:].copy().view(HALF).astype(np.float32)
    low = (low >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(-1, 2, 4, 32)
    high = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low | high << 4).astype(np.int8) - np.int8(32)
    with np.errstate(invalid="ignore"):  # an infinite d
        return ((d * scales)[:, :, None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


FROM_BLOCKS = {Q8_0: _q8_0_values, Q4_K: _q4_k_values, Q6_K: _q6_k_values}

# ---- ternary codes --------------------------------------------------------------------------------------------------


def decode_codes(kind: TensorType, data: memoryview, order: str) -> tuple[Array, Array]:
    """Bytes of TQ1_0, TQ2_0 or I2_S -> int8 codes, flat, and f32 scales, one for each 256 codes, or one for all.

    order: of I2_S, x86 or arm. ValueError for codes that mean nothing.
    """
    if kind is I2_S:
        codes = two_bits.unpack(np.frombuffer(data[: -kind.tail], np.uint8), I2_S_GROUPS[order], True)
        return codes, np.frombuffer(data[-kind.tail :][:4], SINGLE)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, kind.bytes)
    if kind is TQ2_0:
        codes = two_bits.unpack(blocks[:, :-2], 32, False)
    else:
        codes = np.empty((len(blocks), kind.block), np.int8)
        at = 0
        for begin, end, digits in TQ1_PARTS:
            for n in range(digits):
                codes[:, at : at + end - begin] = TQ1_CODES[n][blocks[:, begin:end]]
                at += end - begin
    return codes.reshape(-1), block_scales(kind, data)


def block_scales(kind: TensorType, data: memoryview) -> Array:
    """f32 scales of the blocks of TQ1_0 or TQ2_0."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, kind.bytes)
    with np.errstate(invalid="ignore"):
        return blocks[:, -2:].copy().view(HALF)[:, 0].astype(np.float32)


def encode_codes(kind: TensorType, codes: Array, scale: float, order: str) -> Array:
    """int8 codes and their scale -> bytes of TQ1_0, TQ2_0 or I2_S, as ggml makes them of codes * scale.

    A block of zeros alone has the scale 0, as ggml gives it. ValueError for a scale that F16 does not hold.
    """
    codes = np.ascontiguousarray(codes).reshape(-1)
    if kind is I2_S:
        tail = np.zeros(kind.tail // 4, SINGLE)
        tail[0] = scale
        return np.concatenate([two_bits.pack(codes, I2_S_GROUPS[order], True), tail.view(np.uint8)])
    blocks = codes.reshape(-1, kind.block)
    data = np.empty((len(blocks), kind.bytes), np.uint8)
    if kind is TQ2_0:
        data[:, :-2] = two_bits.pack(codes, 32, False).reshape(len(blocks), -1)
    else:
        at = 0
        for begin, end, digits in TQ1_PARTS:
            q = np.zeros((len(blocks), end - begin), np.uint8)
            for n in range(5):
                q *= 3
                if n < digits:
                    q += (blocks[:, at : at + end - begin] + np.int8(1)).view(np.uint8)
                    at += end - begin
            data[:, begin:end] = TQ1_BYTES[q]
    d = _halves(np.array([scale], np.float32))
    if not d.all():
        raise ValueError(f"the scale {scale:g} is below what F16 holds")
    data[:, -2:] = d.view(np.uint8) * blocks.any(axis=1, keepdims=True)
    return data.reshape(-1)


# ---- codes among floats ---------------------------------------------------------------------------------------------


def codes_among(kind: TensorType, data: memoryview) -> tuple[Array, float] | None:
    """Codes and scale of numbers of which each is -s, 0 or s, for one s: exactly. None if they are others.

    data: of F32, F16, BF16, Q8_0, Q4_K or Q6_K. If all are 0, the scale is 0.
    """
    bits = np.frombuffer(data, "<u2") if kind in (F16, BF16) else decode(kind, data).view(np.uint32)
    top = np.array(1 << 8 * bits.itemsize - 1, bits.dtype)  # the sign
    size = 0
    codes = np.empty(bits.size, np.int8)
    for i in range(0, bits.size, VALUES):
        part = bits[i : i + VALUES]
        sizes = part & ~top
        size = size or int(sizes.max())
        if ((sizes != 0) & (sizes != size)).any():
            return None
        signs = (part >> (8 * bits.itemsize - 1)).astype(np.int8)
        codes[i : i + VALUES] = (sizes != 0) * (1 - 2 * signs)
    found = np.array([size], bits.dtype)
    if kind is BF16:
        return codes, float(bf16_values(found)[0])
    return codes, float(found.view(HALF if kind is F16 else SINGLE)[0])

"""Causal grouped-query attention: out = softmax(q k^T / sqrt(D) + mask) v for each head (Vaswani et al. 2017).

q: (B, T, H, D); k, v: (B, S, KV, D). Query head h reads key/value head h // (H / KV) (Ainslie et al. 2023). Query t of
sequence b sits at position start[b] + t and sees keys 0 .. that position.
"""

from __future__ import annotations

import numpy as np

from . import quantize, softmax


def probabilities(q: np.ndarray, k: np.ndarray, start: np.ndarray | None) -> np.ndarray:
    (batch, time, heads, dim), (_, keys, kv, _) = q.shape, k.shape
    first = np.zeros(batch, int) if start is None else np.asarray(start)
    score = np.einsum("bthd,bshd->bhts", q, np.repeat(k, heads // kv, 2)) / np.sqrt(dim)
    seen = np.arange(keys) <= (first[:, None] + np.arange(time))[..., None]  # (B, T, S)
    return softmax.forward(np.where(seen[:, None], score, -np.inf))


def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    p = probabilities(q, k, start)
    return np.einsum("bhts,bshd->bthd", p, np.repeat(v, q.shape[2] // v.shape[2], 2))


def backward(dy: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (batch, time, heads, dim), kv = q.shape, k.shape[2]
    p = probabilities(q, k, None)
    dp = np.einsum("bthd,bshd->bhts", dy, np.repeat(v, heads // kv, 2))
    ds = p * (dp - np.sum(dp * p, -1, keepdims=True)) / np.sqrt(dim)
    dq = np.einsum("bhts,bshd->bthd", ds, np.repeat(k, heads // kv, 2))
    dk = np.einsum("bhts,bthd->bshd", ds, q)
    dv = np.einsum("bhts,bthd->bshd", p, dy)
    grouped = (batch, time, kv, heads // kv, dim)  # a shared head gathers from its whole group
    return dq, dk.reshape(grouped).sum(3), dv.reshape(grouped).sum(3)


def bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bf16, ties to even, as a float32; NaN stays NaN."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


def cached(x: np.ndarray, dtype: str) -> np.ndarray:
    """Keys or values (..., D) as a cache of f32, bf16 or i8 gives them back; i8 has a scale for each row of D."""
    if dtype == "i8":
        q, scale = quantize.absmax_int8(x)
        return q.astype(np.float32) * scale
    return bf16(x) if dtype == "bf16" else x

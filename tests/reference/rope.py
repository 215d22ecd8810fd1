"""Rotary position embedding: dimensions (j, j + D/2) of each head turn by the angle position * theta^(-2j/D).

x: (B, T, H, D); cos, sin: (positions, D/2); row t of sequence b is at position start[b] + t. A rotation is orthogonal,
so the gradient is turned back by the same angle (Su et al. 2021, in the half-split form of published checkpoints).
"""

from __future__ import annotations

import numpy as np


def tables(positions: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    angle = np.outer(np.arange(positions), theta ** (-2 * np.arange(head_dim // 2) / head_dim))
    return np.cos(angle), np.sin(angle)


def forward(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    batch, time, _, dim = x.shape
    first = np.zeros(batch, int) if start is None else np.asarray(start)
    position = first[:, None] + np.arange(time)  # (B, T)
    c, s = cos[position][:, :, None], sin[position][:, :, None]
    x1, x2 = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def backward(
    dy: np.ndarray, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, start: np.ndarray | None = None
) -> tuple[np.ndarray]:
    return (forward(dy, cos, -sin, start),)

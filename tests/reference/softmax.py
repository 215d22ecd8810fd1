"""Softmax over the last dimension: y = exp(x) / sum exp(x); dx = y (dy - sum dy y)."""

from __future__ import annotations

import numpy as np


def forward(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def backward(dy: np.ndarray, x: np.ndarray) -> tuple[np.ndarray]:
    y = forward(x)
    return (y * (dy - np.sum(dy * y, -1, keepdims=True)),)

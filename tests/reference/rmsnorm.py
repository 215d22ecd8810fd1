"""RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""

from __future__ import annotations

import numpy as np


def forward(x: np.ndarray, weight: np.ndarray | None = None, eps: float = 1e-5) -> np.ndarray:
    y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    return y if weight is None else y * weight


def backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None = None, eps: float = 1e-5
) -> tuple[np.ndarray, ...]:
    rstd = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    g = dy if weight is None else dy * weight
    dx = rstd * (g - x * rstd**2 * np.mean(g * x, -1, keepdims=True))
    return (dx,) if weight is None else (dx, np.sum((dy * x * rstd).reshape(-1, x.shape[-1]), 0))

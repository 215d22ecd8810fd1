"""Matrix product: y = a b with a (..., M, K), b (K, N) or (..., K, N); da = dy b^T, db = a^T dy."""

from __future__ import annotations

import numpy as np


def forward(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a @ b


def backward(dy: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if b.ndim > 2:
        return dy @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ dy
    return dy @ b.T, a.reshape(-1, a.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])

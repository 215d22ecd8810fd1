"""The orthonormal Walsh-Hadamard transform of blocks of n channels, n the largest power of two that divides them.

H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]]; y = H_n x / sqrt(n), whose derivative is H_n / sqrt(n) again.
"""

from __future__ import annotations

import numpy as np


def matrix(channels: int) -> np.ndarray:
    """H_n / sqrt(n), (n, n)."""
    n = channels & -channels
    h = np.ones((1, 1))
    while h.shape[0] < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def forward(x: np.ndarray) -> np.ndarray:
    h = matrix(x.shape[-1]).astype(x.dtype)
    return (x.reshape(-1, h.shape[0]) @ h).reshape(x.shape)


def backward(dy: np.ndarray, x: np.ndarray) -> tuple[np.ndarray]:
    return (forward(dy),)

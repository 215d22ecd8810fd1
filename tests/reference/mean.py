"""Mean of all elements, a scalar."""

from __future__ import annotations

import numpy as np


def forward(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.mean(x))


def backward(dy: np.ndarray, x: np.ndarray) -> tuple[np.ndarray]:
    return (np.full_like(x, dy / x.size),)

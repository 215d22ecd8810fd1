"""The same elements in row-major order under another shape."""

from __future__ import annotations

import numpy as np


def forward(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return x.reshape(shape)


def backward(dy: np.ndarray, x: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray]:
    return (dy.reshape(x.shape),)

"""Linear map: y = x weight^T with x (..., in), weight (out, in); dx = dy weight, dweight = dy^T x."""

from __future__ import annotations

import numpy as np


def forward(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x @ weight.T


def backward(dy: np.ndarray, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, out = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ weight, out.T @ rows

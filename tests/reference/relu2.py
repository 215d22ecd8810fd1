"""Gated squared ReLU: y = max(gate, 0)^2 * up (So et al. 2021, as in bitnet-b1.58-2B-4T)."""

from __future__ import annotations

import numpy as np


def forward(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.maximum(gate, 0) ** 2 * up


def backward(dy: np.ndarray, gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r = np.maximum(gate, 0)
    return dy * up * 2 * r, dy * r * r

"""Embedding: y[..., :] = weight[tokens[...], :]; the gradient of a row is the sum over its occurrences."""

from __future__ import annotations

import numpy as np


def forward(tokens: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight[tokens]


def backward(dy: np.ndarray, tokens: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray]:
    dweight = np.zeros_like(weight)
    for token, row in zip(tokens.reshape(-1), dy.reshape(-1, weight.shape[1]), strict=True):
        dweight[token] += row
    return (dweight,)

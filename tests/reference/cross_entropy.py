"""Output head and loss in one: the mean over counted rows of -log softmax(x weight^T)[target].

x: (..., C); weight: (V, C); targets: (...). A target of -100 takes no part, and with no target at all the loss is 0.
"""

from __future__ import annotations

import numpy as np

from . import linear, softmax

IGNORE = -100


def forward(x: np.ndarray, weight: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = linear.forward(x, weight).reshape(-1, weight.shape[0])
    rows, wanted = counted(targets)
    top = logits.max(-1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return np.asarray((log_sum[rows] - logits[rows, wanted]).sum() / max(1, len(rows)))


def backward(dy: np.ndarray, x: np.ndarray, weight: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits = linear.forward(x, weight)
    rows, wanted = counted(targets)
    flat = np.zeros((targets.size, weight.shape[0]))
    flat[rows] = softmax.forward(logits.reshape(flat.shape)[rows])
    flat[rows, wanted] -= 1
    return linear.backward((flat * (dy / max(1, len(rows)))).reshape(logits.shape), x, weight)


def counted(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that take part, and their targets."""
    flat = targets.reshape(-1)
    rows = np.flatnonzero(flat != IGNORE)
    return rows, flat[rows]

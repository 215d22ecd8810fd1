"""AdamW with decoupled weight decay and clipping by global norm (Loshchilov and Hutter 2019, algorithm 2).

m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr (weight_decay p + m^ / (sqrt(v^) + eps)),
where m^ = m / (1 - b1^t), v^ = v / (1 - b2^t) and t counts from 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class State:
    """Moments of one parameter."""

    m: np.ndarray
    v: np.ndarray
    t: int = 0


def step(
    p: np.ndarray,
    g: np.ndarray,
    state: State,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> np.ndarray:
    """The new parameter; `state` is updated in place."""
    b1, b2 = betas
    state.t += 1
    state.m = b1 * state.m + (1 - b1) * g
    state.v = b2 * state.v + (1 - b2) * g * g
    m_hat, v_hat = state.m / (1 - b1**state.t), state.v / (1 - b2**state.t)
    return p - lr * (weight_decay * p + m_hat / (np.sqrt(v_hat) + eps))


def clip_factor(grads: list[np.ndarray], max_norm: float) -> tuple[float, float]:
    """The global norm, and the factor that brings it to max_norm where it is larger."""
    norm = float(np.sqrt(sum(float(np.sum(g * g)) for g in grads)))
    return norm, min(1.0, max_norm / (norm + 1e-6))

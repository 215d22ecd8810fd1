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


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Four words of Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011)."""
    c, k, low = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & low, (p >> 32) ^ c[3] ^ k[1], p & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def rounding_words(step: int, n: int) -> np.ndarray:
    """The 32 random bits with which a step rounds element i of m (lower half) and of v (upper half)."""
    words = []
    for block in range(-(-n // 4096)):
        key = philox((block, 0, step & 0xFFFFFFFF, step >> 32), (0x6D616441, 0x57))[0]
        x = np.uint32(key) + np.arange(min(4096, n - 4096 * block), dtype=np.uint32)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        words.append(x ^ (x >> np.uint32(16)))
    return np.concatenate(words)


def round_at_random(x: np.ndarray, r: np.ndarray) -> np.ndarray:
    """float32 to the bf16 below or above it: up if the 16 bits that are cut and r (16 random bits) carry."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + r) & np.uint32(0xFFFF0000)).view(np.float32)


def clip_factor(grads: list[np.ndarray], max_norm: float) -> tuple[float, float]:
    """The global norm, and the factor that brings it to max_norm where it is larger."""
    norm = float(np.sqrt(sum(float(np.sum(g * g)) for g in grads)))
    return norm, min(1.0, max_norm / (norm + 1e-6))

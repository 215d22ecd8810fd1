"""The two quantizers of BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764, eq. 1-3, floors of the training notes).

Weights:      scale = max(mean |w|, 1e-5) over the matrix; code = clip(round(w / scale), -1, 1); w ~ code * scale.
Activations:  per row, absmax = max(max |x|, 1e-5); q = clip(round(x * 127 / absmax), -128, 127); x ~ q * absmax / 127.
Rounding is to nearest even. The arithmetic stays in the dtype of the argument and multiplies by a reciprocal where
the published code does, so that in float32 the codes are those of a float32 implementation, ties included; only the
mean is always taken in float64.
"""

from __future__ import annotations

import numpy as np

FLOOR = 1e-5


def ternary(w: np.ndarray) -> tuple[np.ndarray, np.floating]:
    """Codes (int64) and the scale that turns them back into reals."""
    one = w.dtype.type(1)
    scale = w.dtype.type(max(np.abs(w).astype(np.float64).mean(), FLOOR))
    return np.clip(np.rint(w * (one / scale)), -1, 1).astype(np.int64), scale


def absmax_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q (int64, the shape of x) and the scale of each row (..., 1)."""
    top = np.maximum(np.abs(x).max(-1, keepdims=True), x.dtype.type(FLOOR))
    return np.clip(np.rint(x * (127 / top)), -128, 127).astype(np.int64), top / 127

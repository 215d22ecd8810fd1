"""BitLinear: y = (q codes^T) * (act_scale * weight_scale), q from x (..., in) and codes from weight (out, in).

The sum is an integer; quantize.py says what q, codes and the scales are.

Straight through (Bengio et al. 2013): the rounding is taken for the identity, and so are the clip and the dependence
of both scales on their tensors, so the gradients are those of a linear map between the quantized operands:
dx = dy (codes * weight_scale), dweight = dy^T (q * act_scale).
"""

from __future__ import annotations

import numpy as np

from . import linear, quantize


def forward(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    q, act_scale = quantize.absmax_int8(x)
    codes, weight_scale = quantize.ternary(weight)
    return (q @ codes.T).astype(x.dtype) * (act_scale * weight_scale)


def backward(dy: np.ndarray, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return linear.backward(dy, *dequantized(x, weight))


def dequantized(x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q, act_scale = quantize.absmax_int8(x)
    codes, weight_scale = quantize.ternary(weight)
    return q * act_scale, codes * weight_scale

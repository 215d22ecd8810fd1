"""The operations on tensors: shapes, equations, sources. Each records itself when a gradient is wanted.

Arguments called tokens, targets and start may be integer arrays; everything else is a Tensor. B batch, T time, H query
heads, KV key/value heads, D head dimension, V vocabulary. All raise ShapeError when shapes do not fit and TypeError for
a wrong dtype; the sentence names the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from bitnet import _core
from bitnet._core import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    Integers: TypeAlias = "Tensor | np.ndarray[Any, Any] | Sequence[Any]"


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside, results require no gradient and nothing is recorded (except on an explicit Tape, for replay)."""
    _core.disable_grad()
    try:
        yield
    finally:
        _core.enable_grad()


@contextmanager
def precision(name: str) -> Iterator[None]:
    """How what is recorded inside multiplies in its backward pass: "fp32" (the default), "fast" or "int8".

    fp32: in f32, the same bits on every instruction set. fast: factors rounded to bf16, which int8 activations and
    ternary codes survive unchanged, so that the gradient of a BitLinear's output is all that is rounded; attention
    makes its scores again from rounded queries and keys; sums in f32; the same bits for any number of threads, but not
    on every instruction set. A cross_entropy that is differentiated makes its logits in the same precision. Every other
    forward value is the same in both. int8: as fast, but a BitLinear's dx is an integer product like its y: each row of
    dy is rounded to int8 with a scale of its own (SwitchBack, Wortsman et al. 2023, arXiv 2304.13013).
    """
    before = _core.get_precision()
    _core.set_precision(name)
    try:
        yield
    finally:
        _core.set_precision(before)


@contextmanager
def device(name: str) -> Iterator[None]:
    """Inside, this thread makes tensors on another device: models, optimizers and whatever else is made of them.

    "meta" is the one of sizes without values: memory is counted and none is taken, and no arithmetic is done, so that a
    model of any size can be tried in milliseconds (bitnet.plan). What is read back from it is NaN, or -1.
    RuntimeError for "cuda" in a build without it.
    """
    before = _core.get_device()
    _core.set_device(name)
    try:
        yield
    finally:
        _core.set_device(before)


@contextmanager
def segment() -> Iterator[None]:
    """Activation checkpointing: what is computed inside is not kept for backward(), but computed again when it is due.

    At the end of the block the memory of its intermediate results is given back; kept is what can still be reached from
    outside: its inputs and parameters, and every result that a Python name, a view or an array still holds, such as the
    one the block was for. So let names of intermediate results go, or put the work in a function and call that. Losses
    and gradients are the same bits with and without. One backward() consumes a segment as a whole.

    RuntimeError: inside another segment; for backward() or replay() inside; and from a backward() that comes after a
    parameter or input was written to, or lent to NumPy, because the results could not be made again.
    Source: Chen et al. 2016, arXiv 1604.06174.
    """
    _core.open_segment()
    try:
        yield
    finally:
        _core.close_segment()


def tensor(data: ArrayLike | Tensor, dtype: str | None = None, requires_grad: bool = False) -> Tensor:
    """A tensor with the values of an array or nested lists: floats become f32, integers i32."""
    return Tensor(data, dtype, requires_grad)


def zeros(shape: Sequence[int], dtype: str = "f32", device: str | None = None) -> Tensor:
    """A tensor of zeros; device: "cpu", "cuda", "meta", by default where this thread makes tensors."""
    return _core.empty(shape, dtype, device)


def _integers(values: Integers) -> Tensor:
    return values if isinstance(values, Tensor) else Tensor(values, "i32")


def _optional(values: Integers | None) -> Tensor | None:
    return None if values is None else _integers(values)


def embedding(tokens: Integers, weight: Tensor) -> Tensor:
    """Rows of a table, f32 or bf16: tokens (...), weight (V, C) -> (..., C). IndexError for a token outside [0, V)."""
    return _core.embedding(_integers(tokens), weight)


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """y = x W^T (+ residual) in f32: x (..., in), weight (out, in) -> (..., out), which is residual's shape.

    Without gradient and residual the weight may be bf16, which gives the bits of the same values in f32.
    """
    return _core.linear(x, weight, residual)


def compact_linear(x: Tensor, weight: Tensor, top: int = 0) -> Tensor:
    """x W^T of a compact weight (out, in), with x (..., in) rounded to sixteen bits -> (..., out). Forward only.

    top > 0, of a weight made as a screen: the very outputs of the bf16 matrix it was made of, but -infinity where the
    rounded product and the bound of its error show that an output is not among the `top` largest of its row.
    """
    return _core.compact_linear(x, weight, top)


def bitlinear(x: Tensor, weight: Tensor, residual: Tensor | None = None, activation_bits: int = 8) -> Tensor:
    """Ternary linear map with straight-through gradients: x (..., in), latent weight (out, in) f32 -> (..., out).

    int8 activations times ternary codes in integer arithmetic; see csrc/ops/bitlinear.c. x may be q8. `residual`, of
    the result's shape, is added on the way out, with the bits of a separate add. activation_bits 4: rows of x are
    rounded to [-8, 7] with the scale max(|x|, 1e-5) / 7, and x is not q8; ValueError for other numbers.
    Source: Ma et al. 2024, arXiv 2402.17764, eq. 1-3.
    """
    return _core.bitlinear(x, weight, residual, activation_bits)


def rmsnorm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, quantized: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. Source: Zhang and Sennrich 2019, eq. 4.

    quantized: the result exists in its int8 form only (dtype q8), which is all that bitlinear reads of it.
    """
    return _core.rmsnorm(x, weight, eps, quantized)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of blocks of the last dimension: x (..., C), the same shape back.

    A block has as many channels as the largest power of two that divides C: 384 are three blocks of 128, 6912 are 27 of
    256, and an odd C stays as it is. It is its own inverse and its own derivative. One large channel becomes many of
    the same size, which a rounding with one scale bears better.
    Source: Wang et al. 2025, BitNet v2, arXiv 2504.18415.
    """
    return _core.hadamard(x)


def rope_tables(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (positions, head_dim / 2): angle t * theta^(-2j / head_dim). Source: Su et al. 2021."""
    return _core.rope_tables(positions, head_dim, theta)


def rope(x: Tensor, cos: Tensor, sin: Tensor, start: Integers | None = None) -> Tensor:
    """Rotates the pairs (j, j + D/2) of x (B, T, heads, D); row t of sequence b is at position start[b] + t."""
    return _core.rope(x, cos, sin, _optional(start))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Integers | None = None,
    slot: Integers | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention, softmax(q k^T / sqrt(D)) v, without a T x T matrix.

    q (B, T, H, D); k, v (B, S, KV, D) -> (B, T, H, D). Query t of sequence b is at position start[b] + t and sees the
    keys up to it. Without start: S == T, and gradients flow. With start k and v are caches, and it is forward only:
    sequence b has row slot[b] of them (b without slot), and they may be bf16, or i8 times scales f32 (slots, S, KV).
    """
    return _core.attention(q, k, v, _optional(start), _optional(slot), k_scale, v_scale)


def cache_append(
    x: Tensor, cache: Tensor, start: Integers, slot: Integers | None = None, scale: Tensor | None = None
) -> Tensor:
    """Writes x (B, T, KV, D) into cache (slots, S, KV, D) from position start[b] of row slot[b] on; returns the cache.

    A bf16 cache is rounded to nearest even, an i8 one is quantized by heads, their scales kept in `scale` (slots, S,
    KV). Forward only. IndexError for a place outside the cache, ValueError for a slot named twice.
    """
    return _core.cache_append(x, cache, _integers(start), _optional(slot), scale)


def swiglu(gate: Tensor, up: Tensor, quantized: bool = False) -> Tensor:
    """silu(gate) * up; quantized as in rmsnorm. Source: Shazeer 2020, arXiv 2002.05202."""
    return _core.swiglu(gate, up, quantized)


def relu2(gate: Tensor, up: Tensor, quantized: bool = False) -> Tensor:
    """relu(gate)^2 * up, the gate of BitNet b1.58 2B-4T; quantized as in rmsnorm."""
    return _core.relu2(gate, up, quantized)


def cross_entropy(x: Tensor, weight: Tensor, targets: Integers, ternary: bool = False) -> Tensor:
    """Mean loss in nats of the head weight (V, C) over the rows of x (..., C); targets -100 take no part.

    The logits exist for a few rows at a time only. ternary: the head is a bitlinear.
    """
    return _core.cross_entropy(x, weight, _integers(targets), ternary)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b; b may be one row (the last dimension of a), added to every row."""
    return _core.add(a, b)


def mul(a: Tensor, b: Tensor) -> Tensor:
    """a * b elementwise, equal shapes."""
    return _core.mul(a, b)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (..., m, k), b (k, n), or (..., k, n) with the same leading dimensions -> (..., m, n)."""
    return _core.matmul(a, b)


def sum(x: Tensor) -> Tensor:
    """Sum of all elements, a scalar."""
    return _core.sum(x)


def mean(x: Tensor) -> Tensor:
    """Mean of all elements, a scalar."""
    return _core.mean(x)


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Another shape over the same memory; one size may be -1."""
    return _core.reshape(x, shape)


def transpose(x: Tensor) -> Tensor:
    """Swaps the last two dimensions (a copy)."""
    return _core.transpose(x)


def softmax(x: Tensor) -> Tensor:
    """exp(x - max) / sum over the last dimension."""
    return _core.softmax(x)


def convert(x: Tensor, dtype: str) -> Tensor:
    """x in another dtype: f32 <-> bf16; bf16, i8, i32, ternary2, q8 -> f32; ternary2 -> i8."""
    return x if x.dtype == dtype else _core.convert(x, dtype)

"""Every op on odd shapes: its inputs, its reference and its PyTorch equivalent, in one table.

The table is read twice: the references are proved against finite differences and PyTorch in float64, and the
project's ops are compared with the references in float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from . import rope

Array = np.ndarray
U = 2.0**-24  # unit roundoff of float32


@dataclass(frozen=True)
class Case:
    """One call of one op. `terms` is the length of its longest chain of dependent sums, forward or backward."""

    op: str
    inputs: tuple[Array, ...]
    terms: int
    differentiable: tuple[int, ...] = (0,)
    plain: tuple[Any, ...] = ()  # arguments after the inputs that are no arrays
    note: str = ""

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, x.shape)) for x in self.inputs)
        return f"{self.op}-{shapes}{'-' + self.note if self.note else ''}"

    @property
    def reference(self) -> ModuleType:
        return importlib.import_module(f"reference.{self.op}")

    def forward(self, *inputs: Array) -> Array:
        return self.reference.forward(*inputs, *self.plain)

    def backward(self, dy: Array, *inputs: Array) -> tuple[Array, ...]:
        return self.reference.backward(dy, *inputs, *self.plain)

    def in_float64(self) -> tuple[Array, ...]:
        return tuple(x.astype(np.float64) if x.dtype == np.float32 else x for x in self.inputs)

    def tolerance(self, want: Array) -> float:
        """A float32 chain of n fused steps errs by at most n * U * (sum of the terms' magnitudes).

        For terms of random sign that sum is about sqrt(n) times the result and the error falls short of its bound by
        sqrt(n) as well, so n * U * max |result| has room; the 16 covers what surrounds the sums (exp, rsqrt, scaling,
        each a few roundings). A term left out would show as 1/n of the result, thousands of times more.
        """
        return (self.terms + 16) * U * max(1.0, float(np.abs(want).max(initial=0.0)))


def off_ties(x: Array) -> Array:
    """x with every element moved off the int8 ties of its row, so float32 and float64 quantize it alike."""
    scaled = x * (127 / np.abs(x).max(-1, keepdims=True))
    near = np.abs(scaled - np.floor(scaled) - 0.5) < 2e-4
    return np.where(near, x * x.dtype.type(1.002), x)


def grid_weight(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    """Weights scale * k / 16 with mean |k| = 16 exactly and no k at a rounding tie: absmean is exactly `scale`.

    Magnitudes come in pairs 16 - j, 16 + j; j = 8 would sit on the threshold 1/2.
    """
    n = int(np.prod(shape))
    j = rng.choice([i for i in range(17) if i != 8], n // 2)
    k = np.concatenate([16 - j, 16 + j, [16] * (n % 2)])
    return (rng.permutation(k) * rng.choice([-1, 1], n) * scale / 16).reshape(shape).astype(np.float32)


def rotations(dim: int) -> tuple[Array, Array]:
    cos, sin = rope.tables(70, dim, 1e4)
    return cos.astype(np.float32), sin.astype(np.float32)


def all_cases() -> Iterator[Case]:
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> Array:
        return rng.normal(size=shape).astype(np.float32)

    for *lead, inner, outer in ((1, 1, 1), (3, 5, 7), (2, 17, 33, 19), (1, 130, 257), (65, 64, 48)):
        yield Case("linear", (normal(*lead, inner), normal(outer, inner)), max(inner, outer, *lead), (0, 1))
        x, w = off_ties(normal(*lead, inner)), grid_weight(rng, (outer, inner), 0.0234375)
        yield Case("bitlinear", (x, w), max(outer, int(np.prod(lead))), (0, 1))
    for m, k, n in ((1, 1, 1), (5, 3, 2), (33, 17, 31), (16, 200, 16)):
        yield Case("matmul", (normal(m, k), normal(k, n)), max(m, k, n), (0, 1))
    yield Case("matmul", (normal(2, 3, 5), normal(5, 4)), 6, (0, 1))
    for shape, vocab in (((1,), 1), ((2, 9), 5), ((3, 17), 300)):
        yield Case("embedding", (rng.integers(0, vocab, shape).astype(np.int32), normal(vocab, 33)), 18, (1,))
    for shape in ((1, 1), (3, 15), (2, 5, 16), (4, 129)):
        yield Case("rmsnorm", (normal(*shape), 1 + 0.3 * normal(shape[-1])), shape[-1] + shape[0] * shape[-2], (0, 1))
        yield Case("rmsnorm", (normal(*shape),), shape[-1], note="no gain")
        yield Case("softmax", (3 * normal(*shape),), shape[-1])
    for batch, time, heads, kv, dim in ((1, 1, 1, 1, 2), (2, 7, 3, 1, 6), (1, 65, 4, 2, 16), (2, 33, 6, 6, 10)):
        q, k, v = normal(batch, time, heads, dim), normal(batch, time, kv, dim), normal(batch, time, kv, dim)
        yield Case("attention", (q, k, v), (time + dim) * (heads // kv), (0, 1, 2))
        yield Case("rope", (q, *rotations(dim)), 2)
    start = np.array([5, 0], np.int32)
    yield Case("attention", (normal(2, 3, 4, 8), normal(2, 9, 2, 8), normal(2, 9, 2, 8), start), 17, (), note="start")
    yield Case("rope", (normal(2, 3, 4, 8), *rotations(8), start), 2, note="start")
    for shape in ((1,), (3, 5), (2, 3, 17), (4099,)):
        for op in ("swiglu", "relu2", "add", "mul"):
            yield Case(op, (normal(*shape), normal(*shape)), 4, (0, 1))
        yield Case("sum", (normal(*shape),), int(np.prod(shape)))
        yield Case("add", (normal(*shape), normal(shape[-1])), 4 + shape[0], (0, 1), note="row")
        yield Case("mean", (normal(*shape),), 16)
    yield Case("reshape", (normal(4, 6),), 0, plain=((3, 8),))
    yield Case("reshape", (normal(2, 3, 5),), 0, plain=((30,),))
    for shape in ((1, 1), (5, 3), (2, 17, 33)):
        yield Case("transpose", (normal(*shape),), 0)
    for lead, inner, vocab in (((1,), 3, 2), ((2, 5), 17, 33), ((40,), 24, 301)):
        targets = rng.integers(0, vocab, lead).astype(np.int32)
        targets.reshape(-1)[1::4] = -100
        yield Case("cross_entropy", (normal(*lead, inner), normal(vocab, inner), targets), inner + vocab, (0, 1))
    for shape in ((1,), (3, 5), (2, 3, 12), (5, 16), (1, 48), (3, 320), (2, 512)):
        yield Case("hadamard", (normal(*shape),), shape[-1] & -shape[-1])
    yield Case("matmul", (normal(3, 4, 5), normal(3, 5, 2)), 5, (0, 1), note="batched")
    yield Case("matmul", (normal(2, 3, 33, 7), normal(2, 3, 7, 17)), 33, (0, 1), note="batched")

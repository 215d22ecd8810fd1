"""Muon: momentum, made orthogonal, for the matrices between embedding and head; AdamW for all other parameters.

    buffer = momentum * buffer + g          G = g + momentum * buffer (Nesterov)
    W = (1 - lr * weight_decay) W - lr * 0.2 sqrt(max(rows, columns)) * orthogonal(G)

orthogonal(G) is about U V^T of G's singular value decomposition U S V^T: five steps of a quintic Newton-Schulz
iteration bring every singular value of note to between 0.7 and 1.2. All directions of a matrix then move alike, where
AdamW follows the few large ones. The factor 0.2 sqrt(max(rows, columns)) gives the update the root mean square that
AdamW's has, so both halves share one learning rate and one weight decay, and either optimizer reads the same --lr.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (iteration, coefficients); Liu et
al. 2025, arXiv 2502.16982 (weight decay, the factor).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitnet import _core, ops
from bitnet._core import Tensor
from bitnet.formats.safetensors_file import TensorPart
from bitnet.nn import Module, Parameter
from bitnet.optim import AdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
MATCH = 0.2  # the root mean square of an AdamW update, from experience: arXiv 2502.16982, section 2.2
TABLES = ("embed_tokens.weight", "lm_head.weight")  # matrices whose rows are looked up or scored one by one


def orthogonalize(gradient: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, of the same shape: X = a X + (b A + c A A) X with A = X X^T, STEPS times.

    All in f32 and in the canonical order of ops, so the same bits on every machine and for any number of threads.
    """
    a, b, c = COEFFICIENTS
    tall = gradient.shape[0] > gradient.shape[1]
    x = ops.transpose(gradient) if tall else gradient  # the smaller side makes the smaller A
    x = _core.scale(x, 1.0 / (math.sqrt(ops.sum(ops.mul(x, x)).item()) + 1e-7))
    for _ in range(STEPS):
        square = ops.linear(x, x)  # X X^T
        x = _core.add(x, ops.matmul(_core.add(square, ops.linear(square, square), b, c), x), a, 1.0)
    return ops.transpose(x) if tall else x


class Muon:
    """The optimizer of the file's head for a model; its interface is AdamW's, and `rest` is the AdamW.

    moments: of `rest`; the buffers of Muon are f32, 4 bytes a parameter. ValueError for a model without matrices.
    """

    def __init__(
        self, model: Module, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1, moments: str = "f32"
    ) -> None:
        named = list(model.named_parameters())
        self.matrices = {name: p for name, p in named if p.ndim == 2 and not name.endswith(TABLES)}
        if not self.matrices:
            raise ValueError("muon: the model has no matrices between embedding and head")
        others = [(name, parameter) for name, parameter in named if name not in self.matrices]
        self.rest = AdamW(others, lr, weight_decay=weight_decay, moments=moments)
        self.parameters: dict[str, Parameter] = {**self.matrices, **self.rest.parameters}
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.flat, self.flat_grad = _core.flatten(list(self.matrices.values()))
        self.buffers = {name: ops.zeros(matrix.shape) for name, matrix in self.matrices.items()}
        self._norm, self._unused = ops.zeros((1,)), ops.zeros((1,))
        self._factor = 1.0

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self.rest.steps

    def zero_grad(self) -> None:
        """Makes every gradient zero."""
        _core.zero_grad(list(self.parameters.values()))

    def clip_grad_norm(self, max_norm: float) -> float:
        """The norm of all gradients; the next step() scales them to at most max_norm (0: never)."""
        _core.settle_grad(list(self.matrices.values()))
        _core.clip_grad_norm(self.flat_grad, 0.0, self._norm, self._unused)
        norm = math.hypot(self._norm.item(), self.rest.clip_grad_norm(0.0))
        # As the kernel has it: a NaN stays, so that a broken step shows.
        self._factor = max_norm / (norm + 1e-6) if max_norm > 0 else 1.0
        self._factor = 1.0 if self._factor > 1.0 else self._factor
        self.rest.scale_grad(self._factor)
        return norm

    def step(self, lr: float | None = None, weight_decay: float | None = None) -> None:
        """Updates every parameter from its gradient, scaled by the last clip_grad_norm since the last step."""
        rate = self.lr if lr is None else lr
        decay = self.weight_decay if weight_decay is None else weight_decay
        _core.settle_grad(list(self.matrices.values()))
        with ops.no_grad():
            for name, matrix in self.matrices.items():
                assert matrix.grad is not None
                buffer, gradient = self.buffers[name], _core.scale(matrix.grad, self._factor)
                buffer.copy_(_core.add(buffer, gradient, self.momentum, 1.0))
                update = orthogonalize(_core.add(gradient, buffer, 1.0, self.momentum))
                size = MATCH * math.sqrt(max(matrix.shape))
                matrix.copy_(_core.add(matrix, update, 1.0 - rate * decay, -rate * size))
        self._factor = 1.0
        self.rest.step(rate, decay)

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """The state of `rest` (AdamW.state_dict) and copies of the buffers, `momentum.<name>`."""
        return {part.name: np.array(part.make()) for part in self.parts()}

    def parts(self) -> list[TensorPart]:
        """What state_dict() gives, for a file: those of `rest` (AdamW.parts) and views of the buffers."""
        own = [TensorPart(f"momentum.{name}", "F32", b.shape, b.numpy) for name, b in self.buffers.items()]
        return self.rest.parts() + own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what state_dict() gave; names and shapes must match."""
        for name, buffer in self.buffers.items():
            if f"momentum.{name}" not in state or np.shape(state[f"momentum.{name}"]) != buffer.shape:
                raise KeyError(
                    f"optimizer state: momentum.{name} of shape {buffer.shape} is missing or has another shape"
                )
        self.rest.load_state_dict(state)
        for name, buffer in self.buffers.items():
            buffer.copy_(state[f"momentum.{name}"])

"""AdamW over flat buffers, and learning-rate schedules. The other optimizer is in bitnet/muon.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from bitnet import _core, ops
from bitnet._core import Tensor
from bitnet.formats.safetensors_file import TensorPart
from bitnet.nn import Module, Parameter

MOMENTS = ("f32", "bf16")
PIECE = 1 << 18  # floats that are rounded at once: what is made for them is of one size for large and small
LINE = 16  # floats: the padding of csrc/ops/optimizer.c, whole cache lines


class AdamW:
    """Adam with decoupled weight decay on matrices (biases and gains do not decay), one fused pass over all parameters.

    parameters: a Module, or (name, Parameter) pairs. Their values move into one flat buffer (self.flat), matrices
    first, and their gradients into another (self.flat_grad): a norm, an all-reduce or a step is one pass over memory.
    moments: "f32", 8 bytes a parameter for both; or "bf16", 4 bytes, rounded up or down at random so that the mean is
    exact. To nearest, v would stall: a change below half a bf16 step, which is 2^-9 to 2^-8 of v, is lost, and that is
    (1 - beta2) |g^2 - v| for every g^2 within 4 % of v at beta2 = 0.95, and for every g^2 below 2.9 v at 0.999. The
    random bits are a function of step and place, so a run still is one of its seed. ValueError for other moments.
    Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.
    """

    def __init__(
        self,
        parameters: Module | Iterable[tuple[str, Parameter]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: str = "f32",
    ) -> None:
        if moments not in MOMENTS:
            raise ValueError(f"moments must be one of {', '.join(MOMENTS)}, not {moments!r}")
        named = list(parameters.named_parameters() if isinstance(parameters, Module) else parameters)
        named.sort(key=lambda item: item[1].ndim < 2)  # stable: matrices, then the rest, each in its own order
        self.parameters = dict(named)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.flat, self.flat_grad = _core.flatten([parameter for _, parameter in named])
        self.m, self.v = ops.zeros(self.flat.shape, moments), ops.zeros(self.flat.shape, moments)
        self.steps = 0
        self._norm, self._factor = ops.zeros((1,)), ops.zeros((1,))
        self._factor.copy_([1.0])
        self._slots: dict[str, slice] = {}
        self._decay_end = end = 0
        for name, parameter in named:
            self._slots[name] = slice(end, end + parameter.size)
            end += -(-parameter.size // LINE) * LINE
            self._decay_end = end if parameter.ndim >= 2 else self._decay_end

    def zero_grad(self) -> None:
        """Makes every gradient zero."""
        _core.zero_grad(list(self.parameters.values()))

    def clip_grad_norm(self, max_norm: float) -> float:
        """The norm of all gradients; the next step() scales them to at most max_norm (0: never)."""
        _core.settle_grad(list(self.parameters.values()))
        _core.clip_grad_norm(self.flat_grad, max_norm, self._norm, self._factor)
        return self._norm.item()

    def scale_grad(self, factor: float) -> None:
        """The next step() scales gradients by this factor, in place of that of clip_grad_norm."""
        self._factor.copy_([factor])

    def step(self, lr: float | None = None, weight_decay: float | None = None) -> None:
        """Updates every parameter from its gradient, scaled by the last clip_grad_norm since the last step."""
        _core.settle_grad(list(self.parameters.values()))
        self.steps += 1
        _core.adamw(
            self.flat, self.flat_grad, self.m, self.v, self._factor,
            step=self.steps, decay_end=self._decay_end, lr=self.lr if lr is None else lr,
            beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
            weight_decay=self.weight_decay if weight_decay is None else weight_decay,
        )  # fmt: skip
        self._factor.copy_([1.0])

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Copies of both moments in f32 by parameter name (`m.<name>`, `v.<name>`) and the step count (`steps`)."""
        return {part.name: np.array(part.make()) for part in self.parts()}

    def parts(self) -> list[TensorPart]:
        """What state_dict() gives, for a file: each made when its turn has come, a view of f32 moments."""
        steps = np.array([self.steps], np.int64)
        parts = [TensorPart("steps", "I64", steps.shape, lambda: steps)]
        for prefix, flat in (("m", self.m), ("v", self.v)):
            for name, parameter in self.parameters.items():
                parts.append(TensorPart(f"{prefix}.{name}", "F32", parameter.shape, partial(self._moment, flat, name)))
        return parts

    def _moment(self, flat: Tensor, name: str) -> np.ndarray[Any, Any]:
        """One parameter's part of a moment, in f32."""
        parameter, slot = self.parameters[name], self._slots[name]
        if flat.dtype == "f32":
            values = flat.numpy()[slot]
        else:
            lines = np.arange(slot.start // LINE, -(-slot.stop // LINE), dtype=np.int32)
            with ops.no_grad():
                values = ops.embedding(lines, ops.reshape(flat, (-1, LINE))).numpy().reshape(-1)[: parameter.size]
        return values.reshape(parameter.shape)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what state_dict() gave; names and shapes must match. bf16 moments round f32 ones to nearest."""
        wanted = {f"{prefix}.{name}": p.shape for prefix in "mv" for name, p in self.parameters.items()}
        for name, shape in wanted.items():
            if name not in state or tuple(np.shape(state[name])) != shape:
                raise KeyError(f"optimizer state: {name} of shape {shape} is missing or has another shape")
        for prefix, flat in (("m", self.m), ("v", self.v)):
            given = ((slot, state[f"{prefix}.{name}"]) for name, slot in self._slots.items())
            if flat.dtype == "f32":
                values = flat.numpy()
                for slot, array in given:
                    values[slot] = np.reshape(array, -1)
            else:
                flat.copy_(_in_bf16(flat.shape, given))
        self.steps = int(state["steps"][0])


def _in_bf16(shape: tuple[int, ...], given: Iterable[tuple[slice, Any]]) -> Tensor:
    """Arrays at their places in a bf16 tensor of this shape, zeros elsewhere, on the CPU."""
    bits = np.zeros(shape, np.uint16)  # NumPy has no bf16
    for slot, array in given:
        values, own = np.asarray(array, np.float32).reshape(-1), bits[slot]
        for first in range(0, values.size, PIECE):
            piece = values[first : first + PIECE]
            window = _core.from_buffer(own[first : first + PIECE], "bf16", piece.shape)
            with ops.device("cpu"):
                window.copy_(ops.convert(ops.tensor(piece), "bf16"))
    return _core.from_buffer(bits, "bf16", shape)


def warmup_cosine(step: int, total: int, lr: float, min_lr: float, warmup: int) -> float:
    """Learning rate of a step (from 0): linear over `warmup` steps, then a cosine that ends at min_lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def two_stage(
    step: int, total: int, lr: float, second_lr: float, warmup: int, weight_decay: float
) -> tuple[float, float]:
    """(learning rate, weight decay) of a step in the b1.58 recipe.

    Linear warm-up, then linear decay towards zero over the whole run, from `lr` in the first half and from the lower
    `second_lr` in the second; weight decay in the first half only.
    Source: Microsoft 2024, "The Era of 1-bit LLMs: Training Tips, Code and FAQ".
    """
    if step < warmup:
        return lr * (step + 1) / warmup, weight_decay
    remaining = max(0.0, 1.0 - (step - warmup) / max(1, total - warmup))
    if step < total / 2:
        return lr * remaining, weight_decay
    return second_lr * remaining, 0.0


def stable_decay(step: int, total: int, lr: float, min_lr: float, warmup: int, share: float) -> float:
    """Learning rate of a step (from 0): linear warm-up, constant, then linear to min_lr over the last share of steps.

    The constant part does not depend on `total`: a run can be made longer, or ended early, from any of its checkpoints.
    Source: Hu et al. 2024, arXiv 2404.06395, section 4; Haegele et al. 2024, arXiv 2405.18392.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    left = (total - step) / max(1.0, share * total)
    return min_lr + (lr - min_lr) * max(0.0, min(1.0, left))

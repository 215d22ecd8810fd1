"""The loss of a batch: recorded on a tape once, then replayed, so that no Python runs between two ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bitnet import _core, ops
from bitnet._core import Tensor

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # tokens, targets -> what to differentiate, the loss


class RecordedLoss:
    """An objective for one shape of batch: recorded at the first call, replayed at the others.

    prepare: what is done with targets before.
    """

    loss: Tensor  # of the last call, or what is differentiated in its place
    _shown: Tensor

    def __init__(
        self,
        batch_size: int,
        seq_len: int,
        precision: str,
        objective: Objective,
        prepare: Callable[[np.ndarray[Any, Any]], None] | None = None,
    ) -> None:
        self._precision, self._objective, self._prepare = precision, objective, prepare
        self._tokens, self._targets = ops.zeros((batch_size, seq_len), "i32"), ops.zeros((batch_size, seq_len), "i32")
        self._tape: _core.Tape | None = None
        self._losses: Tensor | None = None

    def __call__(self, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
        """Mean loss in nats over targets that are not -100; backward() then has its gradient."""
        self._tokens.copy_(tokens)
        self._targets.copy_(targets)
        if self._prepare is not None:
            self._prepare(targets)
        return self.again()

    def again(self) -> float:
        """The same of the batch that is there already, at first of zeros."""
        if self._tape is not None:
            self._tape.replay()
            return self._shown.item()
        tape = _core.Tape()
        with ops.precision(self._precision), tape:
            self.loss, self._shown = self._objective(self._tokens, self._targets)
        self._tape = tape
        return self._shown.item()

    def losses(self) -> np.ndarray[Any, Any]:
        """The loss of each target of the last call, f32 (B, T), 0 where a target is -100; copied, not computed."""
        if self._losses is None:
            self._losses = _core.row_losses(self._shown)
        return self._losses.numpy(copy=True).reshape(self._targets.shape)

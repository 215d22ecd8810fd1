"""Which targets of a batch take part in a loss, as tensors that a tape reads anew at each replay."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet import ops
from bitnet._core import Tensor
from bitnet.rows import IGNORE


class TargetMask:
    """For one shape of batch. each: a scalar, 1 / the number of targets that are not -100."""

    def __init__(self, batch_size: int, seq_len: int) -> None:
        self.each = ops.zeros(())
        self._taken = ops.zeros((batch_size, seq_len), "i32")  # 1 where a target takes part
        self._rows: dict[int, Tensor] = {}  # zeros and ones, by their width

    def set(self, targets: np.ndarray[Any, Any]) -> None:
        """To be called before each pass or replay, with the targets (B, T)."""
        taken = targets != IGNORE
        self._taken.copy_(taken.astype(np.int32))
        self.each.copy_(np.float32(1.0 / max(1, int(taken.sum()))))

    def wide(self, width: int) -> Tensor:
        """(B, T, width): rows of ones where a target takes part, of zeros elsewhere."""
        if width not in self._rows:
            self._rows[width] = ops.tensor(np.repeat([[0.0], [1.0]], width, axis=1))
        with ops.no_grad():
            return ops.embedding(self._taken, self._rows[width])

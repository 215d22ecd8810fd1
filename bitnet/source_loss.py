"""The training loss of each source of a mixture: what metrics.jsonl has as train_loss_by_source.

A step's loss is the mean over all its targets; here it is taken apart by the source that each row came from, out of the
losses of single targets that the cross entropy made anyway. Like the whole it is of one step, so a source without a row
in the step is not in its record.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from bitnet.mixture import MixtureRows
from bitnet.rows import IGNORE

Array = np.ndarray[Any, Any]


class SourceLoss:
    """Sums over the rows of one step; names: of the sources, in the order of the mixture."""

    def __init__(self, rows: MixtureRows, names: list[str]) -> None:
        self._rows, self._names = rows, names
        self._sums, self._counts = [0.0] * len(names), [0] * len(names)

    def add(self, numbers: Iterable[int], losses: Array, targets: Array) -> None:
        """A micro-batch: its rows by their numbers, and losses and targets (B, T)."""
        # Summed in order, so that every machine finds the same digits.
        sums = np.cumsum(losses, axis=1, dtype=np.float64)[:, -1].tolist()
        counts = np.count_nonzero(targets != IGNORE, axis=1).tolist()
        for number, total, count in zip(numbers, sums, counts, strict=True):
            source, _ = self._rows.choose(number)
            self._sums[source] += total
            self._counts[source] += count

    def means(self) -> dict[str, float]:
        """Mean nats per target of each source that had one."""
        found = zip(self._names, self._sums, self._counts, strict=True)
        return {name: total / count for name, total, count in found if count}

"""The records of a run: metrics.jsonl, one JSON object a line, and how a loss curve is smoothed.

Between the records of steps stand the events of bitnet/stability.py, which have a key "event".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Of one step: step, tokens, train_loss, val_loss, perplexity, perplexity_ema (of the averaged training loss),
# tokens_per_second, mfu (share of the machine's measured peak, bitnet/mfu.py), lr, grad_norm, zero_share, flip_share,
# seconds, memory (bytes); of a mixture also train_loss_by_source (of the sources in the step) and, of its evaluations,
# val_loss_by_source; where the options ask for them,
# val_loss_ema (of the averaged weights, bitnet/ema.py) and ternary_share (bitnet/ramp.py).
Record = dict[str, Any]

SMOOTHING = 0.9  # of the loss shown: about the last ten steps


def smoothed(losses: list[float], start: float | None = None) -> list[float]:
    """Exponential moving average of a loss curve."""
    out: list[float] = []
    for loss in losses:
        start = loss if start is None else SMOOTHING * start + (1 - SMOOTHING) * loss
        out.append(start)
    return out


def read_metrics(path: str | Path) -> list[Record]:
    """The records of steps in a metrics.jsonl, [] if there is none; a last line cut short by a crash is left out."""
    return [record for record in read_lines(path) if "event" not in record]


def read_events(path: str | Path) -> list[Record]:
    """The events in a metrics.jsonl: rollbacks, skips, spikes, an early stop."""
    return [record for record in read_lines(path) if "event" in record]


def read_lines(path: str | Path) -> list[Record]:
    """All whole lines of a file of records."""
    return [record for record, _ in _parsed(path)]


def in_both(
    own: Iterable[tuple[int, float | None]], other: Iterable[tuple[int, float | None]]
) -> list[tuple[int, float, float]]:
    """(place in own, its loss, the other's) for each step at which both have one; of (step, loss, None or NaN)."""
    theirs = dict(other)
    found = []
    for place, (step, loss) in enumerate(own):
        its = theirs.get(step)
        if loss is not None and its is not None and math.isfinite(loss - its):
            found.append((place, loss, its))
    return found


def to_line(record: Record) -> str:
    """A record as it stands in the file."""
    return json.dumps(record) + "\n"


class LineFile:
    """A file of records that grows by whole lines; what a full disk does not take waits in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[Record] = []

    def cut(self, step: int, events: int) -> list[Record]:
        """Takes back what was written after a moment of the run, and returns the records that stay.

        The moment is the first record of a step above `step`, or the first event after that number of them. The file
        is cut in place, which needs no room on the disk.
        """
        kept: list[Record] = []
        size = 0
        for record, end in _parsed(self.path):
            if not _before(record, step, events, kept):
                self._waiting.clear()
                break
            kept.append(record)
            size = end
        if self.path.exists():
            if size < self.path.stat().st_size:
                os.truncate(self.path, size)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        waiting, self._waiting = self._waiting, []
        for record in waiting:
            if not _before(record, step, events, kept):
                break
            kept.append(record)
            self._waiting.append(record)
        return kept

    def add(self, record: Record, log: Callable[[str], None]) -> None:
        """Writes one more line; warns, once, when lines begin to wait."""
        self._waiting.append(record)
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                log(f"warning: {self.path} cannot be written ({error.strerror}); its lines wait in memory")

    def close(self, log: Callable[[str], None]) -> None:
        """Writes what waits; what the disk does not take now is lost, and that is said."""
        try:
            self._write()
        except OSError as error:
            log(f"warning: {len(self._waiting)} lines of {self.path} are lost: {error.strerror}")

    def _write(self) -> None:
        if not self._waiting:
            return
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            data = "".join(map(to_line, self._waiting)).encode()
            try:
                if os.write(file, data) < len(data):
                    raise OSError(28, "the disk is full")
            except OSError:
                os.ftruncate(file, size)  # no half lines
                raise
        finally:
            os.close(file)
        self._waiting.clear()


def _before(record: Record, step: int, events: int, kept: list[Record]) -> bool:
    if "event" in record:
        return sum("event" in one for one in kept) < events
    return record["step"] <= step


def _parsed(path: str | Path) -> Iterator[tuple[Record, int]]:
    """Each record of a file and where its line ends, up to the first line that is no record."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return
    end = 0
    for line in data.splitlines(keepends=True):
        end += len(line)
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return
        yield record, end

"""The records of a run: metrics.jsonl, one JSON object a line, and how a loss curve is smoothed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Of one step: step, tokens, train_loss, val_loss, perplexity, tokens_per_second, mfu (share of the machine's measured
# peak, bitnet/mfu.py), lr, grad_norm, zero_share, flip_share, seconds, memory (bytes).
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
    """The records of a metrics.jsonl, [] if there is none; a last line cut short by a crash is left out."""
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def to_line(record: Record) -> str:
    """A record as it stands in the file."""
    return json.dumps(record) + "\n"

"""What a model gave a token: its log-probability, and the likeliest others beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Scored:
    """A token; logprob: ln of its probability, None for one that nothing stands before; top: likeliest ids first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def scored(logits: npt.NDArray[Any], token: int, top: int) -> Scored:
    """Of a token, by the logits (V,) that it was drawn from, before a sampler changed them; in float64."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    count = min(top, len(values))
    likeliest = np.argpartition(-values, count - 1)[:count] if count else np.zeros(0, np.int64)
    order = likeliest[np.lexsort((likeliest, -values[likeliest]))]  # of equals the lowest id first
    return Scored(token, float(values[token]), tuple((int(id_), float(values[id_])) for id_ in order))

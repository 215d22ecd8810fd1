"""From logits to a token: the choice is a pure function of (logits, tokens seen, seed, position).

In the order that transformers applies them: repetition penalty, temperature, top-k, top-p. What is left is drawn by
inverting its cumulative distribution, in float64, at a uniform number that belongs to the position in the sequence. So
a continuation goes on the same way however it was cut into calls. (The last bit of NumPy's exp may differ between CPUs;
it decides about one draw in 10^13.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet.errors import BitnetError, ConfigError

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SAMPLING_STREAM = 3  # second word of the Philox key; 1 and 2 order the training data


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen; a temperature of 0 takes the likeliest, the lowest id among equals.

    top_k keeps the k likeliest, ties by lowest id; top_p then the fewest likeliest whose probabilities reach top_p.
    repetition_penalty divides positive and multiplies negative logits of every token already in the sequence, the
    prompt included (Keskar et al. 2019, arXiv 1909.05858, section 4.1). Of the tokens from place `drawn_from` on,
    presence_penalty is taken from the logit of each that is there and frequency_penalty as often as it is; logit_bias
    is added (id, value) by (id, value): as OpenAI's API has them. Raises ConfigError for values out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    drawn_from: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0 and finite, not {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be finite, not {getattr(self, name)}")
        if not all(id_ >= 0 and math.isfinite(bias) for id_, bias in self.logit_bias):
            raise ConfigError("logit_bias is of ids and finite numbers")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed must be 0 to 2**64 - 1, not {self.seed}")

    def __call__(self, logits: npt.NDArray[Any], position: int, seen: Sequence[int] = ()) -> int:
        """The token at `position` of a sequence, from logits (V,) and the tokens before it."""
        ids, probabilities = self.candidates(logits, seen)
        # Sums of non-negative numbers never fall, so the first sum above the target belongs to a probability above 0.
        sums = np.cumsum(probabilities)
        return int(ids[np.searchsorted(sums, uniform(self.seed, position) * sums[-1], side="right")])

    @property
    def largest_needed(self) -> int | None:
        """How many of the largest logits decide about a token; None: all of them do."""
        if self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias:
            return None
        return 1 if self.temperature == 0 else self.top_k

    def candidates(self, logits: npt.NDArray[Any], seen: Sequence[int] = ()) -> tuple[Ids, Floats]:
        """(ids, probabilities) that may be drawn, ascending by id."""
        if not ((logits < np.inf).all() and logits.max(initial=-np.inf) > -np.inf):  # a screened head gives -infinity
            raise BitnetError("the model's logits are not finite: its weights may be damaged or have diverged")
        scores = self._penalized(logits.astype(np.float64), seen)
        if self.temperature == 0:
            return np.array([np.argmax(scores)]), np.ones(1)
        ids = np.arange(len(scores)) if self.top_k is None else _largest(scores, self.top_k)
        with np.errstate(over="ignore", under="ignore"):  # a tiny temperature sends all but the best to -inf, so to 0
            weights = np.exp((scores[ids] - scores[ids].max()) / self.temperature)
        probabilities = weights / weights.sum()
        if self.top_p is not None and self.top_p < 1:
            kept = _nucleus(probabilities, self.top_p)
            ids, probabilities = ids[kept], probabilities[kept] / probabilities[kept].sum()
        return ids, probabilities

    def _penalized(self, scores: Floats, seen: Sequence[int]) -> Floats:
        if self.repetition_penalty != 1 and len(seen):
            ids = np.asarray(seen)
            ids = ids[ids < len(scores)]
            there = scores[ids]
            scores[ids] = np.where(there < 0, there * self.repetition_penalty, there / self.repetition_penalty)
        if self.presence_penalty or self.frequency_penalty:
            ids, counts = np.unique(np.asarray(seen[self.drawn_from :], np.int64), return_counts=True)
            known = ids < len(scores)
            scores[ids[known]] -= self.presence_penalty + self.frequency_penalty * counts[known]
        for id_, bias in self.logit_bias:
            if id_ < len(scores):
                scores[id_] += bias
        return scores


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2^-53. Raw Philox words, since NumPy may change what it makes of them."""
    key = np.array([seed, SAMPLING_STREAM], dtype=np.uint64)
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    return (int(np.random.Philox(key=key, counter=counter).random_raw()) >> 11) * 2.0**-53


def _largest(scores: Floats, k: int) -> Ids:
    """Places of the k largest, ascending; the first of equals. Without a sort: V is up to 128256."""
    if k >= len(scores):
        return np.arange(len(scores))
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
    return np.sort(np.concatenate([above, equal[: k - len(above)]]))


def _nucleus(probabilities: Floats, top_p: float) -> Ids:
    """Places of the fewest largest that sum to top_p or more, ascending; the first of equals.

    What is below (1 - top_p) / n cannot be among them: all such together stay below 1 - top_p. The rest is sorted.
    """
    places = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    order = places[np.argsort(-probabilities[places], kind="stable")]
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    return np.sort(order[:count])

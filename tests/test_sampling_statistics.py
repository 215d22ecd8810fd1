"""Thousands of draws against the softmax in float64, by Pearson's chi-square; sets of top-k and top-p by definition.

A sampler that follows its distribution fails a case with probability below one in a million, and seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitnet.sampling import Sampler

TAIL = 1e-6
CASES = {  # sampler, draws
    "plain": (Sampler(1.0, seed=1), 20_000),
    "top_k": (Sampler(1.0, top_k=11, seed=4), 20_000),
    "top_p": (Sampler(1.0, top_p=0.7, seed=5), 20_000),
    "cold": (Sampler(0.6, seed=2), 4_000),
    "hot": (Sampler(2.5, seed=3), 4_000),
    "both": (Sampler(1.3, top_k=25, top_p=0.9, seed=6), 4_000),
    "penalized": (Sampler(0.9, repetition_penalty=1.7, seed=2**64 - 1), 4_000),
}
SEEN = [3, 3, 8, 20, 39]
LOGITS = np.random.default_rng(12).normal(0, 1.5, 40).astype(np.float32)


def quantile(degrees: int) -> float:
    """A number that chi-square with so many degrees of freedom exceeds with probability at most TAIL.

    Laurent and Massart 2000, lemma 1: P(X >= n + 2 sqrt(n t) + 2 t) <= exp(-t).
    """
    t = -math.log(TAIL)
    return degrees + 2 * math.sqrt(degrees * t) + 2 * t


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def expected(sampler: Sampler) -> np.ndarray:
    """The distribution, as its definition reads: penalty, temperature, the k likeliest, the fewest reaching p."""
    scores = LOGITS.astype(np.float64)
    for token in set(SEEN):
        scores[token] *= sampler.repetition_penalty if scores[token] < 0 else 1 / sampler.repetition_penalty
    probabilities = softmax(scores / sampler.temperature)
    order = np.argsort(-probabilities, kind="stable")
    kept = order[: sampler.top_k]
    probabilities = probabilities / probabilities[kept].sum()
    if sampler.top_p is not None:
        kept = kept[: int(np.argmax(np.cumsum(probabilities[kept]) >= sampler.top_p)) + 1]
    result = np.zeros(len(scores))
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


def statistic(sampler: Sampler, probabilities: np.ndarray, draws: int) -> tuple[float, int]:
    """(Pearson's sum, degrees of freedom); ids expected less than ten times count as one, impossible ones by far."""
    counts = np.bincount([sampler(LOGITS, at, SEEN) for at in range(draws)], minlength=len(LOGITS))
    if counts[probabilities == 0].any():
        return math.inf, 0
    wanted = probabilities * draws
    rare = wanted < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    return float(((counts - wanted) ** 2 / wanted).sum()), len(wanted) - 1


@pytest.mark.parametrize("name", CASES)
def test_draws_are_of_the_distribution(name: str) -> None:
    sampler, draws = CASES[name]
    found, degrees = statistic(sampler, expected(sampler), draws)
    assert degrees >= 5
    assert found < quantile(degrees)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (Sampler(1.3, seed=1), "plain"),
        (Sampler(1.0, seed=4), "top_k"),
        (Sampler(1.0, top_p=0.75, seed=5), "top_p"),
        (Sampler(0.9, seed=7), "penalized"),
    ],
    ids=lambda case: "" if isinstance(case, Sampler) else case,
)
def test_a_wrong_distribution_is_noticed(wrong: Sampler, right: str) -> None:
    """A temperature that is off, a set that is too large, a penalty forgotten."""
    found, degrees = statistic(wrong, expected(CASES[right][0]), 4_000)
    assert found > quantile(degrees)


def test_seeds_and_positions_are_independent() -> None:
    """Pairs of draws, at neighbouring positions and of neighbouring seeds, fill their table as independent ones do."""
    sampler, other = Sampler(1.0, top_k=5, seed=8), Sampler(1.0, top_k=5, seed=9)
    first = np.array([sampler(LOGITS, at) for at in range(5_000)])
    second = np.array([other(LOGITS, at) for at in range(5_000)])
    for a, b in ((first[:-1], first[1:]), (first, second)):
        ids = np.unique(a)
        table = np.array([[np.count_nonzero((a == i) & (b == j)) for j in ids] for i in ids])
        wanted = np.outer(table.sum(1), table.sum(0)) / table.sum()
        assert ((table - wanted) ** 2 / wanted).sum() < quantile((len(ids) - 1) ** 2)

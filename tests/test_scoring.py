"""A continuation's log-likelihood is that of the whole sequence run alone, however pairs share and fill passes."""

from __future__ import annotations

import numpy as np
import pytest

import bitnet
from bitnet import scoring
from bitnet.decoding import generate_ids
from bitnet.errors import BitnetError, ConfigError
from bitnet.scoring import Row, Score, Scorer, clusters

CONFIG = bitnet.BitNetConfig(257, 48, 80, 2, 6, 3, max_position_embeddings=64, initializer_range=0.3)
Pair = tuple[list[int], list[int]]


@pytest.fixture(scope="module", params=["bitlinear", "linear"])
def model(request: pytest.FixtureRequest) -> bitnet.BitNetForCausalLM:
    return bitnet.BitNetForCausalLM(CONFIG.replace(linear=request.param), seed=1)


def some_pairs(seed: int) -> list[Pair]:
    """Contexts that begin alike, with one to four continuations each, some of them empty or twice there."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 257, 80).tolist()
    pairs: list[Pair] = [(base, base[:64]), (base[:1], base[1:65]), (base[:40], base[40:42]), (base[:41], base[41:42])]
    for _ in range(20):
        context = base[: int(rng.integers(0, 60))] + rng.integers(0, 257, int(rng.integers(1, 12))).tolist()
        for _ in range(int(rng.integers(1, 5))):
            pairs.append((context, rng.integers(0, 257, int(rng.integers(0, 5))).tolist()))
    return [*pairs, pairs[-1]]


def alone(model: bitnet.BitNetForCausalLM, pair: Pair, max_length: int) -> Score:
    """From the logits of one sequence, in float64."""
    context, continuation = pair
    if not continuation:
        return Score(0.0, True)
    tokens = (context + continuation)[-(max_length + 1) :]
    with bitnet.no_grad():
        logits = model(np.array([tokens[:-1]])).numpy()[0].astype(np.float64)[-len(continuation) :]
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    picked = logprobs[np.arange(len(continuation)), continuation]
    return Score(float(picked.sum()), bool((logits.argmax(axis=1) == continuation).all()))


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("positions", [4096, 200])
@pytest.mark.parametrize("max_length", [64, 33])
def test_scores(
    model: bitnet.BitNetForCausalLM,
    batch_size: int | None,
    positions: int,
    max_length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To 1e-6 of float64 for each token; in any company the same number as alone; less is run than asked for."""
    monkeypatch.setattr(scoring, "POSITIONS", positions)
    pairs = [pair for pair in some_pairs(seed=positions) if len(pair[1]) <= max_length]
    counts: list[int] = []
    scorer = Scorer(model, max_length, batch_size)
    scores = scorer.score(pairs, counts.append)
    expected = [alone(model, pair, max_length) for pair in pairs]
    assert [score.logprob for score in scores] == pytest.approx([score.logprob for score in expected], abs=1e-5)
    assert [score.is_greedy for score in scores] == [score.is_greedy for score in expected]
    assert scores == [Scorer(model, max_length).score([pair])[0] for pair in pairs]
    assert sum(counts) == len(pairs)
    assert scorer.tokens_run < 0.8 * scorer.tokens_asked


def test_greedy(model: bitnet.BitNetForCausalLM) -> None:
    prompt = [5, 9, 2]
    best = list(generate_ids(model, prompt, 4, temperature=0))
    other = [*best[:-1], (best[-1] + 1) % 257]
    scores = Scorer(model).score([(prompt, best), (prompt, other), (prompt + best[:2], best[2:])])
    assert [score.is_greedy for score in scores] == [True, False, True]


def test_chunks_of_logits(model: bitnet.BitNetForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = some_pairs(seed=3)
    whole = Scorer(model).score(pairs)
    monkeypatch.setattr(scoring, "LOGITS", 257 * 3)
    assert Scorer(model).score(pairs) == whole
    assert Scorer(model).score([]) == []


def rows(*sequences: list[int]) -> list[Row]:
    return [Row(tokens, [(i, tokens[-1:])]) for i, tokens in enumerate(sequences)]


def test_clusters() -> None:
    """Endings of one story are together; another story that shares little is not, unless that saves more."""
    story, other = list(range(40)), [0, 1, 2, *range(90, 130)]
    found = clusters(rows([*story, 7, 1], [*other, 3], [*story, 8], [*other, 4, 4]))
    assert [(len(cluster.rows), cluster.shared) for cluster in found] == [(2, 40), (2, 43)]
    examples = list(range(100))
    found = clusters(rows(*([*examples, i, i, choice] for i in range(50) for choice in (1, 2))))
    assert [(len(cluster.rows), cluster.shared) for cluster in found] == [(100, 100)]
    # No scored position may be in what is shared.
    found = clusters([Row(story, [(0, story[10:])]), Row([*story, 1], [(1, [2])])])
    assert [(len(cluster.rows), cluster.shared) for cluster in found] == [(1, 10), (1, 40)]


def test_examples_are_run_once(model: bitnet.BitNetForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a cluster take over its beginning from the pass before."""
    monkeypatch.setattr(scoring, "POSITIONS", 256)
    examples = list(range(50))
    scorer = Scorer(model)
    scorer.score([([*examples, i, i], [choice]) for i in range(40) for choice in (1, 2)])
    assert scorer.tokens_asked == 80 * 52
    assert scorer.tokens_run == 50 + 40 * 2


def test_refusals(model: bitnet.BitNetForCausalLM) -> None:
    scorer = Scorer(model, max_length=8)
    for pairs, message in (
        ([([1], [2]), ([], [2])], "pair 1 has no context"),
        ([([1], [2] * 9)], "9 tokens is longer than the 8"),
        ([([1], [257])], "pair 0 has the id 257, the model knows 0 to 256"),
        ([([-1], [2])], "the id -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            scorer.score(pairs)
    with pytest.raises(ConfigError, match="1 to the model's 64 positions, not 65"):
        Scorer(model, max_length=65)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, not 0"):
        Scorer(model, batch_size=0)
    broken = bitnet.BitNetForCausalLM(CONFIG)
    broken.lm_head.weight.copy_(np.full((257, 48), np.nan, np.float32))
    with pytest.raises(BitnetError, match="not finite"):
        Scorer(broken).score([([1], [2])])

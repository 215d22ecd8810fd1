"""Log-likelihoods of continuations, for many pairs of ids at once, each token run as seldom as possible.

Pairs that read the same tokens are one row: the two answers of a yes-or-no question are read off one distribution. Rows
that begin alike, such as the endings of one story or questions behind the same examples, are a cluster: its beginning
is run once, its keys and values are copied (cache.KVCache), and only what differs is run for each row. Clusters of
about the same length are run together, padded on the right, where attention never looks.

    scorer = Scorer(model)
    scorer.score([([5, 9, 2], [7]), ([5, 9, 2], [8, 1])])     # [(log p(7 | 5 9 2), is 7 the argmax), ...]

The logits are those of the whole sequence run alone, bit for bit. The log-softmax is of these f32 logits, with sums in
float64: within 1e-6 of one made in float64 throughout, for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bitnet import ops
from bitnet._core import Tensor
from bitnet.batching import COPY
from bitnet.cache import KVCache
from bitnet.decoder import shared_prefix
from bitnet.errors import BitnetError, ConfigError
from bitnet.model import BitNetForCausalLM

POSITIONS = 4096  # of one pass: rows enough for the matrix kernels; of 2B-4T they keep 630 MB of keys and values
LOGITS = 1 << 24  # made at once, 64 MB: a head of 128256 ids makes those of 130 tokens


class Score(NamedTuple):
    """logprob: natural logarithm of the continuation's probability; is_greedy: each of its tokens is the argmax."""

    logprob: float
    is_greedy: bool


@dataclass
class Row:
    """Tokens that the model reads, and the pairs, by number, that ask what it makes of the last of them."""

    tokens: list[int]
    asked: list[tuple[int, list[int]]] = field(default_factory=list)  # (pair, its targets)

    @property
    def first(self) -> int:
        """The first position whose logits somebody asks for."""
        return len(self.tokens) - max(len(targets) for _, targets in self.asked)


@dataclass
class Cluster:
    """Rows whose first `shared` tokens are the same; none of them is scored."""

    rows: list[Row]
    shared: int


class Run(NamedTuple):
    """Tokens to run in a slot of the cache, from a position on."""

    slot: int
    start: int
    tokens: list[int]


class Scorer:
    """Scores continuations with a model.

    max_length: tokens that the model may read, by default all its positions. batch_size: rows of one pass at most, by
    default as many as have POSITIONS together. tokens_run and tokens_asked count what score() ran, and what running
    each pair alone would have run. ConfigError for a max_length that the model does not have.
    """

    def __init__(self, model: BitNetForCausalLM, max_length: int | None = None, batch_size: int | None = None) -> None:
        limit = model.config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= limit:
            raise ConfigError(f"max_length must be 1 to the model's {limit} positions, not {max_length}")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        self.model, self.max_length, self.batch_size = model, max_length or limit, batch_size
        self.tokens_run = self.tokens_asked = 0
        self._cache: KVCache | None = None
        self._held: list[int] = []  # what slot 0 was made from

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], done: Callable[[int], Any] | None = None
    ) -> list[Score]:
        """(context, continuation) pairs -> a Score each; an empty continuation has probability 1.

        What is read is the end of context and continuation that fits, without the last token; continuations are never
        cut. done: called with the number of pairs that a pass has finished. ConfigError for an empty context, a
        continuation longer than max_length, or an id that the model does not have.
        """
        scores = [Score(0.0, True)] * len(pairs)
        rows = self._rows(pairs)
        empty = len(pairs) - sum(len(row.asked) for row in rows)
        if done is not None and empty:
            done(empty)
        for batch in self._batches(clusters(rows)):
            for pair, score in self._run_batch(batch):
                scores[pair] = score
            if done is not None:
                done(sum(len(row.asked) for cluster in batch for row in cluster.rows))
        self._cache, self._held = None, []
        return scores

    def _rows(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Row]:
        rows: dict[tuple[int, ...], Row] = {}
        for pair, (context, continuation) in enumerate(pairs):
            if len(context) == 0:
                raise ConfigError(f"pair {pair} has no context: its first token would follow nothing")
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens is longer than the {self.max_length} that the model "
                    "may read"
                )
            if len(continuation) == 0:
                continue
            tokens, size = [*context, *continuation], self.model.config.vocab_size
            bad = next((token for token in tokens if not 0 <= token < size), None)
            if bad is not None:
                raise ConfigError(f"pair {pair} has the id {bad}, the model knows 0 to {size - 1}")
            read = tokens[-(self.max_length + 1) :][:-1]
            self.tokens_asked += len(read)
            row = rows.setdefault(tuple(read), Row(read))
            row.asked.append((pair, list(continuation)))
        return list(rows.values())

    def _batches(self, found: list[Cluster]) -> list[list[Cluster]]:
        """Longest first, so that an estimate of the time left errs on the safe side; large clusters in pieces."""
        batches: list[list[Cluster]] = []
        room = 0
        for cluster in sorted(found, key=lambda c: -max(len(row.tokens) for row in c.rows)):
            rows = cluster.rows
            while rows:
                if room == 0:
                    longest = max(len(row.tokens) for row in cluster.rows)
                    room = max(1, POSITIONS // longest)
                    room = room if self.batch_size is None else min(room, self.batch_size)
                    batches.append([])
                piece, rows = rows[:room], rows[room:]
                batches[-1].append(Cluster(piece, cluster.shared))
                room -= len(piece)
        return batches

    def _run_batch(self, batch: list[Cluster]) -> list[tuple[int, Score]]:
        rows = [row for cluster in batch for row in cluster.rows]
        cache = self._cache_of(len(rows), max(len(row.tokens) for row in rows))
        # Slot 0 may hold the beginning of the first cluster already, where the last batch had another piece of it.
        kept = min(shared_prefix(self._held, rows[0].tokens), batch[0].shared)
        self._held = []
        begin: list[Run] = []
        copies: list[tuple[int, int, int]] = []  # (from slot, to slot, positions)
        rest: list[Run] = []
        for cluster in batch:
            slot = len(rest)
            same = kept if slot == 0 else 0
            begin.append(Run(slot, same, cluster.rows[0].tokens[same : cluster.shared]))
            copies += [(slot, slot + i, cluster.shared) for i in range(1, len(cluster.rows))]
            rest += [Run(slot + i, cluster.shared, row.tokens[cluster.shared :]) for i, row in enumerate(cluster.rows)]
        for _ in self._passes(cache, [run for run in begin if run.tokens]):
            pass
        for source, destination, length in copies:
            if length:
                cache.copy(source, destination, length)
        scores = []
        for members, hidden in self._passes(cache, rest):
            scores += self._read([rows[run.slot] for run in members], members, hidden)
        self._held = rows[0].tokens
        return scores

    def _cache_of(self, slots: int, capacity: int) -> KVCache:
        """The one there is where it is large enough, so that what it holds can be used again."""
        cache = self._cache
        if cache is None or cache.slots < slots or cache.capacity < capacity:
            self._held = []
            self._cache = None  # before the next one is made
            cache = self._cache = KVCache(self.model.config, max(slots, POSITIONS // capacity), capacity)
        return cache

    def _passes(self, cache: KVCache, runs: list[Run]) -> Iterator[tuple[list[Run], Tensor]]:
        """Runs padded on the right, (those of a pass, hidden states (B, T, C)): all in one, where padding has room."""
        waiting = sorted(runs, key=lambda run: -len(run.tokens))
        while waiting:
            time = len(waiting[0].tokens)
            fits = [run.start + time <= cache.capacity for run in waiting]
            members = [run for run, fit in zip(waiting, fits, strict=True) if fit]
            waiting = [run for run, fit in zip(waiting, fits, strict=True) if not fit]
            tokens = np.zeros((len(members), time), np.int32)
            for row, run in zip(tokens, members, strict=True):
                row[: len(run.tokens)] = run.tokens
                self.tokens_run += len(run.tokens)
            step = cache.step(len(members))
            step.slot.copy_([run.slot for run in members])
            step.start.copy_([run.start for run in members])
            with ops.no_grad():
                hidden = self.model.head_input(tokens, step)
            yield members, hidden

    def _read(self, rows: list[Row], runs: list[Run], hidden: Tensor) -> list[tuple[int, Score]]:
        """Scores of the pairs of some rows, from the hidden states (B, T, C) of the runs that end them."""
        time = hidden.shape[1]
        places: list[int] = []  # of the hidden states asked for, in (B T, C)
        asked: list[tuple[int, int, int]] = []  # (index into places, target, pair)
        for i, (row, run) in enumerate(zip(rows, runs, strict=True)):
            count = len(row.tokens) - row.first
            end = i * time + len(run.tokens)
            places += range(end - count, end)
            for pair, targets in row.asked:
                asked += [(len(places) - len(targets) + j, target, pair) for j, target in enumerate(targets)]
        asked.sort()
        at, target_ids, pairs = (np.array(column) for column in zip(*asked, strict=True))
        flat = hidden.reshape(-1, hidden.shape[-1])
        logprobs, is_largest = np.zeros(len(asked)), np.zeros(len(asked), bool)
        chunk = max(1, LOGITS // self.model.config.vocab_size)
        for first in range(0, len(places), chunk):
            with ops.no_grad():
                logits = self.model.logits(ops.embedding(places[first : first + chunk], flat)).numpy()
            here = slice(*np.searchsorted(at, (first, first + chunk)))
            line, target = at[here] - first, target_ids[here]
            logprobs[here] = logits[line, target] - log_sum_exp(logits)[line]
            is_largest[here] = logits.argmax(axis=1)[line] == target
        if not np.isfinite(logprobs).all():
            raise BitnetError("the model's logits are not finite: its weights may be damaged or have diverged")
        numbers, group = np.unique(pairs, return_inverse=True)
        sums = np.bincount(group, logprobs)
        misses = np.bincount(group, ~is_largest)
        return [(int(n), Score(float(x), bool(miss == 0))) for n, x, miss in zip(numbers, sums, misses, strict=True)]


def clusters(rows: Sequence[Row]) -> list[Cluster]:
    """Rows in the order of their tokens, neighbours together where running what they share once saves the most.

    A row joins as long as the tokens saved do not become fewer by what the cluster then shares less of.
    """
    found: list[Cluster] = []
    last: Row | None = None
    for row in sorted(rows, key=lambda row: row.tokens):
        if last is not None:
            cluster = found[-1]
            shared = min(shared_prefix(last.tokens, row.tokens), cluster.shared, row.first)
            count = len(cluster.rows)
            if shared >= COPY and shared * count >= cluster.shared * (count - 1):
                cluster.rows.append(row)
                cluster.shared = shared
                last = row
                continue
        found.append(Cluster([row], row.first))
        last = row
    return found


def log_sum_exp(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(N, V) f32 -> (N,): log of the sum of exp, added in float64."""
    largest = logits.max(axis=1)
    sums = np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
    total: npt.NDArray[np.float64] = largest + np.log(sums)
    return total

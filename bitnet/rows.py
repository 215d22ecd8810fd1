"""Rows of a training batch: which tokens row number n holds is a function of (seed, n) and nothing else.

Shuffled windows cut each epoch into windows of seq_len on a grid that starts at a place drawn for that epoch, and visit
every window once, in an order given by a Feistel network: a bijection computed per index, so no list of a billion
windows is ever built. Draws are raw words of NumPy's Philox counter generator, whose stream is fixed, and are mapped to
ranges here, since NumPy may change how its own distributions do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from bitnet.errors import ConfigError, DataError

if TYPE_CHECKING:
    from bitnet.data import ShardDataset

Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]  # tokens and targets, each (seq_len,)

IGNORE = -100  # the target that ops.cross_entropy leaves out
ROUNDS = 6  # of the Feistel network; three already look random, the rest is margin at nanoseconds a row
SHUFFLED_STREAM, RANDOM_STREAM, DOCUMENT_STREAM, MIXTURE_STREAM = 1, 2, 3, 4  # second word of the Philox key


class Rows(Protocol):
    """An endless sequence of rows, any of which can be asked for alone."""

    per_epoch: int  # rows in one pass over the data

    def row(self, number: int) -> Row:
        """Tokens of row `number`, and for each the one that follows it, IGNORE where none is to be predicted."""


class Windows:
    """Epochs of non-overlapping windows across document boundaries, each visited once."""

    def __init__(self, dataset: ShardDataset, seq_len: int, seed: int) -> None:
        self._dataset, self._seq_len, self._seed = dataset, seq_len, seed
        # One window fewer than fit, where there are several: that leaves the grid a whole window of room to start in.
        self.per_epoch = max(1, whole_windows(dataset, seq_len) - 1)

    def start(self, number: int) -> int:
        """First token of a row."""
        epoch, index = divmod(number, self.per_epoch)
        shift, *keys = words(self._seed, SHUFFLED_STREAM, epoch, 1 + ROUNDS)
        room = len(self._dataset) - self.per_epoch * self._seq_len  # grid starts that leave a last target
        return scale(shift, room) + permute(index, self.per_epoch, keys) * self._seq_len

    def row(self, number: int) -> Row:
        return _window(self._dataset, self.start(number), self._seq_len)


class RandomWindows:
    """Every row starts anywhere."""

    def __init__(self, dataset: ShardDataset, seq_len: int, seed: int, batch_size: int) -> None:
        self._dataset, self._seq_len, self._seed, self._batch_size = dataset, seq_len, seed, batch_size
        self.per_epoch = max(1, whole_windows(dataset, seq_len) - 1)

    def start(self, number: int) -> int:
        """First token of a row."""
        position, index = divmod(number, self._batch_size)
        room = len(self._dataset) - self._seq_len  # starts that leave seq_len tokens and one target
        return scale(words(self._seed, RANDOM_STREAM, position, self._batch_size)[index], room)

    def row(self, number: int) -> Row:
        return _window(self._dataset, self.start(number), self._seq_len)


class DocumentWindows:
    """Epochs of windows none of which holds tokens of two documents, so attention cannot cross from one to another.

    A document is cut every seq_len tokens from its start; its last window is filled up with zeros whose targets are
    IGNORE. Every token but the first of each document is a target once an epoch.
    """

    def __init__(self, dataset: ShardDataset, seq_len: int, seed: int) -> None:
        self._dataset, self._seq_len, self._seed = dataset, seq_len, seed
        self._starts = dataset.document_starts()  # (documents + 1,) i64, the last of them the end
        self._ends = np.cumsum(_windows_of_each(self._starts, seq_len))  # (documents,) windows up to and with each
        self.per_epoch = int(self._ends[-1]) if len(self._ends) else 0
        if self.per_epoch == 0:
            raise DataError(f"split {dataset.split!r} of {dataset.folder} has no document of two tokens")

    @property
    def filled(self) -> float:
        """Share of the places in the rows that hold a target."""
        return (len(self._dataset) - len(self._ends)) / (self.per_epoch * self._seq_len)

    def row(self, number: int) -> Row:
        epoch, index = divmod(number, self.per_epoch)
        keys = words(self._seed, DOCUMENT_STREAM, epoch, ROUNDS)
        return self.window(permute(index, self.per_epoch, keys))

    def window(self, window: int) -> Row:
        """One of per_epoch, in the order of the pack."""
        document = int(np.searchsorted(self._ends, window, side="right"))
        before = int(self._ends[document - 1]) if document else 0
        begin = int(self._starts[document]) + (window - before) * self._seq_len
        ids = self._dataset.read(begin, min(begin + self._seq_len + 1, int(self._starts[document + 1])))
        tokens, targets = np.zeros(self._seq_len, np.int32), np.full(self._seq_len, IGNORE, np.int32)
        tokens[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
        return tokens, targets


def document_windows(dataset: ShardDataset, seq_len: int) -> int:
    """How many windows DocumentWindows cuts the documents into; 0 where it would raise DataError."""
    return int(_windows_of_each(dataset.document_starts(), seq_len).sum())


def _windows_of_each(starts: npt.NDArray[np.int64], seq_len: int) -> npt.NDArray[np.int64]:
    """(documents,) windows that hold every target once, from (documents + 1,) starts."""
    return -(-(np.diff(starts) - 1) // seq_len)


class Conversations:
    """Conversations of a pack that `bitnet data --chat` made, one a row, with targets on the answers alone.

    Each is cut or filled up with zeros to seq_len; a target is IGNORE wherever nothing is learned. Conversations whose
    first answer lies beyond seq_len take no part. order "shuffled": each once an epoch; "random": any, at random.
    """

    def __init__(
        self, dataset: ShardDataset, seq_len: int, seed: int = 0, order: str = "shuffled", batch_size: int = 1
    ) -> None:
        self._dataset, self._seq_len, self._seed = dataset, seq_len, seed
        self._order, self._batch_size = order, batch_size
        self._starts = dataset.document_starts()
        self._numbers = answered(dataset, seq_len)
        self.left_out = len(self._starts) - 1 - len(self._numbers)
        self.per_epoch = len(self._numbers)
        if self.per_epoch == 0:
            raise DataError(f"no conversation of {dataset.folder} has an answer within {seq_len} tokens")

    def row(self, number: int) -> Row:
        if self._order == "random":
            position, index = divmod(number, self._batch_size)
            word = words(self._seed, RANDOM_STREAM, position, self._batch_size)[index]
            return self.conversation(scale(word, self.per_epoch))
        epoch, index = divmod(number, self.per_epoch)
        return self.conversation(permute(index, self.per_epoch, words(self._seed, DOCUMENT_STREAM, epoch, ROUNDS)))

    def conversation(self, number: int) -> Row:
        """One of per_epoch, in the order of the pack."""
        begin, end = self._starts[self._numbers[number] :][:2].tolist()
        end = min(end, begin + self._seq_len + 1)
        ids, marks = self._dataset.read(begin, end), self._dataset.read_marks(begin, end)
        tokens, targets = np.zeros(self._seq_len, np.int32), np.full(self._seq_len, IGNORE, np.int32)
        tokens[: len(ids) - 1] = ids[:-1]
        targets[: len(ids) - 1] = np.where(marks[1:] == 1, ids[1:], IGNORE)
        return tokens, targets


def answered(dataset: ShardDataset, seq_len: int) -> npt.NDArray[np.int64]:
    """Numbers of the conversations that have part of an answer among their first seq_len targets, rising."""
    found, first = [np.zeros(0, np.int64)], 0
    for shard, marks in zip(dataset.shards, dataset.marks, strict=True):
        begins = shard.starts
        ends = np.append(begins[1:], len(shard))
        sums = np.concatenate([[0], np.cumsum(marks.read(0, len(marks)), dtype=np.int64)])
        learned = sums[np.minimum(begins + seq_len + 1, ends)] - sums[np.minimum(begins + 1, ends)]
        found.append(first + np.flatnonzero(learned))
        first += len(begins)
    return np.concatenate(found)


def rows_of(dataset: ShardDataset, batch_size: int, seq_len: int, seed: int, order: str, documents: str) -> Rows:
    """Rows of one data set in an order ("shuffled", "random"), documents "joined" or "separate"."""
    if order not in ("shuffled", "random"):
        raise ConfigError(f"order must be 'shuffled' or 'random', not {order!r}")
    if documents not in ("joined", "separate"):
        raise ConfigError(f"documents must be 'joined' or 'separate', not {documents!r}")
    if dataset.marks:  # of conversations, which are never joined
        return Conversations(dataset, seq_len, seed, order, batch_size)
    if documents == "separate":
        if order != "shuffled":
            raise ConfigError(f"separate documents come in the order 'shuffled', not {order!r}")
        return DocumentWindows(dataset, seq_len, seed)
    if order == "shuffled":
        return Windows(dataset, seq_len, seed)
    return RandomWindows(dataset, seq_len, seed, batch_size)


def _window(dataset: ShardDataset, start: int, seq_len: int) -> Row:
    ids = dataset.read(start, start + seq_len + 1)
    return ids[:-1], ids[1:]


def whole_windows(dataset: ShardDataset, seq_len: int) -> int:
    """How many windows of seq_len fit end to end with a target after the last. Raises DataError if none does."""
    if len(dataset) <= seq_len:
        raise DataError(
            f"split {dataset.split!r} of {dataset.folder} has {len(dataset)} tokens: "
            f"too few for one window of {seq_len} and its last target"
        )
    return (len(dataset) - 1) // seq_len


def permute(index: int, count: int, keys: Sequence[int]) -> int:
    """Image of index under a bijection of 0..count-1 chosen by the keys (64-bit words, one a round).

    A balanced Feistel network permutes the next 4^k >= count whatever its round function; walking on until the image is
    below count keeps that a bijection of 0..count-1, in fewer than four steps on average since 4^k < 4 count.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        index = left << half | right
        if index < count:
            return index


def _mix(word: int) -> int:
    """SplitMix64's finalizer: each bit of the input reaches every bit of the output."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    word = (word ^ word >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return word ^ word >> 31


@lru_cache(maxsize=8)  # every row of a shuffled epoch asks for the same words
def words(seed: int, stream: int, index: int, count: int) -> tuple[int, ...]:
    """64-bit words number 0..count-1 of a stream: word k does not depend on count."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, index, 0, 0], dtype=np.uint64)  # word 0 runs within the block
    return tuple(np.random.Philox(key=key, counter=counter).random_raw(count).tolist())


def scale(word: int, count: int) -> int:
    """A 64-bit word as an index below count; no index is likelier than another by more than count / 2^64."""
    return word * count >> 64

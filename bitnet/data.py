"""Batches from a pack: which tokens a training step sees is a function of (seed, position) and nothing else.

position counts batches from the start of training, so resuming is setting one integer, and any batch can be asked for
alone. Shuffled order cuts each epoch into windows of seq_len on a grid that starts at a place drawn for that epoch, and
visits every window once, in an order given by a Feistel network: a bijection computed per index, so no list of a
billion windows is ever built. Draws are raw words of NumPy's Philox counter generator, whose stream is fixed, and are
mapped to ranges here, since NumPy may change how its own distributions do that.

`python -m bitnet.data` packs text: see bitnet/data_cli.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet.errors import ConfigError, DataError
from bitnet.shard import Shard, read_manifest
from bitnet.tokenizer import Tokenizer, load_tokenizer

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]  # tokens and targets, each (batch_size, seq_len)

ROUNDS = 6  # of the Feistel network; three already look random, the rest is margin at nanoseconds a row
SHUFFLED_STREAM, RANDOM_STREAM = 1, 2  # second word of the Philox key


class ShardDataset:
    """One split of a pack, its shards joined end to end. Raises DataError if a file is not the one listed."""

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder = Path(folder)
        self.split = split
        manifest = read_manifest(folder)
        splits = manifest["splits"]
        if split not in splits:
            raise DataError(f"{folder} has no split {split!r}, only {', '.join(splits)}")
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.text_bytes: int = splits[split]["text_bytes"]
        self.shards: list[Shard] = []
        for entry in splits[split]["files"]:
            shard = Shard.open(self.folder / entry["file"])
            listed = (entry["sha256"], self.vocab_size, self.fingerprint)
            if (shard.sha256, shard.vocab_size, shard.fingerprint) != listed:
                raise DataError(f"shard {shard.path} is not the one the manifest lists")
            self.shards.append(shard)
        self._begins = [0]  # first token of each shard, and the end
        for shard in self.shards:
            self._begins.append(self._begins[-1] + len(shard))

    def __len__(self) -> int:
        """Number of tokens."""
        return self._begins[-1]

    @property
    def documents(self) -> int:
        return sum(len(shard.starts) for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text one token stands for on average: turns loss per token into bits per byte."""
        return self.text_bytes / len(self)

    def read(self, begin: int, end: int) -> npt.NDArray[np.int32]:
        """Tokens begin..end, (end - begin,) int32. Raises DataError outside 0..len."""
        if not 0 <= begin <= end <= len(self):
            raise DataError(f"split {self.split!r} of {self.folder} has tokens 0..{len(self)}, not {begin}..{end}")
        out = np.empty(end - begin, dtype=np.int32)
        at = begin
        while at < end:
            i = bisect_right(self._begins, at) - 1
            stop = min(end, self._begins[i + 1])
            out[at - begin : stop - begin] = self.shards[i].read(at - self._begins[i], stop - self._begins[i])
            at = stop
        return out

    def verify(self) -> None:
        """Check every byte and id of every shard. Raises DataError at the first that is wrong."""
        for shard in self.shards:
            shard.verify()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the pack was made with. Raises DataError if the one in the folder is another."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.fingerprint() != self.fingerprint:
            raise DataError(f"the tokenizer in {self.folder} is not the one its tokens were made with")
        return tokenizer


class DataLoader:
    """Batches of a dataset without end; `position` is the whole state.

    order "shuffled": epochs of non-overlapping windows, each visited once. order "random": every row starts anywhere.
    Raises ConfigError for impossible settings, DataError if the data cannot fill one window and its last target.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        order: str = "shuffled",
        position: int = 0,
    ) -> None:
        if batch_size < 1 or seq_len < 1:
            raise ConfigError(f"batch_size and seq_len must be at least 1, not {batch_size} and {seq_len}")
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed must be 0 to 2**64 - 1, not {seed}")
        if order not in ("shuffled", "random"):
            raise ConfigError(f"order must be 'shuffled' or 'random', not {order!r}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.order = order
        self.position = position
        # One window fewer than fit, where there are several: that leaves the grid a whole window of room to start in.
        self.windows_per_epoch = max(1, _whole_windows(dataset, seq_len) - 1)

    def batch(self, position: int) -> Batch:
        """Batch number `position`: targets are the tokens one place later. Two contiguous (batch_size, seq_len) i32."""
        if position < 0:
            raise ConfigError(f"a position is counted from 0, not {position}")
        rows = np.stack([self.dataset.read(start, start + self.seq_len + 1) for start in self.starts(position)])
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def starts(self, position: int) -> list[int]:
        """First token of each row of a batch."""
        if self.order == "random":
            room = len(self.dataset) - self.seq_len  # starts that leave seq_len tokens and one target
            return [_scale(word, room) for word in _words(self.seed, RANDOM_STREAM, position, self.batch_size)]
        rows = range(position * self.batch_size, (position + 1) * self.batch_size)
        return [self._shuffled_start(*divmod(row, self.windows_per_epoch)) for row in rows]

    def epoch(self, position: int) -> float:
        """Passes over the data before this batch, counted in windows."""
        return position * self.batch_size / self.windows_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self.batch(self.position)
            self.position += 1
            yield batch

    def _shuffled_start(self, epoch: int, index: int) -> int:
        shift, *keys = _words(self.seed, SHUFFLED_STREAM, epoch, 1 + ROUNDS)
        room = len(self.dataset) - self.windows_per_epoch * self.seq_len  # grid starts that leave a last target
        return _scale(shift, room) + permute(index, self.windows_per_epoch, keys) * self.seq_len


def eval_blocks(dataset: ShardDataset, batch_size: int, seq_len: int) -> Iterator[Batch]:
    """Every whole block of seq_len tokens once, in order, no two overlapping; the last batch may have fewer rows."""
    blocks = _whole_windows(dataset, seq_len)
    for first in range(0, blocks, batch_size):
        last = min(first + batch_size, blocks)
        rows = dataset.read(first * seq_len, last * seq_len + 1)
        yield rows[:-1].reshape(-1, seq_len), rows[1:].reshape(-1, seq_len).copy()


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
def _words(seed: int, stream: int, index: int, count: int) -> tuple[int, ...]:
    """64-bit words number 0..count-1 of a stream: word k does not depend on count."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, index, 0, 0], dtype=np.uint64)  # word 0 runs within the block
    return tuple(np.random.Philox(key=key, counter=counter).random_raw(count).tolist())


def _scale(word: int, count: int) -> int:
    """A 64-bit word as an index below count; no index is likelier than another by more than count / 2^64."""
    return word * count >> 64


def _whole_windows(dataset: ShardDataset, seq_len: int) -> int:
    """How many windows of seq_len fit end to end with a target after the last. Raises DataError if none does."""
    if len(dataset) <= seq_len:
        raise DataError(
            f"split {dataset.split!r} of {dataset.folder} has {len(dataset)} tokens: "
            f"too few for one window of {seq_len} and its last target"
        )
    return (len(dataset) - 1) // seq_len


def main(argv: list[str] | None = None) -> int:
    """Command line `bitnet data`."""
    from bitnet.data_cli import main as run

    return run(argv)


def pack(*args: Any, **options: Any) -> Path:
    """See bitnet.data_cli.pack."""
    from bitnet.data_cli import pack as run

    return run(*args, **options)


if __name__ == "__main__":
    raise SystemExit(main())

"""Batches from a pack, or from a mixture of packs: which tokens a training step sees is a function of (seed, position).

position counts batches from the start of training, so resuming is setting one integer, and any batch can be asked for
alone. bitnet/rows.py says which tokens a row holds.

`python -m bitnet.data` packs text: see bitnet/data_cli.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitnet.errors import ConfigError, DataError
from bitnet.rows import (
    Conversations,
    DocumentWindows,
    RandomWindows,
    Row,
    Rows,
    Windows,
    answered,
    document_windows,
    rows_of,
    whole_windows,
)
from bitnet.shard import Shard, read_manifest
from bitnet.tokenizer import Tokenizer, load_tokenizer

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]  # tokens and targets, each (batch_size, seq_len)


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
        self.marks: list[Shard] = []  # one beside each shard of conversations: 1 for a token of an answer, else 0
        for entry in splits[split]["files"]:
            self.shards.append(self._listed(entry, self.vocab_size))
            if "answers" in entry:
                self.marks.append(self._listed(entry["answers"], 2))
                if len(self.marks[-1]) != len(self.shards[-1]):
                    raise DataError(f"shard {self.marks[-1].path} is not as long as {self.shards[-1].path}")
        if len(self.marks) not in (0, len(self.shards)):
            raise DataError(f"split {split!r} of {folder} has marks of answers beside some of its shards only")
        self._begins = [0]  # first token of each shard, and the end
        for shard in self.shards:
            self._begins.append(self._begins[-1] + len(shard))

    def _listed(self, entry: dict[str, Any], vocab_size: int) -> Shard:
        """A shard that the manifest lists."""
        shard = Shard.open(self.folder / entry["file"])
        listed = (entry["sha256"], entry["index_sha256"], vocab_size, self.fingerprint)
        if (shard.sha256, shard.index_sha256, shard.vocab_size, shard.fingerprint) != listed:
            raise DataError(f"shard {shard.path} is not the one the manifest lists")
        return shard

    def __len__(self) -> int:
        """Number of tokens."""
        return self._begins[-1]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text one token stands for on average: turns loss per token into bits per byte."""
        return self.text_bytes / len(self)

    def read(self, begin: int, end: int) -> npt.NDArray[np.int32]:
        """Tokens begin..end, (end - begin,) int32. Raises DataError outside 0..len."""
        return self._read(self.shards, begin, end)

    def read_marks(self, begin: int, end: int) -> npt.NDArray[np.int32]:
        """Of a pack of conversations: 1 for each of the tokens begin..end that is part of an answer, else 0."""
        return self._read(self.marks, begin, end)

    def _read(self, shards: list[Shard], begin: int, end: int) -> npt.NDArray[np.int32]:
        if not 0 <= begin <= end <= len(self):
            raise DataError(f"split {self.split!r} of {self.folder} has tokens 0..{len(self)}, not {begin}..{end}")
        out = np.empty(end - begin, dtype=np.int32)
        at = begin
        while at < end:
            i = bisect_right(self._begins, at) - 1
            stop = min(end, self._begins[i + 1])
            out[at - begin : stop - begin] = shards[i].read(at - self._begins[i], stop - self._begins[i])
            at = stop
        return out

    def document_starts(self) -> npt.NDArray[np.int64]:
        """(documents + 1,) first token of each document, and the end."""
        parts = [shard.starts + begin for shard, begin in zip(self.shards, self._begins, strict=False)]
        return np.concatenate([*parts, np.array([len(self)], np.int64)])

    def rows(self, batch_size: int, seq_len: int, seed: int, order: str, documents: str) -> Rows:
        """See bitnet/rows.py."""
        return rows_of(self, batch_size, seq_len, seed, order, documents)

    def held_out(self) -> dict[str, ShardDataset]:
        """The validation split under its name, where the pack has one."""
        if "validation" not in read_manifest(self.folder)["splits"]:
            return {}
        return {"validation": ShardDataset(self.folder, "validation")}

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must find again."""
        answers = {"answers": [marks.sha256 for marks in self.marks]} if self.marks else {}
        return {"tokens": len(self), "shards": [shard.sha256 for shard in self.shards], **answers}

    def verify(self) -> None:
        """Check every byte and id of every shard. Raises DataError at the first that is wrong."""
        for shard in [*self.shards, *self.marks]:
            shard.verify()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the pack was made with. Raises DataError if the one in the folder is another."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.fingerprint() != self.fingerprint:
            raise DataError(f"the tokenizer in {self.folder} is not the one its tokens were made with")
        return tokenizer


class Dataset(Protocol):
    """What a DataLoader draws from: a ShardDataset or a Mixture of them."""

    def rows(self, batch_size: int, seq_len: int, seed: int, order: str, documents: str) -> Rows: ...


class DataLoader:
    """Batches of a dataset; `position` is the whole state.

    order "shuffled": epochs of non-overlapping windows, each visited once. order "random": every row starts anywhere.
    documents "joined": windows run across the ends of documents; "separate": none does. rank, world: of `world` loaders
    that share the work, number `rank`; the batches of all of them, taken in turns, are those of one loader. Raises
    ConfigError for impossible settings, DataError if the data cannot fill one window and its last target.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        order: str = "shuffled",
        position: int = 0,
        documents: str = "joined",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or seq_len < 1:
            raise ConfigError(f"batch_size and seq_len must be at least 1, not {batch_size} and {seq_len}")
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed must be 0 to 2**64 - 1, not {seed}")
        if not 0 <= rank < world:
            raise ConfigError(f"rank must be 0 to world - 1 = {world - 1}, not {rank}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.order = order
        self.position = position
        self.rows = dataset.rows(batch_size, seq_len, seed, order, documents)
        self.windows_per_epoch = self.rows.per_epoch
        self._rank, self._world = rank, world

    def batch(self, position: int) -> Batch:
        """Batch number `position`: targets are the tokens one place later. Two contiguous (batch_size, seq_len) i32."""
        return _stacked([self.rows.row(number) for number in self.numbers(position)])

    def numbers(self, position: int) -> range:
        """The rows of a batch, by their numbers in the order of all rows."""
        if position < 0:
            raise ConfigError(f"a position is counted from 0, not {position}")
        batch = position * self._world + self._rank
        return range(batch * self.batch_size, (batch + 1) * self.batch_size)

    def starts(self, position: int) -> list[int]:
        """First token of each row of a batch of windows."""
        assert isinstance(self.rows, (Windows, RandomWindows))
        return [self.rows.start(number) for number in self.numbers(position)]

    def epoch(self, position: int) -> float:
        """Passes over the data before this batch, counted in windows."""
        return position * self._world * self.batch_size / self.windows_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self.batch(self.position)
            self.position += 1
            yield batch


def eval_rows(dataset: ShardDataset, seq_len: int, documents: str = "joined") -> int:
    """How many rows eval_blocks gives in all; 0 where it would raise DataError."""
    if dataset.marks:
        return len(answered(dataset, seq_len))
    if documents == "separate":
        return document_windows(dataset, seq_len)
    return max(0, (len(dataset) - 1) // seq_len)


def _stacked(rows: list[Row]) -> Batch:
    return np.stack([tokens for tokens, _ in rows]), np.stack([targets for _, targets in rows])


def _apart(dataset: ShardDataset, seq_len: int) -> tuple[int, Callable[[int], Row]]:
    """How many conversations or windows of documents there are, and each by its number in the order of the pack."""
    if dataset.marks:
        talks = Conversations(dataset, seq_len)
        return talks.per_epoch, talks.conversation
    windows = DocumentWindows(dataset, seq_len, 0)
    return windows.per_epoch, windows.window


def eval_blocks(dataset: ShardDataset, batch_size: int, seq_len: int, documents: str = "joined") -> Iterator[Batch]:
    """Every whole block of seq_len tokens once, in order, no two overlapping; the last batch may have fewer rows.

    documents "separate": every window of every document, as in training (see rows.DocumentWindows), so that no loss
    depends on another document. Of conversations: every one that has an answer within seq_len.
    """
    if dataset.marks or documents == "separate":
        count, row = _apart(dataset, seq_len)
        for first in range(0, count, batch_size):
            yield _stacked([row(number) for number in range(first, min(first + batch_size, count))])
        return
    blocks = whole_windows(dataset, seq_len)
    for first in range(0, blocks, batch_size):
        last = min(first + batch_size, blocks)
        rows = dataset.read(first * seq_len, last * seq_len + 1)
        yield rows[:-1].reshape(-1, seq_len), rows[1:].reshape(-1, seq_len).copy()


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

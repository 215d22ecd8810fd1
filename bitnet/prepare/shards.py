"""The shards of one split: a new one is begun when the current one has no room for the next document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet.shard import SUFFIX, ShardWriter


class Series:
    """Writes shards SPLIT-00000 and so on; where one ends depends on the documents and the limit alone.

    finished: entries of shards that are there already, as they were given to on_shard; documents before `next_document`
    are in them. on_shard is called with the entry of each shard that is complete, but the last.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        vocab_size: int,
        fingerprint: str,
        limit: int,
        finished: Sequence[dict[str, Any]] = (),
        on_shard: Callable[[dict[str, Any]], object] = lambda entry: None,
    ) -> None:
        self.split = split
        self.next_document: int = finished[-1]["next"] if finished else 0
        self._folder, self._vocab_size, self._fingerprint, self._limit = folder, vocab_size, fingerprint, limit
        self._entries = list(finished)
        self._on_shard = on_shard
        self._writer: ShardWriter | None = None
        self._part = 0
        self._bytes = 0  # of text in the current shard

    @property
    def tokens(self) -> int:
        return sum(entry["tokens"] for entry in self._entries) + (self._writer.tokens if self._writer else 0)

    def append(self, number: int, tokens: npt.NDArray[np.integer[Any]], size: int, part: int = 0) -> None:
        """Write document `number`, whose text has `size` bytes. A shard holds documents of one `part` of the corpus."""
        full = self._writer is not None and self._writer.tokens + len(tokens) > self._limit
        if full or (self._writer is not None and part != self._part):
            self._on_shard(self._end_shard(number))
        self._part = part
        if self._writer is None:
            path = self._folder / f"{self.split}-{len(self._entries):05d}{SUFFIX}"
            self._writer = ShardWriter(path, self._vocab_size, self._fingerprint)
        self._writer.append(tokens)
        self._bytes += size

    def describe(self) -> dict[str, Any]:
        """The split as the manifest lists it."""
        names = ("file", "tokens", "documents", "sha256", "index_sha256")
        total = {name: sum(entry[name] for entry in self._entries) for name in ("tokens", "documents", "bytes")}
        return {
            "tokens": total["tokens"],
            "documents": total["documents"],
            "text_bytes": total["bytes"],
            "files": [{name: entry[name] for name in names} for entry in self._entries],
        }

    def _end_shard(self, number: int) -> dict[str, Any]:
        writer = self._writer
        assert writer is not None
        writer.close()
        entry = {
            "split": self.split,
            "number": len(self._entries),
            "file": writer.path.name,
            "tokens": writer.tokens,
            "documents": writer.documents,
            "sha256": writer.sha256,
            "index_sha256": writer.index_sha256,
            "bytes": self._bytes,
            "next": number,
        }
        self._entries.append(entry)
        self._writer, self._bytes = None, 0
        return entry

    def __enter__(self) -> Series:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._writer is not None:
            if kind is None:
                self._end_shard(-1)
            else:
                self._writer.discard()

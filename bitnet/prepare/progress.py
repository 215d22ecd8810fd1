"""A bar with MB/s, tokens/s and the time that is left, on a terminal; nothing elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from bitnet.corpus import Corpus


class Progress:
    """Counts bytes of text, and tokens where there are any. total: bytes, None if they are not known yet."""

    def __init__(self, what: str, total: int | None) -> None:
        from tqdm import tqdm

        self.tokens = self.bytes = 0
        self._start = time.perf_counter()
        self._bar: Any = tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None, leave=False)

    def add(self, size: int, tokens: int = 0) -> None:
        self.tokens += tokens
        self.bytes += size
        if tokens and not self._bar.disable:
            self._bar.set_postfix_str(f"{self.tokens / self.seconds:,.0f} tokens/s", refresh=False)
        self._bar.update(size)

    def skip(self, size: int) -> None:
        """Bytes that were done before: they move the bar and not the rate."""
        if not self._bar.disable:
            self._bar.initial += size
            self._bar.n += size

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()


@contextmanager
def reading(what: str, corpus: Corpus) -> Iterator[Callable[[int], None]]:
    """A bar for one reading, to be called with the bytes of each document.

    It counts bytes of files, with the time that is left, where their sizes are known, and bytes of text elsewhere.
    """
    total = corpus.size()
    with Progress(what, total) as bar:

        def went_by(size: int) -> None:
            bar.add(size if total is None else max(0, corpus.position - bar.bytes))

        yield went_by

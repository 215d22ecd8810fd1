"""A bar with MB/s, tokens/s and the time that is left, on a terminal; nothing elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any


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

"""Ctrl-C and SIGTERM while training: heard between steps, never in the middle of what must happen as a whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM (`signal` says which) ended training; the message says what is kept and how to go on."""

    signal: int = signal.SIGINT


class Interrupts:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, except inside `held()`, at whose end a waiting one is raised.

    Only the main thread receives signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._depth = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by a library in C
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self._depth == 0:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is inside happens as a whole."""
        waiting = self.signal
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0 and self.signal != waiting:
            raise KeyboardInterrupt

"""One piece of work at a time on another thread, whose end or error is asked for later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """begin(work), then take(): the result, or the error that the work raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._result: list[T] = []
        self._error: list[BaseException] = []

    @property
    def busy(self) -> bool:
        """Whether a result is still to be taken."""
        return self._thread is not None

    @property
    def done(self) -> bool:
        """Whether take() would not wait."""
        return self._thread is not None and not self._thread.is_alive()

    def begin(self, work: Callable[[], T]) -> None:
        """Starts the work; the result of the work before must have been taken."""
        assert self._thread is None

        def run() -> None:
            try:
                self._result.append(work())
            except BaseException as error:
                self._error.append(error)

        # A daemon: a process that leaves in a hurry does not wait for it, and what it writes counts only when whole.
        self._thread = threading.Thread(target=run, name="bitnet-background", daemon=True)
        self._thread.start()

    def take(self) -> T:
        """Waits for the work; its result, or raises its error. Interrupted, it can be called again."""
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        if self._error:
            raise self._error.pop()
        return self._result.pop()

"""Work on batches of documents in several processes, with the results in the order of the batches.

One process or many, the results are the same and come in the same order, so nothing that is written depends on how
many there were. At most a few batches for each process are held. The processes begin as fresh interpreters, so a script
that asks for several keeps its own work under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

from bitnet.errors import ConfigError

In = TypeVar("In")
Out = TypeVar("Out")

BATCH_BYTES = 1 << 20  # of text that a process is handed at a time
BATCH_DOCUMENTS = 1024
AHEAD = 3  # batches a process may have waiting or done


def ordered_map(work: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """work(item) for each item, in order. With several workers, `work` and the items must pickle."""
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    if workers == 1:
        yield from map(work, items)
        return
    # A fresh interpreter for each: a fork would copy locks that the threads of this one may hold.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(workers, context, _begin, (work,))
    try:
        for item in items:
            waiting.append(pool.submit(_run, item))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batches(pairs: Iterable[tuple[In, int]]) -> Iterator[list[In]]:
    """Items with their sizes in bytes, in lists of about BATCH_BYTES."""
    batch: list[In] = []
    size = 0
    for item, weight in pairs:
        batch.append(item)
        size += weight
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_work: Callable[[Any], Any]  # of a worker process


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a parent that was killed could not say goodbye
        os._exit(1)


def _run(item: Any) -> Any:
    return _work(item)

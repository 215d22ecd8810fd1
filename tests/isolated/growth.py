"""Whether repeating something costs memory: run by the scripts beside it, each in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import bitnet
from bitnet.nn import Parameter


class Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def heap_bytes() -> int:
    """Bytes handed out by the C heap: headers of tensors and nodes, which no other counter sees. 0 where unknown."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = Mallinfo2
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def counters() -> dict[str, int]:
    """What a leak would raise by at least one a round; the two in bytes by at least 16, the smallest block there is."""
    gc.collect()
    return {
        "arena bytes / 16": bitnet.memory_stats()["in_use"] // 16,
        "C heap bytes / 16": heap_bytes() // 16,
        "Python blocks": sys.getallocatedblocks(),
        "objects known to the collector": len(gc.get_objects()),
        "references to Tensor": sys.getrefcount(bitnet.Tensor),
        "references to Tape": sys.getrefcount(bitnet.Tape),
        "references to ShapeError": sys.getrefcount(bitnet.ShapeError),
        "references to Parameter": sys.getrefcount(Parameter),
    }


def assert_none(step: Callable[[], object], rounds: int = 100) -> None:
    """Repeats step() and fails if anything grows with the number of repetitions.

    Caches fill and freelists breathe, some only after a thousand rounds: a counter may grow in many a stretch of
    rounds, but only a leak grows in every one. Less than one thing in two rounds is let through.
    """
    grown: dict[str, list[int]] = {}
    before = counters()
    for _ in range(25):
        for _ in range(rounds):
            step()
        after = counters()
        for what in before:
            grown.setdefault(what, []).append(after[what] - before[what])
        before = after
        if all(min(stretches) < rounds // 2 for stretches in grown.values()):
            return
    leaks = {what: stretches for what, stretches in grown.items() if min(stretches) >= rounds // 2}
    raise AssertionError(f"{step.__name__} leaks; growth in each {rounds} rounds: {leaks}")

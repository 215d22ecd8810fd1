"""Which dense layout of ternary weights this machine decodes fastest: two bits a weight, or five codes a byte.

Five codes a byte are a fifth fewer bytes and more instructions to take apart: they win where memory is the limit, and
lose where instructions are (an old instruction set, or one thread on fast memory). So a short trial decides. Both
layouts give the same bits.
"""

from __future__ import annotations

import functools
import statistics
from time import perf_counter

import numpy as np

from bitnet import _core, ops

LAYOUTS = ("2", "1.6")  # bits a weight
# Smaller models stay in caches, where two bits are taken apart faster.
LEAST_CODES = 32_000_000
ROWS, COLS, ROUNDS = 51_200, 2560, 5  # 33 and 26 MB, some 30 ms with the preparation


def choose_layout(codes: int, wanted: str = "auto") -> str:
    """`wanted` unless it is "auto", which tries both where the model's `codes` are many."""
    if wanted == "auto":
        return measured_layout(_core.current_isa(), _core.get_threads()) if codes >= LEAST_CODES else "2"
    if wanted not in LAYOUTS:
        raise ValueError(f"a layout is auto, {' or '.join(LAYOUTS)}, not {wanted!r}")
    return wanted


@functools.cache
def measured_layout(isa: str, threads: int) -> str:
    """The layout whose rows are multiplied fastest by one activation, out of memory, on the present settings."""
    with ops.device("cpu"), ops.no_grad():
        return _fastest()


def _fastest() -> str:
    fifths = np.zeros(ROWS * COLS // 5, np.uint8)
    weights = {layout: _core.prepare_fifths(fifths, ROWS, COLS, 1.0, layout) for layout in LAYOUTS}
    x = ops.tensor(np.ones((1, COLS), np.float32))
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(ROUNDS):
        for layout, weight in weights.items():
            start = perf_counter()
            ops.bitlinear(x, weight)
            seconds[layout].append(perf_counter() - start)
    return min(LAYOUTS, key=lambda layout: statistics.median(seconds[layout]))

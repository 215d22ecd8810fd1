"""Small runs of a trainer, as tests compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitnet.callbacks import Callback
from bitnet.data import pack
from bitnet.trainer import Trainer

TIMINGS = ("seconds", "tokens_per_second", "mfu", "memory")


def pack_numbers(root: Path, lines: int = 400) -> Path:
    """A pack of bytes of some arithmetic, in rows of 16 tokens."""
    (root / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(lines)))
    return pack(root / "text.txt", root / "pack", "bytes", seq_len=16, log=lambda line: None)


def numbers(run: Trainer) -> list[Any]:
    """What a resumed run has to repeat: weights, the optimizer's state, averages, records without timings."""
    arrays = [*run.model.state_dict().values(), *run.optimizer.state_dict().values()]
    arrays += run.average.model.state_dict().values() if run.average is not None else []
    records = [{name: value for name, value in r.items() if name not in TIMINGS} for r in run.history]
    return [b"".join(array.tobytes() for array in arrays), records]


class StopAt(Callback):
    """An interrupt when a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            raise KeyboardInterrupt

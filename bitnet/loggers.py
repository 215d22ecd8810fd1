"""The records of a run in other people's pages: TensorBoard and Weights & Biases, as callbacks.

Both show what metrics.jsonl and layers.jsonl hold, which stay the record. A resumed or rolled-back run draws over what
was taken back: TensorBoard by its purge step, Weights & Biases because its x axis is the record's own step.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet.callbacks import Callback
from bitnet.errors import ConfigError
from bitnet.layer_stats import BINS, LIMIT
from bitnet.metrics import Record

if TYPE_CHECKING:
    from bitnet.trainer import Trainer


def _package(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"{extra} needs the package {name}: pip install 'bitnet[{extra}]'") from None


def scalars(record: Record, layers: Record | None) -> Iterator[tuple[str, float]]:
    """The numbers of a step under the names they get in the pages; layers: its record of layers, if it has one."""
    for name, value in record.items():
        if isinstance(value, dict):  # of a mixture: by source
            yield from ((f"{name}/{key}", float(part)) for key, part in value.items())
        elif value is not None and name != "step":
            yield name, float(value)
    for layer, values in (layers or {"layers": {}})["layers"].items():
        for name in ("zero", "flip", "scale"):
            yield f"{name}/{layer}", values[name]


class TensorBoard(Callback):
    """Event files for `tensorboard --logdir RUN`, written by tensorboardX. Raises ConfigError without it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._library = _package("tensorboardX", "tensorboard")
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        self._open(trainer.logged_step + 1)

    def _open(self, step: int) -> None:
        self._close()
        self._writer = self._library.SummaryWriter(str(self.folder), purge_step=step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def on_step(self, trainer: Trainer, record: Record) -> None:
        step = record["step"]
        for name, value in scalars(record, trainer.layers):
            self._writer.add_scalar(name, value, step)
        width = 2 * LIMIT / BINS
        for name, values in (trainer.layers or {"layers": {}})["layers"].items():
            counts = values["histogram"]
            middles = [-LIMIT + (i + 0.5) * width for i in range(BINS)]
            self._writer.add_histogram_raw(
                f"weights/{name}", -LIMIT, LIMIT, sum(counts),
                sum(n * x for n, x in zip(counts, middles, strict=True)),
                sum(n * x * x for n, x in zip(counts, middles, strict=True)),
                [x + width / 2 for x in middles], counts, step,
            )  # fmt: skip

    def on_event(self, trainer: Trainer, event: Record) -> None:
        if event["event"] == "rollback":
            self._open(trainer.step + 1)
        self._writer.add_text(event["event"], event["reason"], trainer.step)

    def on_end(self, trainer: Trainer, complete: bool) -> None:
        self._close()


class WeightsAndBiases(Callback):
    """One run of a project, gone on with on resume. Offline (`wandb sync` sends it later) unless WANDB_MODE is set.

    Raises ConfigError without the package wandb.
    """

    def __init__(self, out: Path, project: str) -> None:
        self.out, self.project = out, project
        self._library = _package("wandb", "wandb")
        self._run: Any = None

    def on_start(self, trainer: Trainer) -> None:
        folder = self.out / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "run-id.txt"
        if not known.exists():
            known.write_text(secrets.token_hex(4))
        self._run = self._library.init(
            project=self.project, name=self.out.name, id=known.read_text().strip(), dir=str(self.out), resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"), config=asdict(trainer.config) | asdict(trainer.model.config),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def on_step(self, trainer: Trainer, record: Record) -> None:
        self._run.log({"step": record["step"], **dict(scalars(record, trainer.layers))})

    def on_event(self, trainer: Trainer, event: Record) -> None:
        self._run.log({"step": trainer.step, event["event"]: 1})

    def on_end(self, trainer: Trainer, complete: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if complete else 1)
            self._run = None

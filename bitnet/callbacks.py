"""What happens beside training: the progress bar, metrics.jsonl, samples and pictures.

A callback sees the trainer at five moments. Those that write into the run folder first take back what a killed run
wrote beyond its last checkpoint, so a resumed run's files have every step once.
"""

from __future__ import annotations

import math
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet.errors import BitnetError
from bitnet.machine import FILE as MACHINES
from bitnet.machine import machine_record
from bitnet.metrics import LineFile, Record, smoothed

if TYPE_CHECKING:
    from bitnet.trainer import Trainer


class Callback:
    """Override what is wanted."""

    def on_start(self, trainer: Trainer) -> None:
        """Training begins, or goes on, at trainer.step."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """A step is done; record["val_loss"] is a number if it was followed by an evaluation."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint was written."""

    def on_event(self, trainer: Trainer, event: Record) -> None:
        """Something out of the ordinary was noted: see bitnet/stability.py. After a rollback, trainer.step is lower."""

    def on_end(self, trainer: Trainer, complete: bool) -> None:
        """Training ends; not complete after an interrupt or an error."""


def standard_callbacks(
    out: Path | None, plots: bool = True, tensorboard: bool = False, wandb: str | None = None
) -> list[Callback]:
    """Progress everywhere, files where there is a run folder; ConfigError if a logger's package is missing."""
    if out is None:
        return [Progress()]
    # Metrics first: it restores the history that the others look at.
    files: list[Callback] = [Metrics(out / "metrics.jsonl"), Progress(), Samples(out / "samples.txt")]
    files += [Layers(out / "layers.jsonl"), Machines(out / MACHINES)]
    if plots:
        files.append(Pictures(out / "plots"))
    if tensorboard or wandb is not None:
        from bitnet.loggers import TensorBoard, WeightsAndBiases
    if tensorboard:
        files.append(TensorBoard(out / "tensorboard"))
    if wandb is not None:
        files.append(WeightsAndBiases(out, wandb))
    return files


class Progress(Callback):
    """A bar in a terminal or notebook, and a line for each evaluation; where output goes to a file, the lines alone."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._loss: float | None = None
        self._sources: dict[str, float] = {}  # smoothed training losses of a mixture's sources
        self._shown: dict[str, str] = {}
        self._log: Callable[[str], None] = print

    def on_start(self, trainer: Trainer) -> None:
        with warnings.catch_warnings():  # a notebook without widgets gets the plain bar, which needs no advice
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm

            wanted = sys.stderr.isatty() or "ipykernel" in sys.modules
            self._bar = tqdm(
                total=trainer.config.steps, initial=trainer.logged_step, desc="training", unit="step",
                disable=not wanted, dynamic_ncols=True, smoothing=0.1,
            )  # fmt: skip
        self._log, self._shown = trainer.log, {}
        self._look_back(trainer)
        if wanted and trainer.log is print:
            trainer.log = self._bar.write

    def _look_back(self, trainer: Trainer) -> None:
        """The smoothed losses as the history left them."""
        self._loss, self._sources = None, {}
        for record in trainer.history:
            self._follow(record)

    def _follow(self, record: Record) -> None:
        self._loss = smoothed([record["train_loss"]], self._loss)[0]
        for name, loss in record.get("train_loss_by_source", {}).items():
            self._sources[name] = smoothed([loss], self._sources.get(name))[0]

    def on_step(self, trainer: Trainer, record: Record) -> None:
        self._follow(record)
        shown = self._shown
        shown["loss"] = f"{self._loss:.3f}"
        if record["val_loss"] is not None:
            shown["val"] = f"{record['val_loss']:.3f}"
            if "val_loss_ema" in record:
                shown["ema"] = f"{record['val_loss_ema']:.3f}"
            for name, loss in record.get("val_loss_by_source", {}).items():
                trained = f"{self._sources[name]:.3f}" if name in self._sources else "-"
                shown[f"of {name}"] = f"{trained}/{loss:.3f}"  # training and validation
            shown["ppl"] = f"{record['perplexity']:.4g}"
        shown["tokens/s"] = f"{record['tokens_per_second']:,.0f}"
        shown["mfu"] = f"{record['mfu']:.1%}"
        if record["zero_share"] is not None:
            shown["zeros"] = f"{record['zero_share']:.1%}"
            shown["flips"] = f"{record['flip_share']:.2%}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if record["val_loss"] is not None:
            facts = "  ".join(f"{name} {value}" for name, value in shown.items())
            trainer.log(f"step {record['step']:>{len(str(trainer.config.steps))}}/{trainer.config.steps}  {facts}")

    def on_event(self, trainer: Trainer, event: Record) -> None:
        if event["event"] == "rollback":
            self._look_back(trainer)
            self._bar.n = trainer.step
            self._bar.refresh()

    def on_end(self, trainer: Trainer, complete: bool) -> None:
        if self._bar is not None:
            self._bar.close()
            trainer.log = self._log


class Metrics(Callback):
    """metrics.jsonl: one record a line, written when its step is done, and the events between them."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def on_start(self, trainer: Trainer) -> None:
        kept = self._file.cut(trainer.logged_step, len(trainer.events))
        trainer.history[:] = [record for record in kept if "event" not in record]

    def on_step(self, trainer: Trainer, record: Record) -> None:
        self._file.add(record, trainer.log)

    def on_event(self, trainer: Trainer, event: Record) -> None:
        if event["event"] == "rollback":
            self._file.cut(trainer.step, len(trainer.events) - 1)
        self._file.add(event, trainer.log)

    def on_end(self, trainer: Trainer, complete: bool) -> None:
        self._file.close(trainer.log)


class Layers(Callback):
    """layers.jsonl: what the codes of each layer do, a line every `layer_stats` steps (bitnet/layer_stats.py)."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def on_start(self, trainer: Trainer) -> None:
        if self._file.path.exists():
            self._file.cut(trainer.logged_step, 0)

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if trainer.layers is not None:
            self._file.add(trainer.layers, trainer.log)

    def on_event(self, trainer: Trainer, event: Record) -> None:
        if event["event"] == "rollback":
            self.on_start(trainer)

    def on_end(self, trainer: Trainer, complete: bool) -> None:
        self._file.close(trainer.log)


class Machines(Callback):
    """machines.jsonl: a line for each machine and time the run began or went on (bitnet/machine.py)."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def on_start(self, trainer: Trainer) -> None:
        self._file.cut(sys.maxsize, 0)  # nothing but a line that a crash cut short
        self._file.add(machine_record(trainer.logged_step), trainer.log)

    def on_end(self, trainer: Trainer, complete: bool) -> None:
        self._file.close(trainer.log)


class Samples(Callback):
    """samples.txt: what the model writes after each evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, trainer: Trainer) -> None:
        self._cut(trainer.logged_step)

    def on_event(self, trainer: Trainer, event: Record) -> None:
        if event["event"] == "rollback":
            self._cut(trainer.step)

    def _cut(self, step: int) -> None:
        """Takes back the samples after a step."""
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        heads = [m for m in re.finditer(r"^=== step (\d+), ", text, re.MULTILINE) if int(m[1]) > step]
        if heads:
            self.path.write_text(text[: heads[0].start()], encoding="utf-8")

    def on_step(self, trainer: Trainer, record: Record) -> None:
        tokens = trainer.config.sample_tokens
        if record["val_loss"] is None or tokens == 0:
            return
        from bitnet.decoding import generate

        prompt = trainer.sample_prompt()
        try:
            text = generate(
                trainer.model, prompt, max_new_tokens=tokens, temperature=0.8, top_p=0.95,
                seed=record["step"], tokenizer=trainer.tokenizer, context="stop",
            )  # fmt: skip
        except BitnetError as error:  # a prompt the tokenizer cannot spell is no reason to stop training
            text = f"(no sample: {error})"
        trainer.samples.append(prompt + text)
        try:
            self._append(f"=== step {record['step']}, validation loss {record['val_loss']:.4f}\n{prompt}{text}\n\n")
        except OSError as error:
            trainer.log(f"warning: {self.path} cannot be written: {error.strerror}")

    def _append(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)


class Pictures(Callback):
    """plots/*.png: drawn at the end and with checkpoints, at most once in two minutes. Drawing takes about a second."""

    PAUSE_SECONDS = 120.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._drawn = -math.inf

    def on_start(self, trainer: Trainer) -> None:
        self._drawn = time.monotonic()

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        rescuing = trainer.logged_step < trainer.step
        if not trainer.over and not rescuing and time.monotonic() - self._drawn > self.PAUSE_SECONDS:
            self._draw(trainer)

    def on_end(self, trainer: Trainer, complete: bool) -> None:
        if complete and trainer.history:
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        from bitnet import plots

        try:
            plots.draw_all(self.folder, trainer.model, trainer.history, trainer.config.compare)
        except OSError as error:
            trainer.log(f"warning: no pictures in {self.folder}: {error.strerror}")
        self._drawn = time.monotonic()

"""The checkpoints of a trainer: what stands in them, when the old ones go, and how a run takes one up again.

bitnet/checkpoint.py writes and reads the folders; here they are filled from a trainer and read back into it.
"""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet import checkpoint
from bitnet.background import Background
from bitnet.checkpoint import Checkpoint
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.safetensors_file import parts_of
from bitnet.stability import LossWatch
from bitnet.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from bitnet.trainer import Trainer

QUICK_SECONDS = 0.3  # a checkpoint expected to take less is still written after Ctrl-C, which has a second in all
DISK_BYTES_PER_SECOND = 200e6  # written, synced and hashed, before the first checkpoint has been timed


class Keeper:
    """Saves a trainer's state in its run folder and restores it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.best: dict[str, Any] | None = None  # {"step", "val_loss"} of the best checkpoint
        self.saved = -1  # step of the newest checkpoint
        self.good = -1  # step of the newest that was due, not written on the way out: where a rollback leads
        self.writer: Background[_Written] = Background()
        self.save_seconds: float | None = None

    def save(self, due: bool = False) -> Path:
        """Writes a checkpoint of the present step into `out` and prunes old ones; CheckpointError leaves the others.

        due: one of those at fixed steps, which a rollback may go back to; with background_save it is written while
        training goes on, from a copy of everything in it, and the next one waits for it.
        """
        t = self.trainer
        if t.out is None:
            raise ConfigError("this trainer has no run folder (out) to save in")
        self.settle()
        start = time.perf_counter()
        record = t.pending or (t.history[-1] if t.history else None)
        value = record["val_loss"] if record is not None else None
        best = self.best
        if value is not None and (best is None or value < best["val_loss"]):
            best = {"step": t.step, "val_loss": value}
        step, good = t.step, t.step if due else self.good
        state = {
            "step": step,
            "tokens": t.tokens,
            "loader": {"position": t.position, "order": t.config.order},
            "rng": {"seed": t.config.seed},  # every draw is a function of the seed and a counter above
            "seconds": t.seconds,
            "val_loss": value,
            "best": best,
            "lowest": t.lowest,
            "stale": t.stale,
            "watch": asdict(t.watch),
            "events": list(t.events),
            "good": good,
            "flips": t.flips,
            "pending": t.pending,
            "config": asdict(t.config),
            "data": t.dataset.identity(),
        }
        if t.teacher is not None:
            state["teacher"] = t.teacher.fingerprint()
        out, keep, tokenizer, config = t.out, t.config.keep, t.tokenizer, t.model.config
        lora = t.model.lora
        weights, moments = t.model.parts(), t.optimizer.parts()
        average = None if t.average is None else t.average.model.parts()
        codes = t.codes.state(step)
        held = None if codes is None else parts_of(codes)
        beside = due and t.config.background_save and not t.over
        if beside:  # the next steps change them
            weights, moments = [part.copied() for part in weights], [part.copied() for part in moments]
            average = None if average is None else [part.copied() for part in average]

        old = (None if self.best is None else self.best["step"], self.good)

        def write() -> _Written:
            checkpoint.prune(out, keep, *old)  # room on the disk, where `keep` became smaller
            path = checkpoint.write(out, step, config, weights, moments, state, tokenizer, average, lora, held)
            checkpoint.prune(out, keep, None if best is None else best["step"], good)
            return _Written(path, step, good, best, time.perf_counter() - start)

        if beside:
            self.writer.begin(write)
        else:
            self._written(write())
        return checkpoint.folder_of(out, step)

    def _written(self, done: _Written) -> None:
        """A checkpoint is on the disk."""
        t = self.trainer
        self.best, self.saved, self.good, self.save_seconds = done.best, done.step, done.good, done.seconds
        for callback in t.callbacks:
            callback.on_checkpoint(t, done.path)

    def settle(self) -> None:
        """Waits for the checkpoint that is being written, if there is one; tells what went wrong with it."""
        t = self.trainer
        if self.writer.busy:
            try:
                self._written(self.writer.take())
            except CheckpointError as error:
                t.log(f"warning: {error}; training goes on")

    def resume(self) -> None:
        """Continues from the newest complete checkpoint of `out`; from the start if none was written yet.

        Options the config leaves open are those of the checkpoint. Raises CheckpointError if the checkpoint is of
        another model or other data, ConfigError if an option differs that a resumed run cannot change.
        """
        t = self.trainer
        if t.out is None:
            raise ConfigError("this trainer has no run folder (out) to resume from")
        checkpoint.clean(t.out)
        if not checkpoint.steps(t.out):
            t.log(f"{t.out} has no checkpoint yet: starting at step 0")
            return
        saved = checkpoint.newest(t.out, t.log, optimizer=True)
        checkpoint.set_aside_newer(saved, t.log)
        own = asdict(t.model.config)
        for name, value in asdict(saved.config).items():
            if value != own[name]:
                raise CheckpointError(f"{saved.path} is of another model: its {name} is {value}, not {own[name]}")
        if saved.lora != t.model.lora:
            raise CheckpointError(f"{saved.path} has other adapters than this model: {saved.lora}, not {t.model.lora}")
        if saved.state["data"] != t.dataset.identity():
            raise CheckpointError(f"{saved.path} was trained on other data than {t.dataset.folder} now holds")
        t.config = _merged(t.config, saved.state["config"], str(saved.path))
        t.forget_tapes()
        if t.teacher is not None and saved.state["teacher"] != t.teacher.fingerprint():
            raise CheckpointError(f"{saved.path} learned from another teacher than {t.config.teacher} now holds")
        self.restore(saved)
        t.seconds, t.events = saved.state["seconds"], saved.state.get("events", [])
        t.log(f"resuming {t.out} at step {t.step}")

    def restore(self, saved: Checkpoint) -> None:
        """Everything as it was, but for the time spent and the events."""
        t = self.trainer
        t.model.load_state_dict(saved.weights)
        assert saved.optimizer is not None
        t.optimizer.load_state_dict(saved.optimizer)
        if t.average is not None:
            t.average.model.load_state_dict(saved.average())
        state = saved.state
        t.step, t.tokens, t.position = state["step"], state["tokens"], state["loader"]["position"]
        t.codes.load(None if t.codes.is_fresh(t.step) else saved.held())
        self.best, t.pending = state["best"], state["pending"]
        # Checkpoints of earlier versions begin to watch where they are.
        t.watch = LossWatch(**state.get("watch", {}))
        t.lowest, t.stale = state.get("lowest"), state.get("stale", 0)
        t.flips, self.good = state.get("flips", {}), state.get("good", t.step)
        self.saved = t.step

    def good_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint that was due; those written on the way out depend on when that was."""
        t = self.trainer
        if t.out is None or self.good < 0:
            return None
        for step in reversed(checkpoint.steps(t.out)):
            try:
                if step <= self.good:
                    found = checkpoint.load(checkpoint.folder_of(t.out, step), optimizer=True)
                    if found.state.get("good", step) == step:
                        return found
            except CheckpointError as error:
                t.log(f"warning: {error}")
        return None

    def rescue(self) -> str:
        """After Ctrl-C: keep the present step if that is quick; after SIGTERM always. Returns what to tell."""
        t = self.trainer
        t.forget_tapes()  # one may have stopped half-way
        self.settle()
        if t.out is None:
            return f"stopped at step {t.step}; fit() goes on"
        expected = self.save_seconds
        if expected is None:
            expected = 3 * 4 * t.model.num_parameters() / DISK_BYTES_PER_SECOND
        wanted = expected < QUICK_SECONDS or t.interrupts.signal == signal.SIGTERM
        if t.step > max(0, self.saved) and wanted:
            try:
                with t.interrupts.held():
                    self.save()
            except CheckpointError as error:
                t.log(f"warning: {error}")
        kept = f"step {self.saved} is kept" if self.saved >= 0 else "no checkpoint yet"
        return f"stopped at step {t.step}, {kept}; go on with: {t.resume_command}"


@dataclass(frozen=True)
class _Written:
    """What a checkpoint on the disk changes."""

    path: Path
    step: int
    good: int
    best: dict[str, Any] | None
    seconds: float


def _merged(config: TrainerConfig, saved: dict[str, Any], where: str) -> TrainerConfig:
    """The options of a resumed run: those given, else those saved. Refuses what would make it another run."""
    changes: dict[str, Any] = {}
    for one in fields(TrainerConfig):
        given, before = getattr(config, one.name), saved.get(one.name, one.default)
        if given is None:
            # New minutes without new steps: as many steps as fit now.
            if not (one.name == "steps" and config.minutes not in (None, saved.get("minutes"))):
                changes[one.name] = before
        elif given != before and not one.metadata["resume"]:
            raise ConfigError(f"{one.name} is {before} in {where} and cannot become {given} on resume")
    return replace(config, **changes)

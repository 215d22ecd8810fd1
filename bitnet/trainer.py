"""Training: batches in, a trained model and a folder that can be resumed out.

A step is `grad_accum` micro-batches, one clip, one AdamW update. Its forward pass is recorded once on a tape and
replayed, so no Python runs between ops. Everything a step does is a function of (config, data, step): the learning
rate, which tokens it sees, the seed of a sample. What changes is the model, the optimizer and a few counters, which is
why a run that was killed and resumed ends in the same bytes as one that never stopped.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet import _core, checkpoint, mfu, ops, optim
from bitnet._core import Tensor
from bitnet.data import DataLoader, ShardDataset, eval_blocks
from bitnet.errors import BitnetError, CheckpointError, ConfigError
from bitnet.interrupts import Interrupted, Interrupts
from bitnet.metrics import Record
from bitnet.model import BitNetForCausalLM
from bitnet.shard import read_manifest
from bitnet.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bitnet.callbacks import Callback

DEFAULT_STEPS = 1000
QUICK_SECONDS = 0.3  # a checkpoint expected to take less is still written after Ctrl-C, which has a second in all
DISK_BYTES_PER_SECOND = 200e6  # written, synced and hashed, before the first checkpoint has been timed


def option(default: Any, help: str, resume: bool = False) -> Any:
    """A field that is also a flag: its help line, and whether a resumed run may change it."""
    return field(default=default, metadata={"help": help, "resume": resume})


@dataclass(frozen=True)
class TrainerConfig:
    """How to train. None means: derived from the other options, once, when the run begins."""

    steps: int | None = option(None, f"optimizer steps ({DEFAULT_STEPS}; with minutes: as many as fit)", True)
    minutes: float | None = option(None, "stop after this long", True)
    batch_size: int = option(8, "sequences in a micro-batch")
    grad_accum: int = option(1, "micro-batches in a step")
    seq_len: int = option(256, "tokens in a sequence")
    order: str = option("shuffled", "shuffled: every window once an epoch; random: windows start anywhere")
    seed: int = option(0, "of initial weights, batches and samples")
    lr: float = option(2e-3, "peak learning rate", True)
    min_lr: float | None = option(None, "cosine: final rate (lr / 10); two-stage: second peak (lr * 2/3)", True)
    warmup: int | None = option(None, "steps of linear warm-up (a tenth, at most 100)", True)
    schedule: str = option("cosine", "cosine, or two-stage: linear decay, second half lower and without decay", True)
    weight_decay: float = option(0.1, "AdamW's, on matrices", True)
    clip: float = option(1.0, "largest gradient norm; 0: any", True)
    precision: str = option("fast", "of the backward pass: fast (bf16), int8 (dx in integers, dW bf16) or fp32 (exact)")
    moments: str = option("f32", "AdamW's moments: f32, or bf16 rounded at random: 4 bytes a parameter less")
    activation_checkpointing: bool = option(
        False, "keep only each block's input and make the rest again: less memory, up to a third more time", True
    )
    eval_every: int | None = option(None, "steps between evaluations (a tenth of all)", True)
    eval_blocks: int = option(0, "most held-out sequences in an evaluation; 0: all", True)
    save_every: int | None = option(None, "steps between checkpoints (a tenth of all)", True)
    keep: int = option(3, "newest checkpoints kept, beside the best", True)
    sample_prompt: str | None = option(None, "what samples begin with (the first held-out words)", True)
    sample_tokens: int = option(64, "length of a sample; 0: no samples", True)
    plots: bool = option(True, "draw pictures at the end, and now and then before", True)
    compare: str | None = option(None, "another run (a twin) to draw beside this one in the pictures", True)

    def __post_init__(self) -> None:
        ones = dict.fromkeys("batch_size grad_accum seq_len keep steps eval_every save_every".split(), 1)
        zeros = dict.fromkeys("warmup eval_blocks sample_tokens weight_decay clip min_lr seed".split(), 0)
        for name, minimum in {**ones, **zeros}.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ConfigError(f"{name} must be at least {minimum}, not {value}")
        for name in ("lr", "minutes"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} must be positive, not {value}")
        words = {
            "order": ("shuffled", "random"), "schedule": ("cosine", "two-stage"), "precision": mfu.PRECISIONS,
            "moments": optim.MOMENTS,
        }  # fmt: skip
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    @property
    def tokens_per_step(self) -> int:
        return self.grad_accum * self.batch_size * self.seq_len

    def resolved(self, steps: int) -> TrainerConfig:
        """Every None that depends on the number of steps filled in."""
        tenth = max(1, steps // 10)
        derived: dict[str, Any] = {"steps": steps, "warmup": min(100, tenth), "eval_every": tenth, "save_every": tenth}
        derived["min_lr"] = self.lr * (0.1 if self.schedule == "cosine" else 2 / 3)
        return replace(self, **{name: value for name, value in derived.items() if getattr(self, name) is None})

    def rates(self, step: int) -> tuple[float, float]:
        """(learning rate, weight decay) of a step counted from 0, of a resolved config."""
        assert self.steps is not None
        assert self.min_lr is not None
        assert self.warmup is not None
        if self.schedule == "cosine":
            return optim.warmup_cosine(step, self.steps, self.lr, self.min_lr, self.warmup), self.weight_decay
        return optim.two_stage(step, self.steps, self.lr, self.min_lr, self.warmup, self.weight_decay)


class DivergenceError(BitnetError, ArithmeticError):
    """A loss or gradient that is no number; the weights are those of the last good step."""


class RecordedLoss:
    """model(tokens, targets) for one shape: recorded at the first call, replayed at the others."""

    loss: Tensor  # of the last call

    def __init__(self, model: BitNetForCausalLM, batch_size: int, seq_len: int, grad: bool, precision: str) -> None:
        self._model, self._grad, self._precision = model, grad, precision
        self._tokens, self._targets = ops.zeros((batch_size, seq_len), "i32"), ops.zeros((batch_size, seq_len), "i32")
        self._tape: _core.Tape | None = None

    def __call__(self, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
        """Mean loss in nats over targets that are not -100; backward() then has its gradient."""
        self._tokens.copy_(tokens)
        self._targets.copy_(targets)
        if self._tape is not None:
            self._tape.replay()
            return self.loss.item()
        tape = _core.Tape()
        with nullcontext() if self._grad else ops.no_grad(), ops.precision(self._precision), tape:
            self.loss = self._model(self._tokens, self._targets)
        self._tape = tape
        return self.loss.item()


class Trainer:
    """Trains a model on a pack: `Trainer(model, "runs/data", TrainerConfig(steps=500), out="runs/first").fit()`.

    dataset: a folder made by bitnet.data.pack, or its ShardDataset; its validation split is evaluated unless another is
    given. out: the run folder (checkpoints, metrics.jsonl, samples.txt, plots); None keeps everything in `history`, a
    list of records with the keys of metrics.jsonl. Losses are mean nats per token. callbacks come after the usual ones.
    Raises ConfigError if model, data and config do not fit, DataError for damaged data.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        dataset: ShardDataset | str | Path,
        config: TrainerConfig | None = None,
        *,
        validation: ShardDataset | None = None,
        tokenizer: Tokenizer | None = None,
        out: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        log: Callable[[str], None] = print,
    ) -> None:
        from bitnet.callbacks import standard_callbacks

        self.model = model
        self.config = config or TrainerConfig()
        self.dataset = dataset if isinstance(dataset, ShardDataset) else ShardDataset(dataset)
        self.log = log
        self.validation = validation or self._held_out()
        self.tokenizer = tokenizer or self.dataset.tokenizer()
        self.out = None if out is None else Path(out)
        self._check_fit()
        c = self.config
        self.loader = DataLoader(self.dataset, c.batch_size, c.seq_len, c.seed, c.order)
        self.optimizer = optim.AdamW(model, lr=c.lr, weight_decay=c.weight_decay, moments=c.moments)
        self.step = self.tokens = self.position = 0
        self.seconds = 0.0  # of training, over all resumed parts
        self.peaks: dict[str, mfu.Peak] = {}  # what this machine can do, measured once when the run is planned
        self.best: dict[str, Any] | None = None  # {"step", "val_loss"} of the best checkpoint
        self.over = False
        self.history: list[Record] = []
        self._pending: Record | None = None  # of a step that is updated but not yet evaluated and logged
        self._saved = -1  # step of the newest checkpoint
        self._save_seconds: float | None = None
        self._interrupts = Interrupts()
        self.samples: list[str] = []  # prompt and continuation after each evaluation
        self._callbacks = [*standard_callbacks(self.out, self.config.plots), *callbacks]
        rows = c.batch_size * c.grad_accum
        self._macs = mfu.training_macs(model.config, rows, c.seq_len, c.precision)  # of one step
        self._forget_tapes()

    def _held_out(self) -> ShardDataset | None:
        if "validation" not in read_manifest(self.dataset.folder)["splits"]:
            return None
        held_out = ShardDataset(self.dataset.folder, "validation")
        if len(held_out) > self.config.seq_len:
            return held_out
        self.log(f"note: {len(held_out)} held-out tokens are too few for one sequence: no validation loss")
        return None

    def _check_fit(self) -> None:
        shape = self.model.config
        for data in filter(None, (self.dataset, self.validation)):
            if data.vocab_size > shape.vocab_size:
                raise ConfigError(
                    f"{data.folder} has a vocabulary of {data.vocab_size} ids, the model only {shape.vocab_size}"
                )
        limit, seq_len = shape.max_position_embeddings, self.config.seq_len
        if seq_len > limit:
            raise ConfigError(f"seq_len {seq_len} is more than the model's max_position_embeddings {limit}")

    def _forget_tapes(self) -> None:
        c = self.config
        self.model.activation_checkpointing = c.activation_checkpointing
        self._loss = RecordedLoss(self.model, c.batch_size, c.seq_len, True, c.precision)
        self._eval_loss = RecordedLoss(self.model, c.batch_size, c.seq_len, False, c.precision)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def fit(self, resume: bool = False) -> list[Record]:
        """Trains to the end of the config and returns the history; a second call goes on after an interrupt.

        resume: first loads the newest complete checkpoint of `out`, if there is one. Raises DivergenceError, and
        Interrupted on Ctrl-C or SIGTERM; in both cases `out` can be resumed.
        """
        if resume:
            self.resume()
        elif self.out is not None and self._saved < 0 and checkpoint.steps(self.out):
            raise CheckpointError(f"{self.out} already holds a run; resume it or choose another folder")
        complete = False
        with Interrupts() as self._interrupts:
            try:
                self.plan()
                for callback in self._callbacks:
                    callback.on_start(self)
                while self._pending is not None or not self.over:
                    self._finish(self._pending or self._train_step())
                complete = True
            except KeyboardInterrupt:
                stopped = Interrupted(self._rescue())
                stopped.signal = self._interrupts.signal or signal.SIGINT
                raise stopped from None
            finally:
                for callback in self._callbacks:
                    callback.on_end(self, complete)
        return self.history

    def plan(self) -> None:
        """Fixes the number of steps and all that follows from it."""
        c = self.config
        steps = c.steps or (self._steps_that_fit(c.minutes) if c.minutes else DEFAULT_STEPS)
        self.config = c.resolved(steps)
        self.over = self._is_over()
        self.peaks = self.peaks or mfu.measure_peaks()

    def _steps_that_fit(self, minutes: float) -> int:
        """Steps in the given time, evaluations included: two micro-batches are timed, without an update."""
        c = self.config
        batch = self.loader.batch(self.position)
        self._loss(*batch)
        self._loss.loss.backward()  # the first of each pays for memory
        start = time.perf_counter()
        for _ in range(2):
            self.optimizer.zero_grad()
            self._loss(*batch)
            forward = time.perf_counter()
            self._loss.loss.backward()
        self.optimizer.clip_grad_norm(c.clip)
        step = (time.perf_counter() - start) / 2 * c.grad_accum
        evaluation = (forward - start) / 2 * self._eval_blocks() / c.batch_size
        left = 0.95 * 60 * minutes - self.seconds  # the rest: updates, checkpoints and pictures
        if c.eval_every is None:
            left -= 10 * evaluation
        else:
            step += evaluation / c.eval_every
        return self.step + max(10, int(left / step))

    def _is_over(self) -> bool:
        c = self.config
        assert c.steps is not None
        return self.step >= c.steps or (c.minutes is not None and self.seconds >= 60 * c.minutes)

    def _train_step(self) -> Record:
        """One update. Nothing that lasts is changed before both loss and gradient norm are known to be numbers."""
        c = self.config
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = 0.0
        for micro in range(c.grad_accum):
            loss += self._loss(*self.loader.batch(self.position + micro)) / c.grad_accum
            if not math.isfinite(loss):
                raise DivergenceError(self._diagnosis(self.step + 1, f"the loss is {loss}"))
            # Micro-batches have equal numbers of tokens: the mean of their means is the mean over the step's tokens.
            self._loss.loss.backward(1.0 / c.grad_accum)
        norm = self.optimizer.clip_grad_norm(c.clip)
        if not math.isfinite(norm):
            raise DivergenceError(self._diagnosis(self.step + 1, f"the gradient norm is {norm}"))
        lr, weight_decay = c.rates(self.step)
        with self._interrupts.held():
            self.optimizer.step(lr, weight_decay)
            codes = self.model.ternary_stats()  # requantizes now, not in the next forward pass: flips are this step's
            seconds = time.perf_counter() - start
            self.step += 1
            self.position += c.grad_accum
            self.tokens += c.tokens_per_step
            self.seconds += seconds
            self._pending = {
                "step": self.step,
                "tokens": self.tokens,
                "train_loss": loss,
                "val_loss": None,
                "perplexity": None,
                "tokens_per_second": c.tokens_per_step / seconds,
                "mfu": mfu.mfu(self._macs, self.peaks, seconds),
                "lr": lr,
                "grad_norm": norm,
                "zero_share": codes.zero_share if codes.count else None,
                "flip_share": codes.flip_share if codes.count else None,
                "seconds": self.seconds,
                "memory": _core.memory_stats()["high_water"],
            }
        return self._pending

    def _finish(self, record: Record) -> None:
        """All that follows an update: evaluation, log, checkpoint. Repeated whole if it was interrupted."""
        c = self.config
        assert c.eval_every is not None
        assert c.save_every is not None
        start = time.perf_counter()
        self.over = self._is_over()
        if self.validation is not None and (self.over or self.step % c.eval_every == 0):
            loss = self.evaluate()
            if not math.isfinite(loss):
                raise DivergenceError(self._diagnosis(self.step, f"the validation loss is {loss}"))
            record["val_loss"] = loss
            record["perplexity"] = math.exp(min(loss, 700.0))  # the largest that a float holds is e^709
        if self.history and self.history[-1]["step"] == self.step:
            self.history.pop()
        self.history.append(record)
        for callback in self._callbacks:
            callback.on_step(self, record)
        with self._interrupts.held():
            self._pending = None
            self.seconds += time.perf_counter() - start
        if self.out is not None and (self.over or self.step % c.save_every == 0):
            try:
                self.save()
            except CheckpointError as error:
                if self.over:
                    raise
                self.log(f"warning: {error}; training goes on")

    def evaluate(self) -> float:
        """Mean loss in nats per token over whole, non-overlapping blocks of the held-out split, in order."""
        if self.validation is None:
            raise ConfigError("there is no held-out text to evaluate on")
        c = self.config
        total, count, limit = 0.0, 0, self._eval_blocks()
        for tokens, targets in eval_blocks(self.validation, c.batch_size, c.seq_len):
            rows = min(len(tokens), limit - count)
            if rows <= 0:
                break
            if rows < c.batch_size:  # the last batch: rows that do not count fill the recorded shape
                missing = c.batch_size - rows
                tokens = np.pad(tokens[:rows], ((0, missing), (0, 0)))
                targets = np.pad(targets[:rows], ((0, missing), (0, 0)), constant_values=-100)
            total += self._eval_loss(tokens, targets) * rows
            count += rows
        return total / count

    def sample_prompt(self) -> str:
        """What samples begin with."""
        if self.config.sample_prompt is not None:
            return self.config.sample_prompt
        text = self.validation or self.dataset
        return self.tokenizer.decode(text.read(0, min(len(text), 8)).tolist())

    def _eval_blocks(self) -> int:
        whole = 0 if self.validation is None else (len(self.validation) - 1) // self.config.seq_len
        return min(whole, self.config.eval_blocks or whole)

    def _diagnosis(self, step: int, what: str) -> str:
        """One sentence on where a number was lost first, and one on how to go on."""
        where = "every weight is finite"
        for name, parameter in self.optimizer.parameters.items():
            gradient = parameter.grad
            if not np.isfinite(parameter.numpy(copy=True)).all():
                where = f"the first weight that is not finite is in {name}"
                break
            if gradient is not None and not np.isfinite(gradient.numpy(copy=True)).all():
                where = f"every weight is finite, the first gradient that is not is of {name}"
                break
        advice = f"nothing was updated: the weights are those of step {self.step}"
        if self.out is not None and self._saved >= 0:
            command = f"{self.resume_command} --lr {self.config.lr / 2:g}"
            advice = f"go on from step {self._saved} with a lower rate: {command}"
        return f"step {step}: {what}; {where}; {advice}"

    # ---- survival ---------------------------------------------------------------------------------------------------

    @property
    def resume_command(self) -> str:
        return f"python -m bitnet.train --resume {self.out}"

    @property
    def logged_step(self) -> int:
        """The last step whose record is complete."""
        return self.step - (self._pending is not None)

    def save(self) -> Path:
        """Writes a checkpoint of the present step into `out` and prunes old ones; CheckpointError leaves the others."""
        if self.out is None:
            raise ConfigError("this trainer has no run folder (out) to save in")
        start = time.perf_counter()
        record = self._pending or (self.history[-1] if self.history else None)
        value = record["val_loss"] if record is not None else None
        best = self.best
        if value is not None and (best is None or value < best["val_loss"]):
            best = {"step": self.step, "val_loss": value}
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "loader": {"position": self.position, "order": self.config.order},
            "rng": {"seed": self.config.seed},  # every draw is a function of the seed and a counter above
            "seconds": self.seconds,
            "val_loss": value,
            "best": best,
            "pending": self._pending,
            "config": asdict(self.config),
            "data": _identity(self.dataset),
        }
        path = checkpoint.save(self.out, self.step, self.model, self.optimizer.state_dict(), state, self.tokenizer)
        self.best, self._saved = best, self.step
        checkpoint.prune(self.out, self.config.keep, None if best is None else best["step"])
        self._save_seconds = time.perf_counter() - start
        for callback in self._callbacks:
            callback.on_checkpoint(self, path)
        return path

    def resume(self) -> None:
        """Continues from the newest complete checkpoint of `out`; from the start if none was written yet.

        Options the config leaves open are those of the checkpoint. Raises CheckpointError if the checkpoint is of
        another model or other data, ConfigError if an option differs that a resumed run cannot change.
        """
        if self.out is None:
            raise ConfigError("this trainer has no run folder (out) to resume from")
        checkpoint.clean(self.out)
        if not checkpoint.steps(self.out):
            self.log(f"{self.out} has no checkpoint yet: starting at step 0")
            return
        saved = checkpoint.newest(self.out, self.log, optimizer=True)
        checkpoint.set_aside_newer(saved, self.log)
        own = asdict(self.model.config)
        for name, value in asdict(saved.config).items():
            if value != own[name]:
                raise CheckpointError(f"{saved.path} is of another model: its {name} is {value}, not {own[name]}")
        if saved.state["data"] != _identity(self.dataset):
            raise CheckpointError(f"{saved.path} was trained on other data than {self.dataset.folder} now holds")
        self.config = _merged(self.config, saved.state["config"], str(saved.path))
        self._forget_tapes()
        self.model.load_state_dict(saved.weights)
        assert saved.optimizer is not None
        self.optimizer.load_state_dict(saved.optimizer)
        state = saved.state
        self.step, self.tokens, self.position = state["step"], state["tokens"], state["loader"]["position"]
        self.seconds, self.best, self._pending = state["seconds"], state["best"], state["pending"]
        self._saved = self.step
        self.log(f"resuming {self.out} at step {self.step}")

    def _rescue(self) -> str:
        """After Ctrl-C: keep the present step if that is quick. Returns what to tell."""
        self._forget_tapes()  # one may have stopped half-way
        if self.out is None:
            return f"stopped at step {self.step}; fit() goes on"
        expected = self._save_seconds
        if expected is None:
            expected = 3 * 4 * self.model.num_parameters() / DISK_BYTES_PER_SECOND
        if self.step > max(0, self._saved) and expected < QUICK_SECONDS:
            try:
                with self._interrupts.held():
                    self.save()
            except CheckpointError as error:
                self.log(f"warning: {error}")
        kept = f"step {self._saved} is kept" if self._saved >= 0 else "no checkpoint yet"
        return f"stopped at step {self.step}, {kept}; go on with: {self.resume_command}"


def _identity(dataset: ShardDataset) -> dict[str, Any]:
    return {"tokens": len(dataset), "shards": [shard.sha256 for shard in dataset.shards]}


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

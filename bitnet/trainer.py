"""Training: batches in, a trained model and a folder that can be resumed out.

A step is `grad_accum` micro-batches, one clip, one update. Its forward pass is recorded once on a tape and
replayed, so no Python runs between ops. Everything a step does is a function of (config, data, step): the learning
rate, which tokens it sees, the seed of a sample. What changes is the model, the optimizer and a few counters, which is
why a run that was killed and resumed ends in the same bytes as one that never stopped. A loss that spikes or is no
number sends the run back to its last checkpoint, past the batches that led there: see bitnet/stability.py.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet import _core, checkpoint, mfu, ops, stability
from bitnet._core import Tensor
from bitnet.attention_distill import AttentionDistillation
from bitnet.background import Background
from bitnet.checkpoint import Checkpoint
from bitnet.data import Batch, DataLoader, ShardDataset, eval_blocks, eval_rows
from bitnet.distill import Distillation, Teacher
from bitnet.ema import WeightAverage
from bitnet.errors import CheckpointError, ConfigError
from bitnet.interrupts import Interrupted, Interrupts
from bitnet.layer_stats import layer_record
from bitnet.metrics import Record
from bitnet.mixture import Mixture, MixtureRows
from bitnet.model import BitNetForCausalLM
from bitnet.nn import TernaryStats
from bitnet.ramp import blended, ternary_share
from bitnet.recorded_loss import RecordedLoss
from bitnet.rows import IGNORE
from bitnet.stability import DivergenceError, LossWatch, Trouble, describe
from bitnet.tokenizer import Tokenizer
from bitnet.trainer_config import DEFAULT_STEPS, OPTIMIZERS, TrainerConfig

if TYPE_CHECKING:
    from bitnet.callbacks import Callback

QUICK_SECONDS = 0.3  # a checkpoint expected to take less is still written after Ctrl-C, which has a second in all
DISK_BYTES_PER_SECOND = 200e6  # written, synced and hashed, before the first checkpoint has been timed


class Trainer:
    """Trains a model on a pack: `Trainer(model, "runs/data", TrainerConfig(steps=500), out="runs/first").fit()`.

    dataset: a folder made by bitnet.data.pack, its ShardDataset, or a Mixture of several; its validation split is
    evaluated unless another is given, that of a mixture source by source. out: the run folder (checkpoints,
    metrics.jsonl, layers.jsonl, samples.txt, plots); None keeps everything in `history`, a list of records with the
    keys of metrics.jsonl, and `events`, what bitnet/stability.py tells of. Losses are mean nats per token. callbacks
    come after the usual ones. Raises ConfigError if model, data and config do not fit, DataError for damaged data.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        dataset: ShardDataset | Mixture | str | Path,
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
        self.dataset = ShardDataset(dataset) if isinstance(dataset, (str, Path)) else dataset
        self.log = log
        self.held_out = self._held_out() if validation is None else {"validation": validation}
        self.tokenizer = tokenizer or self.dataset.tokenizer()
        self.out = None if out is None else Path(out)
        self._check_fit()
        c = self.config
        self.loader = DataLoader(self.dataset, c.batch_size, c.seq_len, c.seed, c.order, documents=c.documents)
        self.optimizer = OPTIMIZERS[c.optimizer](model, lr=c.lr, weight_decay=c.weight_decay, moments=c.moments)
        self.teacher: Teacher | None = None
        self.average = WeightAverage(model, c.ema) if c.ema else None
        self.step = self.tokens = self.position = 0
        self.seconds = 0.0  # of training, over all resumed parts
        self.peaks: dict[str, mfu.Peak] = {}  # what this machine can do, measured once when the run is planned
        self.watch = LossWatch()
        self.events: list[Record] = []  # of bitnet/stability.py, in their order
        self.lowest: float | None = None  # validation loss so far
        self.stale = 0  # evaluations since then
        self.flips: dict[str, int] = {}  # codes changed since the last record of layers, by layer
        self.layers: Record | None = None  # what layers.jsonl gets after this step, if it is one of those
        self.best: dict[str, Any] | None = None  # {"step", "val_loss"} of the best checkpoint
        self.over = False
        self.history: list[Record] = []
        self._pending: Record | None = None  # of a step that is updated but not yet evaluated and logged
        self._saved = -1  # step of the newest checkpoint
        self._good = -1  # step of the newest that was due, not written on the way out: where a rollback leads
        self._writer: Background[_Written] = Background()
        self._save_seconds: float | None = None
        self._interrupts = Interrupts()
        self.source_losses: dict[str, float] = {}  # validation losses of the last evaluation, by name
        self.samples: list[str] = []  # prompt and continuation after each evaluation
        self._callbacks = [*standard_callbacks(self.out, c.plots, c.tensorboard, c.wandb), *callbacks]
        rows = c.batch_size * c.grad_accum
        frozen = model.lora is not None
        self._macs = mfu.training_macs(model.config, rows, c.seq_len, c.precision, frozen)  # of one step
        self._forget_tapes()

    def _held_out(self) -> dict[str, ShardDataset]:
        """The validation splits that hold a sequence; several by the names of their sources."""
        out = {}
        for name, data in self.dataset.held_out().items():
            if eval_rows(data, self.config.seq_len):
                out[name] = data
            else:
                self.log(f"note: {len(data)} held-out tokens are too few for one sequence: no {name} loss")
        return out

    @property
    def validation(self) -> ShardDataset | None:
        """The validation split, the first of a mixture's."""
        return next(iter(self.held_out.values()), None)

    def _check_fit(self) -> None:
        shape = self.model.config
        for data in (self.dataset, *self.held_out.values()):
            if data.vocab_size > shape.vocab_size:
                raise ConfigError(
                    f"{data.folder} has a vocabulary of {data.vocab_size} ids, the model only {shape.vocab_size}"
                )
        if (self.config.ternary_from or self.config.ternary_ramp) and not self.model.num_ternary():
            raise ConfigError("ternary_from and ternary_ramp need a model with ternary layers: this is a twin")
        if self.model.lora is not None:
            for name, off in {"ema": 0.0, "ternary_from": 0, "ternary_ramp": 0, "optimizer": "adamw"}.items():
                value = getattr(self.config, name)
                if value != off:
                    raise ConfigError(f"{name} {value} is for training all weights: these are frozen beside adapters")
        if self.config.patience and self.validation is None:
            raise ConfigError(f"patience {self.config.patience} counts evaluations, but there is no held-out text")
        limit, seq_len = shape.max_position_embeddings, self.config.seq_len
        if seq_len > limit:
            raise ConfigError(f"seq_len {seq_len} is more than the model's max_position_embeddings {limit}")

    def _forget_tapes(self) -> None:
        c = self.config
        self.model.activation_checkpointing = c.activation_checkpointing
        if c.teacher is not None and self.teacher is None:
            self.teacher = Teacher(c.teacher, self.model.config, self.tokenizer, c.seq_len)
        self._share = 1.0
        self._loss = self._training_loss(1.0)
        self._eval_loss = RecordedLoss(self.model, c.batch_size, c.seq_len, False, c.precision)
        if self.average is not None:
            self._average_loss = RecordedLoss(self.average.model, c.batch_size, c.seq_len, False, c.precision)

    def _training_loss(self, share: float) -> RecordedLoss:
        """The loss of the text, and of the teacher if there is one, of layers that are ternary by this share."""
        c, taught = self.config, None
        shape = c.batch_size, c.seq_len
        if self.teacher is not None:
            models = self.model, self.teacher.model
            attention = AttentionDistillation(*models, *shape, c.distill_layer) if c.distill_attention else None
            taught = Distillation(*models, *shape, c.distill, c.temperature, attention, c.distill_attention)

        def objective(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            with blended(self.model, share):
                if taught is not None:
                    return taught(tokens, targets)
                loss = self.model(tokens, targets)
                return loss, loss

        prepare = None if taught is None else taught.prepare
        return RecordedLoss(self.model, *shape, True, c.precision, objective, prepare)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def fit(self, resume: bool = False) -> list[Record]:
        """Trains to the end of the config and returns the history; a second call goes on after an interrupt.

        resume: first loads the newest complete checkpoint of `out`, if there is one. Raises DivergenceError when no
        rollback is left, and Interrupted on Ctrl-C or SIGTERM; in both cases `out` can be resumed.
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
                    try:
                        self._finish(self._pending or self._train_step())
                    except Trouble as trouble:
                        self._recover(trouble)
                complete = True
            except KeyboardInterrupt:
                stopped = Interrupted(self._rescue())
                stopped.signal = self._interrupts.signal or signal.SIGINT
                raise stopped from None
            finally:
                self._settle()
                for callback in self._callbacks:
                    callback.on_end(self, complete)
        return self.history

    def plan(self) -> None:
        """Fixes the number of steps and all that follows from it."""
        c = self.config
        steps = c.steps or (self._steps_that_fit(c.minutes) if c.minutes else DEFAULT_STEPS)
        rows = steps * c.grad_accum * c.batch_size
        if isinstance(self.loader.rows, MixtureRows) and rows > (self.loader.rows.limit or rows):
            raise ConfigError(f"{steps} steps read {rows} rows, and the epoch caps allow {self.loader.rows.limit}")
        self.config = c.resolved(steps)
        if ternary_share(steps - 1, c.ternary_from, c.ternary_ramp) < 1.0:
            first, ramp = c.ternary_from, c.ternary_ramp
            raise ConfigError(f"ternary_from {first} and ternary_ramp {ramp} leave no ternary step of {steps}")
        self.over = self._is_over()
        self.peaks = self.peaks or mfu.measure_peaks()

    def _steps_that_fit(self, minutes: float) -> int:
        """Steps in the given time, evaluations included: two micro-batches are timed, without an update."""
        c = self.config
        blocks = sum(self._eval_blocks(data) for data in self.held_out.values())
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
        evaluation = (forward - start) / 2 * blocks / c.batch_size
        left = 0.95 * 60 * minutes - self.seconds  # the rest: updates, checkpoints and pictures
        if c.eval_every is None:
            left -= 10 * evaluation
        else:
            step += evaluation / c.eval_every
        return self.step + max(10, int(left / step))

    def _is_over(self) -> bool:
        c = self.config
        assert c.steps is not None
        late = c.minutes is not None and self.seconds >= 60 * c.minutes
        return self.step >= c.steps or late or 0 < c.patience <= self.stale

    def _train_step(self) -> Record:
        """One update. Nothing that lasts is changed before both loss and gradient norm are known to be numbers."""
        c = self.config
        start = time.perf_counter()
        ternary = ternary_share(self.step, c.ternary_from, c.ternary_ramp)
        if ternary != self._share:
            self._share, self._loss = ternary, self._training_loss(ternary)
        if self.step and ternary != ternary_share(self.step - 1, c.ternary_from, c.ternary_ramp):
            self.watch = LossWatch()  # a loss of other layers: what came before is no measure of it
        self.optimizer.zero_grad()
        loss = 0.0
        batches = [self.loader.batch(self.position + micro) for micro in range(c.grad_accum)]
        counts = [_targeted(targets) for _, targets in batches]
        for batch, count in zip(batches, counts, strict=True):
            share = count / sum(counts)  # the mean of means, so weighted, is the mean over the step's targets
            loss += self._loss(*batch) * share
            if not math.isfinite(loss):
                raise Trouble(self.step + 1, f"the loss is {loss}", self._first_bad([batch], ternary))
            self._loss.loss.backward(share)
        norm = self.optimizer.clip_grad_norm(c.clip)
        if not math.isfinite(norm):
            raise Trouble(self.step + 1, f"the gradient norm is {norm}", self._first_bad())
        spike = self._spike(loss)
        lr, weight_decay = c.rates(self.step)
        lr *= stability.rate_factor(self.events, self.step, c.rollback_lr)
        with self._interrupts.held():
            self.optimizer.step(lr, weight_decay)
            if self.average is not None:
                self.average.update(self.step)
            # Requantizes now, not in the next forward pass: flips are this step's.
            layers = [(name, layer.ternary_stats()) for name, layer in self.model.bitlinears()]
            codes = TernaryStats.total(stats for _, stats in layers)
            if c.layer_stats:
                self.flips = {name: self.flips.get(name, 0) + stats.flipped for name, stats in layers}
            self.watch = self.watch.after(loss)
            seconds = time.perf_counter() - start
            self.step += 1
            self.position += c.grad_accum
            self.tokens += sum(counts)
            self.seconds += seconds
            self._pending = {
                "step": self.step,
                "tokens": self.tokens,
                "train_loss": loss,
                "val_loss": None,
                "perplexity": None,
                "perplexity_ema": self.watch.perplexity,
                "tokens_per_second": sum(counts) / seconds,
                "mfu": mfu.mfu(self._macs, self.peaks, seconds),
                "lr": lr,
                "grad_norm": norm,
                "zero_share": codes.zero_share if codes.count else None,
                "flip_share": codes.flip_share if codes.count else None,
                "seconds": self.seconds,
                "memory": _core.memory_stats()["high_water"],
            }
            if self.average is not None:
                self._pending["val_loss_ema"] = None
            if c.ternary_from or c.ternary_ramp:
                self._pending["ternary_share"] = ternary
            if spike is not None:
                self._report({"event": "spike", "step": self.step, "reason": spike})
        return self._pending

    def _finish(self, record: Record) -> None:
        """All that follows an update: evaluation, log, checkpoint. Repeated whole if it was interrupted."""
        c = self.config
        assert c.eval_every is not None
        assert c.save_every is not None
        start = time.perf_counter()
        self.over = self._is_over()
        lowest, stale, stop = self.lowest, self.stale, False
        if self.held_out and (self.over or self.step % c.eval_every == 0):
            loss = self.evaluate()
            if not math.isfinite(loss):
                held_out = self.held_out.values()
                blocks = (batch for data in held_out for batch in eval_blocks(data, c.batch_size, c.seq_len))
                raise Trouble(self.step, f"the validation loss is {loss}", self._first_bad(blocks))
            record["val_loss"] = loss
            if len(self.held_out) > 1:
                record["val_loss_by_source"] = dict(self.source_losses)
            if self.average is not None:
                record["val_loss_ema"] = self.evaluate(self._average_loss)
            record["perplexity"] = math.exp(min(loss, 700.0))  # the largest that a float holds is e^709
            ramped = self.step >= c.ternary_from + c.ternary_ramp  # before, the loss says little: patience waits
            lowest, stale = (loss, 0) if lowest is None or loss < lowest else (lowest, stale + ramped)
            stop = 0 < c.patience <= stale and not self.over
            self.over = self.over or stop
        due = c.layer_stats and (self.over or self.step % c.layer_stats == 0)
        self.layers = layer_record(self.step, self.model, self.flips) if due else None
        if self.history and self.history[-1]["step"] == self.step:
            self.history.pop()
        self.history.append(record)
        for callback in self._callbacks:
            callback.on_step(self, record)
        with self._interrupts.held():
            self._pending = None
            self.lowest, self.stale = lowest, stale
            if self.layers is not None:
                self.flips = {}
            self.seconds += time.perf_counter() - start
            if stop:
                reason = f"step {self.step}: {stale} evaluations without a validation loss below {lowest}"
                self._report({"event": "early_stop", "step": self.step, "reason": reason})
        if self._writer.done:
            self._settle()
        if self.out is not None and (self.over or self.step % c.save_every == 0):
            if stability.bad_weight(self.model) is not None:
                raise Trouble(self.step, "no checkpoint of these weights", self._first_bad())
            try:
                self.save(due=True)
            except CheckpointError as error:
                if self.over:
                    raise
                self.log(f"warning: {error}; training goes on")

    def evaluate(self, recorded: RecordedLoss | None = None) -> float:
        """Mean loss in nats per target over the rows of the held-out split, in order: see data.eval_blocks.

        Of a mixture: the mean of its sources' losses, each weighted like the source; `source_losses` holds them.
        recorded: the loss of another model than the one in training, which leaves `source_losses` alone.
        """
        if not self.held_out:
            raise ConfigError("there is no held-out text to evaluate on")
        losses = {name: self._evaluate(data, recorded or self._eval_loss) for name, data in self.held_out.items()}
        if recorded is None:
            self.source_losses = losses
        if not isinstance(self.dataset, Mixture) or len(losses) == 1:
            return next(iter(losses.values()))
        shares = zip(self.dataset.sources, self.dataset.weights, strict=True)
        weights = {source.name: weight for source, weight in shares if source.name in losses}
        total = math.fsum(losses[name] * weight for name, weight in weights.items())
        return total / math.fsum(weights.values())

    def _evaluate(self, data: ShardDataset, loss: RecordedLoss) -> float:
        c = self.config
        total, count, done, limit = 0.0, 0, 0, self._eval_blocks(data)
        for tokens, targets in eval_blocks(data, c.batch_size, c.seq_len):
            rows = min(len(tokens), limit - done)
            if rows <= 0:
                break
            if rows < c.batch_size:  # the last batch: rows that do not count fill the recorded shape
                missing = c.batch_size - rows
                tokens = np.pad(tokens[:rows], ((0, missing), (0, 0)))
                targets = np.pad(targets[:rows], ((0, missing), (0, 0)), constant_values=IGNORE)
            targeted = _targeted(targets)
            total += loss(tokens, targets) * targeted
            count += targeted
            done += rows
        return total / count

    def sample_prompt(self) -> str:
        """What samples begin with."""
        if self.config.sample_prompt is not None:
            return self.config.sample_prompt
        text = self.validation or self.dataset
        return self.tokenizer.decode(text.read(0, min(len(text), 8)).tolist())

    def _eval_blocks(self, data: ShardDataset) -> int:
        whole = eval_rows(data, self.config.seq_len)
        return min(whole, self.config.eval_blocks or whole)

    # ---- trouble ----------------------------------------------------------------------------------------------------

    def _first_bad(self, batches: Iterable[Batch] = (), share: float = 1.0) -> str:
        with ops.precision(self.config.precision), blended(self.model, share):
            return stability.first_bad(self.model, batches)

    def _spike(self, loss: float) -> str | None:
        """Trouble if a loss is a spike and a rollback is possible; what to report if it is not; None for no spike."""
        c = self.config
        assert c.warmup is not None
        limit = self.watch.limit(c.spike)
        if self.step < c.warmup or loss <= limit:
            return None
        trouble = Trouble(self.step + 1, f"the loss {loss:.4g} is a spike: {limit:.4g} would not be")
        self._settle()
        if self._good >= 0 and stability.rollbacks(self.events) < c.rollbacks:
            raise trouble
        return str(trouble)

    def _report(self, event: Record) -> None:
        """Notes an event in the state, the log and metrics.jsonl."""
        self.events.append(event)
        self.log(describe(event))
        for callback in self._callbacks:
            callback.on_event(self, event)

    def _recover(self, trouble: Trouble) -> None:
        """Back to the last checkpoint and past the batches since then; without one, past the batch of this step.

        Raises DivergenceError if neither can be, or all rollbacks are used up.
        """
        c = self.config
        assert c.warmup is not None
        start = time.perf_counter()
        with self._interrupts.held():
            self._settle()
            lost = trouble.step > self.step  # before the update: nothing has changed yet
            end = self.position + (c.grad_accum if lost else 0)
            if stability.rollbacks(self.events) >= c.rollbacks:
                used = f"all {c.rollbacks} rollbacks are used up; " if c.rollbacks else ""
                raise DivergenceError(f"{trouble}; {used}{self._advice()}") from None
            good = self._good_checkpoint()
            if good is None and (not lost or stability.bad_weight(self.model) is not None):
                raise DivergenceError(f"{trouble}; there is no checkpoint to roll back to; {self._advice()}") from None
            if good is not None:
                assert self.out is not None
                checkpoint.remove_newer(self.out, good.state["step"])
                self._restore(good)
                # Of the way that is lost, the rollbacks stay and nothing else.
                past = [e for e in self.events if e["event"] in stability.COUNTED or e["step"] <= self.step]
                self.events[:] = past
                self.history[:] = [record for record in self.history if record["step"] <= self.step]
            event = {
                "event": "skip" if good is None else "rollback",
                "step": trouble.step,
                "to": self.step,
                "skipped": [self.position, end],
                "until": self.step + max(1, c.warmup, trouble.step - self.step),
                "reason": str(trouble),
            }
            self.position, self._pending = end, None
            self._report(event)
            self.over = False  # where time is up, one more step ends the run as usual: evaluated and saved
            self.seconds += time.perf_counter() - start

    def _good_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint that was due; those written on the way out depend on when that was."""
        if self.out is None or self._good < 0:
            return None
        for step in reversed(checkpoint.steps(self.out)):
            try:
                if step <= self._good:
                    found = checkpoint.load(checkpoint.folder_of(self.out, step), optimizer=True)
                    if found.state.get("good", step) == step:
                        return found
            except CheckpointError as error:
                self.log(f"warning: {error}")
        return None

    def _advice(self) -> str:
        """How to go on after trouble that no rollback ended."""
        if self.out is None or self._saved < 0:
            return f"the weights are those of step {self.step}"
        command = f"{self.resume_command} --lr {self.config.lr / 2:g}"
        return f"go on from step {self._saved} with a lower rate: {command}"

    # ---- survival ---------------------------------------------------------------------------------------------------

    @property
    def resume_command(self) -> str:
        return f"python -m bitnet.train --resume {self.out}"

    @property
    def logged_step(self) -> int:
        """The last step whose record is complete."""
        return self.step - (self._pending is not None)

    def save(self, due: bool = False) -> Path:
        """Writes a checkpoint of the present step into `out` and prunes old ones; CheckpointError leaves the others.

        due: one of those at fixed steps, which a rollback may go back to; with background_save it is written while
        training goes on, from a copy of everything in it, and the next one waits for it.
        """
        if self.out is None:
            raise ConfigError("this trainer has no run folder (out) to save in")
        self._settle()
        start = time.perf_counter()
        record = self._pending or (self.history[-1] if self.history else None)
        value = record["val_loss"] if record is not None else None
        best = self.best
        if value is not None and (best is None or value < best["val_loss"]):
            best = {"step": self.step, "val_loss": value}
        step, good = self.step, self.step if due else self._good
        state = {
            "step": step,
            "tokens": self.tokens,
            "loader": {"position": self.position, "order": self.config.order},
            "rng": {"seed": self.config.seed},  # every draw is a function of the seed and a counter above
            "seconds": self.seconds,
            "val_loss": value,
            "best": best,
            "lowest": self.lowest,
            "stale": self.stale,
            "watch": asdict(self.watch),
            "events": list(self.events),
            "good": good,
            "flips": self.flips,
            "pending": self._pending,
            "config": asdict(self.config),
            "data": self.dataset.identity(),
        }
        if self.teacher is not None:
            state["teacher"] = self.teacher.fingerprint()
        out, keep, tokenizer, config = self.out, self.config.keep, self.tokenizer, self.model.config
        lora = self.model.lora
        weights, moments = self.model.state_dict(), self.optimizer.state_dict()
        average = None if self.average is None else self.average.model.state_dict()

        old = (None if self.best is None else self.best["step"], self._good)

        def write() -> _Written:
            checkpoint.prune(out, keep, *old)  # room on the disk, where `keep` became smaller
            path = checkpoint.write(out, step, config, weights, moments, state, tokenizer, average, lora)
            checkpoint.prune(out, keep, None if best is None else best["step"], good)
            return _Written(path, step, good, best, time.perf_counter() - start)

        if due and self.config.background_save and not self.over:
            self._writer.begin(write)
        else:
            self._written(write())
        return checkpoint.folder_of(out, step)

    def _written(self, done: _Written) -> None:
        """A checkpoint is on the disk."""
        self.best, self._saved, self._good, self._save_seconds = done.best, done.step, done.good, done.seconds
        for callback in self._callbacks:
            callback.on_checkpoint(self, done.path)

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, if there is one; tells what went wrong with it."""
        if self._writer.busy:
            try:
                self._written(self._writer.take())
            except CheckpointError as error:
                self.log(f"warning: {error}; training goes on")

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
        if saved.lora != self.model.lora:
            raise CheckpointError(
                f"{saved.path} has other adapters than this model: {saved.lora}, not {self.model.lora}"
            )
        if saved.state["data"] != self.dataset.identity():
            raise CheckpointError(f"{saved.path} was trained on other data than {self.dataset.folder} now holds")
        self.config = _merged(self.config, saved.state["config"], str(saved.path))
        self._forget_tapes()
        if self.teacher is not None and saved.state["teacher"] != self.teacher.fingerprint():
            raise CheckpointError(f"{saved.path} learned from another teacher than {self.config.teacher} now holds")
        self._restore(saved)
        self.seconds, self.events = saved.state["seconds"], saved.state.get("events", [])
        self.log(f"resuming {self.out} at step {self.step}")

    def _restore(self, saved: Checkpoint) -> None:
        """Everything as it was, but for the time spent and the events."""
        self.model.load_state_dict(saved.weights)
        assert saved.optimizer is not None
        self.optimizer.load_state_dict(saved.optimizer)
        if self.average is not None:
            self.average.model.load_state_dict(saved.average())
        state = saved.state
        self.step, self.tokens, self.position = state["step"], state["tokens"], state["loader"]["position"]
        self.best, self._pending = state["best"], state["pending"]
        # Checkpoints of earlier versions begin to watch where they are.
        self.watch = LossWatch(**state.get("watch", {}))
        self.lowest, self.stale = state.get("lowest"), state.get("stale", 0)
        self.flips, self._good = state.get("flips", {}), state.get("good", self.step)
        self._saved = self.step

    def _rescue(self) -> str:
        """After Ctrl-C: keep the present step if that is quick; after SIGTERM always. Returns what to tell."""
        self._forget_tapes()  # one may have stopped half-way
        self._settle()
        if self.out is None:
            return f"stopped at step {self.step}; fit() goes on"
        expected = self._save_seconds
        if expected is None:
            expected = 3 * 4 * self.model.num_parameters() / DISK_BYTES_PER_SECOND
        wanted = expected < QUICK_SECONDS or self._interrupts.signal == signal.SIGTERM
        if self.step > max(0, self._saved) and wanted:
            try:
                with self._interrupts.held():
                    self.save()
            except CheckpointError as error:
                self.log(f"warning: {error}")
        kept = f"step {self._saved} is kept" if self._saved >= 0 else "no checkpoint yet"
        return f"stopped at step {self.step}, {kept}; go on with: {self.resume_command}"


@dataclass(frozen=True)
class _Written:
    """What a checkpoint on the disk changes."""

    path: Path
    step: int
    good: int
    best: dict[str, Any] | None
    seconds: float


def _targeted(targets: np.ndarray[Any, Any]) -> int:
    """How many targets a loss is the mean over."""
    return int(np.count_nonzero(targets != IGNORE))


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

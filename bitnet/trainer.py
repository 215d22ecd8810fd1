"""Training: batches in, a trained model and a folder that can be resumed out.

A step is `grad_accum` micro-batches, one clip, one update. Its forward pass is recorded once on a tape and
replayed, so no Python runs between ops. Everything a step does is a function of (config, data, step): the learning
rate, which tokens it sees, the seed of a sample. What changes is the model, the optimizer and a few counters, which is
why a run that was killed and resumed ends in the same bytes as one that never stopped. A loss that spikes or is no
number sends the run back to its last checkpoint, past the batches that led there: see bitnet/stability.py and
recovery.py. Checkpoints are written and read in bitnet/keeper.py.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet import _core, checkpoint, mfu, ops, recovery, stability
from bitnet.config import BitNetConfig
from bitnet.data import Batch, DataLoader, ShardDataset, eval_blocks, eval_rows
from bitnet.distill import Teacher
from bitnet.ema import WeightAverage
from bitnet.errors import CheckpointError, ConfigError
from bitnet.interrupts import Interrupted, Interrupts
from bitnet.keeper import Keeper
from bitnet.layer_stats import layer_record
from bitnet.metrics import Record
from bitnet.mixture import Mixture, MixtureRows
from bitnet.model import BitNetForCausalLM
from bitnet.nn import TernaryStats
from bitnet.objective import training_loss
from bitnet.ramp import ternary_share
from bitnet.recorded_loss import RecordedLoss
from bitnet.requantize import HeldCodes
from bitnet.rows import IGNORE
from bitnet.source_loss import SourceLoss
from bitnet.stability import LossWatch, Trouble, describe
from bitnet.tokenizer import Tokenizer
from bitnet.trainer_config import DEFAULT_STEPS, OPTIMIZERS, TrainerConfig

if TYPE_CHECKING:
    from bitnet.callbacks import Callback


def check_readable(model: BitNetConfig, seq_len: int, *texts: ShardDataset | Mixture) -> None:
    """Raises ConfigError if a model cannot read texts in sequences of so many tokens."""
    for data in texts:
        if data.vocab_size > model.vocab_size:
            raise ConfigError(
                f"{data.folder} has a vocabulary of {data.vocab_size} ids, the model only {model.vocab_size}"
            )
    limit = model.max_position_embeddings
    if seq_len > limit:
        raise ConfigError(f"seq_len {seq_len} is more than the model's max_position_embeddings {limit}")


def check_levers(model: BitNetForCausalLM, config: TrainerConfig) -> None:
    """Raises ConfigError for what a config asks of layers that the model does not have, or that are frozen."""
    if (config.ternary_from or config.ternary_ramp) and not model.num_ternary():
        raise ConfigError("ternary_from and ternary_ramp need a model with ternary layers: this is a twin")
    if config.requantize_every > 1 and not model.num_ternary():
        raise ConfigError("requantize_every needs a model with ternary layers: this is a twin")
    if model.lora is not None:
        levers = {"ema": 0.0, "ternary_from": 0, "ternary_ramp": 0, "requantize_every": 1, "optimizer": "adamw"}
        for name, off in levers.items():
            value = getattr(config, name)
            if value != off:
                raise ConfigError(f"{name} {value} is for training all weights: these are frozen beside adapters")


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
        self.codes = HeldCodes(model, c.requantize_every)
        self.step = self.tokens = self.position = 0
        self.seconds = 0.0  # of training, over all resumed parts
        self.peaks: dict[str, mfu.Peak] = {}  # what this machine can do, measured once when the run is planned
        self.watch = LossWatch()
        self.events: list[Record] = []  # of bitnet/stability.py, in their order
        self.lowest: float | None = None  # validation loss so far
        self.stale = 0  # evaluations since then
        self.flips: dict[str, int] = {}  # codes changed since the last record of layers, by layer
        self.layers: Record | None = None  # what layers.jsonl gets after this step, if it is one of those
        self.over = False
        self.history: list[Record] = []
        self.pending: Record | None = None  # of a step that is updated but not yet evaluated and logged
        self.keeper = Keeper(self)
        self.interrupts = Interrupts()
        self.source_losses: dict[str, float] = {}  # validation losses of the last evaluation, by name
        self.samples: list[str] = []  # prompt and continuation after each evaluation
        self.callbacks = [*standard_callbacks(self.out, c.plots, c.tensorboard, c.wandb), *callbacks]
        rows = c.batch_size * c.grad_accum
        frozen = model.lora is not None
        self._macs = mfu.training_macs(model.config, rows, c.seq_len, c.precision, frozen)  # of one step
        self.forget_tapes()

    def _held_out(self) -> dict[str, ShardDataset]:
        """The validation splits that hold a sequence; several by the names of their sources."""
        out = {}
        for name, data in self.dataset.held_out().items():
            if eval_rows(data, self.config.seq_len, self.config.documents):
                out[name] = data
            else:
                self.log(f"note: {len(data)} held-out tokens are too few for one sequence: no {name} loss")
        return out

    @property
    def validation(self) -> ShardDataset | None:
        """The validation split, the first of a mixture's."""
        return next(iter(self.held_out.values()), None)

    def _check_fit(self) -> None:
        check_readable(self.model.config, self.config.seq_len, self.dataset, *self.held_out.values())
        check_levers(self.model, self.config)
        if self.config.patience and self.validation is None:
            raise ConfigError(f"patience {self.config.patience} counts evaluations, but there is no held-out text")

    def forget_tapes(self) -> None:
        c = self.config
        self.model.activation_checkpointing = c.activation_checkpointing
        if c.teacher is not None and self.teacher is None:
            self.teacher = Teacher(c.teacher, self.model.config, self.tokenizer, c.seq_len)
        self._share = 1.0
        self._loss = self._training_loss(1.0)

    def _training_loss(self, share: float) -> RecordedLoss:
        """Of layers that are ternary by this share."""
        return training_loss(self.model, None if self.teacher is None else self.teacher.model, self.config, share)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def fit(self, resume: bool = False) -> list[Record]:
        """Trains to the end of the config and returns the history; a second call goes on after an interrupt.

        resume: first loads the newest complete checkpoint of `out`, if there is one. Raises DivergenceError when no
        rollback is left, and Interrupted on Ctrl-C or SIGTERM; in both cases `out` can be resumed.
        """
        if resume:
            self.resume()
        elif self.out is not None and self.keeper.saved < 0 and checkpoint.steps(self.out):
            raise CheckpointError(f"{self.out} already holds a run; resume it or choose another folder")
        complete = False
        with Interrupts() as self.interrupts:
            try:
                self.plan()
                for callback in self.callbacks:
                    callback.on_start(self)
                while self.pending is not None or not self.over:
                    try:
                        if self.pending is None:
                            with self.codes.in_force(self.step):
                                self.pending = self._train_step()
                        self._finish(self.pending)
                    except Trouble as trouble:
                        recovery.recover(self, trouble)
                complete = True
            except KeyboardInterrupt:
                stopped = Interrupted(self.keeper.rescue())
                stopped.signal = self.interrupts.signal or signal.SIGINT
                raise stopped from None
            finally:
                self.keeper.settle()
                for callback in self.callbacks:
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
        return self.step >= c.steps or late or 0 < c.patience <= self.stale or self.out_of_rows() is not None

    def out_of_rows(self) -> str | None:
        """A clause, where the epoch caps of a mixture leave no rows for another step; else None.

        A plan fits into the caps, but batches that a rollback skipped are gone: the run ends that much earlier.
        """
        rows = self.loader.rows
        if not isinstance(rows, MixtureRows) or rows.limit is None:
            return None
        first, needed = self.position * self.config.batch_size, self.config.grad_accum * self.config.batch_size
        if first + needed <= rows.limit:
            return None
        left = max(0, rows.limit - first)
        return f"the epoch caps leave {left} of {rows.limit} rows, and a step reads {needed}"

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
        by_source = self._source_loss()
        for micro, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            share = count / sum(counts)  # the mean of means, so weighted, is the mean over the step's targets
            loss += self._loss(*batch) * share
            if not math.isfinite(loss):
                raise Trouble(self.step + 1, f"the loss is {loss}", recovery.first_bad(self, [batch], ternary))
            if by_source is not None:
                by_source.add(self.loader.numbers(self.position + micro), self._loss.losses(), batch[1])
            self._loss.loss.backward(share)
        norm = self.optimizer.clip_grad_norm(c.clip)
        if not math.isfinite(norm):
            raise Trouble(self.step + 1, f"the gradient norm is {norm}", recovery.first_bad(self))
        spike = recovery.spike(self, loss)
        lr, weight_decay = c.rates(self.step)
        lr *= stability.rate_factor(self.events, self.step, c.rollback_lr)
        with self.interrupts.held():
            self.optimizer.step(lr, weight_decay)
            if self.average is not None:
                self.average.update(self.step)
            self.codes.after(self.step)
            # Requantizes now, not in the next forward pass: flips are this step's, none while codes are held.
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
            self.pending = {
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
            if by_source is not None:
                self.pending["train_loss_by_source"] = by_source.means()
            if self.average is not None:
                self.pending["val_loss_ema"] = None
            if c.ternary_from or c.ternary_ramp:
                self.pending["ternary_share"] = ternary
            if spike is not None:
                self.report({"event": "spike", "step": self.step, "reason": spike})
        return self.pending

    def _source_loss(self) -> SourceLoss | None:
        """Of a mixture: what takes the loss of a step apart."""
        if not isinstance(self.dataset, Mixture) or len(self.dataset.sources) == 1:
            return None
        assert isinstance(self.loader.rows, MixtureRows)
        return SourceLoss(self.loader.rows, [source.name for source in self.dataset.sources])

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
                blocks = (batch for data in held_out for batch in self._blocks(data))
                raise Trouble(self.step, f"the validation loss is {loss}", recovery.first_bad(self, blocks))
            record["val_loss"] = loss
            if len(self.held_out) > 1:
                record["val_loss_by_source"] = dict(self.source_losses)
            if self.average is not None:
                record["val_loss_ema"] = self.evaluate(self.average.model)
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
        for callback in self.callbacks:
            callback.on_step(self, record)
        with self.interrupts.held():
            self.pending = None
            self.lowest, self.stale = lowest, stale
            if self.layers is not None:
                self.flips = {}
            self.seconds += time.perf_counter() - start
            assert c.steps is not None
            short = self.out_of_rows()
            if stop:
                reason = f"step {self.step}: {stale} evaluations without a validation loss below {lowest}"
                self.report({"event": "early_stop", "step": self.step, "reason": reason})
            elif short is not None and self.step < c.steps:
                self.report({"event": "early_stop", "step": self.step, "reason": f"step {self.step}: {short}"})
        if self.keeper.writer.done:
            self.keeper.settle()
        if self.out is not None and (self.over or self.step % c.save_every == 0):
            if stability.bad_weight(self.model) is not None:
                raise Trouble(self.step, "no checkpoint of these weights", recovery.first_bad(self))
            try:
                self.save(due=True)
            except CheckpointError as error:
                if self.over:
                    raise
                self.log(f"warning: {error}; training goes on")

    def evaluate(self, model: BitNetForCausalLM | None = None) -> float:
        """Mean loss in nats per target over the rows of the held-out split, in order: see data.eval_blocks.

        Of a mixture: the mean of its sources' losses, each weighted like the source; `source_losses` holds them.
        model: another than the one in training, which leaves `source_losses` alone.
        """
        if not self.held_out:
            raise ConfigError("there is no held-out text to evaluate on")
        losses = {name: self._evaluate(data, model or self.model) for name, data in self.held_out.items()}
        if model is None:
            self.source_losses = losses
        if not isinstance(self.dataset, Mixture) or len(losses) == 1:
            return next(iter(losses.values()))
        shares = zip(self.dataset.sources, self.dataset.weights, strict=True)
        weights = {source.name: weight for source, weight in shares if source.name in losses}
        total = math.fsum(losses[name] * weight for name, weight in weights.items())
        return total / math.fsum(weights.values())

    def _evaluate(self, data: ShardDataset, model: BitNetForCausalLM) -> float:
        total, count, left = 0.0, 0, self._eval_blocks(data)
        for tokens, targets in self._blocks(data):
            tokens, targets = tokens[:left], targets[:left]
            if not len(tokens):
                break
            targeted = _targeted(targets)
            with ops.no_grad():
                total += model(tokens, targets).item() * targeted
            count += targeted
            left -= len(tokens)
        return total / count

    def sample_prompt(self) -> str:
        """What samples begin with."""
        if self.config.sample_prompt is not None:
            return self.config.sample_prompt
        text = self.validation or self.dataset
        return self.tokenizer.decode(text.read(0, min(len(text), 8)).tolist())

    def _blocks(self, data: ShardDataset) -> Iterator[Batch]:
        """The rows of an evaluation: like those of training, joined or of one document each."""
        return eval_blocks(data, self.config.batch_size, self.config.seq_len, self.config.documents)

    def _eval_blocks(self, data: ShardDataset) -> int:
        whole = eval_rows(data, self.config.seq_len, self.config.documents)
        return min(whole, self.config.eval_blocks or whole)

    def report(self, event: Record) -> None:
        """Notes an event in the state, the log and metrics.jsonl."""
        self.events.append(event)
        self.log(describe(event))
        for callback in self.callbacks:
            callback.on_event(self, event)

    # ---- survival ---------------------------------------------------------------------------------------------------

    @property
    def resume_command(self) -> str:
        return f"python -m bitnet.train --resume {self.out}"

    @property
    def logged_step(self) -> int:
        """The last step whose record is complete."""
        return self.step - (self.pending is not None)

    @property
    def best(self) -> dict[str, Any] | None:
        """{"step", "val_loss"} of the best checkpoint."""
        return self.keeper.best

    def save(self, due: bool = False) -> Path:
        """Writes a checkpoint of the present step into `out`: see Keeper.save."""
        return self.keeper.save(due)

    def resume(self) -> None:
        """Continues from the newest complete checkpoint of `out`: see Keeper.resume."""
        self.keeper.resume()


def _targeted(targets: np.ndarray[Any, Any]) -> int:
    """How many targets a loss is the mean over."""
    return int(np.count_nonzero(targets != IGNORE))

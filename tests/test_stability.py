"""Runs that go wrong and live: spikes and lost numbers, rolled back past what caused them, the same after any kill."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet import BitNetConfig, BitNetForCausalLM, checkpoint, ops, stability
from bitnet.callbacks import Callback
from bitnet.data import ShardDataset, pack
from bitnet.interrupts import Interrupted
from bitnet.metrics import read_events, read_lines, read_metrics
from bitnet.stability import DivergenceError, LossWatch
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

SHAPE = BitNetConfig(257, 32, 48, 2, 2, max_position_embeddings=64)
CONFIG = TrainerConfig(
    steps=84, batch_size=4, seq_len=16, lr=5e-3, warmup=10, eval_every=9, save_every=20, eval_blocks=8,
    sample_tokens=4, plots=False, layer_stats=7,
)  # fmt: skip
TIMINGS = ("seconds", "tokens_per_second", "mfu", "memory")
RARE = 200  # a byte that no text here holds


class Poisoned(ShardDataset):
    """The split, but what is read as batch number `bad` (from 0) is drawn at random, or the rare byte."""

    windows: frozenset[int] = frozenset()

    def __init__(self, folder: Path, rare: bool = False) -> None:
        super().__init__(folder)
        self.rare = rare

    def read(self, begin: int, end: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        tokens = super().read(begin, end)
        if begin in self.windows:
            if self.rare:
                tokens[3] = RARE
            else:
                tokens = np.random.default_rng(begin).integers(0, 256, len(tokens), np.int32)
        return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    (root / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(1200)))
    return pack(root / "text.txt", root / "pack", "bytes", seq_len=16, log=lambda line: None)


def trainer(
    folder: Path, out: Path | None, config: TrainerConfig = CONFIG, bad: int = -1, rare: bool = False,
    shape: BitNetConfig = SHAPE, **options: Any,
) -> Trainer:  # fmt: skip
    """One whose batch number `bad` is poisoned; its log is `run.lines`."""
    data = Poisoned(folder, rare)
    lines: list[str] = []
    run = Trainer(BitNetForCausalLM(shape, 0), data, config, out=out, log=lines.append, **options)
    vars(run)["lines"] = lines
    if bad >= 0:
        data.windows = frozenset(run.loader.starts(bad))
    return run


def weights(model: BitNetForCausalLM) -> bytes:
    return b"".join(array.tobytes() for array in model.state_dict().values())


class Set(Callback):
    """Sets one number of a parameter when a step is done, once."""

    def __init__(self, step: int, name: str, index: tuple[int, ...], value: float) -> None:
        self.step, self.name, self.index, self.value = step, name, index, value

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            self.step = -1
            values = trainer.optimizer.parameters[self.name].numpy(copy=True)
            values[self.index] = self.value
            trainer.optimizer.parameters[self.name].copy_(values)


class Stop(Callback):
    """Ends the process's part of a run at a step: by a signal, or as SIGKILL would, with nothing more written."""

    class Killed(BaseException):
        pass

    def __init__(self, moment: int, number: int | None) -> None:
        self.moment, self.number, self.seen = moment, number, 0

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.seen += 1
        if self.seen == self.moment:
            if self.number is None:
                raise self.Killed
            os.kill(os.getpid(), self.number)


# ---- what a spike is ------------------------------------------------------------------------------------------------


def watched(losses: list[float]) -> LossWatch:
    watch = LossWatch()
    for loss in losses:
        watch = watch.after(loss)
    return watch


def test_a_spike_is_far_above_the_average_of_late() -> None:
    losses = [2.0 + 0.1 * (-1) ** n for n in range(200)]
    watch = watched(losses)
    assert watch.mean == pytest.approx(2.0, abs=0.01)
    assert watch.deviation == pytest.approx(0.2, rel=0.01)
    assert watch.limit(10.0) == pytest.approx(4.0, abs=0.05)
    assert watched([9.0 - 0.01 * n for n in range(200)]).deviation < 0.0101  # a fall is no noise
    assert watch.limit(0) == math.inf
    assert watched(losses[:49]).limit(10.0) == math.inf  # too few to tell
    assert watched([2.0] * 99).limit(10.0) == pytest.approx(2.4)  # a still loss makes no spike of a ripple
    assert watch.perplexity == pytest.approx(math.exp(watch.mean))


def test_the_rate_comes_back_to_the_schedule() -> None:
    once = {"event": "rollback", "to": 20, "until": 30}
    assert [stability.rate_factor([once], step, 0.5) for step in (19, 20, 25, 30)] == [1.0, 0.5, 0.75, 1.0]
    assert stability.rate_factor([once, once], 20, 0.5) == 0.25
    assert stability.rate_factor([{"event": "spike", "step": 20}], 20, 0.5) == 1.0


# ---- rollback -------------------------------------------------------------------------------------------------------


def test_a_run_without_spikes_is_what_it_is_without_the_watch(folder: Path) -> None:
    """Nothing that looks after a run changes one that needs no help."""
    watched = trainer(folder, None)
    plain = trainer(folder, None, replace(CONFIG, spike=0, rollbacks=0, layer_stats=0))
    watched.fit()
    plain.fit()
    assert weights(watched.model) == weights(plain.model)
    assert watched.events == []
    averaged = [record["perplexity_ema"] for record in watched.history]
    assert averaged[0] == pytest.approx(math.exp(watched.history[0]["train_loss"]))
    assert averaged[-1] < averaged[0] / 4


@pytest.fixture(scope="module")
def poisoned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run whose batch 70 is noise."""
    run = trainer(folder, tmp_path_factory.mktemp("poisoned") / "run", bad=70)
    run.fit()
    return run


def test_a_poisoned_batch_is_rolled_back_past(poisoned: Trainer) -> None:
    assert poisoned.out is not None
    (event,) = read_events(poisoned.out / "metrics.jsonl")
    assert event["event"] == "rollback"
    assert (event["step"], event["to"], event["skipped"], event["until"]) == (71, 60, [60, 71], 71)
    assert "is a spike" in event["reason"]
    (line,) = [line for line in vars(poisoned)["lines"] if "warning" in line]
    assert "rolled back to step 60, past batches 60 to 70, with a lower learning rate until step 71" in line
    records = read_metrics(poisoned.out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 85))
    assert records == poisoned.history
    seconds = [record["seconds"] for record in records]  # what was lost took time too, which --minutes counts
    assert seconds == sorted(seconds)
    assert records[-1]["tokens"] == 84 * CONFIG.tokens_per_step  # those that the weights have learned from
    rates = {record["step"]: record["lr"] for record in records}
    assert rates[61] == pytest.approx(0.5 * CONFIG.resolved(84).rates(60)[0])
    assert rates[72] == CONFIG.resolved(84).rates(71)[0]
    assert max(record["train_loss"] for record in records[60:]) < 3
    assert poisoned.position == 95
    samples = (poisoned.out / "samples.txt").read_text()
    assert [samples.count(f"=== step {step},") for step in (54, 63, 72)] == [1, 1, 1]
    layers = [record["step"] for record in read_lines(poisoned.out / "layers.jsonl")]
    assert layers == list(range(7, 85, 7))


@pytest.mark.parametrize(
    ("number", "moments"), [(None, (66,)), (None, (76, 14)), (signal.SIGINT, (64, 14, 6)), (signal.SIGINT, (70, 12))]
)
def test_a_killed_run_repeats_its_rollback(
    folder: Path, tmp_path: Path, poisoned: Trainer, number: int | None, moments: tuple[int, ...]
) -> None:
    """Killed before the spike, after the rollback, and more than once: the end is that of the undisturbed run."""
    assert poisoned.out is not None
    config = replace(CONFIG, keep=1)  # the checkpoint to go back to is kept beside the one written on the way out
    for moment in moments:
        stopped = trainer(folder, tmp_path, config, bad=70, callbacks=[Stop(moment, number)])
        with pytest.raises((Stop.Killed, Interrupted)):
            stopped.fit(resume=True)
    again = trainer(folder, tmp_path, config, bad=70)
    again.fit(resume=True)
    assert weights(again.model) == weights(poisoned.model)
    assert again.events == poisoned.events
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (checkpoint.folder_of(run, 84) / name for run in (tmp_path, poisoned.out))
        assert ours.read_bytes() == theirs.read_bytes()
    for name in ("samples.txt", "layers.jsonl"):
        assert (tmp_path / name).read_bytes() == (poisoned.out / name).read_bytes()
    ours, theirs = (
        [{key: value for key, value in record.items() if key not in TIMINGS} for record in read_lines(path)]
        for path in (tmp_path / "metrics.jsonl", poisoned.out / "metrics.jsonl")
    )
    assert ours == theirs


def test_lost_numbers_are_rolled_back_and_named(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path, callbacks=[Set(31, "model.layers.1.mlp.down_proj.weight", (0, 3), math.nan)])
    history = run.fit()
    (event,) = run.events
    assert (event["event"], event["step"], event["to"]) == ("rollback", 32, 20)
    assert "the first tensor that is not finite is model.layers.1.mlp.down_proj.weight" in event["reason"]
    assert [record["step"] for record in history] == list(range(1, 85))


def test_weights_that_are_no_numbers_are_not_saved(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path, callbacks=[Set(40, "model.norm.weight", (5,), math.inf)])
    run.fit()
    (event,) = run.events
    assert (event["step"], event["to"]) == (40, 20)
    assert "no checkpoint of these weights; the first tensor that is not finite is model.norm.weight" in event["reason"]
    assert checkpoint.steps(tmp_path) == [60, 80, 84]


def test_without_a_checkpoint_the_batch_is_passed_over(folder: Path) -> None:
    """The rare byte meets an embedding whose square is too large: every weight is finite, and the loss is not."""
    first = Set(1, "model.embed_tokens.weight", (RARE,), 1e38)
    bare, config = SHAPE.replace(input_norms=False, linear="linear"), replace(CONFIG, steps=12)
    run = trainer(folder, None, config, bad=4, rare=True, shape=bare, callbacks=[first])
    run.fit()
    (event,) = run.events
    assert (event["event"], event["step"], event["to"], event["skipped"]) == ("skip", 5, 4, [4, 5])
    assert "is not finite is the output of model.layers.0" in event["reason"]
    assert run.position == 13
    assert run.step == 12
    assert stability.bad_weight(run.model) is None


def test_a_validation_loss_that_is_no_number_is_not_kept(folder: Path, tmp_path: Path) -> None:
    """As above, in the held-out text."""

    class HeldOut(ShardDataset):
        def read(self, begin: int, end: int) -> np.ndarray[Any, np.dtype[np.int32]]:
            tokens = super().read(begin, end)
            tokens[:: 16 * 7] = RARE
            return tokens

    bare = SHAPE.replace(input_norms=False, linear="linear")
    config = replace(CONFIG, rollbacks=1, eval_every=25, sample_tokens=0)
    grown = Set(21, "model.embed_tokens.weight", (RARE,), 1e38)
    grown_again = Set(22, "model.embed_tokens.weight", (RARE,), 1e38)
    held_out = HeldOut(folder, "validation")
    run = trainer(folder, tmp_path, config, shape=bare, callbacks=[grown, grown_again], validation=held_out)
    run.fit()
    (event,) = run.events
    assert (event["step"], event["to"], event["skipped"]) == (25, 20, [20, 25])
    assert "the validation loss is nan; the first tensor that is not finite is the output of mo" in event["reason"]
    assert all(record["val_loss"] is None or math.isfinite(record["val_loss"]) for record in run.history)


def test_a_rollback_when_time_is_up_still_ends_as_usual(folder: Path, tmp_path: Path) -> None:
    class Late(Set):
        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            if record["step"] == self.step:
                trainer.seconds = 59.99999
            super().on_step(trainer, record)

    late = Late(25, "model.norm.weight", (3,), math.nan)
    run = trainer(folder, tmp_path, replace(CONFIG, minutes=1.0), callbacks=[late])
    run.fit()
    assert run.events[0]["to"] == 20
    assert run.step in (21, 26)  # 26 only if the clock lets a step pass
    assert checkpoint.steps(tmp_path)[-1] == run.step
    assert run.history[-1]["val_loss"] is not None


def test_rollbacks_end(folder: Path, tmp_path: Path) -> None:
    class Always(Callback):
        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            if record["step"] == 25:
                Set(25, "model.norm.weight", (5,), math.nan).on_step(trainer, record)

    run = trainer(folder, tmp_path, replace(CONFIG, rollbacks=2), callbacks=[Always()])
    message = r"step 26: the loss is nan; .* is model\.norm\.weight; all 2 rollbacks are used up; go on from step 20 "
    with pytest.raises(DivergenceError, match=message):
        run.fit()
    assert [event["skipped"] for event in run.events] == [[20, 26], [20, 32]]
    run = trainer(folder, tmp_path / "none", replace(CONFIG, rollbacks=0), callbacks=[Always()])
    with pytest.raises(DivergenceError, match=r"is model\.norm\.weight; go on from step 20 with a lower rate: "):
        run.fit()


def test_a_spike_without_a_rollback_is_trained_through(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path, replace(CONFIG, rollbacks=0, steps=75), bad=70)
    run.fit()
    (event,) = read_events(tmp_path / "metrics.jsonl")
    assert (event["event"], event["step"]) == ("spike", 71)
    assert run.history[70]["train_loss"] > 4
    assert run.position == 75


# ---- the first bad tensor -------------------------------------------------------------------------------------------


def test_the_first_bad_tensor_is_named() -> None:
    model = BitNetForCausalLM(SHAPE, 0)
    tokens = np.arange(32).reshape(2, 16)
    assert stability.first_bad(model, [(tokens, tokens)]) == "every weight and gradient is finite"
    model(tokens, tokens).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        gradient = gradients[name]
        assert gradient is not None
        values = gradient.numpy(copy=True)
        values[1, 2] = math.inf
        gradient.copy_(values)
        assert stability.bad_gradient(model) == f"{name}.grad"  # of two, the one that the backward pass made first
    before = dict(vars(model.model.layers[0].mlp))
    model.zero_grad()
    assert stability.bad_output(model, tokens, tokens) is None
    assert vars(model.model.layers[0].mlp) == before
    with ops.no_grad():
        table = model.model.embed_tokens.weight
        values = table.numpy(copy=True)
        values[7, 7] = math.nan
        table.copy_(values)
    assert stability.bad_output(model, tokens, tokens) == "the output of model.embed_tokens"
    assert stability.first_bad(model, [(tokens, tokens)]).endswith(" is model.embed_tokens.weight")


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_patience_ends_a_run(folder: Path, tmp_path: Path) -> None:
    # In f32 the losses of a rate that is far too high are the same on every instruction set.
    config = replace(CONFIG, lr=3.0, min_lr=3.0, spike=0, precision="fp32", steps=60, eval_every=5, patience=3)
    rising = trainer(folder, tmp_path, config)
    rising.fit()
    (event,) = read_events(tmp_path / "metrics.jsonl")
    values = [record["val_loss"] for record in rising.history if record["val_loss"] is not None]
    assert event["event"] == "early_stop"
    assert rising.step == event["step"] == 5 * len(values) < 60
    assert min(values) == values[-4]
    assert checkpoint.steps(tmp_path)[-1] == rising.step
    again = trainer(folder, tmp_path, config)
    again.fit(resume=True)
    assert again.step == rising.step
    assert read_events(tmp_path / "metrics.jsonl") == [event]
    further = trainer(folder, tmp_path, replace(config, patience=0))
    further.fit(resume=True)
    assert further.step == 60


def test_sigterm_writes_a_checkpoint_however_long_it_takes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet.keeper.QUICK_SECONDS", 0.0)
    for number, kept in ((signal.SIGINT, [20]), (signal.SIGTERM, [20, 25])):
        run = trainer(folder, tmp_path / str(number), callbacks=[Stop(25, number)])
        with pytest.raises(Interrupted, match="stopped at step 25"):
            run.fit()
        assert checkpoint.steps(tmp_path / str(number)) == kept

"""The training loop: what a step adds up to, what an evaluation measures, what ends a run, and how it goes on."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import pack_numbers

from bitnet import BitNetConfig, BitNetForCausalLM, ops
from bitnet.callbacks import Callback
from bitnet.data import ShardDataset, eval_blocks, pack
from bitnet.errors import ConfigError
from bitnet.interrupts import Interrupted, Interrupts
from bitnet.stability import DivergenceError
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

SHAPE = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)
CONFIG = TrainerConfig(steps=12, batch_size=4, seq_len=16, lr=5e-3, eval_every=5, sample_tokens=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_numbers(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of many lengths, so that separate ones leave rows unevenly full."""
    root = tmp_path_factory.mktemp("lines")
    (root / "text.txt").write_text("|".join(f"{n} squared is {n * n}"[n % 13 :] for n in range(900)))
    return pack(root / "text.txt", root / "pack", "bytes", seq_len=16, separator="|", log=lambda line: None)


def trainer(folder: Path, config: TrainerConfig = CONFIG, shape: BitNetConfig = SHAPE, **options: Any) -> Trainer:
    return Trainer(BitNetForCausalLM(shape, config.seed), folder, config, log=lambda line: None, **options)


def weights(model: BitNetForCausalLM) -> bytes:
    return b"".join(array.tobytes() for array in model.state_dict().values())


def test_fit_learns_and_says_so(folder: Path) -> None:
    run = trainer(folder)
    history = run.fit()
    assert [record["step"] for record in history] == list(range(1, 13))
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.5
    assert abs(history[0]["train_loss"] - math.log(257)) < 0.1  # nothing is known yet
    assert [record["step"] for record in history if record["val_loss"] is not None] == [5, 10, 12]
    last = history[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert last["tokens"] == 12 * 4 * 16
    assert 0.2 < last["zero_share"] < 0.5
    assert history[0]["flip_share"] > 0
    assert all(record["tokens_per_second"] > 0 and record["mfu"] > 0 and record["memory"] > 0 for record in history)


def test_the_twin_has_no_codes(folder: Path) -> None:
    history = trainer(folder, shape=SHAPE.replace(linear="linear")).fit()
    assert history[-1]["zero_share"] is None
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.5


def test_evaluation_is_the_mean_over_whole_blocks(folder: Path) -> None:
    run = trainer(folder)
    held_out = ShardDataset(folder, "validation")
    blocks = (len(held_out) - 1) // 16
    assert blocks % 4  # the last batch is not full
    losses = [run.model(tokens, targets).item() for tokens, targets in eval_blocks(held_out, 1, 16)]
    assert len(losses) == blocks
    assert run.evaluate() == pytest.approx(np.mean(losses), rel=1e-6)
    few = trainer(folder, TrainerConfig(batch_size=4, seq_len=16, eval_blocks=6))
    assert few.evaluate() == pytest.approx(np.mean(losses[:6]), rel=1e-6)


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_accumulated_micro_batches_make_one_batch(lines: Path, documents: str) -> None:
    """The same sequences in one batch of 4 or in 4 of 1: equal up to the order of sums over the batch."""
    whole = trainer(lines, TrainerConfig(steps=3, batch_size=4, seq_len=16, sample_tokens=0, documents=documents))
    parts = trainer(
        lines, TrainerConfig(steps=3, batch_size=1, grad_accum=4, seq_len=16, sample_tokens=0, documents=documents)
    )
    for a, b in zip(whole.fit(), parts.fit(), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["tokens"] == b["tokens"]


def test_replayed_steps_equal_plain_ones(folder: Path) -> None:
    """The loop written out with Python between all ops gives the same weights, bit for bit."""
    run = trainer(folder)
    run.fit()
    plain = trainer(folder)
    config = CONFIG.resolved(12)
    for step in range(12):
        plain.optimizer.zero_grad()
        with ops.precision(config.precision):
            plain.model(*plain.loader.batch(step)).backward()
        plain.optimizer.clip_grad_norm(config.clip)
        plain.optimizer.step(*config.rates(step))
    assert weights(run.model) == weights(plain.model)


class StopAt(Callback):
    """Sends a signal to this process when a step is done."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            self.step = -1
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fit_goes_on_after_an_interrupt(folder: Path, number: int) -> None:
    before = signal.getsignal(number)
    undisturbed = trainer(folder)
    undisturbed.fit()
    run = trainer(folder, callbacks=[StopAt(5, number)])
    with pytest.raises(Interrupted, match=r"stopped at step 5") as stopped:
        run.fit()
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    run.fit()
    assert weights(run.model) == weights(undisturbed.model)
    assert [r["val_loss"] for r in run.history] == [r["val_loss"] for r in undisturbed.history]


def test_an_interrupt_waits_for_the_end_of_what_is_held() -> None:
    done = []

    def work(interrupts: Interrupts) -> None:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("inside")
        done.append("after")

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        work(interrupts)
    assert done == ["inside"]


def test_no_number_ends_training_before_the_update(folder: Path) -> None:
    class Poison(Callback):
        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            if record["step"] == 3:
                values = trainer.optimizer.parameters["model.norm.weight"].numpy(copy=True)
                values[7] = np.nan
                trainer.optimizer.parameters["model.norm.weight"].copy_(values)

    run = trainer(folder, callbacks=[Poison()])
    with pytest.raises(DivergenceError, match=r"step 4: the loss is nan; .* not finite is model\.norm\.weight; "):
        run.fit()
    assert run.step == 3


def test_an_infinite_gradient_ends_training_before_the_update(folder: Path) -> None:
    run = trainer(folder)
    run.optimizer.clip_grad_norm = lambda limit: math.inf  # type: ignore[method-assign]
    before = weights(run.model)
    with pytest.raises(DivergenceError, match=r"step 1: the gradient norm is inf; every weight and gradient"):
        run.fit()
    assert weights(run.model) == before


def test_minutes_decide_the_steps(folder: Path) -> None:
    run = trainer(folder, TrainerConfig(minutes=0.02, batch_size=2, seq_len=16, sample_tokens=0))
    run.fit()
    assert run.config.steps is not None
    assert run.config.steps >= 10
    assert run.step == run.config.steps or run.seconds >= 1.2
    assert run.history[-1]["val_loss"] is not None


def test_what_is_not_given_follows_from_the_steps() -> None:
    config = TrainerConfig(lr=1e-3).resolved(500)
    assert (config.steps, config.warmup, config.eval_every, config.save_every) == (500, 50, 50, 50)
    assert config.min_lr == pytest.approx(1e-4)
    assert config.rates(0)[0] == pytest.approx(1e-3 / 50)
    assert config.rates(49) == (pytest.approx(1e-3), 0.1)
    assert config.rates(499)[0] == pytest.approx(1e-4, rel=1e-2)


def test_the_second_stage_is_lower_and_without_decay() -> None:
    config = TrainerConfig(lr=1.5e-3, schedule="two-stage", warmup=10).resolved(1000)
    assert config.min_lr == pytest.approx(1e-3)
    (first, decay), (second, none) = config.rates(499), config.rates(500)
    assert second / first == pytest.approx(2 / 3, rel=5e-3)
    assert (decay, none) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"lr": math.nan}, "lr must be positive, not nan"),
        ({"minutes": 0.0}, r"minutes must be positive, not 0\.0"),
        ({"order": "sorted"}, "order must be one of shuffled, random, not 'sorted'"),
        ({"schedule": "flat"}, "schedule must be one of cosine, two-stage, wsd, not 'flat'"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerConfig(**options)


def test_model_and_data_must_fit(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has a vocabulary of 257 ids, the model only 200"):
        trainer(folder, shape=SHAPE.replace(vocab_size=200))
    with pytest.raises(ConfigError, match="seq_len 65 is more than the model's max_position_embeddings 64"):
        trainer(folder, TrainerConfig(seq_len=65))


def test_checkpointed_activations_change_nothing_but_memory(folder: Path) -> None:
    plain = trainer(folder)
    plain.fit()
    config = replace(CONFIG, activation_checkpointing=True)
    run = trainer(folder, config, callbacks=[StopAt(5)])
    assert run.model.activation_checkpointing
    with pytest.raises(Interrupted):
        run.fit()
    run.fit()
    assert weights(run.model) == weights(plain.model)
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert [record[name] for record in run.history] == [record[name] for record in plain.history]


def test_a_resumed_run_may_begin_to_checkpoint_activations(folder: Path, tmp_path: Path) -> None:
    plain = trainer(folder)
    plain.fit()
    run = trainer(folder, replace(CONFIG, save_every=4), out=tmp_path, callbacks=[StopAt(6)])
    with pytest.raises(Interrupted):
        run.fit()
    again = trainer(folder, replace(CONFIG, save_every=4, activation_checkpointing=True), out=tmp_path)
    again.fit(resume=True)
    assert again.model.activation_checkpointing
    assert weights(again.model) == weights(plain.model)


def test_moments_in_bf16_learn_and_resume_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, moments="bf16", save_every=4)
    whole = trainer(folder, config)
    history = whole.fit()
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.5
    stopped = trainer(folder, config, out=tmp_path, callbacks=[StopAt(6)])
    with pytest.raises(Interrupted):
        stopped.fit()
    with pytest.raises(ConfigError, match=r"moments is bf16 in .* and cannot become f32 on resume"):
        trainer(folder, replace(config, moments="f32"), out=tmp_path).fit(resume=True)
    again = trainer(folder, config, out=tmp_path)
    again.fit(resume=True)
    assert weights(again.model) == weights(whole.model)
    ended, expected = again.optimizer.state_dict(), whole.optimizer.state_dict()
    assert all(np.array_equal(ended[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match="moments must be one of f32, bf16, not 'f8'"):
        TrainerConfig(moments="f8")

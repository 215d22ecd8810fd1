"""The levers of ternary pretraining: each is off by default, computes what its source says, and resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet import BitNetConfig, BitNetForCausalLM
from bitnet.callbacks import Callback
from bitnet.data import pack
from bitnet.errors import ConfigError
from bitnet.interrupts import Interrupted
from bitnet.trainer import Trainer, TrainerConfig

SHAPE = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)
CONFIG = TrainerConfig(
    steps=8, batch_size=2, seq_len=16, lr=5e-3, eval_every=4, save_every=3, sample_tokens=0, eval_blocks=4, plots=False
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    (root / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    return pack(root / "text.txt", root / "pack", "bytes", seq_len=16, log=lambda line: None)


def trainer(folder: Path, config: TrainerConfig = CONFIG, shape: BitNetConfig = SHAPE, **options: Any) -> Trainer:
    return Trainer(BitNetForCausalLM(shape, config.seed), folder, config, log=lambda line: None, **options)


def numbers(run: Trainer) -> list[Any]:
    """What a resumed run has to repeat: weights, the optimizer's state, records without timings."""
    arrays = [*run.model.state_dict().values(), *run.optimizer.state_dict().values()]
    timings = ("seconds", "tokens_per_second", "mfu", "memory")
    records = [{name: value for name, value in r.items() if name not in timings} for r in run.history]
    return [b"".join(array.tobytes() for array in arrays), records]


class StopAt(Callback):
    """An interrupt when a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            raise KeyboardInterrupt


def resumed(folder: Path, out: Path, config: TrainerConfig, step: int = 5) -> Trainer:
    """A run in `out` that was stopped after a step and went on in a trainer of its own."""
    with pytest.raises(Interrupted):
        trainer(folder, config, out=out, callbacks=[StopAt(step)]).fit()
    again = trainer(folder, config, out=out)
    again.fit(resume=True)
    return again


def off_and_on(folder: Path, tmp_path: Path, config: TrainerConfig) -> tuple[Trainer, Trainer]:
    """A plain run and one with a lever, which differ; the latter resumes to the same end."""
    plain, whole = trainer(folder), trainer(folder, config)
    plain.fit()
    whole.fit()
    assert numbers(plain) != numbers(whole)
    assert numbers(resumed(folder, tmp_path / "run", config)) == numbers(whole)
    return plain, whole


# ---- the schedule ---------------------------------------------------------------------------------------------------


def test_wsd_is_constant_until_its_last_share() -> None:
    config = TrainerConfig(lr=1e-3, schedule="wsd", warmup=10, decay_share=0.25).resolved(100)
    rates = [config.rates(step)[0] for step in range(101)]
    assert config.min_lr == pytest.approx(1e-4)
    assert rates[0] == pytest.approx(1e-4)
    assert set(rates[10:76]) == {1e-3}
    assert rates[80] == pytest.approx(1e-4 + 9e-4 * 0.8)
    assert np.allclose(np.diff(rates[75:]), -9e-4 / 25)
    assert rates[100] == pytest.approx(1e-4)
    assert config.rates(50)[1] == config.weight_decay
    with pytest.raises(ConfigError, match="decay_share must be above 0 and at most 1, not 0"):
        TrainerConfig(decay_share=0)


def test_wsd_resumes(folder: Path, tmp_path: Path) -> None:
    off_and_on(folder, tmp_path, replace(CONFIG, schedule="wsd"))

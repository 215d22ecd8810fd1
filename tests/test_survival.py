"""Runs that are killed, interrupted or out of disk: real processes, real signals, and the same bytes in the end."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bitnet import BitNetConfig, BitNetForCausalLM, checkpoint
from bitnet.callbacks import Callback
from bitnet.data import pack
from bitnet.errors import CheckpointError
from bitnet.metrics import read_metrics
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

FLAGS = (
    "--tokenizer bytes --hidden-size 32 --intermediate-size 48 --num-hidden-layers 1 --num-attention-heads 2 "
    "--threads 1 --batch-size 4 --seq-len 32 --steps 200 --eval-every 12 --save-every 5 --sample-tokens 8 "
    "--val-fraction 0.2 --plots false"
).split()
TIMINGS = ("seconds", "tokens_per_second", "mfu", "memory")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(2000)))
    return path


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bitnet.train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    return output


def wait_for(process: subprocess.Popen[str], run: Path, lines: int) -> None:
    """Until metrics.jsonl has that many lines."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= lines:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {lines} lines in time: {process.communicate()[0]}")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start("--data", text, "--out", run, *FLAGS))
    return run


def assert_same_end(run: Path, undisturbed: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        ours, theirs = (checkpoint.folder_of(folder, 200) / name for folder in (run, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert metrics(run) == metrics(undisturbed)
    for name in ("samples.txt", "layers.jsonl"):
        assert (run / name).read_text() == (undisturbed / name).read_text()


def test_killed_runs_end_in_the_same_bytes(text: Path, tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    process = start("--data", text, "--out", run, *FLAGS)
    for lines in (1, 30, 70):
        moment = random.uniform(0, 0.05)  # somewhere in a step, an evaluation, a sample or a checkpoint
        wait_for(process, run, lines + random.randrange(20))
        time.sleep(moment)
        process.kill()
        finish(process, -signal.SIGKILL)
        process = start("--resume", run, "--background-save")  # how checkpoints are written changes nothing in them
    finish(process)
    assert_same_end(run, undisturbed)
    assert [record["step"] for record in metrics(run)] == list(range(1, 201))


def test_a_run_of_all_levers_is_killed_and_ends_in_the_same_bytes(
    text: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """The teacher is the undisturbed run, on whose packed text both are trained."""
    levers = "--steps 100 --schedule wsd --ema 0.9 --optimizer muon --ternary-from 8 --ternary-ramp 20 --save-every 5"
    flags = [*FLAGS, *levers.split(), "--teacher", str(undisturbed), "--data", str(undisturbed / "data")]
    whole, run = tmp_path / "whole", tmp_path / "run"
    output = finish(start("--out", whole, *flags))
    assert f"levers: optimizer muon, ema 0.9, ternary_from 8, ternary_ramp 20, teacher {undisturbed}" in output
    assert f"with averaged weights: bitnet ema {whole} {whole}-ema" in output
    process = start("--out", run, *flags)
    wait_for(process, run, 12 + random.randrange(40))
    process.kill()
    finish(process, -signal.SIGKILL)
    finish(start("--resume", run))
    assert metrics(run) == metrics(whole)
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        ours, theirs = (checkpoint.folder_of(folder, 100) / name for folder in (run, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_say_how_to_go_on_and_do(text: Path, tmp_path: Path, undisturbed: Path, number: int) -> None:
    run = tmp_path / "run"
    process = start("--data", text, "--out", run, *FLAGS)
    wait_for(process, run, 33)
    begin = time.monotonic()
    process.send_signal(number)
    output = finish(process, 128 + number)
    assert time.monotonic() - begin < 1.0 + 2.0  # a second, and two for sanitizers on a busy machine
    assert f"go on with: python -m bitnet.train --resume {run}" in output
    assert "Traceback" not in output
    stopped = int(output.split("stopped at step ")[1].split(",")[0])
    assert checkpoint.steps(run)[-1] == stopped  # so small a checkpoint is written before leaving
    finish(start("--resume", run))
    assert_same_end(run, undisturbed)


def test_killed_before_the_first_step(text: Path, tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    process = start("--data", text, "--out", run, *FLAGS)
    while not (run / "train.yaml").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    finish(process, -signal.SIGKILL)
    finish(start("--resume", run))
    assert_same_end(run, undisturbed)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(text: Path, tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    process = start("--data", text, "--out", run, *FLAGS)
    wait_for(process, run, 21)
    process.kill()
    finish(process, -signal.SIGKILL)
    newest = checkpoint.steps(run)[-1]
    with open(checkpoint.folder_of(run, newest) / "optimizer.safetensors", "r+b") as file:
        file.truncate(1000)
    output = finish(start("--resume", run))
    assert f"step-{newest:08d} is set aside" in output
    assert_same_end(run, undisturbed)


class DiskIsFull(Callback):
    """No file may grow beyond 64 KiB from one step to another, which stops checkpoints and nothing else."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] in (self.first, self.last):
            limit = 65536 if record["step"] == self.first else self.before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self.before[1]))

    def on_end(self, trainer: Trainer, complete: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def small_run(text: Path, out: Path, callback: Callback, log: Any, **options: Any) -> Trainer:
    folder = pack(text, out.parent / "pack", "bytes", seq_len=16, log=lambda line: None)
    model = BitNetForCausalLM(BitNetConfig(257, 64, 96, 1, 2, max_position_embeddings=64))
    config = TrainerConfig(
        12, plots=False, batch_size=2, seq_len=16, save_every=3, eval_every=99, eval_blocks=4, **options
    )
    return Trainer(model, folder, config, out=out, callbacks=[callback], log=log)


def test_training_goes_on_while_the_disk_is_full(text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    small_run(text, tmp_path / "run", DiskIsFull(4, 8), lines.append).fit()
    warnings = [line for line in lines if "could not be written" in line]
    assert len(warnings) == 1
    assert "step-00000006" in warnings[0]
    assert checkpoint.steps(tmp_path / "run") == [3, 9, 12]
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_training_goes_on_while_the_disk_is_full_in_the_background(text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    small_run(text, tmp_path / "run", DiskIsFull(1, 10), lines.append, background_save=True).fit()
    warnings = [line for line in lines if "could not be written" in line]
    assert ["step-00000003" in warnings[0], "step-00000006" in warnings[1]] == [True, True]
    assert checkpoint.steps(tmp_path / "run") in ([12], [9, 12])  # 9 was on its way when room came back
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_a_disk_full_at_the_end_loses_nothing_saved(text: Path, tmp_path: Path) -> None:
    run = small_run(text, tmp_path / "run", DiskIsFull(10, 99), lambda line: None)
    with pytest.raises(CheckpointError, match="step-00000012 could not be written"):
        run.fit()
    assert checkpoint.steps(tmp_path / "run") == [3, 6, 9]
    again = small_run(text, tmp_path / "run", Callback(), lambda line: None)
    again.fit(resume=True)
    assert checkpoint.steps(tmp_path / "run")[-1] == 12
    assert [record["step"] for record in again.history] == list(range(1, 13))


def test_metrics_wait_for_the_disk(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    class Full(Callback):
        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            def half(file: int, data: bytes) -> int:
                return write(file, data[: len(data) // 2])

            monkeypatch.setattr(os, "write", half if 3 <= record["step"] < 6 else write)

    lines: list[str] = []
    small_run(text, tmp_path / "run", Full(), lines.append).fit()
    assert [line for line in lines if "wait in memory" in line]
    text_lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in text_lines] == list(range(1, 13))

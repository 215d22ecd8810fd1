"""What happens beside training: layers.jsonl, files that are cut back, checkpoints in the background, other loggers."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_runs import pack_numbers

from bitnet import BitNetConfig, BitNetForCausalLM, checkpoint, cli
from bitnet.background import Background
from bitnet.callbacks import Callback
from bitnet.errors import CheckpointError, ConfigError
from bitnet.layer_stats import BINS, histogram, layer_record
from bitnet.metrics import LineFile, read_events, read_lines, read_metrics
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

SHAPE = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_numbers(tmp_path_factory.mktemp("text"))


def trainer(folder: Path, out: Path | None, callbacks: tuple[Callback, ...] = (), **options: Any) -> Trainer:
    usual = {"steps": 12, "batch_size": 4, "seq_len": 16, "sample_tokens": 0, "plots": False, "save_every": 4}
    config = TrainerConfig(**{**usual, **options})
    model = BitNetForCausalLM(SHAPE.replace(), 0)
    return Trainer(model, folder, config, out=out, callbacks=callbacks, log=lambda line: None)


# ---- layers.jsonl ---------------------------------------------------------------------------------------------------


def test_layers_tell_codes_flips_and_weights(folder: Path, tmp_path: Path) -> None:
    class Flips(Callback):
        def __init__(self) -> None:
            self.codes: list[dict[str, np.ndarray[Any, Any]]] = []

        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            self.codes.append({name: layer.codes().numpy().copy() for name, layer in trainer.model.bitlinears()})

    flips = Flips()
    run = trainer(folder, tmp_path, (flips,), layer_stats=5, lr=2e-2)
    run.fit()
    records = read_lines(tmp_path / "layers.jsonl")
    assert [record["step"] for record in records] == [5, 10, 12]
    layers = records[-1]["layers"]
    assert list(layers) == [name for name, _ in run.model.bitlinears()]
    for name, layer in run.model.bitlinears():
        told, codes = layers[name], layer.codes().numpy()
        assert told["minus"] == np.mean(codes == -1)
        assert told["zero"] == np.mean(codes == 0)
        assert told["plus"] == np.mean(codes == 1)
        assert told["scale"] == layer.weight_scale
        assert len(told["histogram"]) == BINS
        assert sum(told["histogram"]) == codes.size
        # Steps 10 to 12 by the codes themselves.
        changed = [np.mean(flips.codes[i][name] != flips.codes[i - 1][name]) for i in (10, 11)]
        assert told["flip"] == pytest.approx(sum(changed))
    assert any(told["flip"] > 0 for told in layers.values())


def test_a_histogram_has_everything_in_it() -> None:
    weights = np.array([[-9.0, -3.0, -0.01], [0.01, 2.999, 70.0]], np.float32)
    counts = histogram(weights * 0.5, 0.5)
    assert [i for i, n in enumerate(counts) for _ in range(n)] == [0, 0, 31, 32, 63, 63]
    assert sum(histogram(np.zeros((2, 3), np.float32), 0.0)) == 6
    drawn = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    assert histogram(drawn, 1.0) == np.histogram(np.clip(drawn, -3, 2.999), BINS, (-3, 3))[0].tolist()


def test_no_ternary_layers_no_record(folder: Path, tmp_path: Path) -> None:
    assert layer_record(1, BitNetForCausalLM(SHAPE.replace(linear="linear")), {}) is None
    trainer(folder, tmp_path, layer_stats=0).fit()
    assert not (tmp_path / "layers.jsonl").exists()


# ---- files of lines -------------------------------------------------------------------------------------------------


def test_lines_are_taken_back_to_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines: list[dict[str, Any]] = [
        {"step": 1}, {"step": 2}, {"step": 9, "event": "rollback"}, {"step": 3}, {"step": 4, "event": "spike"},
        {"step": 4}, {"step": 5},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for step, events, left in ((9, 9, 7), (4, 2, 6), (4, 1, 4), (2, 1, 3), (2, 0, 2), (0, 0, 0)):
        path.write_text(text + '{"step": 6')  # cut short by a crash
        assert LineFile(path).cut(step, events) == lines[:left]
        assert read_lines(path) == lines[:left]
        assert path.read_bytes().count(b"\n") == left
    path.write_text(text)
    assert len(read_metrics(path)) == 5
    assert [event["event"] for event in read_events(path)] == ["rollback", "spike"]


# ---- checkpoints in the background ----------------------------------------------------------------------------------


def test_work_in_the_background_ends_once() -> None:
    background: Background[int] = Background()
    gate = threading.Event()

    def work() -> int:
        gate.wait(10)
        return 7

    background.begin(work)
    assert background.busy
    assert not background.done
    gate.set()
    assert background.take() == 7
    assert not background.busy
    background.begin(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        background.take()
    assert not background.busy


def test_checkpoints_in_the_background_are_the_same(folder: Path, tmp_path: Path) -> None:
    main: list[bool] = []

    class Threads(Callback):
        def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
            main.append(threading.current_thread() is threading.main_thread())
            assert (path / "SHA256SUMS").exists()

    for name, background in (("a", False), ("b", True)):
        trainer(folder, tmp_path / name, (Threads(),), background_save=background, keep=2, eval_every=3).fit()
    assert main == [True] * 6
    assert checkpoint.steps(tmp_path / "a") == checkpoint.steps(tmp_path / "b")
    for step in checkpoint.steps(tmp_path / "a"):
        one, other = (checkpoint.folder_of(tmp_path / name, step) for name in "ab")
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (one / file).read_bytes() == (other / file).read_bytes()
        states = [json.loads((path / "state.json").read_text()) for path in (one, other)]
        assert states[0]["best"] == states[1]["best"]


def test_the_step_goes_on_while_a_checkpoint_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, write, begun = threading.Event(), checkpoint.write, []

    def slow(*arguments: Any) -> Path:
        begun.append(arguments[1])
        if arguments[1] == 4:
            assert gate.wait(30)
            raise CheckpointError("checkpoint step-00000004 could not be written: No space left on device")
        return write(*arguments)

    class Open(Callback):
        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            if record["step"] == 7:
                assert checkpoint.steps(tmp_path) == []
                gate.set()

    monkeypatch.setattr(checkpoint, "write", slow)
    lines: list[str] = []
    run = trainer(folder, tmp_path, (Open(),), background_save=True)
    run.log = lines.append
    run.fit()
    assert begun == [4, 8, 12]
    assert [line for line in lines if "No space left" in line and "training goes on" in line]
    assert checkpoint.steps(tmp_path) == [8, 12]


def test_a_smaller_keep_makes_room_before_the_next_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(folder, tmp_path, keep=6, save_every=2).fit()
    best = json.loads((checkpoint.folder_of(tmp_path, 12) / "state.json").read_text())["best"]["step"]
    assert checkpoint.steps(tmp_path) == [2, 4, 6, 8, 10, 12]

    def full(*arguments: Any) -> Path:
        raise CheckpointError("no room")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(CheckpointError, match="no room"):
        trainer(folder, tmp_path, keep=1, save_every=2, steps=14).fit(resume=True)
    assert checkpoint.steps(tmp_path) == sorted({best, 12})


# ---- other loggers --------------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"tensorboardX: pip install 'bitnet\[tensorboard\]'$"):
        trainer(folder, tmp_path, tensorboard=True)
    with pytest.raises(ConfigError, match=r"wandb needs the package wandb: pip install 'bitnet\[wandb\]'$"):
        trainer(folder, tmp_path, wandb="project")
    shape = "--hidden-size 32 --intermediate-size 48 --num-hidden-layers 1 --num-attention-heads 2 --seq-len 16".split()
    assert cli.main(["train", "--data", str(folder), *shape, "--out", str(tmp_path / "run"), "--tensorboard"]) == 2
    assert "pip install 'bitnet[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_records(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.event_file_writer import event_pb2  # type: ignore[attr-defined]
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    run = trainer(folder, tmp_path, tensorboard=True, layer_stats=6)
    run.fit()
    seen: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                seen.setdefault(value.tag, []).append((event.step, value.simple_value or value.histo.num))
    assert [step for step, _ in seen["train_loss"]] == list(range(1, 13))
    assert [loss for _, loss in seen["train_loss"]] == pytest.approx([r["train_loss"] for r in run.history])
    name = "model.layers.0.mlp.up_proj"
    assert seen[f"weights/{name}"] == [(6, 32 * 48), (12, 32 * 48)]
    assert [step for step, _ in seen[f"zero/{name}"]] == [6, 12]


def test_weights_and_biases_get_the_records(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package's interface written down here: the package itself is large and starts a server."""
    begun: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, values: dict[str, Any]) -> None:
            logged.append(values)

        def finish(self, exit_code: int) -> None:
            logged.append({"exit": exit_code})

    def init(**options: Any) -> Run:
        begun.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = trainer(folder, tmp_path / "run", wandb="ternary", layer_stats=6)
    run.fit()
    trainer(folder, tmp_path / "run", wandb="ternary", steps=13).fit(resume=True)
    assert [options["mode"] for options in begun] == ["offline", "offline"]
    assert begun[0]["id"] == begun[1]["id"]
    assert (begun[0]["project"], begun[0]["name"], begun[0]["resume"]) == ("ternary", "run", "allow")
    assert begun[0]["config"]["hidden_size"] == 32
    assert [values["step"] for values in logged if "step" in values] == list(range(1, 14))
    assert logged[5]["zero/model.layers.0.mlp.up_proj"] > 0
    assert logged[12] == {"exit": 0}


def test_a_checkpoint_in_the_background_is_of_the_step_it_was_due_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written two steps later, when weights, moments and average have moved on."""
    options: dict[str, Any] = {"ema": 0.5, "keep": 9}
    trainer(folder, tmp_path / "a", **options).fit()
    gate, write = threading.Event(), checkpoint.write

    def late(*arguments: Any) -> Path:
        assert arguments[1] != 4 or gate.wait(30)
        return write(*arguments)

    class Open(Callback):
        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            if record["step"] == 6:
                gate.set()

    monkeypatch.setattr(checkpoint, "write", late)
    trainer(folder, tmp_path / "b", (Open(),), background_save=True, **options).fit()
    for file in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        one, other = (checkpoint.folder_of(tmp_path / name, 4) / file for name in "ab")
        assert one.read_bytes() == other.read_bytes(), file

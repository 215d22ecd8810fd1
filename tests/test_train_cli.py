"""`bitnet train` from the outside: what it writes, what it says, and one sentence for every way to be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from train_command import refused, run

from bitnet import cli, from_pretrained, plots, train
from bitnet.config import BitNetConfig
from bitnet.data import pack
from bitnet.errors import ConfigError
from bitnet.metrics import read_metrics
from bitnet.run_config import OPTIONS, Settings, parse, read_yaml
from bitnet.trainer_config import TrainerConfig

SMALL = (
    "--tokenizer chars --hidden-size 32 --intermediate_size 48 --num-hidden-layers=2 --num-attention-heads 2 "
    "--batch-size 2 --seq-len 16 --steps 6 --save-every 3 --sample-tokens 8"
).split()
LINES = "".join(f"{n} squared is {n * n}.\n" for n in range(300))


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "numbers.txt"
    path.write_text(LINES)
    return path


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_a_whole_run(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--data", text, *SMALL) == 0
    out = capsys.readouterr().out
    folder = Path("runs/nano-numbers-001")
    chosen = ("cpu: ", " threads; ", "peak: int8 ", "6 steps of 32 tokens", "step 6/6", "  mfu ", "a sample:")
    for words in (*chosen, f"next: python -m bitnet.generate {folder} -p"):
        assert words in out
    names = sorted(path.name for path in folder.iterdir())
    assert names == "checkpoints data layers.jsonl machines.jsonl metrics.jsonl plots samples.txt train.yaml".split()
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["val_loss"] > 0 and record["tokens_per_second"] > 0 for record in records)  # evaluated every step
    assert (folder / "samples.txt").read_text().count("=== step ") == 6
    for name in ("loss.png", "weights.png", "codes.png"):
        width, height = png_size(folder / "plots" / name)
        assert 600 < width < 2000
        assert 300 < height < 2000
    options = yaml.safe_load((folder / "train.yaml").read_text())
    assert (options["hidden_size"], options["tokenizer"], options["warmup"]) == (32, "chars", 1)
    assert set(options) <= set(OPTIONS)
    model = from_pretrained(folder)
    assert model.config == BitNetConfig(len(set(LINES)), 32, 48, 2, 2)
    assert run("--data", text, *SMALL, "--twin", "--compare", folder) == 0
    twin = Path("runs/nano-numbers-twin-001")
    assert from_pretrained(twin).config.linear == "linear"
    assert [path.name for path in (twin / "plots").iterdir()] == ["loss.png"]


def test_the_same_options_give_the_same_model(text: Path) -> None:
    assert run("--data", text, *SMALL, "--out", "a", "--plots", "false") == 0
    assert not Path("a/plots").exists()
    assert run("--config", "a/train.yaml", "--out", "b", "--threads", "1") == 0
    files = [Path(name, "checkpoints", "step-00000006", "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_finished_run_can_go_further(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--data", text, *SMALL, "--out", "a", "--plots", "false") == 0
    assert run("--resume", "a") == 0
    assert "was complete at step 6; train it further with --steps" in capsys.readouterr().out
    assert run("--resume", "a", "--steps", "9", "--lr", "1e-3") == 0
    assert [record["step"] for record in read_metrics("a/metrics.jsonl")] == list(range(1, 10))
    assert yaml.safe_load(Path("a/train.yaml").read_text())["lr"] == 1e-3
    before = Path("a/train.yaml").read_bytes()
    for flags, message in {
        ("--hidden-size", "64"): "hidden_size is 32 in a and cannot become 64 on resume",
        ("--num-key-value-heads", "1"): "num_key_value_heads is 2 in a and cannot become 1",
        ("--twin",): "twin is False in a and cannot become True",
        ("--batch-size", "4"): "batch_size is 2 in a and cannot become 4",
        ("--data", "other.txt"): "other.txt'] on resume",
        ("--out", "b"): "--resume goes on in its own folder",
    }.items():
        assert message in refused(capsys, "--resume", "a", *flags)
    assert Path("a/train.yaml").read_bytes() == before


def test_data_that_changed_under_a_run(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(text, "pack", "chars", seq_len=16, log=lambda line: None)
    assert run("--data", "pack", *SMALL, "--out", "a", "--plots", "false") == 0
    assert not Path("a/data").exists()
    text.write_text(LINES[::-1])
    pack(text, "pack", "chars", seq_len=16, log=lambda line: None)
    assert "pack now holds" in refused(capsys, "--resume", "a", "--steps", "9")
    shard = text.parent / "pack" / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size - 10)
    assert f"shard {shard} has " in refused(capsys, "--data", "pack", *SMALL, "--out", "b")


def test_requests_that_cannot_be_met(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("bad.yaml").write_text("learning_rate: 1e-3\n")
    Path("text.yaml").write_text("just words\n")
    Path("type.yaml").write_text("steps: many\n")
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    for flags, message in {
        ("--hiden-size", "3"): "unknown option 'hiden_size' on the command line (did you mean 'hidden_size'?)",
        ("--set", "hiden_size=3"): "did you mean 'hidden_size'?",
        ("--set", "hidden_size"): "--set needs NAME=VALUE, not 'hidden_size'",
        ("--steps", "many"): "steps must be an integer, not 'many' on the command line",
        ("--lr", "-1"): "lr must be positive, not -1.0",
        ("--config", "bad.yaml"): "unknown option 'learning_rate' in bad.yaml",
        ("--config", "text.yaml"): "text.yaml must hold names and values",
        ("--config", "type.yaml"): "steps must be an integer, not 'many' in type.yaml",
        ("--config", "none.yaml"): "there is no file and no recipe 'none.yaml'; recipes: stdlib, tinyshakespeare",
        ("--preset", "nan"): "unknown preset 'nan' (did you mean 'nano'?)",
        ("--recipe", "tinystories"): "packed first: `bitnet data --recipe tinystories --out PACK`, then --data PACK",
        ("--recipe", "stdlb"): "unknown recipe 'stdlb' (did you mean 'stdlib'?)",
        ("--data", "empty"): "the corpus is empty",
        ("--data", "nowhere.txt"): f"there is no file or folder {text.parent / 'nowhere.txt'}",
        ("--data", "numbers.txt", "--recipe", "stdlib"): "exclude each other",
        ("--data", "numbers.txt", "--tokenizer", "bytes", "--vocab-size", "9"): "vocab_size 9 is less than the 257 ids",
        ("--data", "numbers.txt", "--tokenizer", "words"): "tokenizer 'words' is neither",
        ("--data", "numbers.txt", "--tokenizer", "bytes", "--seq-len", "5000"): "seq_len 5000 is more than the model's",
        ("--hidden-size", "30"): "hidden_size 30 must be an even multiple of num_attention_heads 8",
        ("--resume", "nowhere"): "nowhere is no run to resume: it has no train.yaml",
        ("--out", "taken"): "taken already exists: go on with --resume taken, or choose another --out",
        ("extra",): "belongs to no flag",
    }.items():
        assert message in refused(capsys, *flags), flags
        assert not Path("runs").exists() or not any(Path("runs").iterdir())
    assert Path("taken/notes.txt").read_text() == "mine"


def test_levers_of_the_model_are_named(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", text, *SMALL, "--steps", "1", "--plots", "false", "--sample-tokens", "0"]
    shape = "--hadamard --activation-bits 4 --weight-scales channel --ema 0.9".split()
    assert run(*flags, *shape, "--out", "a") == 0
    assert "levers: ema 0.9, hadamard True, activation_bits 4, weight_scales channel\n" in capsys.readouterr().out
    assert run("--init", "a", "--data", text, "--steps", "1", "--seq-len", "16", "--plots", "false", "--out", "b") == 0
    assert "levers: hadamard True, activation_bits 4, weight_scales channel\n" in capsys.readouterr().out
    assert run(*flags, "--out", "c") == 0
    assert "levers:" not in capsys.readouterr().out


def test_a_configuration_without_a_text(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, with its name; a command without one trains on the standard library, and writes that down."""
    Path("shape.yaml").write_text("hidden_size: 32\n")
    Path("null.yaml").write_text("data: []\nrecipe: null\n")
    recipe = Path(__file__).parents[1] / "recipes" / "tinyshakespeare.yaml"
    for config, path in {"tinyshakespeare": recipe, "shape.yaml": "shape.yaml", "null.yaml": "null.yaml"}.items():
        said = refused(capsys, "--config", config, "--out", "x")
        assert said == f"error: {path} names no text to train on: add --data FILE or --recipe stdlib\n"
        assert not Path("x").exists()
    few = "--max-mb 0.05 --plots false --eval-every 6 --sample-tokens 0".split()
    assert run(*SMALL, *few, "--out", "bare") == 0
    assert read_yaml("bare/train.yaml")["recipe"] == "stdlib"
    assert run("--config", "bare/train.yaml", "--out", "again") == 0
    assert run("--config", "shape.yaml", *SMALL, "--recipe", "stdlib", *few, "--out", "flag") == 0
    assert read_metrics("flag/metrics.jsonl")[-1]["val_loss"] == read_metrics("bare/metrics.jsonl")[-1]["val_loss"]
    assert run("--config", "bare/train.yaml", "--data", text, "--out", "other") == 0
    assert read_yaml("other/train.yaml")["recipe"] is None


def test_options_have_one_meaning_in_flags_and_yaml(tmp_path: Path) -> None:
    assert parse("lr", "1e-3") == parse("lr", 0.001) == 0.001
    assert parse("sub-norms", "false") is False
    assert parse("data", "a.txt") == ("a.txt",)
    assert parse("steps", "null") is None
    assert parse("steps", 1e3) == 1000
    for name, value in (("steps", 1.5), ("steps", True), ("twin", "maybe"), ("lr", None), ("preset", ["a"])):
        with pytest.raises(ConfigError, match=f"{name} must "):
            parse(name, value)
    path = tmp_path / "x.yaml"
    path.write_text("data: [a, b]\nlr: 1e-3\nhidden-size: 64\n")
    assert read_yaml(path) == {"data": ("a", "b"), "lr": 1e-3, "hidden_size": 64}
    values = Settings.of(read_yaml(path)).values()
    assert Settings.of({name: parse(name, value) for name, value in values.items()}).values() == values


def test_every_option_is_a_flag_with_a_word_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in OPTIONS:
        assert f"--{name.replace('_', '-')} " in text
        assert OPTIONS[name].metadata["help"], name
    assert all(field.metadata["help"] for field in fields(BitNetConfig))
    assert all(action.help for action in train.arguments()._actions)
    assert "bitnet train --resume" in text


def test_the_recipe_of_the_character_model_can_be_given_by_flags() -> None:
    flags = (
        "--preset char --tokenizer chars --order random --batch-size 4 --seq-len 256 --steps 2000 --lr 8e-4 "
        "--warmup 100 --min-lr 8e-5 --weight-decay 0.1 --clip 1 --val-fraction 0.1"
    ).split()
    settings = Settings.of(train.options_given(train.arguments().parse_args(flags)))
    config = settings.trainer.resolved(2000)
    assert config == TrainerConfig(
        steps=2000, batch_size=4, seq_len=256, order="random", lr=8e-4, min_lr=8e-5, warmup=100, weight_decay=0.1,
        clip=1.0, eval_every=200, save_every=200, layer_stats=200,
    )  # fmt: skip
    assert settings.model_config(65) == BitNetConfig.preset("char")


def test_one_word_chooses_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["--version"]) == 0
    assert "start here" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert "'trian' is no command; one of data, train, plan, generate, " in capsys.readouterr().err
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        assert end.value.code == 0
        assert f"usage: bitnet {name}" in capsys.readouterr().out


def test_the_program_is_the_module_that_its_help_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "`python -m bitnet.cli COMMAND` is the same" in text
    assert "  ema " in text
    for name in ("import", "ema"):
        command = [sys.executable, "-m", "bitnet.cli", name, "--help"]
        assert f"usage: bitnet {name} " in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("part", "doing"), [("initial", "opening the model"), ("prepare", "preparing the text")])
def test_an_interrupt_before_training_says_what_it_stopped(text: Path, part: str, doing: str) -> None:
    code = f"""
import os, signal, time
from bitnet import train
def interrupted(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
train.{part} = interrupted
train.main(["--data", "numbers.txt", "--out", "run"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == f"\nstopped while {doing}; go on with: python -m bitnet.train --resume run\n"
    assert Path("run/train.yaml").is_file()


def test_a_run_tells_its_gap_to_another(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", text, *SMALL, "--plots", "false", "--sample-tokens", "0"]
    assert run(*flags, "--steps", "4", "--eval-every", "2", "--out", "twin", "--twin") == 0
    assert "gap" not in capsys.readouterr().out
    assert run(*flags, "--steps", "6", "--eval-every", "1", "--out", "a", "--compare", "twin") == 0
    own, its = (read_metrics(f"{name}/metrics.jsonl")[3]["val_loss"] for name in ("a", "twin"))
    said = f"validation loss {own:.4f}, {its:.4f} of twin: gap {own - its:+.4f} nats at step 4\n"
    assert own != its
    assert said in capsys.readouterr().out
    assert run("--resume", "a", "--compare", "nowhere") == 0
    assert "no gap to nowhere: there is no step at which both runs were evaluated\n" in capsys.readouterr().out
    assert run("--resume", "a", "--compare", "numbers.txt") == 0
    assert "no gap to numbers.txt: Not a directory\n" in capsys.readouterr().out


def test_pictures_of_a_run_without_evaluations(tmp_path: Path) -> None:
    records = [{"step": n, "train_loss": 5 / n, "val_loss": None} for n in range(1, 4)]
    plots.loss_curves(tmp_path / "a.png", records)
    plots.loss_curves(tmp_path / "b.png", [], json.loads(json.dumps(records)))
    assert png_size(tmp_path / "a.png") == png_size(tmp_path / "b.png")
    assert np.all(np.diff(plots._smooth([3.0, 2.0, 1.0])) < 0)

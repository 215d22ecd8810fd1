"""Fine-tuning: going on from weights that are there, and learning answers only."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from bitnet import checkpoint, cli, from_pretrained
from bitnet.formats.hf_export import save_hf
from bitnet.metrics import read_metrics

SHAPE = (
    "--tokenizer bytes --hidden-size 32 --intermediate-size 48 --num-hidden-layers 1 --num-attention-heads 2".split()
)
SHORT = "--batch-size 2 --seq-len 16 --steps 4 --save-every 2 --sample-tokens 0 --plots false --spike 0".split()
LINES = "".join(f"{n} squared is {n * n}.\n" for n in range(200))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    root = tmp_path_factory.mktemp("base")
    (root / "numbers.txt").write_text(LINES)
    assert run("--data", root / "numbers.txt", *SHAPE, *SHORT, "--out", root / "run") == 0
    return root / "run"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "other.txt"
    path.write_text(LINES[::-1])
    return path


def run(*arguments: str | Path) -> int:
    return cli.main(["train", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The sentence of a command that is refused."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def weights_of(folder: Path, step: int = 4) -> bytes:
    return (checkpoint.folder_of(folder, step) / "model.safetensors").read_bytes()


# ---- going on from a checkpoint -------------------------------------------------------------------------------------


def test_init_begins_where_another_run_ended(base: Path, text: Path) -> None:
    assert run("--init", base, "--data", text, *SHORT, "--lr", "1e-30", "--weight-decay", "0", "--out", "same") == 0
    before, after = from_pretrained(base).state_dict(), from_pretrained("same").state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert run("--init", base, "--data", text, *SHORT, "--out", "other") == 0
    assert weights_of(Path("other")) != weights_of(base)
    assert from_pretrained("other").config == from_pretrained(base).config
    assert [record["step"] for record in read_metrics("other/metrics.jsonl")] == [1, 2, 3, 4]  # a fresh beginning
    options = yaml.safe_load(Path("other/train.yaml").read_text())
    assert options["init"] == str(base)
    assert not options.keys() & {"hidden_size", "tokenizer", "preset"}


def test_init_resumes_to_the_same_bytes_without_its_source(base: Path, text: Path) -> None:
    shutil.copytree(base, "source")
    assert run("--init", "source", "--data", text, *SHORT, "--out", "whole") == 0
    shutil.copytree("whole", "cut")
    shutil.rmtree(checkpoint.folder_of("cut", 4))
    shutil.rmtree("source")
    assert run("--resume", "cut") == 0
    assert weights_of(Path("cut")) == weights_of(Path("whole"))
    assert [record["step"] for record in read_metrics("cut/metrics.jsonl")] == [1, 2, 3, 4]


def test_what_init_decides_cannot_be_chosen(base: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in {
        ("--hidden-size", "64"): "hidden_size and init exclude each other",
        ("--preset", "nano"): "preset and init exclude each other",
        ("--tokenizer", "chars"): "tokenizer and init exclude each other",
        ("--vocab-size", "300"): "vocab_size and init exclude each other",
        ("--twin",): "twin and init exclude each other",
        ("--seq-len", "2100"): "seq_len 2100 is more than the model's max_position_embeddings",
    }.items():
        assert message in refused(capsys, "--init", base, "--data", text, *SHORT[:2], *SHORT[4:], *flags)
    assert "there is no folder" in refused(capsys, "--init", "nowhere", "--data", text, *SHORT)
    assert cli.main(["data", "--data", str(text), "--tokenizer", "chars", "--seq", "16", "--out", "chars"]) == 0
    assert "another tokenizer than that of" in refused(capsys, "--init", base, "--data", "chars", *SHORT)


def test_a_packed_model_has_nothing_to_train(base: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pack", str(base), "-o", "packed.bitnet"]) == 0
    assert "has codes and scales, but no latent weights" in refused(
        capsys, "--init", "packed.bitnet", "--data", text, *SHORT
    )


def test_init_takes_a_hugging_face_folder(base: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = from_pretrained(base)
    save_hf(model, "theirs", packed=False)
    assert run("--init", "theirs", "--data", text, *SHORT, "--out", "tuned") == 0
    assert run("--init", base, "--data", text, *SHORT, "--out", "own") == 0
    assert weights_of(Path("tuned")) == weights_of(Path("own"))
    options = yaml.safe_load(Path("tuned/train.yaml").read_text())
    assert options["init"] == str(Path("theirs").resolve())
    save_hf(model, "codes", packed=True)
    assert "no latent weights" in refused(capsys, "--init", "codes", "--data", text, *SHORT)

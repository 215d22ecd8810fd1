"""The runs of recipes/: found by name from anywhere, what their comments say, short forms of them trained."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from bitnet import BitNetForCausalLM, train
from bitnet._core import get_threads, set_threads
from bitnet.metrics import read_metrics
from bitnet.run_config import Settings, read_yaml
from bitnet.shipped import shipped, shipped_names

FILES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
PARAMETERS = {"tinyshakespeare": (65, 0, 11_000_000), "stdlib": (4096, 10_000_000, 13_000_000)}  # ids, least, most
SHORT = "--steps 2 --batch-size 2 --seq-len 16 --warmup 1 --eval-blocks 2 --plots false --sample-tokens 0".split()
SHORT += "--hidden-size 32 --intermediate-size 48 --num-hidden-layers 1 --num-attention-heads 2 --threads 1".split()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_has_the_size_that_it_promises(path: Path) -> None:
    vocabulary, least, most = PARAMETERS[path.stem]
    settings = Settings.of(read_yaml(path))
    assert settings.trainer.steps is not None
    count = BitNetForCausalLM(settings.model_config(vocabulary)).num_parameters()
    assert least <= count <= most
    assert f"{count:,}" in path.read_text(), "its comment says how many"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trains_by_name_with_its_twin(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "tiny.txt"
    text.write_text("".join(f"{n} squared is {n * n}, and {n} doubled is {n + n}.\n" for n in range(400)))
    before, losses = get_threads(), []
    for flags in ([], ["--twin"]):
        words = ["--config", path.stem, "--data", str(text), "--tokenizer", "chars", "--out", f"run{len(flags)}"]
        assert train.main([*words, *SHORT, *flags]) == 0
        losses.append(read_metrics(tmp_path / f"run{len(flags)}" / "metrics.jsonl")[-1]["val_loss"])
    set_threads(before)
    assert losses[0] != losses[1]
    used = read_yaml(tmp_path / "run0" / "train.yaml")
    mine = read_yaml(path)
    assert all(used[name] == mine[name] for name in ("lr", "ema", "schedule", "weight_decay") if name in mine)


def test_a_name_that_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "tinyshakespear", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "'tinyshakespear'" in said
    assert "stdlib, tinyshakespeare" in said
    assert not (tmp_path / "run").exists()


def test_a_user_s_installation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip install --user puts data files where the user's scheme says, not where the default one does."""
    user = sysconfig.get_preferred_scheme("user")
    folders = {None: tmp_path / "prefix", user: tmp_path / "user"}
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme=None: str(folders[scheme]))
    monkeypatch.setattr("bitnet.shipped.__file__", str(tmp_path / "site" / "bitnet" / "shipped.py"))
    assert shipped_names("recipes") == []
    for folder, name in ((folders[user], "mine"), (folders[None], "ours")):
        recipe = folder / "share" / "bitnet" / "recipes" / f"{name}.yaml"
        recipe.parent.mkdir(parents=True)
        recipe.touch()
        assert shipped("recipes", name) == recipe
    assert shipped_names("recipes") == ["mine", "ours"]


def test_names_are_no_paths() -> None:
    assert [path.stem for path in FILES] == shipped_names("recipes")
    assert shipped("recipes", "../datasets/tinystories") is None
    assert shipped("datasets", "tinystories") is not None

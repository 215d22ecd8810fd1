"""benchmarks/ablation.py: what each lever of ternary pretraining is worth, run quickly and put in a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_runs import pack_numbers

from bitnet.metrics import read_metrics
from bitnet.run_config import Settings
from bitnet.train import arguments, options_given

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import ablation
import history


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_numbers(tmp_path_factory.mktemp("text"))


def test_the_ablation_runs_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runs that were asked for, with their gaps; begun again it trains nothing, and other options are refused."""
    history_file, work = tmp_path / "history.jsonl", tmp_path / "work"
    words = ["--quick", "--data", str(folder), "--seeds", "0", "--levers", "distill", "wsd", "--own-twins"]
    words += ["--lrs", "1e-3", "4e-3", "--work", str(work), "--history", str(history_file)]
    names = ["twin", "plain", "plain lr 0.001", "plain lr 0.004", "distill", "wsd"]
    names += ["twin lr 0.001", "twin lr 0.004", "twin wsd"]
    tables = []
    for _ in range(2):
        ablation.main(words)
        lines = capsys.readouterr().out.splitlines()
        tables.append([line for line in lines if line.startswith(tuple(names))])
    assert tables[0] == tables[1]
    assert len(tables[0]) == len(names)
    assert [entry["entry"] for entry in history.read(history_file)[0]["results"]] == names
    folders = sorted(path.name for path in work.iterdir() if path.is_dir())
    assert folders == sorted(f"{name.replace(' ', '-')}-0" for name in names)
    assert all(len(read_metrics(work / name / "metrics.jsonl")) == 5 for name in folders)
    with pytest.raises(SystemExit, match="holds a run with other options: choose another --work"):
        ablation.main([*words, "--lr", "1e-3"])


def test_the_levers_of_the_ablation_are_options() -> None:
    for name, flags in ablation.LEVERS.items():
        settings = Settings.of(options_given(arguments().parse_args(flags(100, Path("twin")))))
        assert settings != Settings.of({}), name


def test_the_table_of_the_ablation() -> None:
    table = ablation.table([{"twin": 3.0, "plain": 3.5, "wsd": 3.25}, {"twin": 3.5, "plain": 4.0, "wsd": 3.5}])
    assert table.splitlines()[-1].split() == "wsd 3.3750 +- 0.1250 -0.3750 +- 0.1250 +0.1250 +- 0.1250".split()
    rates = ablation.table([{"twin": 3.0, "twin lr 1": 2.0, "plain": 3.5, "plain lr 1": 2.25}])
    assert rates.splitlines()[-1].split()[-1] == "+0.2500"  # beside the twin of the same rate

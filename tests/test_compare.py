"""The comparison of benchmark results, on results made up here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compare
import history

MACHINE = {"cpu": "one", "family_model": "6/1", "features": ["fma"], "cores": 2, "system": "Linux", "compiler": "cc 1"}
SETTINGS = {"preset": "nano", "threads": 2}


def write(path: Path, samples: list[float], unit: str = "tokens/s", machine: dict = MACHINE, **settings: Any) -> Path:
    """A history whose last run has these samples; a run before it, and one with other settings, must not matter."""
    higher = unit == "tokens/s"
    runs = [
        history.run("speed", SETTINGS | settings, machine, [history.entry("bitnet", values, unit, higher)])
        for values in ([1e9 if higher else 1e-9], samples)
    ]
    runs.append(history.run("speed", {"preset": str(path)}, machine, [history.entry("bitnet", [1.0], unit, higher)]))
    history.keep(argparse.Namespace(history=path, json=None), runs)
    return path


def outcome(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> tuple[int, str]:
    status = compare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.mark.parametrize(
    ("old", "new", "unit", "status", "verdict"),
    [
        ([100.0, 101, 99], [100.0, 101, 99], "tokens/s", 0, "equal"),
        ([100.0, 106, 94], [88.0, 90, 93], "tokens/s", 0, "equal"),  # a tenth slower, but they scatter by more
        ([100.0, 101, 99], [90.0, 91, 89], "tokens/s", 1, "REGRESSION"),
        ([100.0, 101, 99, 20], [99.0, 98, 100, 30], "tokens/s", 0, "equal"),  # disturbed samples
        ([100.0, 101, 99], [110.0, 111, 112], "tokens/s", 0, "better"),
        ([1.00, 1.01, 0.99], [1.11, 1.10, 1.12], "seconds", 1, "REGRESSION"),  # here less is better
        ([1.00, 1.01, 0.99], [0.90, 0.91, 0.89], "seconds", 0, "better"),
        ([1.692], [1.700], "nats", 0, "equal"),  # within the floor
        ([1.692], [1.800], "nats", 1, "REGRESSION"),
    ],
)
def test_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: list, new: list, unit: str, status: int, verdict: str
) -> None:
    files = write(tmp_path / "old", old, unit), write(tmp_path / "new", new, unit)
    found, output = outcome(capsys, *files)
    assert found == status
    assert f"%  {verdict}" in output
    assert f"{status} regression" in output


def test_the_floor_is_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path / "old", [100.0]), write(tmp_path / "new", [98.0])
    assert outcome(capsys, *files)[0] == 0
    assert outcome(capsys, *files, "--floor", "0.01")[0] == 1


def test_another_machine_is_refused_or_shouted_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path / "old", [100.0]), write(tmp_path / "new", [50.0], machine=MACHINE | {"cpu": "two"})
    status, output = outcome(capsys, *files)
    assert (status, "different machines" in output, "cpu: one and two" in output) == (2, True, True)
    status, output = outcome(capsys, *files, "--other-machine")
    assert (status, "WARNING: another machine: cpu: one and two" in output) == (1, True)


def test_other_software_is_only_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path / "old", [100.0]), write(tmp_path / "new", [100.0], machine=MACHINE | {"compiler": "cc 2"})
    status, output = outcome(capsys, *files)
    assert (status, "note: compiler: cc 1 and cc 2" in output) == (0, True)


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, other = write(tmp_path / "old", [100.0]), write(tmp_path / "new", [1.0], threads=1)
    assert outcome(capsys, old, other) == (2, f"error: {old} and {other} share no benchmark with the same settings\n")
    broken = tmp_path / "broken"
    broken.write_text(old.read_text() + "{\n")
    assert f"{broken}, line 4: " in outcome(capsys, old, broken)[1]
    broken.write_text('{"benchmark": "speed"}')
    assert "run 1 lacks one of" in outcome(capsys, old, broken)[1]
    assert outcome(capsys, old, tmp_path / "absent")[0] == 2


def test_json_files_entries_of_one_name_and_engines_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--json holds one run or a list; seeds of one step are samples of one entry; an error is no measurement."""
    for name, losses in {"old": (1.0, 1.2, 1.1), "new": (1.3, 1.1, 1.2)}.items():
        results = [history.entry("step 5", [loss], "nats", False, seed=i) for i, loss in enumerate(losses)]
        runs = [history.run("loss", {}, MACHINE, [*results, {"entry": "torch", "error": "absent", "samples": []}])]
        history.keep(argparse.Namespace(history=tmp_path / "history", json=tmp_path / name), runs)
    assert len(history.read(tmp_path / "history")) == 2
    assert isinstance(json.loads((tmp_path / "old").read_text()), dict)
    status, output = outcome(capsys, tmp_path / "old", tmp_path / "new")
    assert status == 0
    assert "1.1 -> " in output
    assert "torch" not in output
    history.keep(argparse.Namespace(history=tmp_path / "history", json=tmp_path / "list"), runs * 2)
    assert len(history.read(tmp_path / "list")) == 2

"""Nothing grows: each script of tests/isolated repeats something hundreds of times in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bitnet

SCRIPTS = sorted(path for path in Path(__file__).with_name("isolated").glob("*.py") if path.name != "growth.py")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_repeating_costs_no_memory(script: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(bitnet.__file__).parents[1])}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    assert said == ""

"""`import bitnet` is light: no heavy module, not a word, no thread, hardly any time beside NumPy's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bitnet

HEAVY = ["torch", "transformers", "matplotlib", "sentencepiece", "tokenizers", "safetensors", "yaml", "tqdm"]
SCRIPT = f"""
import json, os, sys, time
import numpy
tasks = lambda: len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
before, started = tasks(), time.perf_counter()
import bitnet
seconds = time.perf_counter() - started
print(json.dumps([seconds, [name for name in {HEAVY} if name in sys.modules], tasks() - before]))
"""


def fresh_import() -> tuple[float, list[str], int]:
    """(seconds beside NumPy, heavy modules loaded, threads started) of a new process that says nothing of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(bitnet.__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("\n") == 1, run.stdout
    seconds, heavy, threads = json.loads(run.stdout)
    return seconds, heavy, threads


def test_import_is_quick_and_silent_and_loads_nothing_heavy() -> None:
    runs = [fresh_import() for _ in range(3)]
    assert min(seconds for seconds, *_ in runs) < 0.5  # the least of three: a busy machine is not the package's fault
    assert [(heavy, threads) for _, heavy, threads in runs] == [([], 0)] * 3


def test_every_public_name_is_there() -> None:
    assert all(getattr(bitnet, name) is not None for name in bitnet.__all__)

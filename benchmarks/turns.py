"""Engines that take turns, each in a process of its own: the protocol between inference.py and its workers.

A worker loads its model, says what it holds, and then blocks on a pipe except while it has its turn, so that the one
that is timed has the machine to itself. Questions and answers are one line of JSON each. Nothing here needs more than
NumPy, because an engine may live in an interpreter without bitnet.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

REST = 0.1  # seconds before a turn, in which the threads of the last one stop looking for work

Logits = npt.NDArray[np.floating[Any]]


class Engine(Protocol):
    """One sequence of one model; each call runs to its end before it returns."""

    about: str  # version and the like
    weight_bytes: float  # read for each token that is decoded
    cache_bytes: float  # read besides, for each token before it

    def set_threads(self, threads: int) -> None:
        """From the next call on."""

    def prefill(self, tokens: list[int]) -> Logits:
        """Forgets what came before; logits (V,) after the last of the tokens, which alone has any made."""

    def step(self, token: int) -> Logits:
        """Logits (V,) after one more."""


def serve(make: Callable[[dict[str, Any]], Engine]) -> None:
    """The worker: settings come as the first argument, questions on stdin, answers go to stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    engine = make(json.loads(sys.argv[1]))
    forget_peak()
    holds = {name: getattr(engine, name) for name in ("about", "weight_bytes", "cache_bytes")}
    print(json.dumps(holds), file=answers)
    for line in sys.stdin:
        question = json.loads(line)
        engine.set_threads(question["threads"])
        answer = run(engine, question["prompt"], question["following"], question.get("logits", False))
        print(json.dumps(answer | {"peak_memory_bytes": peak_bytes()}), file=answers)


def run(engine: Engine, prompt: list[int], following: list[int], logits: bool = False) -> dict[str, Any]:
    """Seconds of a prompt, and of one of the tokens that follow it; or all logits, (1 + len(following), V)."""
    if logits:
        rows = [engine.prefill(prompt).tolist()]  # each becomes a list before the engine overwrites it
        return {"logits": rows + [engine.step(token).tolist() for token in following]}
    start = time.perf_counter()
    last = engine.prefill(prompt)
    middle = time.perf_counter()
    if np.isnan(last).any():
        raise FloatingPointError(f"a logit after a prompt of {len(prompt)} tokens is no number")
    began = time.perf_counter()
    for token in following:
        last = engine.step(token)
    end = time.perf_counter()
    if np.isnan(last).any():
        raise FloatingPointError(f"a logit after {len(following)} further tokens is no number")
    return {"prompt_seconds": middle - start, "decode_seconds": (end - began) / len(following)}


def forget_peak() -> None:
    """From now on peak_bytes() means what comes: loading a model takes more memory than running it. Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory this process held, as the system counts it."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


class Worker:
    """The other side: one engine's process. One that ends leaves its last words in `error` and answers no more."""

    def __init__(
        self,
        script: str,
        settings: dict[str, Any],
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.error: str | None = None
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe for what it prints could fill and stop it)
        command = [python, str(Path(__file__).with_name(script)), json.dumps(settings)]
        self.process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words)  # fmt: skip
        self.holds = self._answer()

    def ask(self, **question: Any) -> dict[str, Any] | None:
        """The answer; None from a worker that has ended."""
        if self.error is not None:
            return None
        assert self.process.stdin is not None
        time.sleep(REST)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.words.seek(0)
        self.error = self.words.read().strip()[-2000:] or f"ended with status {status}"
        return None

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()
        self.words.close()

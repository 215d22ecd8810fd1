"""Tokens per second and peak memory of a full training step, beside PyTorch: forward, backward, clip, AdamW.

    python benchmarks/train_speed.py --preset nano --seq-len 512 --threads 2 --json speed.json
    python benchmarks/train_speed.py --preset char nano 125m --threads 1 2

Each engine lives in a process of its own, so that its peak memory and its threads are its own, and only one of them
runs at a time: they take turns in rounds of a few seconds, and the median over the rounds is reported, so that a
machine that slows down slows all of them. bitnet replays a recorded step as its trainer does, with a fast backward pass
and, as bitnet_int8 and bitnet_fp32, the two others. PyTorch runs the tests'
independent BitNet (torch_models.py) at its best: fused attention and AdamW, and a malloc that is told to keep its
memory, without which page faults take up to half of its time. An engine that cannot run is reported with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import history
import machine
import numpy as np

OURS = {"bitnet": "fast", "bitnet_int8": "int8", "bitnet_fp32": "fp32"}  # engine to the precision of its backward pass
ENGINES = [*OURS, "torch_eager_fp32", "torch_compile_fp32", "torch_eager_bf16", "torch_compile_bf16"]
BATCH = {"char": (16, 256), "nano": (4, 512), "125m": (4, 512)}  # batch size and length, by preset
KEEP_MEMORY = {  # read by glibc as the process starts
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
LR, MAX_NORM = 1e-3, 1.0

Step = Callable[[np.ndarray, np.ndarray], float]


# ---- the engines, each in a worker ----


def bitnet_step(engine: str, settings: dict[str, Any]) -> Step:
    import bitnet

    bitnet.set_threads(settings["threads"])
    config = bitnet.BitNetConfig.preset(settings["preset"])
    model = bitnet.BitNetForCausalLM(config)
    optimizer = bitnet.optim.AdamW(model, lr=LR)
    shape = (settings["batch_size"], settings["seq_len"])
    tokens, targets = bitnet.zeros(shape, "i32"), bitnet.zeros(shape, "i32")
    with bitnet.ops.precision(OURS[engine]), bitnet.Tape() as tape:
        loss = model(tokens, targets)

    def step(new_tokens: np.ndarray, new_targets: np.ndarray) -> float:
        tokens.copy_(new_tokens)
        targets.copy_(new_targets)
        optimizer.zero_grad()
        tape.replay()
        loss.backward()
        optimizer.clip_grad_norm(MAX_NORM)
        optimizer.step()
        return loss.item()

    return step


def torch_step(engine: str, settings: dict[str, Any]) -> Step:
    import torch
    import torch_models

    import bitnet

    torch.set_num_threads(settings["threads"])
    model = torch_models.build(bitnet.BitNetConfig.preset(settings["preset"]))
    if engine.endswith("bf16"):
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return torch_models.training_step(model, LR, MAX_NORM, compiled="compile" in engine)


def batches(settings: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same random tokens for every engine."""
    import bitnet

    rng = np.random.default_rng(0)
    vocabulary = bitnet.BitNetConfig.preset(settings["preset"]).vocab_size
    shape = (2, settings["batch_size"], settings["seq_len"])
    while True:
        tokens, targets = rng.integers(0, vocabulary, shape, dtype=np.int32)
        yield tokens, targets


def work(engine: str, settings: dict[str, Any]) -> None:
    """Takes turns: for every line on stdin, runs for so many seconds and answers with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    step = bitnet_step(engine, settings) if engine in OURS else torch_step(engine, settings)
    data = batches(settings)
    for line in sys.stdin:
        seconds = float(line)
        steps, losses, started = 0, [], time.perf_counter()
        while steps == 0 or time.perf_counter() - started < seconds:
            losses.append(step(*next(data)))
            steps += 1
        elapsed = time.perf_counter() - started
        assert np.isfinite(losses).all(), f"{engine}: loss {losses[-1]}"
        print(json.dumps({"steps": steps, "seconds": elapsed, "loss": losses[-1], "peak": peak_bytes()}), file=answers)


def peak_bytes() -> int:
    """The most memory this process ever held, as the system counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# ---- taking turns ----


class Worker:
    """One engine's process, blocked on a pipe except while it has its turn."""

    def __init__(self, engine: str, settings: dict[str, Any]) -> None:
        self.samples: list[float] = []
        self.peak = 0
        self.error: str | None = None
        self.tokens = settings["batch_size"] * settings["seq_len"]
        environment = dict(os.environ)
        if engine not in OURS:
            environment |= KEEP_MEMORY | {"OMP_NUM_THREADS": str(settings["threads"])}
        command = [sys.executable, __file__, "--worker", engine, json.dumps(settings)]
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe for what it prints could fill and stop it)
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.words)  # fmt: skip

    def turn(self, seconds: float, timed: bool = True) -> None:
        """Runs for so many seconds; a worker that ends instead leaves its last words in `error`."""
        if self.error is not None:
            return
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(seconds, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            self.words.seek(0)
            self.error = self.words.read().strip()[-2000:] or f"ended with status {status}"
            return
        result = json.loads(answer)
        self.peak = result["peak"]
        if timed:
            self.samples.append(self.tokens * result["steps"] / result["seconds"])

    def report(self) -> dict[str, Any]:
        self.process.kill()
        self.process.wait()
        if self.error is not None:
            return {"error": self.error}
        return {
            "tokens_per_second": statistics.median(self.samples),
            "peak_memory_bytes": self.peak,
            "samples": self.samples,
        }


def measure(engines: list[str], settings: dict[str, Any], rounds: int, seconds: float) -> dict[str, Any]:
    """Engine to its report. The first two steps of each, compilation among them, are not timed."""
    workers = {engine: Worker(engine, settings) for engine in engines}
    for engine, worker in workers.items():
        print(f"warming up {engine}", file=sys.stderr)
        for _ in range(2):
            worker.turn(0, timed=False)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for worker in workers.values():
            worker.turn(seconds)
    return {engine: worker.report() for engine, worker in workers.items()}


def table(reports: dict[str, Any]) -> str:
    """Tokens/s, spread, peak memory, and what they are beside the best of PyTorch and beside its plain self."""
    torch = [report for engine, report in reports.items() if engine not in OURS and "error" not in report]
    best = max((report["tokens_per_second"] for report in torch), default=None)
    eager = reports.get("torch_eager_fp32", {})
    head = f"{'engine':20} {'tokens/s':>10} {'min .. max':>19} {'peak MB':>9}"
    lines = [f"{head} {'/ best torch':>12} {'/ eager fp32':>12} {'memory / its':>12}"]
    for engine, report in reports.items():
        if "error" in report:
            lines.append(f"{engine:20} cannot run: {report['error'].splitlines()[-1]}")
            continue
        speed, samples = report["tokens_per_second"], report["samples"]
        memory = report["peak_memory_bytes"]
        pairs = ((speed, best), (speed, eager.get("tokens_per_second")), (memory, eager.get("peak_memory_bytes")))
        ratios = " ".join(f"{f'{value / base:.2f} x' if base else '-':>12}" for value, base in pairs)
        spread = f"{min(samples):,.0f} .. {max(samples):,.0f}"
        lines.append(f"{engine:20} {speed:10,.0f} {spread:>19} {memory / 1e6:9,.0f} {ratios}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed and memory beside PyTorch.")
    parser.add_argument("--preset", "--presets", nargs="+", default=["nano"], dest="presets", metavar="P",
                        help="presets of bitnet.config (default nano)")  # fmt: skip
    parser.add_argument("--seq-len", type=int, metavar="T", help="tokens in a row (default 512, for char 256)")
    parser.add_argument("--batch-size", type=int, metavar="B", help="rows (default 4, for char 16)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], metavar="N", help="of every engine (default 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="turns of every engine (default 5)")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="length of a turn (default 4)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, metavar="E", help=", ".join(ENGINES))
    parser.add_argument("--precision", nargs="+", choices=list(OURS.values()), default=list(OURS.values()),
                        metavar="P", help="which engines of bitnet: fast, int8, fp32 (default all)")  # fmt: skip
    history.add_arguments(parser)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], json.loads(args.worker[1]))
        return
    here = machine.fingerprint()
    print(machine.one_line(here))
    engines = [engine for engine in args.engines if OURS.get(engine, args.precision[0]) in args.precision]
    runs = []
    for preset in args.presets:
        batch_size, seq_len = BATCH.get(preset, (4, 512))
        for threads in args.threads:
            settings = {
                "preset": preset,
                "seq_len": args.seq_len or seq_len,
                "batch_size": args.batch_size or batch_size,
                "threads": threads,
            }
            print(", ".join(f"{name} {value}" for name, value in settings.items()))
            reports = measure(engines, settings, args.rounds, args.seconds)
            print(table(reports), flush=True)
            settings |= {"rounds": args.rounds, "seconds": args.seconds}
            results = [history.entry(engine, report.get("samples", []), "tokens/s", True)
                       for engine, report in reports.items()]  # fmt: skip
            results += [history.entry(f"{engine} memory", [report["peak_memory_bytes"]], "bytes", False)
                        for engine, report in reports.items() if "error" not in report]  # fmt: skip
            runs.append(history.run("train_speed", settings, here, results, **reports))
    history.keep(args, runs)


if __name__ == "__main__":
    main()

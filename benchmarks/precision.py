"""What a precision of the backward pass costs in loss: the same run in each of them, for several seeds.

    bitnet data --recipe stdlib --out PACK
    python benchmarks/precision.py --data PACK --preset nano --steps 500 --seeds 0 1 2 3

A seed fixes the initial weights and the batches, so its runs differ in nothing but how the backward pass rounds. They
still part after some tens of steps, as any two roundings do: a single difference says little, the mean over seeds with
its standard error says how much. Validation is the exact forward pass in all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import history
import machine

from bitnet import mfu

EXACT = "fp32"


def losses(args: argparse.Namespace, precision: str, seed: int, out: Path) -> dict[int, float]:
    """Validation loss by step of one run."""
    command = [sys.executable, "-m", "bitnet.train", "--data", str(args.data), "--out", str(out),
               "--preset", args.preset, "--seq-len", str(args.seq_len), "--batch-size", str(args.batch_size),
               "--steps", str(args.steps), "--lr", str(args.lr), "--eval-every", str(max(args.steps // 5, 1)),
               "--save-every", str(args.steps), "--sample-tokens", "0", "--plots", "false", "--seed", str(seed),
               "--precision", precision]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["val_loss"] for line in lines if line.get("val_loss") is not None}


def summary(differences: list[float]) -> str:
    """Mean, and its standard error where there is more than one."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+9.4f}"
    return f"{mean:+9.4f} +- {statistics.stdev(differences) / len(differences) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Validation loss of each precision against fp32's.")
    parser.add_argument("--data", type=Path, required=True, metavar="PACK", help="a folder that bitnet data made")
    parser.add_argument("--preset", default="nano", metavar="P", help="(default nano)")
    parser.add_argument("--precision", nargs="+", choices=mfu.PRECISIONS, default=["fast", "int8"], metavar="P",
                        help="beside fp32 (default: fast int8)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="(default 0 1 2)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="of each run (default 500)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="T", help="(default 256)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="(default 8)")
    parser.add_argument("--lr", type=float, default=2e-3, metavar="X", help="peak learning rate (default 2e-3)")
    history.add_arguments(parser)
    args = parser.parse_args()
    here = machine.fingerprint()
    print(machine.one_line(here))
    print(f"{args.preset}, {args.steps} steps of {args.batch_size} x {args.seq_len} tokens")
    results: list[dict[str, Any]] = []
    differences: dict[tuple[str, int], list[float]] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            exact = losses(args, EXACT, seed, Path(folder) / EXACT)
            print(
                f"seed {seed}, fp32:  " + "  ".join(f"{step}: {loss:.4f}" for step, loss in exact.items()), flush=True
            )
            for precision in args.precision:
                found = losses(args, precision, seed, Path(folder) / precision)
                by_step = {step: found[step] - exact[step] for step in exact}
                text = "  ".join(f"{step}: {by:+.4f}" for step, by in by_step.items())
                print(f"seed {seed}, {precision} - fp32:  {text}", flush=True)
                for step, by in by_step.items():
                    differences.setdefault((precision, step), []).append(by)
                name = f"{precision} at step {args.steps}"
                results.append(history.entry(name, [found[args.steps]], "nats", False, seed=seed, losses=found,
                                             fp32=exact))  # fmt: skip
    print("mean over the seeds, nats per token:")
    for (precision, step), values in differences.items():
        print(f"  {precision:>5} - fp32 at step {step:6}: {summary(values)}")
    settings = {name: getattr(args, name) for name in ("preset", "seeds", "steps", "seq_len", "batch_size", "lr")}
    history.keep(args, [history.run("precision", {**settings, "data": args.data.name}, here, results)])


if __name__ == "__main__":
    main()

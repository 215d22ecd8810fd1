"""What each lever of ternary training is worth in loss: the same run with and without it, for several seeds.

    bitnet data --recipe stdlib --tokenizer bytes --max-mb 12 --out PACK
    python benchmarks/ablation.py --data PACK --work RUNS --jobs 2 --lrs 1e-3 4e-3 8e-3 --seeds 0 1 2

A seed fixes the initial weights and the batches, so a run with a lever is compared with the plain run of its seed: the
mean of those differences has a smaller error than the difference of the means. The gap is to the full-precision twin
of the seed, trained plainly, or with --own-twins by the same lever where a twin has it too: a lever that helps both
closes the first gap and not the second. --lrs adds plain runs at other learning rates.

Every run is a process of `bitnet train` whose folder stays in --work: what was interrupted goes on with the runs that
are missing, and `bitnet report` draws any of them. Threads and jobs change no figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import history
import machine

from bitnet.data import pack
from bitnet.metrics import read_metrics

PLAIN, TWIN = "plain", "twin"
# The flags of each lever, for a number of steps and the folder of the seed's twin.
LEVERS: dict[str, Callable[[int, Path], list[str]]] = {
    "two-stage": lambda steps, twin: ["--schedule", "two-stage"],
    "wsd": lambda steps, twin: ["--schedule", "wsd"],
    "ema": lambda steps, twin: ["--ema", str(max(0.5, 1 - 20 / steps))],  # an average over a twentieth of the run
    "muon": lambda steps, twin: ["--optimizer", "muon"],
    "distill": lambda steps, twin: ["--teacher", str(twin)],
    "distill-attention": lambda steps, twin: ["--teacher", str(twin), "--distill-attention", "1"],
    "switch": lambda steps, twin: ["--ternary-from", str(steps // 5)],
    "ramp": lambda steps, twin: ["--ternary-from", str(steps // 5), "--ternary-ramp", str(max(1, steps // 5))],
    "requantize-8": lambda steps, twin: ["--requantize-every", "8"],
    "channel-scales": lambda steps, twin: ["--weight-scales", "channel"],
    "hadamard": lambda steps, twin: ["--hadamard", "true"],
    "int4": lambda steps, twin: ["--activation-bits", "4"],
    "int4-hadamard": lambda steps, twin: ["--activation-bits", "4", "--hadamard", "true"],
}
SHARED = ("two-stage", "wsd", "ema", "muon")  # what a twin can have too
QUICK = "--hidden-size 32 --intermediate-size 48 --num-hidden-layers 1 --num-attention-heads 2 --eval-blocks 4".split()


class Ablation:
    """The runs of one call: their commands, their folders, and their losses."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work

    def names(self) -> tuple[list[str], list[str]]:
        """Of the runs of one seed: what comes first because others learn from it, and the rest."""
        args = self.args
        rates = [f"lr {lr:g}" for lr in args.lrs]
        own = [*rates, *(name for name in args.levers if name in SHARED)] if args.own_twins else []
        later = [f"{PLAIN} {rate}" for rate in rates] + args.levers + [f"{TWIN} {name}" for name in own]
        return [TWIN, PLAIN], later

    def words(self, name: str, seed: int) -> list[str]:
        """The flags of a run of `bitnet train`, without its folder."""
        args = self.args
        kind, _, lever = name.partition(" ")
        if kind not in (PLAIN, TWIN):
            lever = name
        flags = ["--twin"] if kind == TWIN else []
        lr = args.lr
        if lever.startswith("lr "):
            lr = float(lever.removeprefix("lr "))
        elif lever:
            flags += LEVERS[lever](args.steps, self.folder(TWIN, seed))
        return ["--data", str(args.data), "--preset", args.preset, "--seq-len", str(args.seq_len),
                "--batch-size", str(args.batch_size), "--steps", str(args.steps), "--lr", str(lr),
                "--eval-every", str(args.steps), "--save-every", str(args.steps), "--sample-tokens", "0",
                "--plots", "false", "--layer-stats", "0", "--seed", str(seed),
                *(f"--set={text}" for text in args.set), *(QUICK if args.quick else []), *flags]  # fmt: skip

    def folder(self, name: str, seed: int) -> Path:
        """Where a run lies."""
        return self.work / f"{name.replace(' ', '-')}-{seed}"

    def loss(self, run: tuple[str, int]) -> float:
        """The last validation loss of a run, of its averaged weights if it has them: trained now, or gone on with."""
        name, seed = run
        out, words = self.folder(name, seed), self.words(name, seed)
        record = self.work / f"{out.name}.json"  # the rate in a name has a dot
        if record.is_file() and json.loads(record.read_text()) != words:
            sys.exit(f"{out} holds a run with other options: choose another --work")
        record.write_text(json.dumps(words))
        if _last_step(out) < self.args.steps:
            where = ["--resume", str(out)] if (out / "train.yaml").is_file() else [*words, "--out", str(out)]
            command = [sys.executable, "-m", "bitnet.train", *where, "--threads", str(self.args.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{' '.join(command[1:])} ended with status {done.returncode}: {done.stderr}")
        last = read_metrics(out / "metrics.jsonl")[-1]
        value = float(last.get("val_loss_ema") or last["val_loss"])
        print(f"seed {seed}  {name:<22} {value:.4f}", flush=True)
        return value

    def losses(self) -> list[dict[str, float]]:
        """Of every seed, the loss of every run."""
        found: dict[tuple[str, int], float] = {}
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for names in self.names():
                runs = [(name, seed) for seed in self.args.seeds for name in names]
                found.update(zip(runs, pool.map(self.loss, runs), strict=True))
        names = [name for group in self.names() for name in group]
        return [{name: found[name, seed] for name in names} for seed in self.args.seeds]


def _numbers(folder: Path) -> Path:
    """A tiny pack."""
    (folder / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    return pack(folder / "text.txt", folder / "pack", "bytes", seq_len=16, log=lambda line: None)


def _last_step(run: Path) -> int:
    """Of its metrics, 0 for a run that has none."""
    metrics = run / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    return int(records[-1]["step"]) if records else 0


def summary(values: list[float], sign: str = "") -> str:
    """Mean, and its standard error where there is more than one."""
    text = f"{statistics.mean(values):{sign}.4f}"
    return text if len(values) < 2 else f"{text} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def table(losses: list[dict[str, float]]) -> str:
    """Loss, difference from the plain run and gap to the twin of every run, over the seeds, in nats per token."""
    rows = [("", "validation loss", "minus plain", "gap to the twin")]
    for name in losses[0]:
        own = f"{TWIN} {name.removeprefix(PLAIN).strip()}"  # trained by the same lever, or at the same rate
        own = own if own in losses[0] else TWIN
        by = summary([one[name] - one[PLAIN] for one in losses], "+")
        gap = summary([one[name] - one[own] for one in losses], "+")
        rows.append((name, summary([one[name] for one in losses]), by, gap))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Validation loss with each lever of ternary training.")
    parser.add_argument("--data", type=Path, metavar="PACK", help="a folder that bitnet data made")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the runs are kept (default: nowhere)")
    parser.add_argument("--preset", default="nano", metavar="P", help="(default nano)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE",
                        help="options of bitnet train for every run, such as hidden_size=192")  # fmt: skip
    parser.add_argument("--levers", nargs="*", choices=LEVERS, default=list(LEVERS), metavar="NAME",
                        help=f"of {', '.join(LEVERS)} (default: all)")  # fmt: skip
    parser.add_argument("--own-twins", action="store_true", help="train a twin by each lever and rate that it has too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="(default 0 1 2)")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="of each run (default 1000)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="T", help="(default 256)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="(default 8)")
    parser.add_argument("--lr", type=float, default=2e-3, metavar="X", help="peak learning rate (default 2e-3)")
    parser.add_argument("--lrs", type=float, nargs="*", default=[], metavar="X",
                        help="others, for the plain model, and its twin with --own-twins")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each run (default 1)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, text and run: only shows that it works")
    history.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.data is None and not args.quick:
        parser.error("--data is needed, or --quick")
    here = machine.fingerprint()
    print(machine.one_line(here))
    with tempfile.TemporaryDirectory() as scratch:
        if args.quick:
            args.data = args.data or _numbers(Path(scratch))
            args.steps, args.seq_len, args.batch_size = 5, 16, 2
        work = args.work or Path(scratch, "runs")
        work.mkdir(parents=True, exist_ok=True)
        print(f"{args.preset}, {args.steps} steps of {args.batch_size} x {args.seq_len} tokens", flush=True)
        losses = Ablation(args, work).losses()
    print(table(losses))
    results: list[dict[str, Any]] = []
    for name in losses[0]:
        by = [one[name] - one[PLAIN] for one in losses]
        results.append(history.entry(name, [one[name] for one in losses], "nats", False, minus_plain=by))
    names = ("preset", "set", "seeds", "steps", "seq_len", "batch_size", "lr", "quick", "own_twins")
    settings = {name: getattr(args, name) for name in names} | {"data": args.data.name}
    history.keep(args, [history.run("ablation", settings, here, results)])


if __name__ == "__main__":
    main()

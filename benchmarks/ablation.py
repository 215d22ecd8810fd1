"""What each lever of ternary training is worth in loss: the same run with and without it, for several seeds.

    bitnet data --recipe stdlib --out PACK
    python benchmarks/ablation.py --data PACK --preset nano --steps 2000 --seeds 0 1 2 3

A seed fixes the initial weights and the batches, so a run with a lever is compared with the plain run of its seed: the
mean of those differences has a smaller error than the difference of the means. The gap is to the full-precision twin
of the seed, trained plainly, or with --own-twins by the same lever where a twin has it too: a lever that helps both
closes the first gap and not the second. All runs share one learning rate; what a lever would reach with its own, --lr
says run by run.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import history
import machine

from bitnet import train
from bitnet.data import pack
from bitnet.metrics import read_metrics

PLAIN, TWIN = "plain", "twin"
# The flags of each lever, for a number of steps and the folder of the seed's twin.
LEVERS: dict[str, Callable[[int, Path], list[str]]] = {
    "two-stage": lambda steps, twin: ["--schedule", "two-stage"],
    "wsd": lambda steps, twin: ["--schedule", "wsd"],
    "ema": lambda steps, twin: ["--ema", str(max(0.5, 1 - 10 / steps))],  # an average over a tenth of the run
    "muon": lambda steps, twin: ["--optimizer", "muon"],
    "distill": lambda steps, twin: ["--teacher", str(twin)],
    "switch": lambda steps, twin: ["--ternary-from", str(steps // 5)],
    "ramp": lambda steps, twin: ["--ternary-from", str(steps // 5), "--ternary-ramp", str(max(1, steps // 5))],
}
TERNARY_ONLY = ("distill", "switch", "ramp")  # a twin has nothing to do with these
QUICK = "--hidden-size 32 --intermediate-size 48 --num-hidden-layers 1 --num-attention-heads 2 --eval-blocks 4".split()


def loss(args: argparse.Namespace, seed: int, out: Path, flags: list[str]) -> float:
    """The last validation loss of one run, of its averaged weights if it has them."""
    words = ["--data", str(args.data), "--out", str(out), "--preset", args.preset, "--seq-len", str(args.seq_len),
             "--batch-size", str(args.batch_size), "--steps", str(args.steps), "--lr", str(args.lr),
             "--eval-every", str(args.steps), "--save-every", str(args.steps), "--sample-tokens", "0",
             "--plots", "false", "--layer-stats", "0", "--seed", str(seed), *(QUICK if args.quick else []),
             *flags]  # fmt: skip
    with redirect_stdout(io.StringIO()):
        status = train.main(words)
    if status:
        sys.exit(f"bitnet train {' '.join(words)} ended with status {status}")
    last = read_metrics(out / "metrics.jsonl")[-1]
    return float(last.get("val_loss_ema") or last["val_loss"])


def seed_losses(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    """Losses of one seed: of the twin, the plain run, each lever, and `twin NAME` of those twins that have one."""
    found = {TWIN: loss(args, seed, folder / TWIN, ["--twin"]), PLAIN: loss(args, seed, folder / PLAIN, [])}
    for name in args.levers:
        flags = LEVERS[name](args.steps, folder / TWIN)
        found[name] = loss(args, seed, folder / name, flags)
        if args.own_twins and name not in TERNARY_ONLY:
            found[f"{TWIN} {name}"] = loss(args, seed, folder / f"{TWIN}-{name}", ["--twin", *flags])
    return found


def summary(values: list[float], sign: str = "") -> str:
    """Mean, and its standard error where there is more than one."""
    text = f"{statistics.mean(values):{sign}.4f}"
    return text if len(values) < 2 else f"{text} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def table(losses: list[dict[str, float]]) -> str:
    """Loss, difference from the plain run and gap to the twin of every run, over the seeds, in nats per token."""
    rows = [("", "validation loss", "minus plain", "gap to the twin")]
    for name in losses[0]:
        own = f"{TWIN} {name}" if f"{TWIN} {name}" in losses[0] else TWIN
        by = summary([one[name] - one[PLAIN] for one in losses], "+")
        gap = summary([one[name] - one[own] for one in losses], "+")
        rows.append((name, summary([one[name] for one in losses]), by, gap))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Validation loss with each lever of ternary training.")
    parser.add_argument("--data", type=Path, metavar="PACK", help="a folder that bitnet data made")
    parser.add_argument("--preset", default="nano", metavar="P", help="(default nano)")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS), metavar="NAME",
                        help=f"of {', '.join(LEVERS)} (default: all)")  # fmt: skip
    parser.add_argument("--own-twins", action="store_true", help="train a twin by each lever that twins have too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="(default 0 1 2)")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="of each run (default 1000)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="T", help="(default 256)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="(default 8)")
    parser.add_argument("--lr", type=float, default=2e-3, metavar="X", help="peak learning rate (default 2e-3)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, text and run: only shows that it works")
    history.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.data is None and not args.quick:
        parser.error("--data is needed, or --quick")
    here = machine.fingerprint()
    print(machine.one_line(here))
    losses: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if args.quick:
            args.steps, args.seq_len, args.batch_size, args.data = 5, 16, 2, Path(scratch, "pack")
            Path(scratch, "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
            pack(Path(scratch, "text.txt"), args.data, "bytes", seq_len=args.seq_len, log=lambda line: None)
        print(f"{args.preset}, {args.steps} steps of {args.batch_size} x {args.seq_len} tokens", flush=True)
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                losses.append(seed_losses(args, seed, Path(folder)))
            print(f"seed {seed}: " + "  ".join(f"{name} {value:.4f}" for name, value in losses[-1].items()), flush=True)
    print(table(losses))
    results: list[dict[str, Any]] = []
    for name in losses[0]:
        by = [one[name] - one[PLAIN] for one in losses]
        results.append(history.entry(name, [one[name] for one in losses], "nats", False, minus_plain=by))
    names = ("preset", "seeds", "steps", "seq_len", "batch_size", "lr", "quick", "own_twins")
    settings = {name: getattr(args, name) for name in names} | {"data": args.data.name}
    history.keep(args, [history.run("ablation", settings, here, results)])


if __name__ == "__main__":
    main()

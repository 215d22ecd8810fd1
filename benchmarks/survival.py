"""One run, killed again and again at random moments: does it end in the bytes of a run that was left alone?

Both train the same small model on the same text, in processes of their own. The second is killed with SIGKILL (or told
to leave with SIGINT or SIGTERM: --signals) some steps or milliseconds after it began, resumed, and so on until it was
killed `--kills` times and then left to end. Compared are weights, moments, metrics but for their timings, samples and
the records of layers. With --poison the text has stretches of noise, which make spikes and rollbacks on the way. With
--nan a weight of both runs becomes NaN after a certain batch, which must be found, named and rolled back past, whenever
the run is killed. With --full-disk the second run is not killed: at a third of its way none of its files can grow any
more, as on a full disk, until it has given up on three checkpoints; samples of that time are lost, which it says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from bitnet import callbacks, train
from bitnet.trainer import Trainer

FLAGS = (
    "--tokenizer bytes --hidden-size 128 --intermediate-size 256 --num-hidden-layers 2 --num-attention-heads 4 "
    "--threads 1 --batch-size 8 --seq-len 64 --warmup 10 --sample-tokens 16 --val-fraction 0.1 --plots false"
).split()
TIMINGS = ("seconds", "tokens_per_second", "mfu", "memory")
LOST, LOST_AT = "model.layers.1.mlp.down_proj.weight", 103  # which weight becomes NaN, and after how many batches
LOSING = "--train"
FULL_FOR = 3  # checkpoints that do not fit on the disk
SIGNALS = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}


def text(poison: bool) -> str:
    """Lines that a small model learns fast; with stretches of noise in them where wanted."""
    draw = random.Random(0)
    lines = []
    for n in range(4000):
        lines.append(f"{n} squared is {n * n}.\n")
        if poison and n in (1000, 2500):
            lines.append("".join(chr(draw.randrange(33, 127)) for _ in range(250)) + "\n")
    return "".join(lines)


def command(*words: str | Path, nan: bool = False) -> list[str]:
    """`bitnet train`; nan: with a weight that is lost on the way."""
    return [sys.executable, *([__file__, LOSING] if nan else ["-m", "bitnet.train"]), *map(str, words)]


class LoseNumber(callbacks.Callback):
    """Makes a weight NaN when the batch before a position was read: past that, a run that rolled back never is."""

    def on_step(self, trainer: Trainer, record: dict[str, object]) -> None:
        if trainer.position == LOST_AT:
            weight = trainer.optimizer.parameters[LOST]
            values = weight.numpy(copy=True)
            values.flat[3] = np.nan
            weight.copy_(values)


def train_losing(words: list[str]) -> int:
    """`bitnet train` with one callback more."""
    usual = callbacks.standard_callbacks
    callbacks.standard_callbacks = lambda *options: [*usual(*options), LoseNumber()]
    return train.main(words)


def logged(run: Path) -> int:
    """Lines of a run's metrics."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(run: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def disturb(run: Path, begin: list[str], args: argparse.Namespace, draw: random.Random) -> Counter[str]:
    """Runs to the end with interruptions; returns how many there were of each kind."""
    ends: Counter[str] = Counter()
    words = begin
    for left in range(args.kills, 0, -1):
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            name = draw.choice(args.signals)
            if draw.random() < 0.2:  # while it starts
                time.sleep(draw.uniform(0.0, 1.0))
            else:  # after some steps, at any place within one
                wanted = logged(run) + draw.randint(0, max(1, 2 * (args.steps - logged(run)) // (left + 1)))
                while process.poll() is None and logged(run) <= wanted:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0.0, 0.01))
            process.send_signal(SIGNALS[name])
            status = process.wait()
        if status == 0:
            print(f"the run was over after {ends.total()} interruptions; more --steps leave time for {args.kills}")
            return ends
        ends[name] += 1
        if (run / "train.yaml").exists():
            words = command("--resume", run, *(["--background-save"] if args.background else []), nan=args.nan)
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return ends


def fill_disk(begin: list[str], steps: int) -> list[str]:
    """Runs to the end, for a time without room for any file; returns the warnings."""
    warnings: list[str] = []
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(begin, stdout=subprocess.PIPE, text=True, env=unbuffered) as process:
        assert process.stdout is not None
        room = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        for line in process.stdout:
            if (mark := re.match(r"step +(\d+)/", line)) and int(mark[1]) >= steps // 3 and not warnings:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, room[1]))
            if line.startswith("warning:"):
                warnings.append(line.strip())
                if sum("checkpoint" in one for one in warnings) == FULL_FOR:
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, room)
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode} after: {'; '.join(warnings)}")
    return warnings


def main() -> int:
    """Returns 0 if both ends are the same, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="interruptions of the one run (50)")
    parser.add_argument("--steps", type=int, default=250, help="steps of both runs (250)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=["kill"], help="drawn from for each (kill)")
    parser.add_argument("--poison", action="store_true", help="noise in the text: the run spikes and rolls back")
    parser.add_argument("--background", action="store_true", help="the disturbed run saves in the background")
    parser.add_argument("--nan", action="store_true", help=f"a weight becomes NaN after {LOST_AT} batches")
    parser.add_argument("--full-disk", action="store_true", help="no room on the disk for a time, and no kills")
    args = parser.parse_args()
    if args.nan and args.steps <= LOST_AT:
        parser.error(f"--nan needs --steps above {LOST_AT}, not {args.steps}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus, quiet, run = (Path(folder, name) for name in ("text.txt", "undisturbed", "disturbed"))
        corpus.write_text(text(args.poison))
        flags = [*FLAGS, "--steps", str(args.steps), "--eval-every", "12", "--save-every", "5", "--data", str(corpus)]
        flags += ["--spike", "6"] if args.poison else []
        subprocess.run(command("--out", quiet, *flags, nan=args.nan), stdout=subprocess.DEVNULL, check=True)
        begin = command("--out", run, *flags, nan=args.nan)
        if args.full_disk:
            for warning in fill_disk(begin, args.steps):
                print(warning.replace(f"{folder}/", ""))
        else:
            ends = disturb(run, begin, args, random.Random(args.seed))
            kinds = ", ".join(f"{name} {count} x" for name, count in ends.items())
            print(f"{args.steps} steps, interrupted {ends.total()} times: {kinds}")
        last = Path("checkpoints", f"step-{args.steps:08d}")
        files = [last / "model.safetensors", last / "optimizer.safetensors", Path("layers.jsonl")]
        files += [] if args.full_disk else [Path("samples.txt")]
        same = {str(file): (run / file).read_bytes() == (quiet / file).read_bytes() for file in files}
        same["metrics.jsonl, timings aside"] = metrics(run) == metrics(quiet)
        events = [record for record in metrics(quiet) if "event" in record]
    counts = Counter(str(event["event"]) for event in events)
    print(f"events on the way: {', '.join(f'{name} {count} x' for name, count in counts.items()) or 'none'}")
    found = [event for event in events if LOST in str(event["reason"])]
    for event in found:
        print(f"{event['reason']}; rolled back to step {event['to']}")
    for name, equal in same.items():
        print(f"{'the same' if equal else 'DIFFERENT'}: {name}")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if all(same.values()) and bool(found) == args.nan else 1


if __name__ == "__main__":
    raise SystemExit(train_losing(sys.argv[2:]) if sys.argv[1:2] == [LOSING] else main())

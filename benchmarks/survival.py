"""One run, killed again and again at random moments: does it end in the bytes of a run that was left alone?

Both train the same small model on the same text, in processes of their own. The second is killed with SIGKILL (or told
to leave with SIGINT or SIGTERM: --signals) some steps or milliseconds after it began, resumed, and so on until it was
killed `--kills` times and then left to end. Compared are weights, moments, metrics but for their timings, samples and
the records of layers. With --poison the text has stretches of noise, which make spikes and rollbacks on the way.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

FLAGS = (
    "--tokenizer bytes --hidden-size 128 --intermediate-size 256 --num-hidden-layers 2 --num-attention-heads 4 "
    "--threads 1 --batch-size 8 --seq-len 64 --warmup 10 --sample-tokens 16 --val-fraction 0.1 --plots false"
).split()
TIMINGS = ("seconds", "tokens_per_second", "mfu", "memory")
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


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "bitnet.train", *map(str, words)]


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
            words = command("--resume", run, *(["--background-save"] if args.background else []))
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return ends


def main() -> int:
    """Returns 0 if both ends are the same, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="interruptions of the one run (50)")
    parser.add_argument("--steps", type=int, default=250, help="steps of both runs (250)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=["kill"], help="drawn from for each (kill)")
    parser.add_argument("--poison", action="store_true", help="noise in the text: the run spikes and rolls back")
    parser.add_argument("--background", action="store_true", help="the disturbed run saves in the background")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus, quiet, run = (Path(folder, name) for name in ("text.txt", "undisturbed", "disturbed"))
        corpus.write_text(text(args.poison))
        flags = [*FLAGS, "--steps", str(args.steps), "--eval-every", "12", "--save-every", "5", "--data", str(corpus)]
        flags += ["--spike", "6"] if args.poison else []
        subprocess.run(command("--out", quiet, *flags), stdout=subprocess.DEVNULL, check=True)
        ends = disturb(run, command("--out", run, *flags), args, random.Random(args.seed))
        last = Path("checkpoints", f"step-{args.steps:08d}")
        files = [last / "model.safetensors", last / "optimizer.safetensors", Path("samples.txt"), Path("layers.jsonl")]
        same = {str(file): (run / file).read_bytes() == (quiet / file).read_bytes() for file in files}
        same["metrics.jsonl, timings aside"] = metrics(run) == metrics(quiet)
        events = Counter(str(record["event"]) for record in metrics(quiet) if "event" in record)
    kinds = ", ".join(f"{name} {count} x" for name, count in ends.items())
    print(f"{args.steps} steps, interrupted {ends.total()} times: {kinds}")
    print(f"events on the way: {', '.join(f'{name} {count} x' for name, count in events.items()) or 'none'}")
    for name, equal in same.items():
        print(f"{'the same' if equal else 'DIFFERENT'}: {name}")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

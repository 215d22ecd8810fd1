"""Does training reach the loss that PyTorch reaches? The `char` preset on a text of your own, by a fixed recipe.

    python benchmarks/charlm.py --data tinyshakespeare.txt            ternary, 2000 steps
    python benchmarks/charlm.py --data tinyshakespeare.txt --twin     the same model with full-precision linear layers

Recipe: ids of the sorted characters; first 90 % of the text trains, the rest validates; batches of 4 x 256 characters
at uniformly random offsets; AdamW (0.9, 0.95), weight decay 0.1 on matrices, clip 1.0; learning rate 8e-4 after a
linear warm-up over 100 steps, on a cosine to 8e-5 at step 2000, wherever --steps stops. Validation: the mean over all
whole blocks of 256. REFERENCE holds what an independent PyTorch implementation reached by it on tinyshakespeare.txt
(1,115,394 bytes, 65 characters) with one seed; other texts are printed without comparison.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import history
import machine
import numpy as np

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, Tape, mfu
from bitnet.optim import AdamW, warmup_cosine

REFERENCE = {  # validation loss in nats per character, by step
    "ternary": {100: 2.432, 250: 2.184, 500: 2.037, 1000: 1.831, 1500: 1.751, 2000: 1.692},
    "twin": {100: 2.433, 250: 2.121, 500: 1.952, 1000: 1.764, 1500: 1.660, 2000: 1.616},
}
REFERENCE_TEXT = (1_115_394, 65)  # characters, and how many different ones
STEPS, WARMUP, LR, MIN_LR, MAX_NORM = 2000, 100, 8e-4, 8e-5, 1.0
ROWS, LENGTH = 4, 256


def read_ids(path: Path) -> tuple[np.ndarray, int]:
    """(ids of all characters in sorted order of the alphabet, size of the alphabet)."""
    codes = np.frombuffer(path.read_text(encoding="utf-8").encode("utf-32-le"), np.uint32)
    alphabet, ids = np.unique(codes, return_inverse=True)
    return ids.astype(np.int32), len(alphabet)


def rows(ids: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, targets) from each start on."""
    window = ids[starts[:, None] + np.arange(LENGTH + 1)]
    return window[:, :-1], window[:, 1:]


class Recorded:
    """The model's loss over batches of one shape, recorded once and replayed."""

    def __init__(self, model: BitNetForCausalLM, batch: int) -> None:
        self.tokens, self.targets = bitnet.zeros((batch, LENGTH), "i32"), bitnet.zeros((batch, LENGTH), "i32")
        with Tape() as self.tape:
            self.loss = model(self.tokens, self.targets)

    def __call__(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        self.tokens.copy_(tokens)
        self.targets.copy_(targets)
        self.tape.replay()
        return self.loss.item()


def validation_loss(model: BitNetForCausalLM, ids: np.ndarray) -> float:
    """Mean over all whole, non-overlapping blocks."""
    starts = np.arange((len(ids) - 1) // LENGTH) * LENGTH
    total = 0.0
    with bitnet.no_grad():
        for first in range(0, len(starts), 16):
            part = starts[first : first + 16]
            total += model(*rows(ids, part)).item() * len(part)
    return total / len(starts)


def train(
    ids: np.ndarray, vocabulary: int, seed: int, twin: bool, precision: str, steps: int
) -> Iterator[tuple[int, float, float]]:
    """Yields (step, validation loss, seconds of training so far) at the steps of the table."""
    split = int(0.9 * len(ids))
    training, held_out = ids[:split], ids[split:]
    linear = "linear" if twin else "bitlinear"
    model = BitNetForCausalLM(BitNetConfig.preset("char", vocab_size=vocabulary, linear=linear), seed)
    optimizer = AdamW(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    with bitnet.ops.precision(precision):
        loss = Recorded(model, ROWS)
    rng = np.random.default_rng(seed)
    seconds = 0.0
    for step in range(steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss(*rows(training, rng.integers(0, len(training) - LENGTH, ROWS)))
        loss.loss.backward()
        optimizer.clip_grad_norm(MAX_NORM)
        optimizer.step(warmup_cosine(step, STEPS, LR, MIN_LR, WARMUP))
        seconds += time.perf_counter() - started
        if step + 1 in REFERENCE["ternary"] or step + 1 == steps:
            yield step + 1, validation_loss(model, held_out), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Validation losses of the char preset beside PyTorch's.")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="a text file")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"stop here (default {STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S", help="one run each (default 0)")
    parser.add_argument("--twin", action="store_true", help="full-precision linear layers")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: all processors")
    parser.add_argument("--precision", choices=mfu.PRECISIONS, default="fast", help="of the backward pass")
    history.add_arguments(parser)
    args = parser.parse_args()
    bitnet.set_threads(args.threads)
    here = machine.fingerprint()
    print(machine.one_line(here))
    ids, vocabulary = read_ids(args.data)
    kind = "twin" if args.twin else "ternary"
    reference = REFERENCE[kind] if (len(ids), vocabulary) == REFERENCE_TEXT else {}
    print(f"{args.data.name}: {len(ids):,} characters, {vocabulary} different", end="; ")
    print(f"{kind}, {args.precision}, {args.steps} steps")
    print(f"{'seed':>4} {'step':>5} {'val loss':>9} {'reference':>9} {'ratio':>7} {'tokens/s':>9}")
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        for step, value, seconds in train(ids, vocabulary, seed, args.twin, args.precision, args.steps):
            speed = step * ROWS * LENGTH / seconds
            known = reference.get(step)
            beside = f"{known:9.3f} {value / known:7.4f}" if known else f"{'-':>9} {'-':>7}"
            print(f"{seed:4} {step:5} {value:9.4f} {beside} {speed:9,.0f}", flush=True)
            ratio = value / known if known else None
            more = {"seed": seed, "step": step, "reference": known, "ratio": ratio, "tokens_per_second": speed}
            results.append(history.entry(f"loss at step {step}", [value], "nats", False, val_loss=value, **more))
    settings = {"model": kind, "data": args.data.name, "precision": args.precision, "seeds": args.seeds}
    history.keep(args, [history.run("charlm", settings, here, results, model=kind)])


if __name__ == "__main__":
    main()

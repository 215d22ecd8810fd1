"""How close each matrix product of a training step comes to the measured peak of the machine.

    python benchmarks/kernels.py --presets nano 125m --threads 1 2

The products of a linear map over m tokens, (m, in) to (m, out): y = x W^T, dx = dy W, dw = dy^T x, in the shapes of the
presets: their projections, ternary, and their output head, which is not. For 2b-4t also y of 1, 8 and 64 tokens, as in
decoding, where memory is the limit and the column GB/s the one to read. Time is that of the product alone: operands are
made and quantized before. The peak is that of the kind of multiply-add (csrc/cpu/peak.c): int8 for ternary y, and dx
with --precision int8; otherwise bf16, or f32 with --precision fp32. It is measured between the products. The table
shows medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from typing import NamedTuple

import history
import machine

import bitnet
from bitnet import BitNetConfig, _core, mfu

TOKENS = {"char": 4096, "nano": 2048, "125m": 2048, "2b-4t": 2048}  # of a micro-batch, by preset
DECODING = {"2b-4t": (1, 8, 64)}
LARGEST_HEAD = 100e6  # elements; 2b-4t's logits and gradients would fill gigabytes
ROUND_SECONDS = 0.1  # of repeats of one product in one round


class Case(NamedTuple):
    """One product and what it is measured against."""

    preset: str
    product: str  # y, dx or dw
    ternary: bool
    rows: int
    inputs: int
    outputs: int

    def name(self) -> str:
        return f"{'' if self.ternary else 'head '}{self.product} {self.rows}, {self.inputs} -> {self.outputs}"

    def macs(self) -> int:
        return self.rows * self.inputs * self.outputs

    def kind(self, precision: str) -> str:
        if self.ternary and (self.product == "y" or (self.product, precision) == ("dx", "int8")):
            return "int8"
        return "f32" if precision == "fp32" else "bf16"

    def bytes(self) -> int:
        """Of operands and result, each once: int8 x and codes where the product is ternary, f32 for the rest."""
        x, w, y = self.rows * self.inputs, self.inputs * self.outputs, self.rows * self.outputs
        small = {"y": x + w, "dx": w, "dw": x}[self.product] if self.ternary else 0
        return 4 * (x + w + y) - 3 * small

    def run(self, repeats: int) -> float:
        """Median seconds."""
        return statistics.median(
            _core.time_product(self.product, self.ternary, self.rows, self.inputs, self.outputs, repeats)
        )


def cases(preset: str) -> Iterator[Case]:
    """Each different shape of the preset once."""
    c = BitNetConfig.preset(preset)
    kv = c.kv_heads * c.head_dim
    sizes = dict.fromkeys([(c.hidden_size, c.hidden_size), (c.hidden_size, kv), (c.hidden_size, c.intermediate_size),
                           (c.intermediate_size, c.hidden_size)])  # fmt: skip
    for inputs, outputs in sizes:
        for product in ("y", "dx", "dw"):
            yield Case(preset, product, True, TOKENS[preset], inputs, outputs)
    if c.vocab_size * c.hidden_size <= LARGEST_HEAD:
        for product in ("y", "dx", "dw"):
            yield Case(preset, product, c.quantize_head, TOKENS[preset], c.hidden_size, c.vocab_size)
    for rows in DECODING.get(preset, ()):
        for inputs, outputs in sizes:
            yield Case(preset, "y", True, rows, inputs, outputs)


def measure(todo: list[Case], rounds: int) -> tuple[dict[Case, list[float]], dict[str, mfu.Peak]]:
    """Seconds of each case, one sample a round, and the best peak of each kind over the rounds."""
    repeats = {case: max(1, min(1000, int(ROUND_SECONDS / case.run(1)))) for case in todo}
    seconds: dict[Case, list[float]] = {case: [] for case in todo}
    peaks = mfu.measure_peaks()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for case in todo:
            seconds[case].append(case.run(repeats[case]))
        peaks = {kind: max(peak, peaks[kind]) for kind, peak in mfu.measure_peaks().items()}
    return seconds, peaks


def report(
    seconds: dict[Case, list[float]], peaks: dict[str, mfu.Peak], precision: str
) -> Iterator[tuple[str, dict[str, object]]]:
    """For each case its line of the table and its entry of the history."""
    for case, samples in seconds.items():
        rates = [case.macs() / s for s in samples]
        kind = case.kind(precision)
        rate = statistics.median(rates)
        share = rate / peaks[kind].macs_per_second
        gigabytes = case.bytes() * rate / case.macs() / 1e9
        spread = f"{min(rates) / 1e9:,.1f} .. {max(rates) / 1e9:,.1f}"
        line = f"{case.name():34} {kind:>5} {rate / 1e9:10,.1f} {spread:>20} {share:7.1%} {gigabytes:8.1f}"
        yield line, history.entry(case.name(), rates, "MAC/s", True, kind=kind, share_of_peak=share,
                                  peak=peaks[kind]._asdict(), gigabytes_per_second=gigabytes)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Matrix products beside the measured peak of the machine.")
    parser.add_argument("--presets", nargs="+", choices=TOKENS, default=list(TOKENS), metavar="P",
                        help=f"shapes of which presets (default: {' '.join(TOKENS)})")  # fmt: skip
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="(default: 1, and all processors)")
    parser.add_argument("--precision", choices=mfu.PRECISIONS, default="fast", help="of dx, dw and the head")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="samples of each product (default 5)")
    history.add_arguments(parser)
    args = parser.parse_args()
    here = machine.fingerprint()
    print(machine.one_line(here))
    runs = []
    for threads in args.threads or sorted({1, bitnet.get_threads()}):
        for preset in args.presets:
            bitnet.set_threads(threads)
            with bitnet.ops.precision(args.precision):
                seconds, peaks = measure(list(cases(preset)), args.rounds)
            settings = {"preset": preset, "threads": threads, "precision": args.precision}
            print(f"\n{preset}, threads {threads}, {args.precision}; peak {mfu.describe(peaks)}")
            columns = f"{'kind':>5} {'GMAC/s':>10} {'min .. max':>20} {'of peak':>7} {'GB/s':>8}"
            print(f"{'product m, in -> out':34} {columns}")
            results = []
            for line, one in report(seconds, peaks, args.precision):
                print(line, flush=True)
                results.append(one)
            runs.append(history.run("kernels", settings, here, results))
    history.keep(args, runs)


if __name__ == "__main__":
    main()

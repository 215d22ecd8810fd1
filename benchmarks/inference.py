"""Speed of inference beside llama.cpp and transformers: one random model in every engine, taking turns.

    python benchmarks/inference.py --work MODELS --presets 2b-4t 700m nano --threads 1 2
    python benchmarks/inference.py --quick

Each engine keeps its model in a process of its own (turns.py), blocked while another has its turn. A turn is a prompt
of 512 tokens into an empty cache, then 128 further tokens one by one, given and not drawn; logits are made for the last
token alone. After one turn that is not counted come the rounds, and the medians over them are reported, with the bytes
that a token reads as a share of the bandwidth, and the multiply-adds of the ternary layers as a share of the peak, both
measured in the same run. All engines run the same model: the preset's shape with SiLU (llama.cpp's `bitnet` knows no
other), tied embeddings, and a feed-forward layer that is a multiple of 256 wide (TQ types need it);
inference_check.py shows that they do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import history
import machine
import turns
from inference_engines import TORCH, Engine, Tokens, engines, shared, start, wanted

from bitnet import BitNetConfig, _core, mfu, set_threads
from bitnet.bench import LEAST_READ

BASE = "llama_tq2_0"  # what ratios are to
QUICK = {"presets": ["nano"], "threads": [1], "rounds": 1, "prompt": 32, "gen": 8, "torch_gen": 4}


class Roof(NamedTuple):
    """The most that this machine was seen to do: bytes read a second, and multiply-adds a second by kind."""

    bandwidth: float
    peaks: dict[str, float]

    @staticmethod
    def measure(threads: int, size: int) -> Roof:
        set_threads(threads)
        peaks = {kind: peak.macs_per_second for kind, peak in mfu.measure_peaks().items()}
        return Roof(_core.read_bandwidth(size), peaks)

    def best(self, other: Roof) -> Roof:
        peaks = {kind: max(peak, other.peaks[kind]) for kind, peak in self.peaks.items()}
        return Roof(max(self.bandwidth, other.bandwidth), peaks)


def read_again(workers: dict[str, turns.Worker]) -> int:
    """Bytes of weights that the engines of few bits read for each token: a roof is measured over as many."""
    few_bits = [worker.holds["weight_bytes"] for name, worker in workers.items()
                if worker.holds is not None and name.startswith(("llama", "bitnet"))]  # fmt: skip
    return max([LEAST_READ, *map(round, few_bits)])


def measure(
    workers: dict[str, turns.Worker], chosen: dict[str, Engine], tokens: Tokens, threads: int, rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], Roof]:
    """Answers of each engine, one a round, and the roof over the rounds."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    size = read_again(workers)
    roof = Roof.measure(threads, size)
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}" if number else "warming up", file=sys.stderr)
        for name, worker in workers.items():
            answer = worker.ask(threads=threads, **tokens.turn(chosen[name]))
            if answer is not None and number > 0:
                answers[name].append(answer)
        roof = roof.best(Roof.measure(threads, size))
    return answers, roof


def report(
    engine: Engine,
    config: BitNetConfig,
    holds: dict[str, Any],
    turn: dict[str, list[int]],
    answers: list[dict[str, Any]],
    roof: Roof,
) -> dict[str, Any]:
    """What is known of one engine: speeds in tokens a second, what a token reads, and shares of the roof."""
    prompts = [len(turn["prompt"]) / answer["prompt_seconds"] for answer in answers]
    decodes = [1 / answer["decode_seconds"] for answer in answers]
    length = len(turn["prompt"]) + (len(turn["following"]) + 1) / 2  # of the cache, in the middle
    read = holds["weight_bytes"] + length * holds["cache_bytes"]
    kv = config.kv_heads * config.head_dim
    layer = 2 * config.hidden_size * (config.hidden_size + kv) + 3 * config.hidden_size * config.intermediate_size
    peak = roof.peaks["bf16" if engine.script == TORCH else "int8"]
    return {
        "about": holds["about"],
        "prompt_tokens_per_second": statistics.median(prompts),
        "decode_tokens_per_second": statistics.median(decodes),
        "prompt_samples": prompts,
        "decode_samples": decodes,
        "bytes_per_token": read,
        "prompt_peak_share": statistics.median(prompts) * config.num_hidden_layers * layer / peak,
        "decode_bandwidth_share": statistics.median(decodes) * read / roof.bandwidth,
        "peak_memory_bytes": max(answer["peak_memory_bytes"] for answer in answers),
    }


def table(reports: dict[str, Any]) -> str:
    """Both speeds with their ranges, shares of the roof, memory, and what the speeds are beside llama.cpp's TQ2_0."""
    base = reports.get(BASE, {})
    lines = [f"{'':20} {'prompt':>30} {'of peak':>8} {'token by token':>26} {'MB/token':>9} {'of GB/s':>8} "
             f"{'memory MB':>10} {f'/ {BASE}':>17}"]  # fmt: skip
    for name, one in reports.items():
        if "error" in one:
            lines.append(f"{name:20} cannot run: {one['error'].splitlines()[-1]}")
            continue
        cells, ratios = [], []
        for kind in ("prompt", "decode"):
            speed, samples = one[f"{kind}_tokens_per_second"], one[f"{kind}_samples"]
            cells.append(f"{speed:,.1f} ({min(samples):,.1f} .. {max(samples):,.1f})")
            other = base.get(f"{kind}_tokens_per_second")
            ratios.append(f"{speed / other:.2f} x" if other else "-")
        lines.append(f"{name:20} {cells[0]:>30} {one['prompt_peak_share']:8.1%} {cells[1]:>26} "
                     f"{one['bytes_per_token'] / 1e6:9,.1f} {one['decode_bandwidth_share']:8.1%} "
                     f"{one['peak_memory_bytes'] / 1e6:10,.0f} {ratios[0]:>8} {ratios[1]:>8}")  # fmt: skip
    return "\n".join(lines)


def bench(preset: str, args: argparse.Namespace, here: dict[str, Any]) -> list[history.Run]:
    """One shape with every number of threads, which is a run each; models are loaded once."""
    capacity = args.prompt + args.gen
    config = shared(BitNetConfig.preset(preset), capacity)
    tokens = Tokens.draw(config, args.prompt, args.gen, min(args.torch_gen, args.gen))
    chosen = {name: one for name, one in engines(args.head, args.layout).items() if wanted(name, args.engines)}
    runs = []
    with ExitStack() as stack:
        workers: dict[str, turns.Worker] = {}
        for name, engine in chosen.items():
            print(f"loading {name}", file=sys.stderr)
            worker = workers[name] = start(engine, config, capacity, args.work, args.llama_python)
            stack.callback(worker.close)
            if worker.holds is not None:
                print(f"{name}: {worker.holds['about']}")
        for threads in args.threads:
            settings = {"preset": preset, "threads": threads, "prompt": args.prompt, "gen": args.gen,
                        "torch_gen": tokens.torch_gen, "rounds": args.rounds}  # fmt: skip
            answers, roof = measure(workers, chosen, tokens, threads, args.rounds)
            reports = {}
            for name, worker in workers.items():
                if worker.holds is None or worker.error is not None:
                    reports[name] = {"error": worker.error}
                else:
                    turn = tokens.turn(chosen[name])
                    reports[name] = report(chosen[name], config, worker.holds, turn, answers[name], roof)
            print("\n" + ", ".join(f"{name} {value}" for name, value in settings.items()))
            print(f"read bandwidth {roof.bandwidth / 1e9:.1f} GB/s; peak int8 {roof.peaks['int8'] / 1e12:.3g}, "
                  f"bf16 {roof.peaks['bf16'] / 1e12:.3g} TMAC/s")  # fmt: skip
            print(table(reports), flush=True)
            runs.append(history.run("inference", settings, here, entries(reports), roof=roof._asdict(), **reports))
    return runs


def entries(reports: dict[str, Any]) -> list[dict[str, Any]]:
    """What compare.py compares: both speeds of each engine, and its memory."""
    found = []
    for name, one in reports.items():
        for kind in ("prompt", "decode"):
            found.append(history.entry(f"{name} {kind}", one.get(f"{kind}_samples", []), "tokens/s", True))
        if "error" not in one:
            found.append(history.entry(f"{name} memory", [one["peak_memory_bytes"]], "bytes", False))
    return found


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed of inference beside llama.cpp and transformers.")
    parser.add_argument("--presets", "--preset", nargs="+", default=["2b-4t", "700m", "nano"], metavar="P",
                        help="shapes of which presets (default: 2b-4t 700m nano)")  # fmt: skip
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="turns of each engine (default 5)")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt (default 512)")
    parser.add_argument("--gen", type=int, default=128, metavar="N", help="tokens after it (default 128)")
    parser.add_argument("--torch-gen", type=int, default=8, metavar="N", help="of transformers (default 8)")
    parser.add_argument("--head", nargs="+", default=["f32", "int6", "screened"], metavar="H",
                        help="output heads of bitnet (default: f32 int6 screened)")  # fmt: skip
    parser.add_argument("--layout", nargs="+", default=["auto"], metavar="L",
                        help="layouts of bitnet's codes (default: auto)")  # fmt: skip
    parser.add_argument("--engines", nargs="+", default=["bitnet", "llama", "transformers"], metavar="E",
                        help="names or their beginnings (default: bitnet llama transformers)")  # fmt: skip
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH",
                        help="an interpreter with llama_cpp and gguf (default: this one)")  # fmt: skip
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep GGUF files here (default: made anew each time)")
    parser.add_argument("--quick", action="store_true", help="only see whether everything runs")
    history.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    here = machine.fingerprint()
    print(machine.one_line(here))
    runs: list[history.Run] = []
    with ExitStack() as stack:
        stack.callback(lambda: history.keep(args, runs) if runs else None)  # whatever comes later
        if args.work is None:
            args.work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args.work.mkdir(parents=True, exist_ok=True)
        for preset in args.presets:
            runs += bench(preset, args, here)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Speed of generation: the prompt against the peak of the processor, each further token against that of memory.

    bitnet bench runs/nano-stdlib-001
    bitnet bench --preset 700m --random --prompt 512 --gen 128 --threads 2 --json speed.json

A prompt is limited by multiply-adds and a token by the bytes that it reads: every weight once, and the keys and values
of the tokens before it. Peak and bandwidth are measured in the same run. Random weights are as fast as trained ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bitnet import _core, current_isa, get_threads, mfu, nn
from bitnet.cache import DTYPES, KVCache
from bitnet.command import exit_status, peak_memory
from bitnet.config import PRESETS, BitNetConfig
from bitnet.decoding import Decoder
from bitnet.errors import ConfigError
from bitnet.generation_options import add_form_flags, head_of, layout_of, load
from bitnet.model import BitNetForCausalLM, Factory
from bitnet.threads import use_threads

# Where a model is smaller, the measured bandwidth is that of this many bytes.
LEAST_READ = 1 << 20


class RandomFactory(Factory):
    """Packed layers of random codes, and matrices of one random row: made in seconds at any size."""

    def __init__(self, config: BitNetConfig, seed: int, layout: str = "2") -> None:
        super().__init__(config, seed)
        self.layout = layout

    def matrix(self, name: str, rows: int, cols: int) -> nn.Parameter:
        row = np.random.default_rng(self.seed).normal(0, self.config.initializer_range, cols)
        return nn.Parameter(np.broadcast_to(row.astype(np.float32), (rows, cols)).copy())

    def projection(self, name: str, in_features: int, out_features: int) -> nn.Linear:
        if self.config.linear != "bitlinear":
            return super().projection(name, in_features, out_features)
        fifths = np.random.default_rng(self.seed).integers(0, 243, -(-out_features * in_features // 5), np.uint8)
        scale = self.config.initializer_range
        weight = _core.prepare_fifths(fifths, out_features, in_features, scale, self.layout)
        return nn.BitLinear(in_features, out_features, weight=weight, activation_bits=self.config.activation_bits)


def step_bytes(model: BitNetForCausalLM, batch: int, length: float, cache_dtype: str = "f32") -> float:
    """Bytes that a step of `batch` sequences reads: weights once, and the cache of `length` tokens of each."""
    c = model.config
    ternary = model.num_ternary() * float(layout_of(model)) / 8 if model.num_ternary() else 0
    head = 4 * c.vocab_size * c.hidden_size if model.head is None else model.head.bytes_read()
    inner = {id(model.head_weight), id(model.model.embed_tokens.weight)}
    others = sum(4 * parameter.size for parameter in model.parameters() if id(parameter) not in inner)
    return ternary + head + others + batch * length * KVCache(c, 1, 1, cache_dtype).bytes_per_position


def measure(
    model: BitNetForCausalLM, prompt: int, new: int, batch: int, rounds: int, cache_dtype: str = "f32"
) -> tuple[float, float]:
    """Median seconds of a prompt and of one further token, of `batch` sequences each, drawn greedily."""
    rng = np.random.default_rng(0)
    decoder = Decoder(model, batch, prompt + new + 1, cache_dtype)
    decoder.top = 1
    prompts = rng.integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    prompt_seconds, step_seconds = [], []
    for _ in range(rounds + 1):  # the first is not counted: it records the step and finds its memory
        decoder.reset()
        start = perf_counter()
        decoder.prefill(prompts)
        prompt_seconds.append(perf_counter() - start)
        decoder.step([0] * batch)
        start = perf_counter()
        for token in range(new):
            decoder.step([token % model.config.vocab_size] * batch)
        step_seconds.append((perf_counter() - start) / new)
    return statistics.median(prompt_seconds[1:]), statistics.median(step_seconds[1:])


def bench(model: BitNetForCausalLM, prompt: int, new: int, batch: int = 1, rounds: int = 3,
          cache_dtype: str = "f32") -> dict[str, Any]:  # fmt: skip
    """What `bitnet bench` prints, by name; speeds in tokens a second, of all sequences together."""
    c = model.config
    read = step_bytes(model, batch, prompt + new / 2, cache_dtype)
    peak = mfu.measure_peaks()["int8" if c.linear == "bitlinear" else "f32"]
    prompt_seconds, step_seconds = measure(model, prompt, new, batch, rounds, cache_dtype)
    memory = peak_memory()
    bandwidth = max(_core.read_bandwidth(max(round(read), LEAST_READ)) for _ in range(2))  # takes memory itself
    return {
        "prompt_tokens_per_second": batch * prompt / prompt_seconds,
        "decode_tokens_per_second": batch / step_seconds,
        "bytes_per_token": read / batch,
        "read_bandwidth": bandwidth,
        "decode_bandwidth_share": read / step_seconds / bandwidth,
        "prompt_peak_share": model.num_ternary() * batch * prompt / prompt_seconds / peak.macs_per_second,
        "peak_memory_bytes": memory,
    }


def describe(found: dict[str, Any]) -> str:
    """The figures in lines for people."""
    return "\n".join((
        f"prompt: {found['prompt_tokens_per_second']:,.1f} tokens/s, "
        f"{found['prompt_peak_share']:.0%} of the peak in the ternary layers",
        f"decode: {found['decode_tokens_per_second']:,.1f} tokens/s, {found['bytes_per_token'] / 1e6:,.1f} MB a token, "
        f"{found['decode_bandwidth_share']:.0%} of the {found['read_bandwidth'] / 1e9:.1f} GB/s that memory gives",
        f"peak memory: {found['peak_memory_bytes'] / 1e6:,.0f} MB",
    ))  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bitnet bench", description=(__doc__ or "").split("\n\n")[0],
                                     epilog=(__doc__ or "").split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", nargs="?", metavar="RUN", help="a trained run, a checkpoint or a .bitnet file")
    parser.add_argument("--preset", choices=PRESETS, metavar="P", help=f"instead of a run: {', '.join(PRESETS)}")
    parser.add_argument("--random", action="store_true", help="with --preset: its weights, random")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt (default 512)")
    parser.add_argument("--gen", type=int, default=128, metavar="N", help="tokens generated (default 128)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once (default 1)")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="medians are of these (default 3)")
    add_form_flags(parser)
    parser.add_argument("--cache-dtype", choices=DTYPES, default="f32", metavar="T",
                        help=f"how keys and values are kept: {', '.join(DTYPES)} (default f32)")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser


def model_of(args: argparse.Namespace) -> BitNetForCausalLM:
    """The model that is asked for, packed."""
    if (args.run is None) == (args.preset is None) or args.random != (args.preset is not None):
        raise ConfigError("bench needs either a run, or --preset P --random")
    if args.preset is None:
        return load(args.run, args.layout, args.head)
    config = BitNetConfig.preset(args.preset)
    room = max(config.max_position_embeddings, args.prompt + args.gen + 1)
    random = partial(RandomFactory, layout="2" if args.layout == "auto" else args.layout)
    model = BitNetForCausalLM(config.replace(max_position_embeddings=room), factory=random)
    return model.pack(args.layout, args.head)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    for name in ("prompt", "gen", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(args, name)}")
    use_threads(args.threads)
    model = model_of(args)
    print(f"cpu: {current_isa()}, {get_threads()} threads; {args.run or f'{args.preset}, random weights'}; "
          f"{layout_of(model)} bits a ternary weight, head {head_of(model)}; "
          f"prompt {args.prompt}, {args.gen} new tokens, batch {args.batch}", flush=True)  # fmt: skip
    found = bench(model, args.prompt, args.gen, args.batch, args.rounds, args.cache_dtype)
    print(describe(found))
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        settings |= {"threads": get_threads(), "layout": layout_of(model), "head": head_of(model)}
        args.json.write_text(json.dumps({**found, "isa": current_isa(), "settings": settings}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

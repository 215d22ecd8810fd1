"""Command line `bitnet evaluate`: how well a trained model predicts a text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bitnet import set_threads
from bitnet.command import add_run, exit_status
from bitnet.errors import ConfigError
from bitnet.evaluation import evaluate
from bitnet.generate import describe

MEANING = """\
loss and perplexity are per token: compare them between models with the same tokenizer. perplexity e^loss is the number
of tokens, all equally likely, that would be as hard to guess. bits per byte compares any two models: an ideal coder
driven by this one would store the text in that many bits for each of its bytes (8 uncompressed)."""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet evaluate",
        description="Loss, perplexity and bits per byte of a trained model on a text it has not seen.",
        epilog="example: bitnet evaluate runs/nano-stdlib-001 --data held_out.txt --json result.json",
    )
    add_run(parser)
    parser.add_argument(
        "--data", nargs="+", required=True, type=Path, metavar="PATH", help="text or .jsonl, or folders"
    )
    parser.add_argument("--seq-len", type=int, metavar="T", help="window (default: as trained)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core; never changes a number")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from bitnet.pretrained import from_pretrained

    if args.threads is not None:
        set_threads(args.threads)
    model = from_pretrained(args.run)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(f"{args.run} has no tokenizer: text cannot be turned into its tokens")
    print(describe(model), file=sys.stderr)
    bar = partial(tqdm, desc="evaluating", unit="batch", disable=None, leave=False)
    start = time.perf_counter()
    result = evaluate(model, tokenizer, args.data, args.seq_len, progress=bar)
    seconds = time.perf_counter() - start
    print(table(result), MEANING, sep="\n\n")
    print(f"{result['tokens'] / seconds:,.0f} tokens/s", file=sys.stderr)
    if args.json is not None:
        where = {"run": str(args.run), "step": getattr(model, "step", None), "data": [str(path) for path in args.data]}
        args.json.write_text(json.dumps(result | where, indent=1) + "\n", encoding="utf-8")
    return 0


def table(result: dict[str, Any]) -> str:
    """Names and numbers, aligned."""
    lines = [
        ("loss", f"{result['loss']:.4f}", "nats per token"),
        ("perplexity", f"{result['perplexity']:.3f}", ""),
        ("bits per byte", f"{result['bits_per_byte']:.4f}", ""),
        ("tokens", f"{result['tokens']:,}", f"in {result['windows']:,} windows of {result['seq_len']}"),
        ("bytes", f"{result['bytes']:,}", f"in {result['documents']:,} documents"),
    ]
    width = max(len(number) for _, number, _ in lines)
    return "\n".join(f"{name:<13}  {number:>{width}}  {note}".rstrip() for name, number, note in lines)


if __name__ == "__main__":
    raise SystemExit(main())

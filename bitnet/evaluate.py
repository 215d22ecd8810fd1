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

from bitnet.command import add_run, exit_status
from bitnet.errors import ConfigError
from bitnet.evaluation import evaluate
from bitnet.generate import describe
from bitnet.protocols import PROTOCOLS, perplexity
from bitnet.threads import use_threads

MEANING = """\
loss and perplexity are per token: compare them between models with the same tokenizer. perplexity e^loss is the number
of tokens, all equally likely, that would be as hard to guess. bits per byte compares any two models: an ideal coder
driven by this one would store the text in that many bits for each of its bytes (8 uncompressed)."""

DOCUMENTS = "documents"
PROTOCOL_HELP = """\
protocols:
  documents        each document between bos and eos, laid end to end; every token is predicted once
  wikitext2        as in GPTQ (arXiv 2210.17323) and most papers on quantization: the lines of WikiText-2's test split
                   joined by blank lines, windows of 2048 tokens without overlap, the rest dropped; the first token of
                   each window is given
  c4               the same for C4: the first 256 windows of the first 1100 validation documents, joined by spaces
  paper-wikitext2  as 1bitLLM's BitNet b1.58 models were evaluated: each line ended by eos, whole lines behind a bos as
                   long as they fit into 2048 tokens
  paper-c4         the same for the documents of C4's first validation file. The mean of both is the perplexity in the
                   paper's tables (arXiv 2402.17764): 12.87 with 700M, 11.29 with 1.3B, 9.91 with 3B parameters

examples:
  bitnet evaluate runs/nano-stdlib-001 --data held_out.txt --json result.json
  bitnet evaluate runs/700m-001 --protocol paper-wikitext2
  bitnet evaluate runs/700m-001 --protocol wikitext2 --data wiki.test.raw"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet evaluate",
        description="Loss, perplexity and bits per byte of a trained model on a text it has not seen.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=PROTOCOL_HELP,
    )
    add_run(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="text or .jsonl, or folders; without it a published protocol fetches its text from the Hugging Face hub",
    )
    parser.add_argument(
        "--protocol",
        choices=(DOCUMENTS, *PROTOCOLS),
        default=DOCUMENTS,
        help="how the text is cut into windows, see below (default: documents)",
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="T", help="window (default: as trained; 2048 for a published protocol)"
    )
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

    use_threads(args.threads)
    if args.data is None and args.protocol == DOCUMENTS:
        raise ConfigError("a text is needed: --data PATH, or --protocol for a published one")
    model = from_pretrained(args.run)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(f"{args.run} has no tokenizer: text cannot be turned into its tokens")
    print(describe(model), file=sys.stderr)
    bar = partial(tqdm, desc="evaluating", unit="batch", disable=None, leave=False)
    start = time.perf_counter()
    if args.protocol == DOCUMENTS:
        result = evaluate(model, tokenizer, args.data, args.seq_len, progress=bar)
    else:
        result = perplexity(model, args.protocol, args.data, tokenizer, args.seq_len, progress=bar)
    seconds = time.perf_counter() - start
    print(table(result), MEANING, sep="\n\n")
    print(f"{result['tokens'] / seconds:,.0f} tokens/s", file=sys.stderr)
    if args.json is not None:
        where = {
            "run": str(args.run),
            "step": getattr(model, "step", None),
            "data": [str(path) for path in args.data or []],
        }
        args.json.write_text(json.dumps(result | where, indent=1) + "\n", encoding="utf-8")
    return 0


def table(result: dict[str, Any]) -> str:
    """Names and numbers, aligned."""
    lines = [
        ("loss", f"{result['loss']:.4f}", "nats per token"),
        ("perplexity", f"{result['perplexity']:.3f}", ""),
        ("bits per byte", f"{result['bits_per_byte']:.4f}", ""),
        ("tokens", f"{result['tokens']:,}", f"in {result['windows']:,} windows of {result['seq_len']}"),
        ("bytes", f"{result['bytes']:,}", f"in {result['documents']:,} {_pieces(result)}"),
    ]
    width = max(len(number) for _, number, _ in lines)
    return "\n".join(f"{name:<13}  {number:>{width}}  {note}".rstrip() for name, number, note in lines)


def _pieces(result: dict[str, Any]) -> str:
    name = result.get("protocol")
    return "lines" if name is not None and PROTOCOLS[name].is_lines else "documents"


if __name__ == "__main__":
    raise SystemExit(main())

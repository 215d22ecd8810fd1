"""Command line `bitnet generate`: continue a prompt with a trained model; text to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bitnet import current_isa, get_threads, set_threads
from bitnet._core import has_cuda
from bitnet.command import exit_status
from bitnet.decoding import TextStream
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler


def arguments() -> argparse.ArgumentParser:
    """The command's flags; defaults are those of decoding.generate."""
    parser = argparse.ArgumentParser(
        prog="bitnet generate",
        description="Continue a prompt with a trained model. The same seed gives the same text on every machine.",
        epilog='example: bitnet generate runs/nano-stdlib-001 -p "def main(" --temperature 0.7 --top-p 0.95',
    )
    parser.add_argument("run", metavar="RUN", help="run folder, one checkpoint folder in it, or a .bitnet file")
    parser.add_argument(
        "-p",
        "--prompt",
        default="",
        metavar="TEXT",
        help="text to continue; - reads it from stdin, without its last line end",
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default 200")
    choice = parser.add_argument_group("choice of tokens")
    choice.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest (default 0.8)")
    choice.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    choice.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest that have probability P together"
    )
    choice.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less")
    choice.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text (default 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core; never changes the text")
    parser.add_argument("--no-stream", action="store_true", help="print once, when all is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run_into_pipe(args))


def describe(model: BitNetForCausalLM) -> str:
    """What the command runs on, in one line."""
    cuda = "CUDA" if has_cuda() else "no CUDA in this build"
    packed = sum(layer.in_features * layer.out_features for _, layer in model.bitlinears() if layer.is_packed)
    parameters = f"{(model.num_parameters() + packed) / 1e6:.1f} M parameters"
    return f"cpu: {current_isa()}, {get_threads()} threads; {cuda}; model: {parameters}"


def _run_into_pipe(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except BrokenPipeError:  # the reader of a pipe has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the flush at exit may go
        return 0


def _run(args: argparse.Namespace) -> int:
    from bitnet.checkpoint import from_pretrained

    if args.threads is not None:
        set_threads(args.threads)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
    model = from_pretrained(args.run)
    model.pack()  # nothing here is trained: a token reads a sixteenth of the memory
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    stream = TextStream(model, prompt, sampler, args.max_new_tokens, args.stop)
    print(describe(model), file=sys.stderr)
    if sys.stdout.isatty() and prompt:
        print(f"\033[2m{prompt}\033[0m", end="", flush=True)  # faint
    reason = _print(stream, not args.no_stream)
    ids = stream.ids
    print(
        f"{len(ids.tokens)} tokens, {ids.tokens_per_second:.1f} tokens/s; "
        f"prompt: {ids.prompt_tokens} tokens in {ids.prompt_seconds:.2f} s; finish reason: {reason}",
        file=sys.stderr,
    )
    return 130 if reason == "interrupted" else 0


def _print(stream: TextStream, at_once: bool) -> str:
    """Print the text, piece by piece or at the end; returns the finish reason."""
    text, reason = "", ""
    try:
        for piece in stream:
            text += piece
            if at_once:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        reason = "interrupted"
        rest = stream.held()
        text += rest
        if at_once:
            print(rest, end="")
    print("" if at_once else text, end="" if text.endswith("\n") else "\n", flush=True)
    full = " (the model's context is full)" if stream.ids.is_context_full else ""
    return reason or f"{stream.finish_reason}{full}"


if __name__ == "__main__":
    raise SystemExit(main())

"""Command line `bitnet generate`: continue a prompt with a trained model; text to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bitnet import current_isa, generation_options, get_threads
from bitnet._core import Tensor, has_cuda
from bitnet.command import add_run, exit_status
from bitnet.decoder import ContextFullError
from bitnet.generation_options import head_of, layout_of
from bitnet.model import BitNetForCausalLM
from bitnet.text_stream import TextStream
from bitnet.threads import use_threads
from bitnet.token_stream import CONTEXTS


def arguments() -> argparse.ArgumentParser:
    """The command's flags; defaults are those of decoding.generate."""
    parser = argparse.ArgumentParser(
        prog="bitnet generate",
        description="Continue a prompt with a trained model. The same seed gives the same text on every machine.",
        epilog='example: bitnet generate runs/nano-stdlib-001 -p "def main(" --temperature 0.7 --top-p 0.95',
    )
    add_run(parser)
    generation_options.add_lora_flag(parser)
    parser.add_argument(
        "-p",
        "--prompt",
        default="",
        metavar="TEXT",
        help="text to continue; - reads it from stdin, without its last line end",
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--no-stream", action="store_true", help="print once, when all is there")
    parser.add_argument(
        "--context",
        choices=CONTEXTS,
        default="error",
        help="when the model's context is full: error (default), stop, or slide: run the newest half of the text again "
        "as a new context and go on",
    )
    parser.add_argument("--keep", type=int, default=0, metavar="N", help="first tokens that stay when it slides")
    generation_options.add_choice_flags(parser)
    generation_options.add_speed_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: generation_options.until_reader_leaves(lambda: _run(args)))


def describe(model: BitNetForCausalLM) -> str:
    """What the command runs on, in one line."""
    cuda = "CUDA" if has_cuda() else "no CUDA in this build"
    weights = {
        id(w): w.size for _, module in model.named_modules() for w in vars(module).values() if isinstance(w, Tensor)
    }
    form = f"{layout_of(model)} bits a ternary weight, head {head_of(model)}"
    return (
        f"cpu: {current_isa()}, {get_threads()} threads; {cuda}; "
        f"model: {sum(weights.values()) / 1e6:.1f} M parameters, {form}"
    )


def _run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    sampler = generation_options.sampler(args)
    model = generation_options.load(args.run, args.layout, args.head, args.lora)
    speculation = generation_options.speculation(args, model)
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    stream = TextStream(
        model, prompt, sampler, args.max_new_tokens, args.stop,
        context=args.context, keep=args.keep, cache_dtype=args.cache_dtype, speculation=speculation,
    )  # fmt: skip
    print(describe(model), file=sys.stderr)
    if sys.stdout.isatty() and prompt:
        print(f"\033[2m{prompt}\033[0m", end="", flush=True)  # faint
    status, reason = _print(stream, not args.no_stream)
    ids = stream.ids
    slides = f", {ids.slides} slides of the context" if ids.slides else ""
    print(
        f"{len(ids.tokens)} tokens, {ids.tokens_per_second:.1f} tokens/s"
        f"{generation_options.describe_drafts(ids)}{slides}; "
        f"prompt: {ids.prompt_tokens} tokens in {ids.prompt_seconds:.2f} s; finish reason: {reason}",
        file=sys.stderr,
    )
    return status


def _print(stream: TextStream, at_once: bool) -> tuple[int, str]:
    """Print the text, piece by piece or at the end; returns the exit status and the finish reason."""
    text, status, reason = "", 0, ""
    try:
        for piece in stream:
            text += piece
            if at_once:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        status, reason = 130, "interrupted"
        rest = stream.held()
        text += rest
        if at_once:
            print(rest, end="")
    except ContextFullError as error:
        status, reason = 2, f"error: {error}"
    print("" if at_once else text, end="" if text.endswith("\n") else "\n", flush=True)
    full = " (the model's context is full)" if stream.ids.is_context_full else ""
    return status, reason or f"{stream.finish_reason}{full}"


if __name__ == "__main__":
    raise SystemExit(main())

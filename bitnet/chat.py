"""Command line `bitnet chat`: talk with a model; answers to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from bitnet import generation_options
from bitnet.chat_template import NAMES, choose
from bitnet.command import add_run, exit_status
from bitnet.conversation import CONTEXTS, Conversation, Turn
from bitnet.errors import BitnetError
from bitnet.generate import describe
from bitnet.text_stream import tokenizer_of
from bitnet.threads import use_threads

HELP = """\
/regenerate  another answer to the last question
/reset       forget the conversation
/help        this list
/quit        end, as Ctrl-D does
Ctrl-C stops an answer; what there is of it stays in the conversation."""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet chat",
        description="Talk with a trained model. A line is a message; /help lists commands.",
        epilog='example: bitnet chat runs/nano-stdlib-001 --system "You are brief." --temperature 0.6',
    )
    add_run(parser)
    generation_options.add_lora_flag(parser)
    parser.add_argument(
        "--template",
        choices=NAMES,
        default="auto",
        help="how a conversation is written: the tokenizer's own template if it has one, else bitnet (b1.58 2B-4T) if "
        "it knows that one's special token, else plain lines (default auto)",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told at first")
    parser.add_argument("--max-new-tokens", type=int, default=1000, metavar="N", help="of one answer (default 1000)")
    parser.add_argument(
        "--context",
        choices=CONTEXTS,
        default="slide",
        help="when the conversation outgrows the model's context: drop its oldest messages (default), or say so",
    )
    generation_options.add_choice_flags(parser)
    generation_options.add_speed_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C where nobody types."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: generation_options.until_reader_leaves(lambda: _run(args)))


def _run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    sampler = generation_options.sampler(args)
    model = generation_options.load(args.run, args.layout, args.head, args.lora)
    template = choose(args.template, tokenizer_of(model))
    conversation = Conversation(
        model, template, sampler, args.system, args.max_new_tokens, context=args.context,
        speculation=generation_options.speculation(args, model), cache_dtype=args.cache_dtype,
    )  # fmt: skip
    say(
        f"{describe(model)}; template: {template.name}; "
        f"context: {conversation.capacity} tokens, cache in {args.cache_dtype}; /help lists commands"
    )
    if template.name == "plain":
        say("this model comes without a chat template: it continues a written dialogue, as well as it can")
    talk(conversation)
    return 0


def talk(conversation: Conversation) -> None:
    """Reads lines and answers them until they end."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):  # where it is there, input() edits lines and remembers them
            importlib.import_module("readline")
    while True:
        try:
            line = _read(is_terminal)
            if line is None or line in ("/quit", "/exit"):
                return
            if line:
                respond(conversation, line)
        except KeyboardInterrupt:  # at the prompt, or between an answer and its status line
            if not is_terminal:
                raise
            say("\n(Ctrl-D or /quit ends)")


def respond(conversation: Conversation, line: str) -> None:
    """Obeys a command or answers a message; what cannot be done is said in a sentence."""
    try:
        if line == "/reset":
            conversation.reset()
            say("(forgotten)")
        elif line == "/help":
            say(HELP)
        elif line == "/regenerate":
            answer(conversation.ask_again)
        elif line.startswith("/"):
            say(f"error: {line.split()[0]} is no command; /help lists them")
        else:
            answer(lambda: conversation.ask(line))
    except BitnetError as error:
        say(f"error: {error}")


def answer(ask: Callable[[], Turn]) -> None:
    """Prints an answer as it comes, then what it took; Ctrl-C ends it."""
    turn = ask()
    try:
        for piece in turn:
            _print(piece if turn.text != piece else piece.lstrip())
    except KeyboardInterrupt:
        _print(turn.interrupt())
    print(flush=True)
    say(status(turn))


def status(turn: Turn) -> str:
    """Speed, what of the conversation had to be read, and why the answer ended where that is not its own end."""
    ids = turn.stream.ids
    notes = [f"{len(ids.tokens)} tokens, {ids.tokens_per_second:.1f} tokens/s{generation_options.describe_drafts(ids)}"]
    notes.append(f"read {ids.prompt_tokens - ids.reused_tokens} tokens in {ids.prompt_seconds:.2f} s")
    notes.append(f"{ids.reused_tokens} were in the cache")
    if turn.dropped:
        notes.append(f"the {turn.dropped} oldest messages were dropped to make room")
    if ids.slides:
        notes.append(f"the context slid {ids.slides} times")
    if ids.is_context_full:
        notes.append("the context is full: /reset, or --context slide")
    elif turn.finish_reason == "length":
        notes.append("cut at --max-new-tokens")
    elif turn.finish_reason == "interrupted":
        notes.append("interrupted" if turn.text else "interrupted before the first word: not remembered")
    return f"[{'; '.join(notes)}]"


def say(text: str) -> None:
    """To stderr, faint where somebody reads it."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def _read(is_terminal: bool) -> str | None:
    """A line without the spaces around it; None at the end."""
    if not is_terminal:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

"""Flags that `bitnet generate` and `bitnet chat` share, and what is made from them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from bitnet import _core
from bitnet.cache import DTYPES
from bitnet.drafting import MOST, Drafter, ModelDrafter, NgramDrafter, Speculation
from bitnet.errors import ConfigError
from bitnet.head import HEADS
from bitnet.layout import LAYOUTS
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler
from bitnet.text_stream import tokenizer_of
from bitnet.token_stream import TokenStream


def until_reader_leaves(work: Callable[[], int]) -> int:
    """work()'s own status; 0 where the reader of a pipe has enough."""
    try:
        return work()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the flush at exit may go
        return 0


def load(run: str, layout: str = "auto", head: str | None = None, adapters: str | None = None) -> BitNetForCausalLM:
    """The model of a run or file, packed: nothing is trained, and a token reads a sixteenth of the memory.

    adapters: a run or checkpoint of bitnet.lora whose adapters go beside the layers.
    """
    from bitnet.pretrained import from_pretrained

    model = from_pretrained(run)
    if adapters is not None:
        from bitnet.lora import attach

        attach(model, adapters)
    return model.pack(layout, head)


def layout_of(model: BitNetForCausalLM) -> str:
    """Bits of a ternary weight, as it is kept."""
    return next((_core.ternary_layout(layer.weight) or "8" for _, layer in model.bitlinears()), "no")


def head_of(model: BitNetForCausalLM) -> str:
    """Form of the output head."""
    if model.config.quantize_head:
        return "ternary"
    return model.head_weight.dtype if model.head is None else model.head.form


def add_form_flags(parser: argparse._ActionsContainer) -> None:
    """How weights are kept."""
    parser.add_argument(
        "--layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="bits of a ternary weight in memory; auto tries both where the model is large; never changes a result",
    )
    parser.add_argument(
        "--head",
        choices=HEADS,
        help="form of the output head: by default as it is stored; int8 and int6 are fast and near, screened is fast "
        "and gives the greedy and top-k choices of bf16",
    )


def add_lora_flag(parser: argparse.ArgumentParser) -> None:
    """Adapters beside the model."""
    parser.add_argument("--lora", metavar="RUN", help="adapters that were trained beside this model")


def add_choice_flags(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    choice = parser.add_argument_group("choice of tokens")
    choice.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest (default 0.8)")
    choice.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    choice.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest that have probability P together"
    )
    choice.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less")
    choice.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text (default 0)")


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """What changes how long a text takes; of these --head and --cache-dtype alone can change the text."""
    speed = parser.add_argument_group("speed and memory")
    add_form_flags(speed)
    speed.add_argument("--threads", type=int, metavar="N", help="default: one a core; never changes the text")
    speed.add_argument(
        "--speculate",
        type=_draft_length,
        default=None,
        metavar="auto|off|N",
        help=f"guess tokens from the text so far and verify them together: where it pays (default), never, or always "
        f"N of them, 1 to {MOST}; never changes the text",
    )
    speed.add_argument(
        "--cache-dtype",
        choices=DTYPES,
        default="f32",
        help="how keys and values of the text so far are kept: exact (default), or rounded in less memory",
    )
    speed.add_argument("--draft", metavar="RUN", help="a small model with the same tokenizer that guesses too")


def sampler(args: argparse.Namespace) -> Sampler:
    """Of the flags of add_choice_flags."""
    return Sampler(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)


def speculation(args: argparse.Namespace, model: BitNetForCausalLM) -> Speculation:
    """Of the flags of add_speed_flags. ConfigError if the small model has another tokenizer."""
    drafters: list[Drafter] = [NgramDrafter()]
    if args.draft is not None:
        small, tokenizer = load(args.draft), tokenizer_of(model)
        if tokenizer_of(small).fingerprint() != tokenizer.fingerprint():
            raise ConfigError(f"{args.draft} cannot draft: its tokenizer is not the model's")
        drafters.append(ModelDrafter(small, sampler(args), tokenizer.vocab_size))
    return Speculation(drafters, args.speculate)


def describe_drafts(stream: TokenStream) -> str:
    """What became of the drafts, for a status line; nothing where there were none."""
    drafted, accepted = stream.drafted_tokens, stream.accepted_tokens
    return f", {accepted} of {drafted} drafted tokens right" if drafted else ""


def _draft_length(text: str) -> int | None:
    if text == "auto":
        return None
    if text == "off":
        return 0
    if text.isdecimal() and 0 <= int(text) <= MOST:
        return int(text)
    raise argparse.ArgumentTypeError(f"auto, off or a number from 0 to {MOST}, not {text!r}")

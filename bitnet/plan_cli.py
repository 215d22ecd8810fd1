"""Command line `bitnet plan`: what a run or a conversation takes in memory, before anything is made.

    bitnet plan train --preset 125m --batch-size 4 --seq-len 512      any option of bitnet train
    bitnet plan generate --preset 2b-4t --context 4096 --head int6    or a model: a run, a folder, a file

The step is rehearsed in milliseconds with tensors that have sizes and no values: see bitnet/plan.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitnet import train
from bitnet._core import get_threads
from bitnet.cache import DTYPES
from bitnet.command import exit_status
from bitnet.config import PRESETS, BitNetConfig
from bitnet.errors import ConfigError
from bitnet.head import HEADS
from bitnet.layout import LAYOUTS
from bitnet.plan import Plan, generation_plan, process_bytes
from bitnet.pretrained import Outline, outline_of
from bitnet.report_text import size
from bitnet.run_model import DEFAULT_VOCAB, planned, prospect_of
from bitnet.system_memory import system_memory
from bitnet.threads import use_threads
from bitnet.trainer_config import TrainerConfig

Lever = tuple[str, dict[str, Any]]  # flags, and the fields that they set
MOST_ROWS = 1 << 14


def table(plan: Plan) -> str:
    """The parts of a plan and their sum, one a line, and what opening takes where that is more."""
    rows = [(name, size(bytes_)) for name, bytes_ in plan.parts.items()]
    rows.append(("in all", f"{size(plan.total)}, and {size(process_bytes())} for Python and {get_threads()} threads"))
    if plan.opening > plan.total:
        rows.append(("while it is opened", size(plan.opening)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def choices(rows: Iterable[tuple[str, Plan]]) -> str:
    """What would take how much, one a line."""
    rows = list(rows)
    width = max(len(flags) for flags, _ in rows)
    return "\n".join(f"{flags:<{width}}  {size(plan.total)}" for flags, plan in rows)


def training_levers(c: TrainerConfig) -> list[Lever]:
    """What makes a run take less, of what is not in use; all but the last change no batch."""
    levers: list[Lever] = []
    if not c.activation_checkpointing:
        levers.append(("--activation-checkpointing", {"activation_checkpointing": True}))
    if c.moments != "bf16":
        levers.append(("--moments bf16", {"moments": "bf16"}))
    if c.batch_size > 1 and c.batch_size % 2 == 0:
        halves = {"batch_size": c.batch_size // 2, "grad_accum": 2 * c.grad_accum}
        levers.append((f"--batch-size {halves['batch_size']} --grad-accum {halves['grad_accum']}", halves))
    return levers


def most_rows(planned: Callable[[int], int], room: int) -> int:
    """The largest batch, of up to MOST_ROWS, whose plan is within `room` bytes; 0 if not even one sequence is."""
    low, high = 0, 1
    while planned(high) <= room:
        if high == MOST_ROWS:
            return high
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if planned(middle) <= room else (low, middle)
    return low


def plan_training(argv: Sequence[str]) -> int:
    """Of `bitnet train` with these flags."""
    parser = train.arguments()
    parser.prog, parser.usage = "bitnet plan train", "bitnet plan train [any option of bitnet train]"
    parser.description, parser.epilog = "What `bitnet train` with the same options takes in memory.", None
    args = train.parsed(parser, argv)
    settings = train.settings_of(args)
    use_threads(settings.run.threads)
    prospect = prospect_of(settings, None if args.resume is None else Path(args.resume))
    shape, c = prospect.shape(DEFAULT_VOCAB), settings.trainer

    def changed(**changes: Any) -> Plan:
        return planned(replace(prospect, settings=replace(settings, trainer=replace(c, **changes))), shape)

    room = system_memory()
    print(f"{c.batch_size} x {c.seq_len} tokens, vocabulary {shape.vocab_size:,}, {c.optimizer}, {c.precision}")
    if prospect.vocabulary is None:
        print("the characters of the text are counted when it is packed: --vocab-size N plans with another number")
    print("\n" + table(changed()))
    levers = training_levers(c)
    if levers:
        every = {name: value for _, changes in levers for name, value in changes.items()}
        rows = [(flags, changed(**changes)) for flags, changes in levers]
        print("\nwith\n" + choices([*rows, ("all of these", changed(**every))] if len(rows) > 1 else rows))
    free = room.free - process_bytes()
    most = most_rows(lambda rows: changed(batch_size=rows).total, free)
    found = f"--batch-size {most} is the most that fits" if most else "not even --batch-size 1 fits"
    if most == MOST_ROWS:
        found = f"at least --batch-size {most} fits"
    print(f"\nthis machine has {size(room.total)}, {size(room.free)} free: {found}")
    return 0


def plan_generation(argv: Sequence[str]) -> int:
    """Of `bitnet generate` or `bitnet chat` with a packed model."""
    parser = argparse.ArgumentParser(prog="bitnet plan generate", description="What a packed model takes in memory.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run, a Hugging Face folder, a .bitnet or GGUF file")
    parser.add_argument("--preset", choices=PRESETS, metavar="P", help=f"instead of a run: {', '.join(PRESETS)}")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a sequence (as many as the model reads)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once (1)")
    parser.add_argument("--layout", choices=LAYOUTS, default="2", help="bits of a ternary weight (2)")
    parser.add_argument("--head", choices=HEADS, help="form of the output head (f32)")
    parser.add_argument("--cache-dtype", choices=tuple(DTYPES), default="f32", help="of keys and values (f32)")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.preset is None):
        raise ConfigError("plan generate needs either a run or --preset P")
    outline = Outline(BitNetConfig.preset(args.preset), False) if args.run is None else outline_of(args.run)
    shape = outline.config
    context = shape.max_position_embeddings if args.context is None else args.context
    given = {"layout": args.layout, "head": args.head, "cache": args.cache_dtype}

    def changed(**changes: Any) -> Plan:
        return generation_plan(shape, context, args.batch, **{**given, **changes}, is_latent=outline.is_latent)

    print(f"{args.batch} x {context:,} tokens\n\n{table(changed())}")
    levers: list[Lever] = [(f"--cache-dtype {name}", {"cache": name}) for name in DTYPES if name != args.cache_dtype]
    if not shape.quantize_head:
        levers += [(f"--head {name}", {"head": name}) for name in HEADS if name != (args.head or "f32")]
    levers += [(f"--layout {name}", {"layout": name}) for name in LAYOUTS if name != args.layout]
    print("\nwith\n" + choices((flags, changed(**changes)) for flags, changes in levers))
    room = system_memory()
    print(f"\nthis machine has {size(room.total)}, {size(room.free)} free")
    return 0


KINDS = {"train": plan_training, "generate": plan_generation}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in KINDS:
        return exit_status(lambda: KINDS[words[0]](words[1:]))
    parser = argparse.ArgumentParser(prog="bitnet plan", description=(__doc__ or "").partition(": ")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=KINDS, help="of which command; `bitnet plan train --help` tells its options")
    parser.parse_args(words)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())

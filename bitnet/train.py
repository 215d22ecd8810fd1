"""Command line `bitnet train`: text to tokens, tokens to a model, in a run folder that can always be resumed.

RUN/train.yaml      every option as used        RUN/data/         the packed text (unless --data is a pack)
RUN/checkpoints/    see bitnet/checkpoint.py    RUN/metrics.jsonl, layers.jsonl, samples.txt, plots/*.png
                                                RUN/machines.jsonl  where it ran
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from bitnet import checkpoint, mfu
from bitnet._core import current_isa, get_threads, has_cuda, set_threads
from bitnet.command import REFUSALS, said
from bitnet.config import WRITTEN_WHERE_SET, BitNetConfig
from bitnet.convert import to_ternary
from bitnet.corpus import RECIPES
from bitnet.corpus.hub import PREFIX
from bitnet.data import DataLoader, ShardDataset
from bitnet.data_cli import pack
from bitnet.errors import BitnetError, CheckpointError, ConfigError
from bitnet.interrupts import Interrupted, Interrupts
from bitnet.metrics import Record, in_both, read_metrics
from bitnet.mixture import Mixture
from bitnet.model import BitNetForCausalLM
from bitnet.pretrained import from_pretrained, located
from bitnet.rows import Conversations, DocumentWindows
from bitnet.run_config import OPTIONS, RunConfig, Settings, parse, read_yaml, resumed, write_yaml
from bitnet.run_model import (
    DEFAULT_VOCAB,
    Prospect,
    goes_on_with_its_own,
    memory_line,
    model_vocabulary,
    packed_text,
    planned,
    prospect_of,
    refuse_untrainable,
)
from bitnet.shipped import shipped, shipped_names
from bitnet.tokenizer import Tokenizer
from bitnet.trainer import Trainer, check_readable
from bitnet.trainer_config import TrainerConfig

T = TypeVar("T")

OPTIONS_FILE = "train.yaml"

EXAMPLES = """\
examples:
  bitnet train                                          the default: Python's standard library, a small model
  bitnet train --data book.txt --tokenizer chars --preset char --minutes 10
  bitnet train --data texts/ more.jsonl --preset 125m --grad-accum 8 --steps 20000
  bitnet train --data packs/web=0.7 packs/code=0.3      several packs, mixed (or a mixture.yaml)
  bitnet train --config tinyshakespeare --data tinyshakespeare.txt    a recipe that was measured; --twin: its twin
  bitnet train --hidden-size 512 --num-hidden-layers 6 --twin
  bitnet train --config runs/nano-stdlib-001/train.yaml --lr 1e-3 --out runs/lower
  bitnet train --init runs/nano-stdlib-001 --data notes.txt --lr 5e-4
  bitnet train --init llama/ --convert --teacher llama/ --data notes.txt    full precision made ternary
  bitnet train --init nano.bitnet --lora 8 --data notes.txt --lr 1e-3     adapters alone, beside frozen weights
  bitnet train --resume runs/nano-stdlib-001            goes on after Ctrl-C, a crash, or with more --steps

Ctrl-C ends at once and keeps what is done; SIGTERM writes a checkpoint first and ends with status 143.
Same options and text, same bytes: on any CPU, stopped or not.
"""

GROUPS: tuple[tuple[str, type, str], ...] = (
    ("text and model", RunConfig, ""),
    ("training", TrainerConfig, ""),
    ("model shape, over the preset's", BitNetConfig, "Any field of BitNetConfig by its name."),
)


def arguments() -> argparse.ArgumentParser:
    """The command's flags: one for every option, each a text that run_config.parse understands."""
    parser = argparse.ArgumentParser(
        prog="bitnet train",
        usage="bitnet train [--data PATH ...] [--preset NAME] [--steps N | --minutes X] [--out DIR | --resume DIR] ...",
        description="Train a ternary language model. With no flags: a complete small run, a few minutes on two cores.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", help="run folder to make (runs/PRESET-TEXT-NNN)")
    run.add_argument("--resume", metavar="DIR", help="run folder to go on with; other flags change its options")
    run.add_argument("--config", metavar="FILE", help="YAML file of options, under the names of these flags, "
                     f"or a recipe: {', '.join(shipped_names('recipes'))}")  # fmt: skip
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any option by name; repeatable")
    run.add_argument("--debug", action="store_true", help="show the traceback of an error")
    seen: set[str] = set()
    for title, group, about in GROUPS:
        section = parser.add_argument_group(title, about or None)
        for field in fields(group):
            if field.name in seen:
                continue
            seen.add(field.name)
            kind = str(field.type)
            metavars = {"float": "X", "int": "N"}
            extra: dict[str, Any] = {"metavar": metavars.get(kind.removesuffix(" | None"), "TEXT")}
            if kind == "bool":
                extra = {"nargs": "?", "const": "true", "metavar": "true|false"}
            elif kind.startswith("tuple"):
                extra = {"nargs": "+", "metavar": "PATH"}
            section.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, help=_help(field), **extra)
    return parser


def _help(field: Any) -> str:
    text = str(field.metadata.get("help", "")).replace("%", "%%")
    if field.default in (MISSING, None, ()) or field.name in _MODEL_NAMES or str(field.type) == "bool":
        return text
    return f"{text} ({field.default})" if text else f"({field.default})"


_MODEL_NAMES = {field.name for field in fields(BitNetConfig)}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C, 143 after SIGTERM."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        train(parsed(arguments(), words))
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("\ninterrupted; a run that had begun goes on with --resume", file=sys.stderr)
        return 130
    except REFUSALS as error:
        if "--debug" in words:
            raise
        print(f"error: {said(error)}", file=sys.stderr)
        return 2
    return 0


def parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The flags of arguments(), in either spelling. ConfigError for others."""
    args, unknown = parser.parse_known_args(_normalized(words))
    if unknown:
        if unknown[0].startswith("--"):
            parse(unknown[0].removeprefix("--").partition("=")[0], "", " on the command line")
        raise ConfigError(f"{unknown[0]!r} on the command line belongs to no flag")
    return args


def _normalized(argv: Sequence[str]) -> list[str]:
    """--hidden_size is --hidden-size."""
    out = []
    for word in argv:
        flag, equals, value = word.partition("=")
        out.append((flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value)
    return out


def train(args: argparse.Namespace) -> Trainer:
    """Runs the command; returns the trainer when it is done."""
    settings = settings_of(args)
    if args.resume is not None:
        out = Path(args.resume)
    else:
        out = _make_folder(settings, args.out)
        write_yaml(out / OPTIONS_FILE, settings)
    try:
        trainer = _set_up(settings, out, args.resume is not None)
    except (BitnetError, MemoryError):
        if args.resume is None:  # it never began
            shutil.rmtree(out)
        raise
    before = trainer.step
    trainer.fit()
    _conclude(trainer, before)
    return trainer


def settings_of(args: argparse.Namespace) -> Settings:
    """The options that the flags ask for: of a new run, or of the one that goes on. Raises ConfigError."""
    given = options_given(args)
    if args.resume is None:
        return Settings.of(chosen(args.config, given))
    if args.out is not None or args.config is not None:
        raise ConfigError("--resume goes on in its own folder with its own options: leave --out and --config away")
    run = Path(args.resume)
    if not (run / OPTIONS_FILE).is_file():
        raise CheckpointError(f"{run} is no run to resume: it has no {OPTIONS_FILE}")
    return Settings.of(resumed(read_yaml(run / OPTIONS_FILE), given, run))


def _set_up(settings: Settings, out: Path, resume: bool) -> Trainer:
    """Text, tokenizer, model, and the trainer at the step where it begins; prints what was chosen."""
    set_threads(settings.run.threads)
    print(f"cpu: {current_isa()}, {get_threads()} threads; {'CUDA' if has_cuda() else 'no CUDA in this build'}")
    print(f"run: {out}", flush=True)
    prospect = prospect_of(settings, out)
    line = memory_line(planned(prospect, prospect.shape(1)))  # refuses before anything is opened, or text read
    if prospect.given is not None:  # a new model's vocabulary may be another one, and is known in build()
        print(line, flush=True)
    model = _interruptible(lambda: initial(settings, out), out, "opening the model")
    data = _interruptible(lambda: prepare(settings, out, model), out, "preparing the text")
    trainer = build(prospect, data, out, model)
    if resume:
        trainer.resume()
    trainer.plan()
    write_yaml(out / OPTIONS_FILE, replace(settings, trainer=trainer.config))
    _introduce(trainer)
    return trainer


def chosen(config: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a new run: those of --config (a file, or the name of a recipe), and flags over them.

    Flags that name a text take the place of the file's. ConfigError where neither names one: only a command without
    --config takes the standard library.
    """
    if config is None:
        options, path = dict(given), None
    else:
        path = Path(config) if Path(config).is_file() else shipped("recipes", config)
        if path is None:
            known = ", ".join(shipped_names("recipes"))
            raise ConfigError(f"there is no file and no recipe {config!r}; recipes: {known}")
        options = read_yaml(path)
        if given.keys() & {"data", "recipe"}:
            options = {name: value for name, value in options.items() if name not in ("data", "recipe")}
        options |= given
    if not options.get("data") and options.get("recipe") is None:
        if path is not None:
            raise ConfigError(f"{path} names no text to train on: add --data FILE or --recipe {RECIPES[0]}")
        options["recipe"] = RECIPES[0]
    return options


def options_given(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were set by flags."""
    pairs = [(name, value) for name, value in vars(args).items() if name in OPTIONS and value is not None]
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set needs NAME=VALUE, not {text!r}")
        pairs.append((name.strip().replace("-", "_"), value))
    options = {name: parse(name, value, " on the command line") for name, value in pairs}
    if "data" in options:  # the run may be resumed from another folder
        options["data"] = tuple(
            path if path.startswith(PREFIX) else str(Path(path).resolve()) for path in options["data"]
        )
    if options.get("teacher") is not None:
        options["teacher"] = located(options["teacher"])
    if options.get("init") is not None:
        options["init"] = located(options["init"])
    return options


def _make_folder(settings: Settings, out: str | None) -> Path:
    """The run folder, new: an existing run is never written over."""
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} already exists: go on with --resume {folder}, or choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    run = settings.run
    name = (
        f"{run.preset if run.init is None else Path(run.init).stem}-{run.stem}"
        + "-twin" * run.twin
        + "-lora" * (run.lora > 0)
    )
    number = 1
    while True:
        folder = Path("runs", f"{name}-{number:03d}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def initial(settings: Settings, out: Path) -> BitNetForCausalLM | None:
    """The model that `init` names, to be trained; None without. A run with checkpoints is its own source.

    Raises CheckpointError, or ConfigError for a model that cannot be trained.
    """
    source = settings.run.init
    if source is None:
        return None
    run = settings.run
    if goes_on_with_its_own(run, out):
        return from_pretrained(out)
    model = from_pretrained(source)
    refuse_untrainable(model, run, source)
    lora = run.adapters
    if lora is not None:
        seed = settings.trainer.seed
        return model.add_lora(lora.rank, lora.alpha, lora.targets, norms=lora.norms, seed=seed)
    return model


def prepare(settings: Settings, out: Path, model: BitNetForCausalLM | None = None) -> ShardDataset | Mixture:
    """The packed text: packed now into the run folder, unless it is there or `data` is a pack, or several.

    model: what is trained further, whose tokenizer takes the place of the one that the options name.
    """
    run = settings.run
    data = packed_text(run, out)
    if data is not None:
        return data
    tokenizer = run.tokenizer if model is None else _tokenizer_of(model)
    if tokenizer is None:
        raise ConfigError(f"{run.init} has no tokenizer: pack the text with `bitnet data`, and give the pack as data")
    folder = pack(
        list(run.data) or run.recipe or RECIPES[0],
        out / "data",
        tokenizer,
        run.vocab_size or DEFAULT_VOCAB,
        seq_len=settings.trainer.seq_len,
        val_fraction=run.val_fraction,
        separator=run.separator,
        max_bytes=None if run.max_mb is None else int(run.max_mb * 1e6),
    )
    return ShardDataset(folder)


def _tokenizer_of(model: BitNetForCausalLM) -> Tokenizer | None:
    """The one that came with a model that was opened."""
    tokenizer: Tokenizer | None = getattr(model, "tokenizer", None)
    return tokenizer


def build(
    prospect: Prospect, data: ShardDataset | Mixture, out: Path, model: BitNetForCausalLM | None = None
) -> Trainer:
    """Trainer for packed text, and its model: a new one, of which it is said what it takes, unless it is given.

    Raises ConfigError for a model whose tokenizer is not the one of the text, and for too little memory.
    """
    settings, tokenizer, trainer = prospect.settings, data.tokenizer(), prospect.settings.trainer
    if trainer.sample_prompt is None and not settings.run.data:
        trainer = replace(trainer, sample_prompt="def ")  # the recipe's text is Python
    if model is None:
        shape = settings.model_config(model_vocabulary(settings.run, tokenizer.vocab_size, data.folder, out))
        print(memory_line(planned(prospect, shape)), flush=True)
        model = BitNetForCausalLM(shape, trainer.seed)
    else:
        own = _tokenizer_of(model)
        if own is not None and own.fingerprint() != tokenizer.fingerprint():
            raise ConfigError(
                f"the text in {data.folder} was packed with another tokenizer than that of {settings.run.init}"
            )
        if settings.run.convert and not checkpoint.steps(out):
            model = _converted(model, data, trainer)
    return Trainer(model, data, trainer, tokenizer=tokenizer, out=out)


def _converted(model: BitNetForCausalLM, data: ShardDataset | Mixture, trainer: TrainerConfig) -> BitNetForCausalLM:
    """The ternary form of a full-precision model, calibrated on the first batch; says what was made.

    Raises ConfigError for a batch that the model cannot read.
    """
    c, t = model.config, trainer
    check_readable(c, t.seq_len, data)
    loader = DataLoader(data, t.batch_size, t.seq_len, t.seed, t.order, documents=t.documents)
    made = to_ternary(model, *loader.batch(0))
    norms = "with the sub-norms that it had"
    if not c.sub_norms:
        new = [p.numpy(copy=True) for name, p in made.named_parameters() if name.endswith("_sub_norm.weight")]
        gains = [float(values[0]) for values in new]
        norms = f"{len(gains)} sub-norms inserted with gains of {min(gains):.3g} to {max(gains):.3g}"
    print(f"converted: {sum(1 for _ in made.bitlinears())} matrices are ternary now, {norms}")
    return made


def _interruptible(work: Callable[[], T], out: Path, doing: str) -> T:
    """Does work on another thread, so that Ctrl-C is heard while a library computes; nothing half-done counts.

    doing: what it is, as an interrupt tells.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with Interrupts() as interrupts:
        try:
            thread.start()
            while thread.is_alive():
                thread.join(0.1)
        except KeyboardInterrupt:
            command = f"python -m bitnet.train --resume {out}"
            print(f"\nstopped while {doing}; go on with: {command}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            # The thread may be deep inside a library, which an orderly exit would wait for.
            os._exit(128 + (interrupts.signal or signal.SIGINT))
    if errors:
        raise errors[0]
    return results[0]


BACKWARD = {"fast": "bf16", "int8": "int8 and bf16", "fp32": "f32"}


# Named where they are not off, with the model's own, WRITTEN_WHERE_SET.
LEVERS = ("optimizer", "ema", "ternary_from", "ternary_ramp", "requantize_every", "teacher", "distill_attention")


def _introduce(trainer: Trainer) -> None:
    c, model = trainer.config, trainer.model
    ternary = model.num_ternary()
    if model.lora is not None:
        kind = f"in adapters of rank {model.lora.rank} beside {ternary:,} frozen ternary weights"
    else:
        kind = f"{ternary / model.num_parameters():.0%} of them ternary" if ternary else "full precision"
    steps = c.steps or 0
    print(f"peak: {mfu.describe(trainer.peaks)}")
    print(f"model: {model.num_parameters():,} parameters, {kind}; vocabulary {model.config.vocab_size:,}")
    print(
        f"plan: {steps:,} steps of {c.tokens_per_step:,} tokens = {steps * c.tokens_per_step / 1e6:.2f} M tokens, "
        f"{trainer.loader.epoch(steps * c.grad_accum):.2f} epochs; {c.schedule}, lr {c.lr:g} to {c.min_lr:g}, "
        f"{c.warmup} steps of warm-up; evaluation every {c.eval_every}, checkpoint every {c.save_every}; "
        f"backward in {BACKWARD[c.precision]}"
    )
    if isinstance(trainer.loader.rows, DocumentWindows):
        print(f"documents stay separate: {trainer.loader.rows.filled:.0%} of the places in a batch hold text")
    if isinstance(trainer.loader.rows, Conversations) and trainer.loader.rows.left_out:
        print(f"{trainer.loader.rows.left_out:,} conversations have no answer within {c.seq_len} tokens: left out")
    levers = [f"{name} {getattr(c, name)}" for name in LEVERS if getattr(c, name) != OPTIONS[name].default]
    levers += [f"{name} {value}" for name, value in model.config.as_dict().items() if name in WRITTEN_WHERE_SET]
    if levers:
        print(f"levers: {', '.join(levers)}")
    sys.stdout.flush()


def _conclude(trainer: Trainer, before: int) -> None:
    out, prompt = trainer.out, trainer.sample_prompt()
    if trainer.step == before:
        early = " (it stopped early: --patience 0)" if 0 < trainer.config.patience <= trainer.stale else ""
        print(f"{out} was complete at step {trainer.step}; train it further with --steps or --minutes{early}")
    if trainer.samples:
        print(f"\na sample:\n{trainer.samples[-1]}\n")
    best = trainer.best
    if best is not None:
        print(f"best validation loss {best['val_loss']:.4f} at step {best['step']}")
    if trainer.history and trainer.history[-1].get("val_loss_ema") is not None:
        loss = trainer.history[-1]["val_loss_ema"]
        print(f"validation loss {loss:.4f} with averaged weights: bitnet ema {out} {out}-ema")
    if trainer.config.compare is not None:
        print(_gap(trainer.history, trainer.config.compare))
    print(f"pictures: {out}/plots; checkpoints, metrics.jsonl and samples.txt beside them")
    print(f"next: python -m bitnet.generate {out} -p {_quoted(prompt)}")


def _gap(history: Sequence[Record], other: str) -> str:
    """How far the validation loss of a run lies above another's, at the last step where both were evaluated."""
    try:
        theirs = read_metrics(Path(other) / "metrics.jsonl")
    except OSError as error:
        return f"no gap to {other}: {error.strerror}"
    found = in_both(*([(record["step"], record["val_loss"]) for record in one] for one in (history, theirs)))
    if not found:
        return f"no gap to {other}: there is no step at which both runs were evaluated"
    place, own, its = found[-1]
    step = history[place]["step"]
    return f"validation loss {own:.4f}, {its:.4f} of {other}: gap {own - its:+.4f} nats at step {step}"


def _quoted(text: str) -> str:
    """The last line of a prompt as a shell needs it."""
    line = text.strip("\n").rpartition("\n")[2]
    return shlex.quote(line) if any(mark in line for mark in '"\\$`!') else f'"{line}"'


if __name__ == "__main__":
    raise SystemExit(main())

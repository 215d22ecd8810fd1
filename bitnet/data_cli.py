"""Command line `bitnet data`: text in, a pack out. What it does is in bitnet/prepare."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet import recipes
from bitnet.chat_template import NAMES
from bitnet.command import exit_status
from bitnet.data import ShardDataset
from bitnet.errors import ConfigError
from bitnet.prepare import DEDUP, SHARD_TOKENS, pack, pack_chat
from bitnet.shard import MANIFEST, read_manifest
from bitnet.tokenizer import SPECS, Tokenizer, build_tokenizer

__all__ = ["main", "pack", "pack_chat"]

EXAMPLES = """\
examples:
  bitnet data --data book.txt --out packs/book --tokenizer chars
  bitnet data --data web/*.jsonl.zst --out packs/web --dedup near --min-score 3 --language en --workers 8
  bitnet data --recipe tinystories --out packs/tinystories          asks the hub; --data FILE reads it from there
  bitnet data --chat talks.jsonl --tokenizer-of runs/nano-stdlib-001 --out packs/talks          to fine-tune on

Killed, the same command goes on with the first shard that was not finished.
"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet data",
        description="Turn text into packed tokens for training.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="text, .jsonl (.gz, .zst), .parquet, folders of them, hub:OWNER/NAME"
    )
    parser.add_argument("--recipe", metavar="NAME", help="stdlib, another of datasets/, or a .yaml; --data: from there")
    parser.add_argument("--chat", nargs="+", metavar="FILE", help="conversations (.jsonl, .gz, .zst) to fine-tune on")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help=f"sentencepiece; {', '.join(SPECS)}, a .model or .json file"
    )
    parser.add_argument("--tokenizer-of", metavar="RUN", help="the tokenizer of a model, instead")
    parser.add_argument("--template", choices=NAMES, help="with --chat: as for bitnet chat (auto)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="for sentencepiece (4096)")
    parser.add_argument("--seq", dest="seq_len", type=int, metavar="T", help="window the data must hold (256)")
    parser.add_argument("--val-fraction", type=float, metavar="X", help="held out (default 0.01, one document: 0.1)")
    parser.add_argument("--separator", metavar="TEXT", help="what stands between documents in text files")
    parser.add_argument("--text-field", metavar="NAME", help="of a record (text), such as body.plain")
    parser.add_argument("--max-mb", type=float, metavar="MB", help="stop after this much text")
    parser.add_argument("--shards", type=int, metavar="N", help="equal parts of the corpus, a file or more each (1)")
    parser.add_argument("--shard-tokens", type=int, metavar="N", help=f"most tokens in a file ({SHARD_TOKENS:,})")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (1); no byte depends on them")
    parser.add_argument("--verify", action="store_true", help="read the pack again and check every byte")
    screen = parser.add_argument_group("documents to leave out", "By default none.")
    screen.add_argument("--min-score", type=float, metavar="X", help="least score a record must have")
    screen.add_argument("--score-field", metavar="NAME", help="where it stands (score)")
    screen.add_argument("--language", metavar="CODE", help="language a record must have")
    screen.add_argument("--language-field", metavar="NAME", help="where it stands (language)")
    screen.add_argument("--where", nargs="+", metavar="NAME=TEXT", help="what fields of a record must hold")
    screen.add_argument("--min-chars", type=int, metavar="N", help="shortest document")
    screen.add_argument("--max-chars", type=int, metavar="N", help="longest document")
    screen.add_argument(
        "--max-repetition", type=float, metavar="X", help="largest share of repeated five-word stretches"
    )
    screen.add_argument("--dedup", choices=DEDUP, help="duplicates: exact, or near (exact too)")
    screen.add_argument("--near", type=float, metavar="X", help="similarity of near duplicates (0.7)")
    screen.add_argument("--across", type=float, metavar="X", help="of held-out and training text (0.5)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _make(args), "\ninterrupted; the same command goes on with what is finished")


def _make(args: argparse.Namespace) -> int:
    """Packs, verifies where that is asked, and says what is next."""
    out = _run(args)
    if args.verify:
        for folder in [out] if out.is_dir() else [path.parent for path in out.parent.glob(f"*/{MANIFEST}")]:
            for part in read_manifest(folder)["splits"]:
                ShardDataset(folder, part).verify()
        print("verified: every checksum and every id")
    init = "" if args.tokenizer_of is None else f" --init {args.tokenizer_of}"
    print(f"next: bitnet train{init} --data {out}")
    return 0


PACK_FLAGS = "tokenizer vocab_size seq_len val_fraction separator text_field shards shard_tokens workers".split()
SCREEN_FLAGS = (
    "min_score score_field language language_field where min_chars max_chars max_repetition dedup near across".split()
)


def _run(args: argparse.Namespace) -> Path:
    """The pack that was made, or the mixture of several."""
    options, screen = (
        {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        for names in (PACK_FLAGS, SCREEN_FLAGS)
    )
    if args.tokenizer_of is not None:
        if args.tokenizer is not None:
            raise ConfigError("either --tokenizer or --tokenizer-of names the tokenizer")
        options["tokenizer"] = _tokenizer_of(args.tokenizer_of)
    if args.chat is not None:
        return _run_chat(args, options | screen)
    if args.template is not None:
        raise ConfigError(f"--template {args.template} is for --chat")
    if args.max_mb is not None:
        options["max_bytes"] = int(args.max_mb * 1e6)
    if "where" in screen:
        pairs = [pair.partition("=") for pair in screen["where"]]
        screen["where"] = {name: value for name, _, value in pairs}
    if args.recipe is not None and args.recipe != "stdlib":
        return recipes.run(recipes.find(args.recipe), args.out, args.data or (), options, screen)
    if (args.recipe is None) == (args.data is None):
        raise ConfigError("either --data or --recipe names the text")
    return pack(args.recipe or args.data, args.out, preparation=recipes.preparation(screen), **options)


def _run_chat(args: argparse.Namespace, given: dict[str, Any]) -> Path:
    """The pack of conversations. ConfigError for flags that say nothing of them."""
    known = ("tokenizer", "val_fraction")
    other = [name for name in ("data", "recipe", "max_mb") if getattr(args, name) is not None]
    other += [name for name in given if name not in known]
    if other:
        raise ConfigError(f"--{other[0].replace('_', '-')} is for text, not for the conversations of --chat")
    tokenizer = given.get("tokenizer", "sentencepiece")
    if isinstance(tokenizer, str):
        if tokenizer in SPECS and tokenizer != "bytes":
            raise ConfigError(f"--chat needs the tokenizer of a model (--tokenizer-of RUN), not {tokenizer}")
        tokenizer = build_tokenizer(tokenizer, [], 0)
    return pack_chat(args.chat, args.out, tokenizer, args.template or "auto", val_fraction=args.val_fraction)


def _tokenizer_of(run: str) -> Tokenizer:
    from bitnet.pretrained import from_pretrained
    from bitnet.text_stream import tokenizer_of

    return tokenizer_of(from_pretrained(run))


if __name__ == "__main__":
    raise SystemExit(main())

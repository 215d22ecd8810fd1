"""Command line `bitnet data`: text in, a pack out. What it does is in bitnet/prepare."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bitnet.corpus import RECIPES
from bitnet.data import ShardDataset
from bitnet.errors import BitnetError
from bitnet.prepare import DEDUP, SHARD_TOKENS, Filters, Preparation, pack
from bitnet.shard import read_manifest
from bitnet.tokenizer import SPECS

__all__ = ["main", "pack"]

EXAMPLES = """\
examples:
  bitnet data --data book.txt --out packs/book --tokenizer chars
  bitnet data --data web/*.jsonl.zst --out packs/web --dedup near --min-score 3 --language en --workers 8

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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", nargs="+", metavar="PATH", help="text, .jsonl (.gz, .zst), .parquet, folders of them, hub:OWNER/NAME"
    )
    source.add_argument("--recipe", choices=RECIPES, help="text already on this machine; see datasets/README.md")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tokenizer", default="sentencepiece", metavar="SPEC", help=f"{', '.join(SPECS)}, or a .model or .json file"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="for sentencepiece (default 4096)")
    parser.add_argument("--seq", type=int, default=256, metavar="T", help="window the data must hold (default 256)")
    parser.add_argument("--val-fraction", type=float, metavar="X", help="held out (default 0.01, one document: 0.1)")
    parser.add_argument("--separator", metavar="TEXT", help="what stands between documents in text files")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of a record, such as text or body.plain")
    parser.add_argument("--max-mb", type=float, metavar="MB", help="stop after this much text")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="most tokens in a file")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; no byte depends on them")
    parser.add_argument("--verify", action="store_true", help="read the pack again and check every byte")
    screen = parser.add_argument_group("documents to leave out", "By default none.")
    screen.add_argument("--min-score", type=float, metavar="X", help="least score a record must have")
    screen.add_argument("--score-field", default="score", metavar="NAME", help="where it stands (score)")
    screen.add_argument("--language", metavar="CODE", help="language a record must have")
    screen.add_argument("--language-field", default="language", metavar="NAME", help="where it stands (language)")
    screen.add_argument("--min-chars", type=int, metavar="N", help="shortest document")
    screen.add_argument("--max-chars", type=int, metavar="N", help="longest document")
    screen.add_argument(
        "--max-repetition", type=float, metavar="X", help="largest share of repeated five-word stretches"
    )
    screen.add_argument("--dedup", choices=DEDUP, default="none", help="duplicates: exact, or near (exact too)")
    screen.add_argument("--near", type=float, default=0.7, metavar="X", help="similarity of near duplicates (0.7)")
    screen.add_argument("--across", type=float, default=0.5, metavar="X", help="of held-out and training text (0.5)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    try:
        filters = Filters(
            args.min_score,
            args.score_field,
            args.language,
            args.language_field,
            args.min_chars,
            args.max_chars,
            args.max_repetition,
        )
        out = pack(
            args.recipe or args.data,
            args.out,
            args.tokenizer,
            args.vocab_size,
            seq_len=args.seq,
            val_fraction=args.val_fraction,
            separator=args.separator,
            text_field=args.text_field,
            max_bytes=None if args.max_mb is None else int(args.max_mb * 1e6),
            shard_tokens=args.shard_tokens,
            preparation=Preparation(filters, args.dedup, args.near, args.across),
            workers=args.workers,
        )
        if args.verify:
            for part in read_manifest(out)["splits"]:
                ShardDataset(out, part).verify()
            print("verified: every checksum and every id")
    except BitnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what is finished", file=sys.stderr)
        return 130
    print(f"next: bitnet train --data {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

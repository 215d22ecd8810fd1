"""Command line `bitnet import`: another project's checkpoint as a file or folder of this one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from bitnet.command import RUN, add_reading, bar, exit_status, reading_of
from bitnet.durable import refuse_existing
from bitnet.errors import ConfigError
from bitnet.export import verify, write, written
from bitnet.generate import describe
from bitnet.pretrained import open_without_copies


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet import",
        description="Read a model from wherever it is and write it as this package likes it: DST.bitnet, one file for "
        "inference, with the codes and scales exactly as they were; or a folder DST of latent weights, for training, "
        "if SRC has them. generate, chat, evaluate, bench and export open SRC too; a .bitnet file opens faster.",
        epilog="example: bitnet import microsoft/bitnet-b1.58-2B-4T 2b-4t.bitnet --verify",
    )
    parser.add_argument("src", metavar="SRC", help=RUN)
    parser.add_argument("dst", metavar="DST", type=Path, help="NAME.bitnet, or a folder")
    parser.add_argument(
        "--verify", nargs="?", const="", metavar="TEXT", help="read DST back and compare logits on TEXT"
    )
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    add_reading(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    form = "bitnet" if args.dst.suffix == ".bitnet" else "hf"
    refuse_existing(args.dst, args.force, folder=form == "hf")  # before anything is read
    start = time.perf_counter()
    model, provenance = open_without_copies(args.src, reading_of(args), bar("reading"))
    if form == "hf" and any(layer.is_packed for _, layer in model.bitlinears()):
        raise ConfigError(f"{args.src} is packed: it has no latent weights to train. Name DST with .bitnet at its end")
    print(describe(model))
    options = {"dtype": "f32"} if form == "hf" else {}  # latent weights of any kind, exactly
    write(model, form, args.dst, options, provenance, args.force, bar("writing"))
    print(written(args.dst, time.perf_counter() - start))
    if args.verify is not None:
        print(verify(model, args.dst, args.verify or None))
    print(f"next: bitnet generate {args.dst} -p TEXT, or bitnet evaluate {args.dst} --data FILE")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

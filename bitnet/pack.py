"""Command line `bitnet pack`: a trained run as one `.bitnet` file, for inference anywhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitnet.command import add_run, bar, exit_status
from bitnet.durable import refuse_existing
from bitnet.formats.bitnet_file import TERNARY, BitnetFile
from bitnet.formats.source import Reading
from bitnet.pretrained import open_without_copies


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet pack",
        description="Write a trained model, its tokenizer and where it comes from into one file, with a checksum for "
        "every tensor. Ternary layers take 1.6 bits a weight; the logits are those of the run, bit for bit.",
        epilog="example: bitnet pack runs/nano-stdlib-001 -o nano.bitnet --coded",
    )
    add_run(parser)
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--coded", action="store_true", help="entropy-code each ternary layer that gets smaller by it; loads as fast"
    )
    parser.add_argument(
        "--embeddings",
        choices=("bf16", "f32"),
        help="form of the matrices that are not ternary; bf16 rounds (default: bf16 if that loses nothing, else f32)",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from bitnet.formats.packing import save_packed

    refuse_existing(args.out, args.force)  # before anything is read
    model, provenance = open_without_copies(args.run, Reading())
    save_packed(
        model,
        args.out,
        coded=args.coded,
        floats=args.embeddings,
        provenance=provenance,
        force=args.force,
        progress=bar("packing"),
    )
    print(sizes(BitnetFile(args.out)))
    print(f"next: bitnet info {args.out}, or bitnet generate {args.out} -p TEXT")
    return 0


def sizes(file: BitnetFile) -> str:
    """What a file takes, in lines for people."""
    tensors = [section for section in file.sections.values() if section.form != "bytes"]
    size, latent = file.path.stat().st_size, 4 * sum(section.count for section in tensors)
    lines = [f"{file.path}: {size:,} bytes, {latent / size:.1f} times smaller than the same weights in f32"]
    for what, wanted in (("ternary weights", True), ("other weights", False)):
        chosen = [section for section in tensors if (section.form in TERNARY) == wanted]
        count, taken = sum(section.count for section in chosen), sum(section.bytes for section in chosen)
        if chosen:
            forms = ", ".join(sorted({section.form for section in chosen}))
            lines.append(f"{what}: {count:,} in {taken:,} bytes ({forms}), {8 * taken / count:.4f} bits each")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

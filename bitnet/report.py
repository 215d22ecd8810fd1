"""Command line `bitnet report`: one HTML page that shows what runs did, beside each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bitnet.command import exit_status
from bitnet.report_data import read_runs
from bitnet.report_page import page

EXAMPLES = """\
examples:
  bitnet report runs/nano-stdlib-001                    writes report.html
  bitnet report runs/nano-stdlib-001 runs/nano-stdlib-twin-001 -o gap.html
  bitnet report runs/* --title "learning rates"

A run and its twin (the same text, seed and shape, trained with --twin) are found to be a pair, and their gap is told.
The page is one file: no network, no other files, light and dark. A run that is still training may be read, too.
"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet report",
        description="Write one self-contained HTML page on one or more runs: losses, gaps, speed, curves, histograms "
        "and maps of the layers, samples, events, checkpoints, options.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of bitnet train")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)")
    parser.add_argument("--title", metavar="TEXT", help="what stands on top (the run's name)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    runs = read_runs(args.runs)
    text = page(runs, args.title)
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(args.out)
    print(f"{args.out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(text.encode()) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

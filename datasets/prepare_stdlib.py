"""Packs the standard library of the running interpreter: `python datasets/prepare_stdlib.py --out DIR [options]`."""

from __future__ import annotations

import sys

from bitnet.data_cli import main

if __name__ == "__main__":
    raise SystemExit(main(["--recipe", "stdlib", *sys.argv[1:]]))

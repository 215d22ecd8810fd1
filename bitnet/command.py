"""What the command lines share: the model they work on, and how one ends, with a sentence and a status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from bitnet.errors import BitnetError


def add_run(parser: argparse.ArgumentParser) -> None:
    """The model that a command works on."""
    parser.add_argument("run", metavar="RUN", help="run folder, one checkpoint folder in it, or a .bitnet file")


def exit_status(work: Callable[[], int]) -> int:
    """work()'s own status; 2, with the error in one line, for a request that cannot be met; 130 after Ctrl-C."""
    try:
        return work()
    except (BitnetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

"""What the command lines share: how one ends, with a sentence for people and a status for scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable

from bitnet.errors import BitnetError


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

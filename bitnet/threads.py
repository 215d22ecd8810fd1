"""How many threads kernels run on, where a person says it: a flag or an option."""

from __future__ import annotations

from bitnet import _core
from bitnet.errors import ConfigError

THREADS_MAX = 64  # BN_MAX_THREADS of csrc/base/parallel.h


def check_threads(count: int) -> None:
    """ConfigError for a number that there cannot be; 0 means one a core."""
    if not 0 <= count <= THREADS_MAX:
        raise ConfigError(f"threads must be 0 (one a core) to {THREADS_MAX}, not {count}")


def use_threads(count: int | None) -> None:
    """So many from now on; None leaves them as they are. Raises ConfigError."""
    if count is not None:
        check_threads(count)
        _core.set_threads(count)

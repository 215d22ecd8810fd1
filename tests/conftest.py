"""Fixtures shared by all tests: every instruction set this CPU has, and thread counts that divide work unevenly."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

# No example is timed: a machine under load has no wrong results.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# PyTorch reads this when it is first imported. Its matrices here are tiny, and idle OpenMP threads that spin beside a
# busy one made a half-second of conditioning take twenty on a loaded machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A suite started in the background of a script is told to ignore SIGINT, and so would be the commands it interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Asked for at collection, and only where a test wants it: the list needs the extension.
    if "isa" in metafunc.fixturenames:
        import bitnet

        metafunc.parametrize("isa", bitnet.isa_names(), indirect=True)


def pytest_collection_finish() -> None:
    # What the test files import lives as long as they do: millions of objects of PyTorch and its like, through which
    # every collection of every test would walk.
    gc.collect()
    gc.freeze()


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test under each instruction set, then goes back to the one chosen at import."""
    import bitnet

    before = bitnet.current_isa()
    bitnet.use_isa(request.param)
    yield request.param
    bitnet.use_isa(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with 1, 2 and 5 threads (five leaves ragged pieces), then goes back to the default."""
    import bitnet

    before = bitnet.get_threads()
    bitnet.set_threads(request.param)
    yield request.param
    bitnet.set_threads(before)

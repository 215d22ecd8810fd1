"""A number of threads that a person gives: one sentence where there cannot be so many."""

from __future__ import annotations

import pytest

from bitnet import _core, cli
from bitnet.config import BitNetConfig
from bitnet.errors import ConfigError
from bitnet.run_config import RunConfig
from bitnet.threads import THREADS_MAX, use_threads


def test_the_most_is_that_of_the_pool() -> None:
    before = _core.get_threads()
    try:
        use_threads(THREADS_MAX)
        use_threads(None)
        assert _core.get_threads() == THREADS_MAX
        with pytest.raises(ValueError, match="outside"):
            _core.set_threads(THREADS_MAX + 1)
    finally:
        use_threads(before)
    for count in (-1, THREADS_MAX + 1, 10**30):
        with pytest.raises(ConfigError, match=rf"threads must be 0 \(one a core\) to 64, not {count}"):
            RunConfig(threads=count)


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["plan", "train"],
        ["generate", "nowhere"],
        ["chat", "nowhere"],
        ["evaluate", "nowhere", "--data", "x"],
        ["bench", "nowhere"],
        ["compare", "a", "b"],
    ],
)
def test_every_command_refuses_it_alike(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--threads", "1000"]) == 2
    assert capsys.readouterr().err == "error: threads must be 0 (one a core) to 64, not 1000\n"


def test_positions_have_an_end() -> None:
    assert BitNetConfig(max_position_embeddings=2**20).max_position_embeddings == 2**20
    with pytest.raises(ConfigError, match="max_position_embeddings is 1048577, but rotary tables are made for at most"):
        BitNetConfig(max_position_embeddings=2**20 + 1)

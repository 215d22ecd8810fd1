"""`bitnet train` as a test calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet import cli


def run(*arguments: str | Path) -> int:
    """Its exit status."""
    return cli.main(["train", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The sentence of a command that is refused."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert error.count("\n") == 1
    return error

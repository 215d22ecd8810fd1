"""Contents of a file that must be made one at a time."""

from __future__ import annotations

from typing import ClassVar


class Single(bytearray):
    """64 bytes, of which no two may be alive."""

    alive: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__(64)
        Single.alive += 1
        assert Single.alive == 1

    def __del__(self) -> None:
        Single.alive -= 1

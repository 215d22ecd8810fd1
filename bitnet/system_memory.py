"""How much memory this machine has, and how much of it is free: as far as this process may use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SystemMemory:
    """Bytes. free: what can be had without swapping; total: of this machine, or of the container that holds us."""

    total: int
    free: int


def system_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> SystemMemory:
    """Now. Where the system does not say what is free, all of it counts as free."""
    meminfo = _meminfo(proc / "meminfo")
    total = meminfo.get("MemTotal", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    free = meminfo.get("MemAvailable", total)
    for limit, used in _limits(proc / "self" / "cgroup", cgroups):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return SystemMemory(total, free)


def _meminfo(path: Path) -> dict[str, int]:
    """Linux's own account, in bytes; empty elsewhere."""
    pairs = (line.partition(":") for line in _lines(path) if line.endswith("kB"))
    numbers = ((name, _number(rest.removesuffix("kB"))) for name, _, rest in pairs)
    return {name: 1024 * number for name, number in numbers if number is not None}


@dataclass(frozen=True)
class _Version:
    """What a version of control groups calls its files; cache: the row of memory.stat that can be had back at once."""

    limit: str
    used: str
    cache: str


FIRST = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
SECOND = _Version("memory.max", "memory.current", "inactive_file")


def _limits(own: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes used) of every control group, of either version, that this process is in and that has a limit.

    Pages of files that nobody looked at of late are not counted as used.
    """
    for line in _lines(own):
        _, _, rest = line.partition(":")  # number:controllers:path, without controllers in version 2
        controllers, colon, path = rest.partition(":")
        if not colon:
            continue
        if controllers == "":
            base, version = root, SECOND
        elif "memory" in controllers.split(","):
            base, version = root / "memory", FIRST
        else:
            continue
        group = base / path.strip("/")
        for folder in [group, *group.parents]:
            # The root group has no limit; in a container the path may lie outside what is mounted.
            limit, used = (_number("".join(_lines(folder / name)[:1])) for name in (version.limit, version.used))
            if limit is not None and used is not None:
                rows = dict(line.partition(" ")[::2] for line in _lines(folder / "memory.stat"))
                yield limit, max(0, used - (_number(rows.get(version.cache, "")) or 0))
            if folder == base:
                break


def _lines(path: Path) -> list[str]:
    """Of a file of the system, whose names may hold any bytes; none where it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (OSError, ValueError):  # ValueError: a path with a zero byte
        return []


def _number(text: str) -> int | None:
    """A count; None for all else, such as "max"."""
    text = text.strip()
    return int(text) if len(text) < 20 and text.isascii() and text.isdecimal() else None

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
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name: 1024 * int(rest.split()[0]) for name, _, rest in pairs if rest.split()[:1] and rest.endswith("kB")}


def _limits(own: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes used) of every control group, of either version, that this process is in and that has a limit."""
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:path, without controllers in version 2
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = base / path.strip("/")
        for folder in [group, *group.parents]:
            try:
                limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in names)
            except OSError:
                pass  # the root group has none; in a container the path may lie outside what is mounted
            else:
                if limit != "max":
                    yield int(limit), int(used)
            if folder == base:
                break

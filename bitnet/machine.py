"""The machines that a run ran on: RUN/machines.jsonl, a line at its start and at each resume.

    {"step": 0, "started": "2025-01-31T12:00:00+00:00", "cpu": "...", "instruction_set": "avx512vnni", "threads": 2,
     "system": "Linux x86_64", "version": "0.1.0"}

A file of its own, since the records of steps do not depend on the machine.
"""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bitnet import _core
from bitnet.metrics import Record

FILE = "machines.jsonl"


def machine_record(step: int) -> Record:
    """This machine as a run finds it that begins, or goes on, at a step."""
    from bitnet import __version__

    return {
        "step": step,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "instruction_set": _core.current_isa(),
        "threads": _core.get_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "version": __version__,
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor by the name it gives itself, else by its architecture."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == "model name")
    return next(filter(None, named), "") or platform.processor() or platform.machine()


def one_line(record: dict[str, Any]) -> str:
    """A record for people, of what it holds."""
    parts = [str(record["cpu"])] if record.get("cpu") else []
    parts += [str(record["instruction_set"])] if record.get("instruction_set") else []
    threads = record.get("threads")
    if isinstance(threads, int):
        parts.append(f"{threads} thread" + "s" * (threads != 1))
    return ", ".join([*parts, *([f"bitnet {record['version']}"] if record.get("version") else [])])

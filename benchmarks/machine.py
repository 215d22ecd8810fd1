"""What a number was measured on: processor, features, cores, memory, compiler, versions."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

VECTOR_FLAGS = "fma avx2 avx_vnni avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16 asimd asimddp i8mm bf16".split()


def fingerprint() -> dict[str, Any]:
    """Everything a reader needs to repeat a measurement or to see why theirs differs."""
    import bitnet
    from bitnet.machine import cpu_name

    cpu = _cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "family_model": "/".join(cpu.get(key, "?") for key in ("cpu family", "model")),
        "features": [flag for flag in VECTOR_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "compiler": _first_line(sysconfig.get_config_var("CC") or "cc", "--version"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("bitnet", "numpy", "torch")},
        "instruction_set": bitnet.current_isa(),
        "revision": _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }


def one_line(machine: dict[str, Any]) -> str:
    """The fingerprint for people."""
    features = " ".join(machine["features"])
    return (
        f"{machine['cpu']} (family/model {machine['family_model']}; {features}), {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['compiler']}, Python {machine['python']}, "
        f"torch {machine['versions']['torch']}, bitnet {machine['instruction_set']}, {machine['date']}"
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _first_line(command: str, *arguments: str) -> str:
    try:
        run = subprocess.run([command.split()[0], *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return run.stdout.splitlines()[0]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(one_line(fingerprint()))

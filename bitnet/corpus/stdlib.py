"""Text that is on every machine: the sources of the running interpreter's standard library."""

from __future__ import annotations

import sys
import sysconfig

from bitnet.corpus.files import Corpus

# Not documents of their own: installed packages, tables written by programs, deliberately broken samples.
SKIPS = frozenset(("site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3"))


def stdlib(max_bytes: int | None = None) -> Corpus:
    """The Python sources of the running interpreter's standard library; they differ from one version to another."""
    root = sysconfig.get_path("stdlib")
    return Corpus([root], max_bytes=max_bytes, suffixes=frozenset((".py",)), skip_folders=SKIPS)


def stdlib_name() -> str:
    """What a manifest calls it."""
    version = ".".join(map(str, sys.version_info[:3]))
    return f"standard library of {sys.implementation.name} {version}"

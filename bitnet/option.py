"""A field of a configuration that is also a flag of `bitnet train`."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, resume: bool = False) -> Any:
    """A field with its help line; resume: whether a run that goes on may change it."""
    return field(default=default, metadata={"help": help, "resume": resume})

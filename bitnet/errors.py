"""Exceptions of the Python package. Each message is one sentence that names the value and the file it came from."""

from __future__ import annotations


class BitnetError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(BitnetError, ValueError):
    """A setting that cannot be honoured: a name that does not exist, a size that does not fit."""


class DataError(BitnetError, ValueError):
    """Text, tokens or a file of them that are not what they claim to be."""


class CheckpointError(BitnetError, ValueError):
    """A checkpoint that is damaged, incomplete or made for another model."""

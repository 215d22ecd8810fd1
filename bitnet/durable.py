"""What must outlive a power cut: sync() before and after the rename that puts a file or folder in its place.

whole_file() and whole_folder() write under another name first, so that what has its name is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bitnet.errors import CheckpointError


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows has no handle of a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, force: bool) -> Iterator[BinaryIO]:
    """A file to write (and seek in), which gets its name when the block ends; no trace is left if it does not.

    force: replace a file that exists. CheckpointError if it exists otherwise, or cannot be written (a full disk).
    """
    unfinished = path.with_name(f".partial-{path.name}")
    refuse_existing(path, force)
    try:
        try:
            with open(unfinished, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            refuse_existing(path, force)
            unfinished.replace(path)
            sync(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}") from None


@contextmanager
def whole_folder(path: Path, force: bool) -> Iterator[Path]:
    """A folder to write files into, which gets its name when the block ends; otherwise as whole_file.

    force: replace a folder that exists, files in it that are not written again included.
    """
    unfinished, old = (path.with_name(f".{what}-{path.name}") for what in ("partial", "old"))
    refuse_existing(path, force, folder=True)
    try:
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            yield unfinished
            for written in [*unfinished.rglob("*"), unfinished]:
                sync(written)
            refuse_existing(path, force, folder=True)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            unfinished.rename(path)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}") from None


def refuse_existing(path: Path, force: bool, folder: bool = False) -> None:
    """CheckpointError if something is there that may not be replaced: anything without force, or the other kind."""
    if path.exists() and (path.is_dir() != folder or not force):
        hint = "; --force replaces it" if path.is_dir() == folder else ""
        raise CheckpointError(f"{path} exists already{hint}")

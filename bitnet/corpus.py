"""Documents: where text comes from, in which order, and on which side of the held-out split it falls.

A corpus is read as a stream, as often as wanted, always in the same order: nothing larger than one document is held.
Text is passed on exactly as stored; only what is not UTF-8 text is left out, and counted.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bitnet.errors import ConfigError, DataError

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini .cfg .sql .sh .py .pyi .c .h "
    ".cc .cpp .cxx .hpp .inc .cu .rs .go .java .kt .swift .scala .js .mjs .ts .tsx .jsx .css .rb .pl .php .lua .r .jl "
    ".hs .ml .lisp .el .clj .ex .erl .f90 .m .s .asm .jsonl .jsonl.gz".split()
)
# Not documents of their own: installed packages, tables written by programs, deliberately broken samples.
STDLIB_SKIPS = frozenset(("site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3"))
RECIPES = ("stdlib",)
FEW = 8  # with fewer held-out documents than this to be expected, each document is cut instead


class Corpus:
    """Documents of files and folders, in the order of the paths, each folder in the order of its sorted names.

    A text file is one document, or several when `separator` is given; each line of a `.jsonl` or `.jsonl.gz` file is an
    object whose `text` is one. Folders are searched for names ending in `suffixes`, hidden ones left out. `max_bytes`
    stops before the first document that would exceed it. A file that is not UTF-8 text is an error when it was named,
    and lands in `skipped` when it was found in a folder (an error there too with `separator`, since its first pieces
    are already out). Empty documents are passed over. Raises DataError naming file and line.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        separator: str | None = None,
        max_bytes: int | None = None,
        suffixes: frozenset[str] = TEXT_SUFFIXES,
        skip_folders: frozenset[str] = frozenset(),
    ) -> None:
        if separator == "":
            raise ConfigError("the document separator must not be empty")
        self._separator = separator
        self._max_bytes = max_bytes
        self._files: list[tuple[Path, bool]] = []  # and whether it was named by the caller
        for path in map(Path, paths):
            if path.is_dir():
                self._files += [(file, False) for file in _walk(path, suffixes, skip_folders)]
            elif path.is_file():
                self._files.append((path, True))
            else:
                raise DataError(f"there is no file or folder {path}")
        self.skipped: set[Path] = set()

    def __iter__(self) -> Iterator[str]:
        taken = 0
        for path, named in self._files:
            for text in self._read(path, named):
                if self._max_bytes is not None:
                    taken += len(text.encode())
                    if taken > self._max_bytes:
                        return
                yield text

    def _read(self, path: Path, named: bool) -> Iterator[str]:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_jsonl(path)
            return
        if self._separator is not None:
            yield from _read_separated(path, self._separator)
            return
        data = _read_bytes(path)
        try:
            if b"\0" in data:
                raise ValueError("it holds a zero byte")
            text = data.decode()
        except ValueError as error:
            if named:
                raise DataError(f"{path} is not UTF-8 text: {error}") from None
            self.skipped.add(path)
            return
        if text:
            yield text


def documents(paths: Iterable[str | Path], separator: str | None = None) -> Iterator[str]:
    """Documents of the files and folders, once through; see Corpus."""
    return iter(Corpus(paths, separator))


def stdlib(max_bytes: int | None = None) -> Corpus:
    """The Python sources of the running interpreter's standard library; they differ from one version to another."""
    root = sysconfig.get_path("stdlib")
    return Corpus([root], max_bytes=max_bytes, suffixes=frozenset((".py",)), skip_folders=STDLIB_SKIPS)


def stdlib_name() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    return f"standard library of {sys.implementation.name} {version}"


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus finds."""

    documents: int
    bytes: int
    sha256: str  # of every document's length and text, in order

    @classmethod
    def of(cls, texts: Iterable[str]) -> Survey:
        """Raises DataError if there is no document."""
        count = size = 0
        digest = hashlib.sha256()
        for text in texts:
            data = text.encode()
            count += 1
            size += len(data)
            digest.update(len(data).to_bytes(8, "little") + data)
        if count == 0:
            raise DataError("the corpus is empty: no document was found")
        return cls(count, size, digest.hexdigest())


@dataclass(frozen=True)
class Split:
    """Which text is held out for validation.

    Whole documents are drawn by a hash of their text, so the same text is always on the same side, however often it
    occurs and whatever is added around it. Where that would hold out fewer than FEW, the last part of each document is
    held out instead.
    """

    fraction: float
    by_position: bool

    @classmethod
    def choose(cls, survey: Survey, fraction: float | None = None) -> Split:
        """Split for a corpus; by default 1 % is held out, or 10 % of a single document."""
        if fraction is None:
            fraction = 0.1 if survey.documents == 1 else 0.01
        if not 0 <= fraction < 1:
            raise ConfigError(f"the validation fraction must be at least 0 and below 1, not {fraction}")
        return cls(fraction, survey.documents * fraction < FEW)

    def parts(self, text: str) -> tuple[str, str]:
        """The (training, validation) parts of one document; either may be empty."""
        if self.by_position:
            cut = int(len(text) * (1 - self.fraction))
            return text[:cut], text[cut:]
        return ("", text) if self.holds_out(text) else (text, "")

    def holds_out(self, text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8], "little") < self.fraction * 2**64

    def __str__(self) -> str:
        what = "the last {:.3g} % of each document" if self.by_position else "{:.3g} % of the documents, by hash"
        return what.format(100 * self.fraction)


def _walk(root: Path, suffixes: frozenset[str], skip_folders: frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skip_folders and not name.startswith("."))
        for name in sorted(names):
            ends = Path(name.lower()).suffixes
            if not name.startswith(".") and suffixes & {"".join(ends[-1:]), "".join(ends[-2:])}:
                yield Path(folder, name)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _read_separated(path: Path, separator: str) -> Iterator[str]:
    """Pieces between separators, without the line ends next to them; the file is read a megabyte at a time."""
    rest = ""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while block := file.read(1 << 20):
                *whole, rest = (rest + block).split(separator)
                yield from filter(None, (piece.strip("\r\n") for piece in whole))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    if rest := rest.strip("\r\n"):
        yield rest


def _read_jsonl(path: Path) -> Iterator[str]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and (text := _text_field(path, number, line)):
                    yield text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file after line {number}: {error}") from None


def _text_field(path: Path, number: int, line: bytes) -> str:
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} line {number} is not JSON: {error}") from None
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{path} line {number} has no string named 'text'")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path} line {number} is not Unicode text: {error}") from None
    return text

"""The documents of files, folders and hub data sets, as one stream."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bitnet.corpus.document import Document
from bitnet.corpus.hub import PREFIX, HubSource
from bitnet.corpus.readers import JSONL, PARQUET, NotTextError, read_records, read_separated, read_whole
from bitnet.errors import ConfigError, DataError
from bitnet.shard import MANIFEST, read_manifest

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .html .htm .xml .csv .tsv .json .yaml .yml .toml .ini .cfg .sql .sh .py .pyi .c .h "
    ".cc .cpp .cxx .hpp .inc .cu .rs .go .java .kt .swift .scala .js .mjs .ts .tsx .jsx .css .rb .pl .php .lua .r .jl "
    ".hs .ml .lisp .el .clj .ex .erl .f90 .m .s .asm .jsonl .jsonl.gz .jsonl.zst .parquet".split()
)


@dataclass(frozen=True)
class _File:
    path: Path
    named: bool  # by the caller, rather than found in a folder
    source: str


class Corpus:
    """Documents of files and folders, in the order of the paths, each folder in the order of its sorted names.

    A text file is one document, or several when `separator` is given; each line of a `.jsonl` file (also `.gz`,
    `.zst`) and each row of a `.parquet` file is a record whose `text_field` is one; `hub:OWNER/NAME` is a data set of
    the Hugging Face hub (see bitnet/corpus/hub.py). Folders are searched for names ending in `suffixes`, hidden ones
    left out. `max_bytes` stops before the first document that would exceed it. A file that is not UTF-8 text is an
    error when it was named, and lands in `skipped` when it was found in a folder (an error there too with `separator`,
    since its first pieces are already out). Empty documents are passed over. Raises DataError naming file and line,
    and for a folder that is or holds a pack.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        separator: str | None = None,
        max_bytes: int | None = None,
        suffixes: frozenset[str] = TEXT_SUFFIXES,
        skip_folders: frozenset[str] = frozenset(),
        text_field: str = "text",
        fields: Iterable[str] = (),
    ) -> None:
        if separator == "":
            raise ConfigError("the document separator must not be empty")
        self._separator = separator
        self._max_bytes = max_bytes
        self._text_field, self._fields = text_field, tuple(fields)
        self._sources: list[_File | HubSource] = []
        for spec in paths:
            path = Path(spec)
            if str(spec).startswith(PREFIX):
                self._sources.append(HubSource.parse(str(spec)))
            elif path.is_dir():
                for file in _walk(path, suffixes, skip_folders):
                    source = f"{path.resolve().name}/{file.relative_to(path).as_posix()}"
                    self._sources.append(_File(file, False, source))
            elif path.is_file():
                self._sources.append(_File(path, True, path.name))
            else:
                raise DataError(f"there is no file or folder {path}")
        self.skipped: set[Path] = set()
        self.position = 0  # bytes of files that the last reading has gone through, at most; within one, by its text

    @property
    def files(self) -> list[Path]:
        """The files that are read, in order."""
        return [source.path for source in self._sources if isinstance(source, _File)]

    def size(self) -> int | None:
        """Bytes of the files: where `position` ends. None where that is not known: with the hub, or max_bytes."""
        if self._max_bytes is not None or len(self.files) < len(self._sources):
            return None
        return sum(path.stat().st_size for path in self.files)

    def stamp(self) -> list[list[str | int]]:
        """What tells cheaply whether the same text would be read again: sizes and times of files, names of others."""
        out: list[list[str | int]] = [[str(self._separator), str(self._max_bytes), self._text_field, *self._fields]]
        for source in self._sources:
            if isinstance(source, _File):
                status = source.path.stat()
                out.append([source.source, status.st_size, status.st_mtime_ns])
            else:
                out.append([str(source)])
        return out

    def __iter__(self) -> Iterator[str]:
        """The texts alone."""
        return (document.text for document in self.documents())

    def documents(self) -> Iterator[Document]:
        """The texts with their source, and those of `fields` that their records have."""
        taken = begin = self.position = 0
        for source in self._sources:
            size, own = source.path.stat().st_size if isinstance(source, _File) else 0, 0
            for document in self._read(source):
                if self._max_bytes is not None:
                    taken += len(document.text.encode())
                    if taken > self._max_bytes:
                        return
                own += len(document.text)
                self.position = begin + min(own, size)  # compressed, a file has more text than bytes
                yield document
            begin += size
            self.position = begin

    def _read(self, source: _File | HubSource) -> Iterator[Document]:
        if isinstance(source, HubSource):
            yield from source.read(self._text_field, self._fields)
        elif source.path.name.lower().endswith((*JSONL, PARQUET)):
            yield from read_records(source.path, source.source, self._text_field, self._fields)
        elif self._separator is not None:
            yield from (Document(text, source.source) for text in read_separated(source.path, self._separator))
        else:
            try:
                text = read_whole(source.path)
            except NotTextError:
                if source.named:
                    raise
                self.skipped.add(source.path)
                return
            if text:
                yield Document(text, source.source)


def documents(paths: Iterable[str | Path], separator: str | None = None) -> Iterator[str]:
    """Texts of the files and folders, once through; see Corpus."""
    return iter(Corpus(paths, separator))


def _walk(root: Path, suffixes: frozenset[str], skip_folders: frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        if MANIFEST in names and _is_pack(folder):
            raise DataError(
                f"{folder} is a pack, not text: train on it as --data {folder} alone, "
                f"or mixed as --data {folder}=WEIGHT"
            )
        subfolders[:] = sorted(name for name in subfolders if name not in skip_folders and not name.startswith("."))
        for name in sorted(names):
            ends = Path(name.lower()).suffixes
            if not name.startswith(".") and suffixes & {"".join(ends[-1:]), "".join(ends[-2:])}:
                yield Path(folder, name)


def _is_pack(folder: str) -> bool:
    try:
        return bool(read_manifest(folder))
    except DataError:
        return False  # a file of that name, of something else

"""Documents of one file: text with separators, JSONL (plain, .gz, .zst) and Parquet, a block at a time."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitnet.corpus.document import Document, of_record
from bitnet.errors import ConfigError, DataError

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = ".parquet"
PARQUET_ROWS = 256  # held at a time
ZSTD_BYTES = 1024  # read at a time: a block of 4 bytes can stand for 128 KB, so no more than 32 MB come out of them


def read_records(path: Path, source: str, text_field: str, wanted: Sequence[str]) -> Iterator[Document]:
    """The documents of a file of records: each line of a JSONL file, each row of a Parquet file."""
    if path.name.endswith(PARQUET):
        records = _parquet_rows(path, {name.partition(".")[0] for name in (text_field, *wanted)} | {text_field})
    else:
        records = json_lines(path)
    for where, record in records:
        document = of_record(record, text_field, wanted, source, where)
        if document is not None:
            yield document


def read_separated(path: Path, separator: str) -> Iterator[str]:
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


class NotTextError(DataError):
    """A file that is not UTF-8 text."""


def read_whole(path: Path) -> str:
    """The text of a file that is one document."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise NotTextError(f"{path} is not UTF-8 text: it holds a zero byte")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise NotTextError(f"{path} is not UTF-8 text: {error}") from None


def need(module: str, what: str) -> Any:
    """An optional library of the extra `data`. Raises ConfigError saying how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise ConfigError(f"{what} needs {name}: pip install 'bitnet[data]'") from None


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line of a JSONL file that is not empty; where: "PATH line N". Raises DataError."""
    broken: list[type[BaseException]] = [EOFError, gzip.BadGzipFile, zlib.error]
    if path.suffix == ".zst":
        broken.append(need("zstandard", str(path)).ZstdError)
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                yield f"{path} line {number}", _parsed(path, number, line)
    except tuple(broken) as error:
        kind = "zstd" if path.suffix == ".zst" else "gzip"
        raise DataError(f"{path} is a damaged {kind} file after line {number}: {error}") from None


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        pieces: list[bytes] = []  # of the line that is not whole yet
        for block in _unzstd(path):
            head, newline, rest = block.partition(b"\n")
            pieces.append(head)
            if newline:
                *whole, rest = rest.split(b"\n")
                yield b"".join(pieces)
                yield from whole
                pieces = [rest]
        yield b"".join(pieces)
        return
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        yield from file


def _unzstd(path: Path) -> Iterator[bytes]:
    """Blocks of a file of one or more frames. The library's own stream takes a file cut short for a whole one."""
    zstandard = need("zstandard", str(path))
    frame = None
    with open(path, "rb") as file:
        while block := file.read(ZSTD_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends within a frame")


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} line {number} is not JSON: {error}") from None


def _parquet_rows(path: Path, columns: set[str]) -> Iterator[tuple[str, Any]]:
    parquet = need("pyarrow.parquet", str(path))
    arrow = need("pyarrow", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            held = [name for name in file.schema_arrow.names if name in columns]
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=held):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is a damaged Parquet file: {str(error).splitlines()[0]}") from None

"""SentencePiece's model file, as far as its pieces.

A ModelProto is a run of fields. Field 1, repeated, is a piece {1: text, 2: score (f32), 3: type}; field 2 says how the
model was trained, field 3 how text is normalized. Only the few settings that decide what an id means are looked at;
all that is no piece is kept as the bytes it came in, so that a model taken apart and put together is the same file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from bitnet.errors import DataError
from bitnet.formats.protobuf import Value, bytes_field, fields, number_field, whole_fields

T = TypeVar("T")
MODEL_TYPES: dict[Value, str] = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class Kind(IntEnum):
    """What a piece is; GGUF counts them the same way."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One id: its text with U+2581 for spaces."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class Settings:
    """What the model says of itself. charsmap: whether it rewrites characters (any normalization but "identity")."""

    model_type: str = "unigram"
    byte_fallback: bool = False
    space_behind: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    charsmap: bool = False


def parse(model: bytes) -> tuple[list[Piece], bytes]:
    """The pieces by id, and the bytes of all other fields. Raises DataError."""
    return _reading(lambda: _parse(memoryview(model)))


def _parse(model: memoryview) -> tuple[list[Piece], bytes]:
    pieces = []
    others = []
    for number, value, raw in whole_fields(model):
        if number == 1 and not isinstance(value, int):
            pieces.append(_piece(value))
        else:
            others.append(raw)
    return pieces, b"".join(others)


def _reading(read: Callable[[], T]) -> T:
    try:
        return read()
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"the SentencePiece model cannot be read: {error}") from None


def build(pieces: Sequence[Piece], others: bytes) -> bytes:
    """A model of pieces and the other fields, which parse or settings_bytes gave."""
    return b"".join([*map(_piece_bytes, pieces), others])


def is_plain(others: bytes) -> bool:
    """Whether the fields are the settings of training and normalization, and no more."""
    found = _reading(lambda: list(fields(memoryview(others))))
    return all(number in (2, 3) and not isinstance(value, int) for number, value in found)


def settings(others: bytes) -> Settings:
    """Reads the fields that are no pieces. Raises DataError."""
    return _reading(lambda: _settings(memoryview(others)))


def _settings(others: memoryview) -> Settings:
    numbers = {(2, 3), (2, 24), (2, 35), (3, 3), (3, 4), (3, 5)}
    found: dict[tuple[int, int], Value] = {}  # by message and field; a later one counts
    for message, outer in fields(others):
        if not isinstance(outer, int) and message in (2, 3):
            for number, value in fields(outer):
                place = (message, number)
                if isinstance(value, int) == (place in numbers):
                    found[place] = value

    def flag(message: int, number: int, default: bool) -> bool:
        return bool(found.get((message, number), default))

    model_type = found.get((2, 3), 1)
    if model_type not in MODEL_TYPES:
        raise DataError(f"a SentencePiece model of type {model_type} is unknown")
    return Settings(
        MODEL_TYPES[model_type],
        byte_fallback=flag(2, 35, False),
        space_behind=flag(2, 24, False),
        add_dummy_prefix=flag(3, 3, True),
        remove_extra_whitespaces=flag(3, 4, True),
        escape_whitespaces=flag(3, 5, True),
        charsmap=bool(found.get((3, 2), b"")),
    )


def settings_bytes(names: dict[str, str | None], byte_fallback: bool, add_dummy_prefix: bool) -> bytes:
    """The other fields of a BPE model that rewrites nothing; names: of "unk", "bos", "eos" and "pad", None for none."""
    trainer = number_field(3, 2) + number_field(35, int(byte_fallback))
    for number, name in zip((45, 46, 47, 48), ("unk", "bos", "eos", "pad"), strict=True):
        # SentencePiece finds these by name and takes a name that is no control piece for none.
        trainer += bytes_field(number, (names.get(name) or f"no {name}").encode())
    normalizer = bytes_field(1, b"identity") + number_field(3, int(add_dummy_prefix)) + number_field(4, 0)
    return bytes_field(2, trainer) + bytes_field(3, normalizer)


def without_prefix(model: bytes) -> bytes:
    """The model, with no space put before a text: later fields are the ones that count."""
    return model + bytes_field(3, number_field(3, 0))


def _piece(message: memoryview) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in fields(message):
        if number == 1 and not isinstance(value, int):
            try:
                text = str(value, "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"a piece of the SentencePiece model, {bytes(value)!r}, is not UTF-8") from None
        elif number == 2 and not isinstance(value, int) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    try:
        return Piece(text, score, Kind(kind))
    except ValueError:
        raise DataError(f"piece {text!r} of the SentencePiece model has the unknown type {kind}") from None


def _piece_bytes(piece: Piece) -> bytes:
    body = bytes_field(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score)
    if piece.kind != Kind.NORMAL:
        body += number_field(3, piece.kind)
    return bytes_field(1, body)

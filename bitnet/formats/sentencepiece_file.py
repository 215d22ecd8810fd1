"""SentencePiece's model file, as far as its pieces: protocol buffers, read and written by hand.

A ModelProto is a run of fields. Field 1, repeated, is a piece {1: text, 2: score (f32), 3: type}; field 2 says how the
model was trained, field 3 how text is normalized. Only the few settings that decide what an id means are looked at;
all that is no piece is kept as the bytes it came in, so that a model taken apart and put together is the same file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from bitnet.errors import DataError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LONGEST_VARINT = 10
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


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
    pieces = []
    others = []
    for field, wire, value, raw in _fields(model):
        if field == 1 and wire == BYTES:
            pieces.append(_piece(value))
        else:
            others.append(raw)
    return pieces, b"".join(others)


def build(pieces: Sequence[Piece], others: bytes) -> bytes:
    """A model of pieces and the other fields, which parse or settings_bytes gave."""
    return b"".join([*map(_piece_bytes, pieces), others])


def is_plain(others: bytes) -> bool:
    """Whether the fields are the settings of training and normalization, and no more."""
    return {(field, wire) for field, wire, _, _ in _fields(others)} <= {(2, BYTES), (3, BYTES)}


def settings(others: bytes) -> Settings:
    """Reads the fields that are no pieces. Raises DataError."""
    found: dict[tuple[int, int], bytes] = {}  # by message and field; a later one counts
    wires = {(2, 3): VARINT, (2, 24): VARINT, (2, 35): VARINT} | {(3, number): VARINT for number in (3, 4, 5)}
    wires[3, 2] = BYTES
    for message, outer, value, _ in _fields(others):
        if outer == BYTES and message in (2, 3):
            for number, wire, inner, _ in _fields(value):
                if wires.get((message, number)) == wire:
                    found[message, number] = inner

    def flag(message: int, number: int, default: bool) -> bool:
        return _varint_value(found[message, number]) != 0 if (message, number) in found else default

    model_type = _varint_value(found.get((2, 3), b"\x01"))
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
    trainer = _varint_field(3, 2) + _varint_field(35, int(byte_fallback))
    for number, name in zip((45, 46, 47, 48), ("unk", "bos", "eos", "pad"), strict=True):
        # SentencePiece finds these by name and takes a name that is no control piece for none.
        trainer += _bytes_field(number, (names.get(name) or f"no {name}").encode())
    normalizer = _bytes_field(1, b"identity") + _varint_field(3, int(add_dummy_prefix)) + _varint_field(4, 0)
    return _bytes_field(2, trainer) + _bytes_field(3, normalizer)


def without_prefix(model: bytes) -> bytes:
    """The model, with no space put before a text: later fields are the ones that count."""
    return model + _bytes_field(3, _varint_field(3, 0))


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """(number, wire type, value, the whole field). A varint's value is its bytes."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            begin = at
            _, at = _varint(data, at)
        elif wire == BYTES:
            size, begin = _varint(data, at)
            at = begin + size
        elif wire in (FIXED32, FIXED64):
            begin, at = at, at + (4 if wire == FIXED32 else 8)
        else:
            raise DataError(f"a SentencePiece model has no field of wire type {wire}, which stands at byte {start}")
        if at > len(data):
            raise DataError(f"a field of the SentencePiece model at byte {start} ends outside it")
        yield number, wire, data[begin:at], data[start:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(LONGEST_VARINT):
        if at + i >= len(data):
            break
        value |= (data[at + i] & 127) << 7 * i
        if data[at + i] < 128:
            return value, at + i + 1
    raise DataError(f"a number of the SentencePiece model at byte {at} has no end")


def _varint_value(data: bytes) -> int:
    return _varint(data, 0)[0]


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, wire, value, _ in _fields(data):
        if number == 1 and wire == BYTES:
            try:
                text = value.decode()
            except UnicodeDecodeError:
                raise DataError(f"a piece of the SentencePiece model, {value!r}, is not UTF-8") from None
        elif number == 2 and wire == FIXED32:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and wire == VARINT:
            kind = _varint_value(value)
    try:
        return Piece(text, score, Kind(kind))
    except ValueError:
        raise DataError(f"piece {text!r} of the SentencePiece model has the unknown type {kind}") from None


def _piece_bytes(piece: Piece) -> bytes:
    body = _bytes_field(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score)
    if piece.kind != Kind.NORMAL:
        body += _varint_field(3, piece.kind)
    return _bytes_field(1, body)


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
    return _encoded(number << 3 | VARINT) + _encoded(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _encoded(number << 3 | BYTES) + _encoded(len(value)) + value

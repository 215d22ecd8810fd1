"""The wire format of protocol buffers, as far as ONNX files and SentencePiece models need it: fields written, and read.

A message is a sequence of fields, each a key (number * 8 + wire type) as a varint, then a varint (wire type 0), eight
or four bytes (1, 5), or a length and as many bytes (2). Reading copies nothing and makes nothing that the caller does
not ask for, so a message of a few bytes cannot become a large object. Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIELDS_MAX = 1 << 20  # of one message; a model of a thousand layers has fifty thousand nodes

Value = int | memoryview


def varint(number: int) -> bytes:
    """A number below 2^64, seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def opening(number: int, length: int) -> bytes:
    """What comes before the `length` bytes of field `number`."""
    return varint(number << 3 | BYTES) + varint(length)


def number_field(number: int, value: int) -> bytes:
    """A field that holds a number."""
    return varint(number << 3 | VARINT) + varint(value)


def bytes_field(number: int, value: bytes) -> bytes:
    """A field that holds bytes, or text, or a message."""
    return opening(number, len(value)) + value


def fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """(number, value) of every field, in order: an int, or the bytes where they lie. ValueError if it is no message."""
    return ((number, value) for number, value, _ in whole_fields(message))


def whole_fields(message: memoryview) -> Iterator[tuple[int, Value, memoryview]]:
    """The same, and all bytes of the field."""
    at, count = 0, 0
    while at < len(message):
        count += 1
        begin = at
        if count > FIELDS_MAX:
            raise ValueError(f"a message has more than {FIELDS_MAX} fields")
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"field number {number} is not between 1 and 2^29")
        if wire == VARINT:
            value, at = _varint(message, at)
            yield number, value, message[begin:at]
            continue
        if wire == BYTES:
            length, at = _varint(message, at)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"field {number} has the unknown wire type {wire}")
        if length > len(message) - at:
            raise ValueError(f"field {number} should have {length} bytes, but {len(message) - at} follow")
        at += length
        yield number, message[at - length : at], message[begin:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at an offset, and the offset after it."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("a number is cut off")
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            if number >> 64:
                break
            return number, at
    raise ValueError("a number is no number below 2^64")


def numbers(value: Value) -> list[int]:
    """A repeated number: one of its fields, or all of them packed in one. Each is at least a byte of the message."""
    if isinstance(value, int):
        return [value]
    found: list[int] = []
    at = 0
    while at < len(value):
        if len(found) == FIELDS_MAX:
            raise ValueError(f"a list has more than {FIELDS_MAX} numbers")
        number, at = _varint(value, at)
        found.append(number)
    return found

"""The fields of one JSON object of a request, read by name: each refusal is an ApiError that names field and value.

null means "not given" everywhere, as in the OpenAI API reference. true and false are no numbers, 1.0 is no integer, and
NaN and Infinity, which Python's JSON reader lets through, are in no range.
"""

from __future__ import annotations

import json
from typing import Any

from bitnet.errors import BitnetError

# Of a value in a message, so that a prompt in the wrong field is not sent back whole: characters, and parts of a list.
SHOWN, FEW = 60, 4
INVALID, UNSUPPORTED = "invalid_request_error", "unsupported"


class ApiError(BitnetError):
    """A request that is refused: the HTTP status and what the body of the reply says.

    kind: the error's "type"; param: the field it is about; code: a word for programs. Source: OpenAI API reference,
    error codes; the kinds are those that llama.cpp's server has too.
    """

    def __init__(
        self, status: int, message: str, kind: str = INVALID, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    def body(self) -> dict[str, Any]:
        """What the client is sent, also as an event of a stream."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Fields:
    """One JSON object; `where` is its place in the body ("messages[2]"). ApiError if it is none."""

    def __init__(self, value: object, where: str = "") -> None:
        if not isinstance(value, dict):
            name = where or "the body"
            raise ApiError(400, f"{name} must be a JSON object, not {shown(value)}", param=where or None)
        self._values, self._where = value, where

    def get(self, name: str) -> Any:
        """The value, unchecked; None where it is null or absent."""
        return self._values.get(name)

    def path(self, name: str) -> str:
        """The field's name with its place before it, as errors call it."""
        return f"{self._where}.{name}" if self._where else name

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        """An integer of low..high; None: not bounded on that side."""
        value = self.get(name)
        if value is None or (type(value) is int and (low is None or low <= value) and (high is None or value <= high)):
            return value
        raise self.refusal(name, f"must be an integer{_range(low, high)}, not {shown(value)}")

    def number(self, name: str, low: float, high: float, above: bool = False) -> float | None:
        """A number of low..high; above: low itself is refused."""
        value = self.get(name)
        if value is None:
            return None
        if is_number(value, low, high) and not (above and value == low):
            return float(value)
        limits = f" above {low} and at most {high}" if above else _range(low, high)
        raise self.refusal(name, f"must be a number{limits}, not {shown(value)}")

    def flag(self, name: str) -> bool:
        """true or false; false where it is not given."""
        value = self.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.refusal(name, f"must be true or false, not {shown(value)}")

    def text(self, name: str) -> str | None:
        """A string of whole characters."""
        value = self.get(name)
        return None if value is None else checked_text(value, self.path(name))

    def neutral(self, name: str, *values: object) -> None:
        """Refuses what this server does not do, unless it is null or one of the values that ask for nothing."""
        value = self.get(name)
        if value is None or any(type(value) is type(other) and value == other for other in values):
            return
        ways = "".join(f" or {json.dumps(other)}" for other in values)
        raise self.refusal(
            name, f"is not supported by this server: leave it out or null{ways}, not {shown(value)}", UNSUPPORTED
        )

    def refusal(self, name: str, why: str, code: str | None = None) -> ApiError:
        """The error that says why a field cannot be honoured."""
        return refusal(self.path(name), why, code)


def refusal(name: str, why: str, code: str | None = None) -> ApiError:
    """The error that says why the field of that name cannot be honoured."""
    return ApiError(400, f"{name} {why}", param=name, code=code)


def is_number(value: object, low: float, high: float) -> bool:
    """Whether it is a number of low..high, both finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def checked_text(value: object, name: str) -> str:
    """The string; ApiError if it is none, or has half of a surrogate pair ("\\ud83d"), which no UTF-8 can hold."""
    if not isinstance(value, str):
        raise refusal(name, f"must be a string, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = shown(value[error.start])
        raise refusal(name, f"must not have half of a surrogate pair, as {half} at {error.start} is") from None
    return value


def shown(value: object) -> str:
    """A JSON value in a message, in ASCII: as it was written, or less of it when that is long."""
    if isinstance(value, (list, dict)):
        inside = list(value.values()) if isinstance(value, dict) else value
        if len(inside) <= FEW and not any(isinstance(one, (list, dict)) for one in inside):
            written = json.dumps(value)
            if len(written) <= SHOWN:
                return written
        return f"{'an object' if isinstance(value, dict) else 'a list'} of length {len(value)}"
    if isinstance(value, str) and len(value) > SHOWN:
        return json.dumps(value[:SHOWN])[:-1] + '.."'
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f"an integer of {value.bit_length()} bits"
    return json.dumps(value)


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return f" of at least {low}" if high is None else f" from {low} to {high}"

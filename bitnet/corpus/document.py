"""One document: its text, where it came from, and what its record said about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitnet.errors import DataError


@dataclass(frozen=True)
class Document:
    """`source` names the file or hub data set without the folders of this machine."""

    text: str
    source: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)  # those asked for that its record has


def of_record(record: Any, text_field: str, wanted: Sequence[str], source: str, where: str) -> Document | None:
    """The document of a record of a `.jsonl`, Parquet or hub data set; None if its text is empty.

    A field is named as it is spelled, or by a path such as "meta.language". where: what an error calls the record.
    Raises DataError if the text is missing or is not Unicode.
    """
    text = look_up(record, text_field)
    if not isinstance(text, str):
        raise DataError(f"{where} has no string named {text_field!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is not Unicode text: {error}") from None
    if not text:
        return None
    values = {name: look_up(record, name) for name in wanted}
    return Document(text, source, {name: value for name, value in values.items() if value is not None})


def look_up(record: Any, name: str) -> Any:
    """A field of a record, or None."""
    if isinstance(record, dict) and name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    return look_up(record.get(head), rest) if dot and isinstance(record, dict) else None

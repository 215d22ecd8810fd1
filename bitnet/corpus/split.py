"""Which documents are held out for validation, decided from one pass over the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from bitnet.errors import ConfigError, DataError

FEW = 8  # with fewer held-out documents than this to be expected, each document is cut instead


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus finds."""

    documents: int
    bytes: int
    sha256: str  # of every document's length and text, in order

    @classmethod
    def of(cls, texts: Iterable[str]) -> Survey:
        """Raises DataError if there is no document."""
        count = Counter()
        for text in texts:
            count.add(text)
        return count.survey()


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

    def sides(self, text: str) -> tuple[bool, bool]:
        """Whether some of a document is trained on, and whether some of it is held out."""
        train, validation = self.parts(text)
        return bool(train), bool(validation)

    def holds_out(self, text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8], "little") < self.fraction * 2**64

    def __str__(self) -> str:
        what = "the last {:.3g} % of each document" if self.by_position else "{:.3g} % of the documents, by hash"
        return what.format(100 * self.fraction)


class Counter:
    """A Survey in the making."""

    def __init__(self) -> None:
        self.documents = self.bytes = 0
        self._digest = hashlib.sha256()

    def add(self, text: str) -> int:
        """Count one document; returns its length in bytes."""
        data = text.encode()
        self.documents += 1
        self.bytes += len(data)
        self._digest.update(len(data).to_bytes(8, "little") + data)
        return len(data)

    def survey(self) -> Survey:
        """What was counted. Raises DataError if there was no document."""
        if self.documents == 0:
            raise DataError("the corpus is empty: no document was found")
        return Survey(self.documents, self.bytes, self._digest.hexdigest())

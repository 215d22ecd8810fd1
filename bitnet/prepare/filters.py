"""Quality: which documents are worth reading, judged one at a time."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet.corpus import Document
from bitnet.errors import ConfigError

GRAM = 5  # words


@dataclass(frozen=True)
class Filters:
    """Bounds a document must keep; None is no bound. A document whose record lacks a judged field does not pass."""

    min_score: float | None = None
    score_field: str = "score"
    language: str | None = None
    language_field: str = "language"
    min_chars: int | None = None
    max_chars: int | None = None
    max_repetition: float | None = None  # see repetition()
    where: tuple[tuple[str, str], ...] = ()  # fields and the text each must hold

    def __post_init__(self) -> None:
        for name in ("min_chars", "max_chars"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be at least 0, not {value}")
        if self.max_repetition is not None and not 0 <= self.max_repetition <= 1:
            raise ConfigError(f"max_repetition must be 0 to 1, not {self.max_repetition}")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that are judged."""
        wanted = (self.score_field, self.min_score), (self.language_field, self.language)
        return (*(name for name, bound in wanted if bound is not None), *(name for name, _ in self.where))

    def refuses(self, document: Document) -> str | None:
        """Which bound the document breaks first, None if it passes."""
        if self.min_score is not None:
            score = document.fields.get(self.score_field)
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not score >= self.min_score:
                return "score"
        if self.language is not None and document.fields.get(self.language_field) != self.language:
            return "language"
        if any(str(document.fields.get(name)) != value for name, value in self.where):
            return "where"
        if not (self.min_chars or 0) <= len(document.text) <= (self.max_chars or len(document.text)):
            return "length"
        if self.max_repetition is not None and repetition(document.text) > self.max_repetition:
            return "repetition"
        return None


def repetition(text: str) -> float:
    """Share of the five-word stretches of a text that have occurred in it before: 0 for fresh prose, 1 for a chant."""
    words = text.split()
    count = len(words) - GRAM + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(words[i : i + GRAM]) for i in range(count)}) / count

"""A pass over the corpus that decides which documents stay, and with them the held-out split.

The order of the judgements is filters, exact duplicates, near duplicates; the first of those that are alike stays. A
document's side of the split follows from a hash of its text, so it is known here already, and a document that
resembles a kept one of the other side is removed too: nothing that is held out has a near duplicate in training. Where
so few stay that each document is cut instead, it is on both sides, and near duplicates are judged again as that asks.
A part of a mixture is judged with what all parts hold out (held_out.py), before duplicates of its own.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bitnet.corpus import Corpus, Counter, Document, Split, Survey
from bitnet.corpus.hub import PREFIX
from bitnet.errors import ConfigError, DataError
from bitnet.prepare.exact import digest
from bitnet.prepare.filters import Filters
from bitnet.prepare.near import NearIndex, signature
from bitnet.prepare.workers import batches, ordered_map

DEDUP = ("none", "exact", "near")
# "": kept; leak: trained on, and like a document that some part of a mixture holds out
REASONS = ("", "score", "language", "where", "length", "repetition", "exact", "near", "across", "leak")
DEFAULT_HELD_OUT = 0.01


@dataclass(frozen=True)
class Preparation:
    """Which documents to leave out."""

    filters: Filters = field(default_factory=Filters)
    dedup: str = "none"  # or "exact", or "near", which includes exact
    near: float = 0.7  # similarity of near duplicates; see NearIndex
    across: float = 0.5  # and of a held-out and a training document

    def __post_init__(self) -> None:
        if self.dedup not in DEDUP:
            raise ConfigError(f"dedup must be one of {', '.join(DEDUP)}, not {self.dedup!r}")
        for name, value in (("near", self.near), ("across", self.across)):
            if not 0 < value <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, not {value}")

    @property
    def keeps_everything(self) -> bool:
        return self == Preparation()

    def settings(self) -> dict[str, Any]:
        """What differs from keeping everything, for the manifest."""
        flat = asdict(self) | asdict(self.filters)
        plain = asdict(Preparation()) | asdict(Filters())
        return {name: value for name, value in flat.items() if name != "filters" and value != plain[name]}


@dataclass(frozen=True)
class Screening:
    """What the pass found. Documents are numbered in the order of the corpus."""

    survey: Survey  # of all documents
    kept_documents: int
    kept_bytes: int
    codes: bytes | None  # one of REASONS by number for each document; None: all are kept
    dropped: dict[str, int]  # how many for each reason
    sources: dict[str, int]  # kept documents of each file or data set
    split: Split  # of the kept documents

    def keeps(self, number: int) -> bool:
        return self.codes is None or self.codes[number] == 0

    def kept(self, corpus: Corpus) -> Iterator[tuple[int, str]]:
        """Number and text of each document that stays, the corpus read again."""
        return ((number, text) for number, text in enumerate(corpus) if self.keeps(number))


@dataclass(frozen=True)
class Guard:
    """What a part of a mixture is told of all parts."""

    split: Split  # its own
    key: str  # of all that is held out
    refuses: Callable[[tuple[bool, bool], bytes, Any], bool]  # a document by its sides, hash and MinHash


def screen(
    corpus: Corpus,
    preparation: Preparation,
    val_fraction: float | None = None,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
    guard: Guard | None = None,
) -> Screening:
    """Reads the corpus once, or twice where near duplicates are to go and few documents stay.

    progress: called with the bytes of each document, the first time. guard: of a part of a mixture, which goes
    with a search for duplicates. Raises DataError if nothing is left.
    """
    if guard is not None:
        return _read(corpus, preparation, guard.split, workers, progress, guard)
    by_hash = Split(DEFAULT_HELD_OUT if val_fraction is None else val_fraction, by_position=False)
    found = _read(corpus, preparation, by_hash, workers, progress)
    split = Split.choose(_kept(found), val_fraction)
    if split.by_position and preparation.dedup == "near":
        found = _read(corpus, preparation, split, workers, None)
        split = replace(Split.choose(_kept(found), val_fraction), by_position=True)
    return replace(found, split=split)


def _kept(found: Screening) -> Survey:
    return Survey(found.kept_documents, found.kept_bytes, found.survey.sha256)


def _read(
    corpus: Corpus,
    preparation: Preparation,
    split: Split,
    workers: int,
    progress: Callable[[int], object] | None,
    guard: Guard | None = None,
) -> Screening:
    """One pass, with documents on the sides that `split` says."""
    count, codes = Counter(), bytearray()
    dropped: Tally[str] = Tally()
    sources: Tally[str] = Tally()
    kept_bytes = 0
    seen: set[bytes] = set()
    index = NearIndex(preparation.near, preparation.across) if preparation.dedup == "near" else None
    sized = ((document, len(document.text)) for document in corpus.documents())
    judge = _Judge(preparation)
    for batch, verdicts in ordered_map(judge, batches(sized), workers):
        for document, (reason, hashed, hashes) in zip(batch, verdicts, strict=True):
            size = count.add(document.text)
            if reason is None and guard is not None and hashed is not None:
                reason = "leak" if guard.refuses(split.sides(document.text), hashed, hashes) else None
            if reason is None and hashed is not None:
                reason = "exact" if hashed in seen else None
                seen.add(hashed)
            if reason is None and index is not None:
                reason = index.admit(hashes, split.sides(document.text))
            codes.append(REASONS.index(reason or ""))
            if reason is None:
                kept_bytes += size
                sources[origin(document.source)] += 1
            else:
                dropped[reason] += 1
            if progress is not None:
                progress(size)
    survey = count.survey()
    kept = survey.documents - dropped.total()
    if kept == 0:
        reasons = ", ".join(f"{n:,} by {reason}" for reason, n in sorted(dropped.items()))
        raise DataError(f"no document is left of {survey.documents:,}: {reasons}")
    by_name = dict(sorted(sources.items()))
    kept_codes = bytes(codes) if dropped else None
    return Screening(survey, kept, kept_bytes, kept_codes, dict(sorted(dropped.items())), by_name, split)


def origin(source: str) -> str:
    """The file, folder or data set that was named, of a document's source."""
    return source if source.startswith(PREFIX) else source.partition("/")[0]


Verdict = tuple[str | None, bytes | None, Any]  # refused by which filter; hash of the text; its MinHash


class _Judge:
    """What can be said of each document alone, in any process."""

    def __init__(self, preparation: Preparation) -> None:
        self._filters, self._dedup = preparation.filters, preparation.dedup

    def __call__(self, batch: list[Document]) -> tuple[list[Document], list[Verdict]]:
        return batch, [self._one(document) for document in batch]

    def _one(self, document: Document) -> Verdict:
        reason = self._filters.refuses(document)
        if reason is not None or self._dedup == "none":
            return reason, None, None
        return None, digest(document.text), signature(document.text) if self._dedup == "near" else None

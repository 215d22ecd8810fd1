"""What the parts of a mixture hold out, collected before any of them is packed: no part trains on a likeness of it.

Each part is read once, with its own filters. Of a part with many documents, those that a hash holds out are remembered,
wherever they stand: about one in a hundred. A part with few is read again, because each of its documents is cut and so
is on both sides of the split; all of them are remembered, but for those that are like one that another part holds out.

Two alike documents of different parts both stay if both are trained on, or both held out. If one is held out and the
other is not, the one that is trained on goes; of two that are cut, that of the later part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bitnet.corpus import Corpus, Document, Split, Survey
from bitnet.prepare.exact import digest
from bitnet.prepare.near import Signatures, signature
from bitnet.prepare.progress import reading
from bitnet.prepare.screening import DEFAULT_HELD_OUT, Guard, Preparation
from bitnet.prepare.workers import batches, ordered_map


@dataclass(frozen=True)
class _Entry:
    """Where a remembered document is from."""

    part: int
    trains: bool  # it is cut, and its beginning is trained on


class HeldOut:
    """Held-out documents of several parts. parts: texts and filters; all find duplicates in the same way.

    A part's split follows from how many documents pass its filters and differ, so it is known before near duplicates
    are. Raises ConfigError for a fraction that cannot be.
    """

    def __init__(
        self, parts: Iterable[tuple[Corpus, Preparation]], val_fraction: float | None = None, workers: int = 1
    ) -> None:
        self._parts, self._workers = list(parts), workers
        first = self._parts[0][1]
        self._same, self._least = first.near, min(first.near, first.across)
        self._exact: dict[bytes, list[_Entry]] = {}
        self._near = Signatures(self._least) if first.dedup == "near" else None
        self._digest = hashlib.sha256()
        by_hash = Split(DEFAULT_HELD_OUT if val_fraction is None else val_fraction, by_position=False)
        self.splits: list[Split] = []
        for number in range(len(self._parts)):
            texts: set[bytes] = set()
            held = []
            for hashed, hashes, (_, is_held) in self._read(number, by_hash):
                texts.add(hashed)
                if is_held:
                    held.append((hashed, hashes))
            split = Split.choose(Survey(len(texts), 0, ""), val_fraction)
            self.splits.append(split)
            if not split.by_position:
                for hashed, hashes in held:
                    self._remember(_Entry(number, False), hashed, hashes)
        for number, split in enumerate(self.splits):
            if split.by_position and split.fraction > 0:
                for hashed, hashes, (trains, is_held) in self._read(number, split):
                    if is_held:
                        self._remember(_Entry(number, trains), hashed, hashes)

    def guard(self, number: int) -> Guard:
        """What the screening of a part goes by."""

        def refuses(sides: tuple[bool, bool], hashed: bytes, hashes: Any) -> bool:
            return self._refuses(number, sides, hashed, hashes)

        return Guard(self.splits[number], self._digest.hexdigest(), refuses)

    def _read(self, number: int, split: Split) -> Iterator[tuple[bytes, Any, tuple[bool, bool]]]:
        """Hash, MinHash (of held-out ones) and sides of the documents of a part that pass its filters."""
        corpus, preparation = self._parts[number]
        sized = ((document, len(document.text)) for document in corpus.documents())
        with reading("reading what is held out", corpus) as went_by:
            for batch in ordered_map(_Judge(preparation, split), batches(sized), self._workers):
                for size, judged in batch:
                    went_by(size)
                    if judged is not None:
                        yield judged

    def _alike(self, hashed: bytes, hashes: Any) -> list[tuple[float, _Entry]]:
        """What is remembered and like a document, and how much."""
        same = [(1.0, entry) for entry in self._exact.get(hashed, ())]
        return same + (self._near.alike(hashes) if self._near is not None else [])

    def _remember(self, entry: _Entry, hashed: bytes, hashes: Any) -> None:
        """Unless its part leaves it out: as a duplicate of its own, or for another part's sake."""
        for value, other in self._alike(hashed, hashes):
            if entry.part == other.part and not entry.trains:
                bar = self._same
            elif entry.part == other.part or entry.trains:
                bar = self._least
            else:
                continue  # both held out, of two parts
            if value >= bar:
                return
        self._exact.setdefault(hashed, []).append(entry)
        if self._near is not None:
            self._near.insert(hashes, entry)
        self._digest.update(bytes([entry.trains]) + entry.part.to_bytes(4, "little") + hashed)

    def _refuses(self, part: int, sides: tuple[bool, bool], hashed: bytes, hashes: Any) -> bool:
        trains, held_out = sides
        if not trains:
            return False
        alike = [entry for value, entry in self._alike(hashed, hashes) if value >= self._least]
        if not held_out:
            return bool(alike)
        return any(entry.part != part and (not entry.trains or entry.part < part) for entry in alike)


class _Judge:
    """What can be said of each document alone, in any process: its bytes, and None if its part's filters refuse it."""

    def __init__(self, preparation: Preparation, split: Split) -> None:
        self._preparation, self._split = preparation, split

    def __call__(self, batch: list[Document]) -> list[tuple[int, tuple[bytes, Any, tuple[bool, bool]] | None]]:
        return [(len(document.text.encode()), self._one(document)) for document in batch]

    def _one(self, document: Document) -> tuple[bytes, Any, tuple[bool, bool]] | None:
        if self._preparation.filters.refuses(document) is not None:
            return None
        sides = self._split.sides(document.text)
        near = sides[1] and self._preparation.dedup == "near"
        return digest(document.text), signature(document.text) if near else None, sides

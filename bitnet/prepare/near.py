"""Near duplicates: texts that share most of their five-word stretches, found by MinHash and locality-sensitive hashing.

The Jaccard similarity of two texts is the share of stretches they have in common among all that either has. MinHash
estimates it from 128 numbers a text, with a standard error of at most 0.045. The index is datasketch's, held in memory:
some twelve kilobytes a document, so millions on one machine; datasets/README.md says what to run for more.
"""

from __future__ import annotations

import zlib
from typing import Any

from bitnet.corpus.readers import need
from bitnet.prepare.exact import normalized
from bitnet.prepare.filters import GRAM

PERMUTATIONS = 128
SEED = 1
BLOCK = 4096  # stretches hashed at a time: 2 MB of 32-bit products


def signature(text: str) -> Any:
    """The 128 numbers of a text, as a LeanMinHash. They depend on the text and nothing else."""
    sketch = need("datasketch", "near-duplicate removal")
    words = normalized(text).split()
    count = max(1, len(words) - GRAM + 1)
    stretches = list({" ".join(words[i : i + GRAM]).encode() for i in range(count)})
    hashes = sketch.MinHash(PERMUTATIONS, seed=SEED, hashfunc=zlib.crc32, scheme="affine32")
    for first in range(0, len(stretches), BLOCK):
        hashes.update_batch(stretches[first : first + BLOCK])
    return sketch.LeanMinHash(hashes)


class Signatures:
    """Signatures, each with a value, found again by a likeness of `least` or more."""

    def __init__(self, least: float) -> None:
        sketch = need("datasketch", "near-duplicate removal")
        # What the index names too much is compared and let go; what it misses is missed: hence the weights.
        self._index = sketch.MinHashLSH(least, PERMUTATIONS, weights=(0.1, 0.9))
        self._held: list[tuple[Any, Any]] = []

    def insert(self, hashes: Any, value: Any) -> None:
        self._index.insert(len(self._held), hashes)
        self._held.append((hashes, value))

    def alike(self, hashes: Any) -> list[tuple[float, Any]]:
        """(similarity, value) of those that may be alike."""
        found = (self._held[i] for i in self._index.query(hashes))
        return [(hashes.jaccard(other), value) for other, value in found]


class NearIndex:
    """Documents that were kept so far. In the order in which they come, the first of those that are alike stays.

    near: a document this similar to one that was kept is a near duplicate. across: so is one this similar to a kept one
    on the other side of the held-out split; lower than near, it makes the two sides differ more than texts of one side.
    Documents that are cut, so that each is on both sides, are all on each other's other side.
    """

    def __init__(self, near: float, across: float) -> None:
        self._near, self._across = near, across
        self._kept = Signatures(min(near, across))  # with their sides

    def admit(self, hashes: Any, sides: tuple[bool, bool]) -> str | None:
        """Keeps a document unless it is like one before; returns "near" or "across" if it is. sides: as Split.sides."""
        trains, held_out = sides
        found = [
            (value, (trains and held) or (held_out and trained)) for value, (trained, held) in self._kept.alike(hashes)
        ]
        if any(value >= self._near for value, _ in found):
            return "near"
        if any(crosses and value >= self._across for value, crosses in found):
            return "across"
        self._kept.insert(hashes, sides)
        return None

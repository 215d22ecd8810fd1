"""Planted duplicates and leaks: what `bitnet data --dedup` finds of them, and what else it takes away.

Documents of random words, each tenth of them opening with the same sixty, get copies of twelve kinds: on the same side
of the held-out split or across it, in other letters and spaces alone (exact) or with 2, 3, 5, 10 or 20 % of their words
exchanged. All are shuffled, packed as `bitnet data` packs, and read back from the packs. What should happen to a copy
follows from its similarity, the Jaccard index of five-word stretches, counted here without the pipeline's code: from
0.7 on it is a duplicate on its own side, from 0.5 on across the split, and below it stays. Either one of a pair may be
the one to go; both gone, or one that was not planted, are false removals.

The exit status is 1 if an exact copy stayed or anything was removed falsely.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitnet.corpus import Split
from bitnet.data import ShardDataset
from bitnet.prepare import Preparation, pack

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=2 + i % 7)) for i in range(3000)]
LENGTH, OPENING = 150, 60  # words of a document, and of what some have in common
HELD_OUT = 0.1
EDITS = (0.0, 0.02, 0.03, 0.05, 0.1, 0.2)  # shares of the words that are exchanged; 0: letters and spaces alone
BOUNDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the table by similarity; the last is exact copies


@dataclass(frozen=True)
class Pair:
    """A document and its planted copy."""

    edits: float
    across: bool  # one of them is held out, the other is not
    texts: tuple[str, str]
    similarity: float


def stretches(text: str) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def similarity(a: str, b: str) -> float:
    ours, theirs = stretches(a), stretches(b)
    return len(ours & theirs) / len(ours | theirs)


def copied(draw: random.Random, text: str, edits: float) -> str:
    """In other letters and spaces, or with a share of its words exchanged."""
    words = text.split(" ")
    if edits == 0:
        return "  ".join(word.upper() if draw.random() < 0.5 else word for word in words)
    for i in draw.sample(range(len(words)), round(edits * len(words))):
        words[i] = draw.choice(WORDS)
    return " ".join(words)


def planted(documents: int, seed: int) -> tuple[list[str], list[Pair]]:
    """So many documents of their own, and pairs made with half of them: as many of each kind."""
    draw = random.Random(seed)
    opening = draw.choices(WORDS, k=OPENING)
    own = [" ".join([*opening * (n % 10 == 0), *draw.choices(WORDS, k=LENGTH)][:LENGTH]) for n in range(documents)]
    sources = iter(draw.sample(own, documents // 2))
    side = Split(HELD_OUT, by_position=False).holds_out
    pairs = []
    for across in (False, True):
        for edits in EDITS:
            for _ in range(documents // 2 // (2 * len(EDITS))):
                text = next(sources)
                copy = copied(draw, text, edits)
                while (side(copy) != side(text)) != across:
                    copy = copied(draw, text, edits)
                pairs.append(Pair(edits, across, (text, copy), similarity(text, copy)))
    texts = own + [pair.texts[1] for pair in pairs]
    draw.shuffle(texts)
    return texts, pairs


def packed(source: Path, out: Path, dedup: str) -> tuple[list[str], list[str]]:
    """What is left for training, and held out."""
    pack(source, out, "bytes", val_fraction=HELD_OUT, preparation=Preparation(dedup=dedup), log=lambda line: None)
    sides = []
    for split in ("train", "validation"):
        data = ShardDataset(out, split)
        tokens, starts = data.read(0, len(data)), data.document_starts()
        texts = [tokens[a:b] for a, b in itertools.pairwise(starts)]
        sides.append([one[one < 256].astype(np.uint8).tobytes().decode() for one in texts])
    return sides[0], sides[1]


def nearest(train: list[str], held: list[str]) -> list[float]:
    """Of each held-out document, the similarity of the training document that is most alike, planted or not."""
    sets = [stretches(text) for text in train]
    where: dict[tuple[str, ...], list[int]] = {}
    for i, own in enumerate(sets):
        for stretch in own:
            where.setdefault(stretch, []).append(i)
    out = []
    for own in map(stretches, held):
        shared = Counter(i for stretch in own for i in where.get(stretch, ()))
        out.append(max((n / (len(own) + len(sets[i]) - n) for i, n in shared.items()), default=0.0))
    return out


def by_kind(pairs: list[Pair], kept: dict[str, set[str]]) -> None:
    print(f"{'planted':24}{'similarity':>24}{'pairs':>8}{'exact':>8}{'near':>8}{'recall':>9}")
    for across in (False, True):
        for edits in EDITS:
            some = [pair for pair in pairs if (pair.edits, pair.across) == (edits, across)]
            values = [pair.similarity for pair in some]
            found = {name: sum(lost(pair, left) > 0 for pair in some) for name, left in kept.items()}
            name = ("leak" if across else "duplicate") + (f", {edits:.0%} of words" if edits else ", exact")
            spread = f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            print(f"{name:24}{spread:>24}{len(some):8}{found['exact']:8}{found['near']:8}{share(found['near'], some)}")


def by_similarity(pairs: list[Pair], kept: set[str]) -> None:
    print(f"\n{'with near':24}{'own side, from 0.7':>24}{'recall':>9}{'across, from 0.5':>24}{'recall':>9}")
    for low, high in zip(BOUNDS, (*BOUNDS[1:], 2.0), strict=True):
        line = f"{f'similarity {low:.1f} to {high:.1f}' if low < 1 else 'the same words':24}"
        for across in (False, True):
            some = [pair for pair in pairs if pair.across == across and low <= pair.similarity < high]
            found = sum(lost(pair, kept) > 0 for pair in some)
            line += f"{f'{found} of {len(some)}':>24}{share(found, some)}"
        print(line)


def lost(pair: Pair, kept: set[str]) -> int:
    return sum(text not in kept for text in pair.texts)


def share(count: int, pairs: list[Pair]) -> str:
    return f"{count / len(pairs):9.1%}" if pairs else f"{'':9}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all exact copies are gone and nothing else that should stay, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=4000, help="of their own; half as many copies (4000)")
    parser.add_argument("--seed", type=int, default=0, help="of the words and of what is planted (0)")
    args = parser.parse_args(argv)
    if args.documents < 400:
        parser.error(f"--documents must be at least 400, for 16 copies of each kind, not {args.documents}")
    start = time.perf_counter()
    texts, pairs = planted(args.documents, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "texts.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        left = {dedup: packed(source, Path(folder, dedup), dedup) for dedup in ("none", "exact", "near")}
    kept = {name: {*train, *held} for name, (train, held) in left.items()}
    print(f"{args.documents} documents and {len(pairs)} copies, seed {args.seed}; packed with --dedup exact and near\n")
    by_kind(pairs, kept)
    by_similarity(pairs, kept["near"])
    print()
    wrong = {}
    for name in ("exact", "near"):
        removed, found = len(texts) - len(kept[name]), sum(lost(pair, kept[name]) > 0 for pair in pairs)
        wrong[name] = removed - found
        print(f"precision of {name}: {found} of {removed} removed were planted ({found / removed:.2%})")
    alike = {name: nearest(*left[name]) for name in ("none", "near")}
    for least in (1.0, 0.65, 0.5):
        counts = [f"{name} {sum(one >= least for one in some)} of {len(some)}" for name, some in alike.items()]
        print(f"held out with a training document of similarity {least} or more: {', '.join(counts)}")
    print(f"{time.perf_counter() - start:.0f} s")
    stayed = sum(lost(pair, kept[name]) == 0 for pair in pairs if not pair.edits for name in wrong)
    return 0 if stayed == 0 and not any(wrong.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Shares of a mixture as they come out, beside its weights, and one stream of tokens whatever the workers and ranks.

Three packs whose every row tells its source are mixed by weights, by sizes at a temperature, and with an epoch cap on
one. Rows are read as a trainer reads them and counted; a chi-square test compares the counts with the weights, and the
same over `--seeds` other seeds shows that a good p-value is no luck. A block of 65,536 rows has the exact shares, so n
rows of it are drawn without replacement: chi-square is smaller than that of independent draws, by 1 - n / 65536 on the
mean. Then the packs are made by one and by two worker processes, batches read by 1, 2 and 4 ranks, a process each, and
the SHA-256 of all batches in their order is printed for each.

The exit status is 1 if a p-value is below 0.001, a cap is not met exactly, or the streams differ.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitnet.data import DataLoader, ShardDataset
from bitnet.mixture import BLOCK, Mixture, MixtureRows, Source
from bitnet.prepare import pack

DOCUMENTS = {"a": 4000, "b": 9000, "c": 2000}  # of each source
WEIGHTS = {"a": 0.55, "b": 0.3, "c": 0.15}
TEMPERATURE, CAP = 2.0, 1.5  # the cap: epochs of source a
SEQ_LEN, BATCH = 64, 8
STREAM = 256  # batches that are hashed
WORKERS, RANKS = (1, 2), (1, 2, 4)


def packs(folder: Path, workers: int) -> list[Source]:
    """Documents with a letter of their own before every number, so that a row tells its source."""
    sources = []
    for letter, count in DOCUMENTS.items():
        text, out = folder / f"{letter}.txt", folder / f"{letter}-{workers}"
        text.write_text("|".join(f"{letter}{n} {letter}{n * n} {letter}{n * n * n}" for n in range(count)))
        pack(text, out, "bytes", separator="|", val_fraction=0, workers=workers, log=lambda line: None)
        sources.append(Source(ShardDataset(out), letter))
    return sources


def weighted(sources: list[Source], cap: float | None = None) -> Mixture:
    capped = [replace(source, weight=WEIGHTS[source.name]) for source in sources]
    return Mixture([replace(source, epochs=cap if source.name == "a" else None) for source in capped])


def counted(mixture: Mixture, first: int, rows: int, seed: int) -> Counter[str]:
    """How many of these rows come from each source, by their tokens."""
    loader = DataLoader(mixture, 1, SEQ_LEN, seed)
    names = [source.name for source in mixture.sources]
    found = Counter(dict.fromkeys(names, 0))
    for position in range(first, first + rows):
        tokens, _ = loader.batch(position)
        found[names[int(np.argmax([np.count_nonzero(tokens == ord(name)) for name in names]))]] += 1
    return found


def chi_square(found: dict[str, int], shares: dict[str, float]) -> float:
    rows = sum(found.values())
    return sum((found[name] - rows * share) ** 2 / (rows * share) for name, share in shares.items())


def p_value(value: float, freedom: int) -> float:
    """How often independent draws differ that much or more: the closed forms of one and two degrees of freedom."""
    return {1: math.erfc(math.sqrt(value / 2)), 2: math.exp(-value / 2)}[freedom]


def show(title: str, found: Counter[str], shares: dict[str, float]) -> float:
    """Prints counts beside shares; returns the p-value."""
    value = chi_square(found, shares)
    p, rows = p_value(value, len(shares) - 1), found.total()
    pairs = ", ".join(f"{name} {found[name] / rows:.4f} of {share:.4f}" for name, share in shares.items())
    print(f"{title:34}{rows:7} rows: {pairs}; chi-square {value:.2f}, p {p:.3f}")
    return p


def over_seeds(mixture: Mixture, rows: int, seeds: int) -> None:
    """Sources as the mixture chooses them, without reading the rows."""
    values = []
    for seed in range(1, seeds + 1):
        chosen = DataLoader(mixture, 1, SEQ_LEN, seed).rows
        assert isinstance(chosen, MixtureRows)
        found = Counter(mixture.sources[chosen.choose(number)[0]].name for number in range(rows))
        values.append(chi_square(found, WEIGHTS))
    low = sum(p_value(value, 2) < 0.05 for value in values)
    mean = sum(values) / seeds
    wanted = 2 * (1 - rows / BLOCK)
    print(f"  {seeds} other seeds: chi-square {mean:.2f} on the mean, {wanted:.2f} expected; p below 0.05 in {low}")


def capped(mixture: Mixture, rows: int, seed: int) -> tuple[list[float], bool]:
    """Shares before and after source a is read as often as it may be; whether that is as often as it says."""
    loader = DataLoader(mixture, 1, SEQ_LEN, seed)
    chosen = loader.rows
    assert isinstance(chosen, MixtureRows)
    per_epoch = DataLoader(mixture.sources[0].dataset, 1, SEQ_LEN).windows_per_epoch
    allowed = int(CAP * per_epoch)
    end = int(allowed / WEIGHTS["a"]) + 2  # the last rows of a shorter block are whole
    reads = Counter(row for source, row in map(chosen.choose, range(end + rows)) if source == 0)
    print(f"cap of {CAP} epochs of {per_epoch} rows: {allowed} rows of a allowed, {reads.total()} read, "
          f"{len(reads)} of them different")  # fmt: skip
    others = {name: weight / (1 - WEIGHTS["a"]) for name, weight in WEIGHTS.items() if name != "a"}
    before = show("  before a is used up", counted(mixture, 0, min(rows, end // 2), seed), WEIGHTS)
    after = counted(mixture, end, rows, seed)
    del after["a"]
    exact = sorted(reads.elements()) == list(range(allowed))
    return [before, show("  after it", after, others)], exact and after.total() == rows


def part(folder: Path, workers: int, seed: int, rank: int, world: int) -> list[bytes]:
    """What one rank reads of the stream, batch by batch."""
    sources = [Source(ShardDataset(folder / f"{letter}-{workers}"), letter) for letter in DOCUMENTS]
    loader = DataLoader(weighted(sources), BATCH, SEQ_LEN, seed, rank=rank, world=world)
    return [b"".join(half.tobytes() for half in loader.batch(n)) for n in range(STREAM // world)]


def streams(folder: Path, seed: int) -> set[str]:
    """Prints the hash of each way to read the stream; returns the different ones."""
    digests = set()
    context = multiprocessing.get_context("spawn")
    for workers in WORKERS:
        for world in RANKS:
            with context.Pool(world) as pool:
                parts = pool.starmap(part, [(folder, workers, seed, rank, world) for rank in range(world)])
            digest = hashlib.sha256(b"".join(batch for turn in zip(*parts, strict=True) for batch in turn)).hexdigest()
            print(f"packed by {workers} worker(s), read by {world} rank(s): {STREAM} batches, SHA-256 {digest}")
            digests.add(digest)
    return digests


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if shares are the weights and all streams one, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000, help="to count in each test (5000)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (0)")
    parser.add_argument("--seeds", type=int, default=100, help="others to repeat the first test with (100)")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, *_ = [packs(folder, workers) for workers in WORKERS]
        print(", ".join(f"{source.name} {len(source.dataset):,} tokens" for source in sources) + f", seed {args.seed}")
        plain = weighted(sources)
        ps = [show("weights", counted(plain, 0, args.rows, args.seed), WEIGHTS)]
        over_seeds(plain, args.rows, args.seeds)
        warm = Mixture(sources, TEMPERATURE)
        roots = {source.name: len(source.dataset) ** (1 / TEMPERATURE) for source in sources}
        shares = {name: root / sum(roots.values()) for name, root in roots.items()}
        ps.append(show(f"sizes at temperature {TEMPERATURE:g}", counted(warm, 0, args.rows, args.seed), shares))
        some, exact = capped(weighted(sources, CAP), args.rows, args.seed)
        digests = streams(folder, args.seed)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if min(ps + some) >= 0.001 and exact and len(digests) == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())

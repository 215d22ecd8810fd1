"""Is NEW slower than OLD, beyond what their own samples scatter? Both are histories or --json files of benchmarks here.

    python benchmarks/compare.py before.jsonl after.jsonl

Of each benchmark with each settings the last run in each file counts. An entry's noise is sigma = 1.4826 x the median
absolute deviation of its samples over their median, which a few disturbed samples do not move; its limit is
3 sqrt(sigma of OLD^2 + sigma of NEW^2), and at least --floor, for a machine drifts between two runs by more than within
one. A ratio worse than the limit is a REGRESSION. Exit status: 0, 1 for a regression, 2 where nothing can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import history

MACHINE = ("cpu", "family_model", "features", "cores", "system")  # what must be equal; versions may be the question
SOFTWARE = ("revision", "compiler", "python", "versions", "instruction_set")


def key(run: history.Run) -> tuple[str, str]:
    return run["benchmark"], json.dumps(run["settings"], sort_keys=True)


def entries(run: history.Run) -> dict[str, dict[str, Any]]:
    """By name; the samples of entries with one name together. Entries that could not run have none and are left out."""
    found: dict[str, dict[str, Any]] = {}
    for one in run["results"]:
        if one.get("samples"):
            known = found.setdefault(one["entry"], {**one, "samples": []})
            known["samples"] = known["samples"] + one["samples"]
    return found


def scatter(samples: list[float]) -> float:
    """Relative standard deviation of one sample, estimated from the median absolute deviation; 0 of a single sample."""
    middle = statistics.median(samples)
    return 1.4826 * statistics.median(abs(s - middle) for s in samples) / abs(middle) if middle else 0.0


def differences(old: dict[str, Any], new: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{name}: {old.get(name)} and {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def compare(old: history.Run, new: history.Run, floor: float) -> tuple[list[str], int]:
    """(lines of the table, number of regressions) of two runs with equal settings."""
    before, after = entries(old), entries(new)
    lines, regressions = [], 0
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        from_, to = statistics.median(a["samples"]), statistics.median(b["samples"])
        ratio = to / from_ if from_ else math.nan
        limit = max(floor, 3 * math.hypot(scatter(a["samples"]), scatter(b["samples"])))
        gain = ratio if a["higher_is_better"] else 1 / ratio if ratio else math.inf  # above 1: better
        verdict = "REGRESSION" if gain < 1 - limit else "better" if gain > 1 + limit else "equal"
        regressions += verdict == "REGRESSION"
        lines.append(f"  {name:36} {from_:12.5g} -> {to:12.5g} {a['unit']:9} {ratio:7.3f} x  +-{limit:6.1%}  {verdict}")
    lines.sort()
    missing = sorted(before.keys() ^ after.keys())
    return [*lines, *(f"  {name:36} only in {'OLD' if name in before else 'NEW'}" for name in missing)], regressions


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares the results of benchmarks, entry by entry.")
    parser.add_argument("old", type=Path, metavar="OLD", help="a history or --json file")
    parser.add_argument("new", type=Path, metavar="NEW", help="another")
    parser.add_argument("--floor", type=float, default=0.03, metavar="X", help="least limit (default 0.03: 3 %%)")
    parser.add_argument("--other-machine", action="store_true", help="compare even where the machines differ")
    args = parser.parse_args(argv)
    try:
        old, new = ({key(run): run for run in history.read(path)} for path in (args.old, args.new))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shared = [k for k in new if k in old]
    if not shared:
        print(f"error: {args.old} and {args.new} share no benchmark with the same settings", file=sys.stderr)
        return 2
    total = 0
    for k in shared:
        a, b = old[k], new[k]
        other = differences(a["machine"], b["machine"], MACHINE)
        if other and not args.other_machine:
            print(f"error: {k[0]} was measured on different machines, of which ratios say nothing about the code "
                  f"({'; '.join(other)}); --other-machine compares them all the same", file=sys.stderr)  # fmt: skip
            return 2
        print(f"{k[0]}, {', '.join(f'{name} {value}' for name, value in a['settings'].items())}")
        for line in other:
            print(f"  WARNING: another machine: {line}")
        for line in differences(a["machine"], b["machine"], SOFTWARE):
            print(f"  note: {line}")
        lines, regressions = compare(a, b, args.floor)
        print("\n".join(lines))
        total += regressions
    print(f"{total} regression{'' if total == 1 else 's'}")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())

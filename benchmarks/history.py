"""Results that are kept: one JSON object a line, so that versions, machines and days can be compared (compare.py).

    {"benchmark": name, "date": when, "settings": {...}, "machine": {...}, "results": [{"entry": name, ...}, ...]}

An entry is one measured thing: its `samples` are repetitions, in `unit`, and `higher_is_better` says which way is good;
entries of one name are repetitions too. What else a run or an entry holds is for readers. The default file lies beside
the scripts and out of git; what is worth keeping goes where --history says.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

DEFAULT = Path(__file__).with_name("results.jsonl")
KEYS = {"benchmark", "date", "settings", "machine", "results"}

Run = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--history and --json, the same for every benchmark."""
    parser.add_argument("--history", type=Path, default=DEFAULT, metavar="FILE",
                        help="append the results here (default: results.jsonl beside this script)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too, alone")


def entry(name: str, samples: list[float], unit: str, higher_is_better: bool, **more: Any) -> dict[str, Any]:
    """One measured thing."""
    return {"entry": name, "samples": samples, "unit": unit, "higher_is_better": higher_is_better, **more}


def run(
    benchmark: str, settings: dict[str, Any], machine: dict[str, Any], results: list[dict[str, Any]], **more: Any
) -> Run:
    """What one run of a benchmark found, dated now."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "date": date, "settings": settings, "machine": machine, "results": results, **more}


def keep(args: argparse.Namespace, runs: list[Run]) -> None:
    """Appends runs to args.history; args.json, if given, gets the run alone, or a list of several."""
    with open(args.history, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in runs)
    if args.json:
        args.json.write_text(json.dumps(runs[0] if len(runs) == 1 else runs, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[Run]:
    """The runs of a history or of a --json file, in order. ValueError, with the line, for anything else."""
    text = path.read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
        runs = whole if isinstance(whole, list) else [whole]
    except ValueError:
        runs = [_parse(line, f"{path}, line {number}") for number, line in enumerate(text.splitlines(), 1)]
    for number, one in enumerate(runs, 1):
        if not isinstance(one, dict) or not one.keys() >= KEYS:
            raise ValueError(f"{path}: run {number} lacks one of {', '.join(sorted(KEYS))}")
    return runs


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None

"""Line coverage of the quantization, straight-through and forward code: prints every file, fails below the floor.

usage: line_coverage.py PYTHON_JSON TREE...

A TREE is a source tree whose extension or C programs were built with --coverage and have run: every .gcda below its
build folder is read through gcov. A template of csrc/cpu is compiled once per instruction set; a line of it counts as
run when any of them ran it, because tests hold the sets equal bit for bit. PYTHON_JSON is what `coverage json` wrote.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

FLOOR = 95.0  # percent of lines, for each group

GROUPS = {
    "quantization": [
        "csrc/quant/*.c",
        "csrc/cpu/quantize.inc",
        "csrc/tensor/ternary_weight.c",
        "csrc/tensor/quantized.c",
    ],
    "bitlinear and its straight-through gradients": [
        "csrc/ops/projection.c",
        "csrc/ops/linear_map.inc",
        "csrc/cpu/bitlinear.inc",
    ],
    "forward": [
        "csrc/ops/op.c",
        "csrc/ops/[!o]*.c",  # every op, not the optimizer
        "csrc/ops/*.inc",
        "csrc/cpu/*.inc",
        "bitnet/ops.py",
        "bitnet/nn.py",
        "bitnet/model.py",
    ],
}


def c_lines(trees: list[Path]) -> dict[str, dict[int, bool]]:
    """Of every C file: its lines with code, and whether each ran in any of the trees."""
    ran: dict[str, dict[int, bool]] = defaultdict(dict)
    pairs = [(tree, counts) for tree in trees for counts in sorted(tree.glob("build/**/*.gcda"))]
    for tree, counts in pairs:
        report = subprocess.run(
            ["gcov", "--json-format", "--stdout", str(counts)], cwd=tree, check=True, capture_output=True
        )
        for document in report.stdout.splitlines():
            data = json.loads(document)
            for file in data["files"]:
                path = Path(data["current_working_directory"], file["file"]).resolve()
                if not path.is_relative_to(tree):
                    continue
                lines = ran[str(path.relative_to(tree))]
                for line in file["lines"]:
                    number = line["line_number"]
                    lines[number] = lines.get(number, False) or line["count"] > 0
    return ran


def python_lines(report: Path) -> dict[str, dict[int, bool]]:
    files = json.loads(report.read_text())["files"]
    return {
        name: dict.fromkeys(file["missing_lines"], False) | dict.fromkeys(file["executed_lines"], True)
        for name, file in files.items()
    }


def spans(numbers: list[int]) -> str:
    """[3, 4, 5, 9] as "3-5 9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def main() -> int:
    report, trees = Path(sys.argv[1]), [Path(tree).resolve() for tree in sys.argv[2:]]
    ran = c_lines(trees) | python_lines(report)
    status = 0
    for group, patterns in GROUPS.items():
        names: list[str] = []
        for pattern in patterns:
            found = sorted(name for name in ran if Path(name).match(pattern))
            if not found:
                print(f"no coverage data for {pattern}")
                status = 1
            names += [name for name in found if name not in names]
        total = covered = 0
        print(f"\n{group}")
        for name in names:
            lines = ran[name]
            missed = [number for number, hit in lines.items() if not hit]
            total, covered = total + len(lines), covered + len(lines) - len(missed)
            percent = 100 * (1 - len(missed) / max(1, len(lines)))
            note = f"  not run: {spans(missed)}" if missed else ""
            print(f"  {percent:5.1f} %  {len(lines):5d} lines  {name}{note}")
        percent = 100 * covered / max(1, total)
        print(f"  {percent:5.1f} %  {total:5d} lines  all of {group}")
        if percent < FLOOR:
            print(f"  below {FLOOR} %")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

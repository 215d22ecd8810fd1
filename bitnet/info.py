"""Command line `bitnet info`: what a `.bitnet` file holds, measured, with every checksum verified."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.command import exit_status
from bitnet.config import WRITTEN_WHERE_SET
from bitnet.errors import BitnetError, CheckpointError
from bitnet.formats.bitnet_file import TERNARY, VERSION, BitnetFile, Section
from bitnet.nn import TernaryStats
from bitnet.pack import sizes

MEANING = """\
bits: bytes of the file times 8, by weights. entropy: bits that the shares of -1, 0 and 1 in this layer need, at most
log2(3) = 1.5850, if codes are independent; zeros: the share of 0. A weight is its code times the scale."""

ROW_SCALES = "\nHere each row has a scale of its own, which is counted in bits; what is shown is their mean."


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet info",
        description="What a .bitnet file holds: bits per weight of each layer, config, tokenizer, provenance. Reads "
        "everything and verifies every checksum.",
        epilog="example: bitnet info nano.bitnet --json info.json",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a .bitnet file, as bitnet pack writes it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a section is damaged, 2 for a file that cannot be opened, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    file = BitnetFile(args.file)
    found = inspect(file)
    print(report(file, found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for damage in found["damage"]:
        print(f"error: {damage}", file=sys.stderr)
    return 1 if found["damage"] else 0


def inspect(file: BitnetFile) -> dict[str, Any]:
    """Everything the command tells, by name: file, totals, sections, config, tokenizer, provenance, damage."""
    damage: list[str] = []
    sections = [_inspect_section(file, section, damage) for section in file.sections.values()]
    size = Path(file.path).stat().st_size
    return {
        "file": str(file.path),
        "version": VERSION,
        "bytes": size,
        "ternary": _total([entry for entry in sections if entry["form"] in TERNARY]),
        "other": _total([entry for entry in sections if entry["form"] not in (*TERNARY, "bytes")]),
        "config": file.config,
        "tokenizer": _inspect_tokenizer(file, damage),
        "provenance": file.provenance,
        "sections": sections,
        "damage": damage,
    }


def _inspect_section(file: BitnetFile, section: Section, damage: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": section.name,
        "form": section.form,
        "shape": list(section.shape),
        "bytes": section.bytes,
        "crc32": f"{section.crc32:08x}",
        "is_whole": True,
    }
    if section.form != "bytes":
        entry["weights"] = section.count
        entry["bits_per_weight"] = 8 * section.bytes / section.count
    try:
        file.verify(section)
        if section.form in TERNARY:
            counts = count_codes(np.asarray(file.fifths(section)), section.count)
            scale = float(file.scales(section).mean(dtype=np.float64))
            entry |= {"scale": scale, "entropy": counts.entropy, "zero_share": counts.zero_share}
            if section.scales is not None:
                entry["scales"] = section.scales
            entry["codes"] = [counts.minus, counts.zero, counts.plus]
    except CheckpointError as error:
        entry["is_whole"] = False
        damage.append(str(error))
    return entry


def count_codes(fifths: np.ndarray[Any, Any], count: int) -> TernaryStats:
    """How many of `count` codes, five a byte, are -1, 0 and +1 (flipped: 0)."""
    bytes_of = np.bincount(fifths, minlength=243)[:243]
    digits = np.arange(243)[:, None] // 3 ** np.arange(5) % 3
    minus, zero, plus = (int((bytes_of * (digits == d).sum(1)).sum()) for d in range(3))
    return TernaryStats(minus - (5 * fifths.size - count), zero, plus, 0)  # places beyond the last code are digit 0


def _total(entries: list[dict[str, Any]]) -> dict[str, Any]:
    weights, size = sum(entry["weights"] for entry in entries), sum(entry["bytes"] for entry in entries)
    total = {"weights": weights, "bytes": size, "bits_per_weight": 8 * size / weights if weights else None}
    counted = [entry for entry in entries if "codes" in entry]
    if counted:
        minus, zero, plus = (sum(entry["codes"][i] for entry in counted) for i in range(3))
        stats = TernaryStats(minus, zero, plus, 0)
        total |= {"entropy": stats.entropy, "zero_share": stats.zero_share}
    return total


def _inspect_tokenizer(file: BitnetFile, damage: list[str]) -> dict[str, Any] | None:
    from bitnet.formats.packing import open_tokenizer

    try:
        tokenizer = open_tokenizer(file)
    except BitnetError as error:
        if str(error) not in damage:
            damage.append(str(error))
        return None
    if tokenizer is None:
        return None
    found = {"kind": tokenizer.name, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint()}
    return found | {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}


# ---- for people -----------------------------------------------------------------------------------------------------


def report(file: BitnetFile, found: dict[str, Any]) -> str:
    """What inspect() found, as text."""
    heads = ("section", "form", "shape", "bits", "entropy", "zeros", "scale", "checksum")
    rows = [heads, *(_row(entry) for entry in found["sections"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    table = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    ternary, tokenizer = found["ternary"], found["tokenizer"]
    by_row = any("scales" in entry for entry in found["sections"])
    lines = [*table, "", MEANING + ROW_SCALES * by_row, "", sizes(file)]
    if "entropy" in ternary:
        lines.append(f"all ternary layers: entropy {ternary['entropy']:.4f} (log2(3) = {math.log2(3):.4f}), "
                     f"zeros {ternary['zero_share']:.3f}")  # fmt: skip
    shape = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    shape += [name for name in WRITTEN_WHERE_SET if name in found["config"]]
    lines.append("config: " + ", ".join(f"{name} {found['config'].get(name)}" for name in shape))
    kind = "none" if tokenizer is None else f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} ids"
    lines.append(f"tokenizer: {kind}")
    lines.append("provenance: " + (", ".join(f"{k} {_short(v)}" for k, v in found["provenance"].items()) or "none"))
    whole = sum(entry["is_whole"] for entry in found["sections"])
    lines.append(f"checksums: {whole} of {len(found['sections'])} sections are whole")
    if whole == len(found["sections"]):
        lines.append(f"next: bitnet generate {file.path} -p TEXT")
    else:
        lines.append("next: fetch or pack this file again; it cannot be loaded")
    return "\n".join(lines)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    bits = f"{entry['bits_per_weight']:.4f}" if "weights" in entry else ""
    shape = " x ".join(str(size) for size in entry["shape"])
    state = "ok" if entry["is_whole"] else "DAMAGED"
    codes = ("", "", "")
    if "codes" in entry:
        codes = (f"{entry['entropy']:.4f}", f"{entry['zero_share']:.3f}", f"{entry['scale']:.6g}")
    return (entry["name"], entry["form"], shape, bits, *codes, state)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:16]}..."


if __name__ == "__main__":
    raise SystemExit(main())

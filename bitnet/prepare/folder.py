"""The folder of a pack: what is in it, whether it is whole, and the manifest that makes it so."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from bitnet.data import ShardDataset
from bitnet.errors import BitnetError, DataError
from bitnet.prepare.unfinished import FOLDER
from bitnet.shard import INDEX_SUFFIX, MANIFEST, read_manifest, write_manifest
from bitnet.tokenizer import Tokenizer

SPLITS = ("train", "validation")


def finish(out: Path, key: str, source: dict[str, Any], tokenizer: Tokenizer, splits: dict[str, Any]) -> None:
    """Writes the tokenizer, and the manifest last of all. source: what the manifest says of the text."""
    about = {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint(),
        "files": tokenizer.save(out),
    }
    write_manifest(out, {"key": key, "source": source, "tokenizer": about, "splits": splits})


def key_of(*parts: object) -> str:
    """What a pack is known by: of the text and the options it was made with."""
    return hashlib.sha256(json.dumps(["bitnet pack 2", *parts]).encode()).hexdigest()


def pack_in(folder: Path) -> dict[str, Any]:
    """Manifest of the pack in a folder, {} where there is none yet. Raises DataError if something else is there."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: a pack is a folder")
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    # Shards and a tokenizer without a manifest are those of a pack that was killed, if it says that there was one.
    ours = {path.name for path in leftovers(folder)} | {FOLDER}
    if (folder / FOLDER).is_dir():
        ours |= {path.name for suffix in ("json", "model") for path in folder.glob(f"*.{suffix}")}
    strange = sorted(path.name for path in folder.glob("*") if path.name not in ours)
    if strange:
        raise DataError(f"{folder} is not a pack and not empty: it holds {strange[0]}")
    return {}


def leftovers(folder: Path) -> list[Path]:
    """Files that only the making of a pack leaves."""
    begun = (folder / FOLDER).is_dir()
    shards = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}(\.answers)?\.(bin|idx)") if begun else None
    return [
        path
        for path in folder.glob("*")
        if path.name.endswith(".partial") or (shards is not None and shards.fullmatch(path.name))
    ]


def sweep(folder: Path) -> None:
    """Takes them away."""
    for path in leftovers(folder):
        path.unlink()


def is_whole(folder: Path) -> bool:
    """Whether the splits of a pack and its tokenizer open."""
    try:
        for split in read_manifest(folder)["splits"]:
            ShardDataset(folder, split).tokenizer()
    except BitnetError:
        return False
    return True


def remove(folder: Path, manifest: dict[str, Any]) -> None:
    """Take away a pack: the manifest first, so that what is left never looks complete; then only files it listed."""
    (folder / MANIFEST).unlink()
    entries = [entry for split in manifest["splits"].values() for entry in split["files"]]
    entries += [entry["answers"] for entry in entries if "answers" in entry]
    shards = [Path(entry["file"]) for entry in entries]
    for name in [*manifest["tokenizer"]["files"], *shards, *(shard.with_suffix(INDEX_SUFFIX) for shard in shards)]:
        (folder / name).unlink(missing_ok=True)

"""What a pack that is being made goes on from after it was killed: a folder inside the pack, gone when it is whole.

plan.json     what the screening found, with the stamp of the text and options it belongs to
codes         Screening.codes
tokenizer/    the tokenizer once it is trained
shards.jsonl  a line for each finished shard, with the number of the first document after it
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitnet.corpus import Split, Survey
from bitnet.durable import sync
from bitnet.errors import BitnetError
from bitnet.prepare.screening import Screening
from bitnet.shard import Shard
from bitnet.tokenizer import Tokenizer, load_tokenizer

FOLDER = "unfinished"
PLAN, CODES, SHARDS, TOKENIZER = "plan.json", "codes", "shards.jsonl", "tokenizer"


class Unfinished:
    """The state of a pack in the making in folder `out`."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder = out / FOLDER

    def screening(self, stamp: str) -> Screening | None:
        """What an earlier attempt found, if it was made of the same text with the same options."""
        try:
            plan = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
            if plan.pop("stamp") != stamp:
                return None
            codes = (self.folder / CODES).read_bytes() or None
            survey, split = Survey(**plan.pop("survey")), Split(**plan.pop("split"))
            return Screening(survey, codes=codes, split=split, **plan)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def begin(self, stamp: str, screening: Screening) -> None:
        """Forgets any earlier attempt."""
        self.discard()
        self.folder.mkdir(parents=True)
        (self.folder / CODES).write_bytes(screening.codes or b"")
        fields = asdict(screening)
        del fields["codes"]
        partial = self.folder / (PLAN + ".partial")
        partial.write_text(json.dumps({"stamp": stamp, **fields}), encoding="utf-8")
        sync(self.folder / CODES)
        sync(partial)
        partial.replace(self.folder / PLAN)

    def tokenizer(self) -> Tokenizer | None:
        """The one an earlier attempt trained."""
        try:
            return load_tokenizer(self.folder / TOKENIZER)
        except BitnetError:
            return None

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        partial = self.folder / (TOKENIZER + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in tokenizer.save(partial):
            sync(partial / name)
        partial.rename(self.folder / TOKENIZER)

    def shards(self, split: str) -> list[dict[str, Any]]:
        """Finished shards of a split, in order, as far as they are there as they were left."""
        out: list[dict[str, Any]] = []
        for entry in self._entries():
            try:
                if (entry["split"], entry["number"]) != (split, len(out)):
                    continue
                shard = Shard.open(self._out / entry["file"])
                if (shard.sha256, shard.index_sha256) == (entry["sha256"], entry["index_sha256"]):
                    out.append(entry)
            except BitnetError:
                continue
        return out

    def _entries(self) -> list[dict[str, Any]]:
        """The lines of the journal; one that was cut short is cut off."""
        path = self.folder / SHARDS
        if not path.is_file():
            return []
        whole = path.read_bytes().rpartition(b"\n")[0]
        os.truncate(path, len(whole) + bool(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def keep_shard(self, entry: dict[str, Any]) -> None:
        with open(self.folder / SHARDS, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def discard(self) -> None:
        """Takes the folder away, and with it any claim to the shards it lists."""
        shutil.rmtree(self.folder, ignore_errors=True)

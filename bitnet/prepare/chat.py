"""Conversations to a pack: a shard of tokens a split, and beside it one of marks on the tokens that are learned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bitnet.chat_template import Message, choose
from bitnet.conversations import encode_conversation, opening, read_conversations
from bitnet.corpus import Split, Survey
from bitnet.data import ShardDataset
from bitnet.errors import BitnetError, DataError
from bitnet.prepare.folder import SPLITS, finish, is_whole, key_of, pack_in, remove, sweep
from bitnet.prepare.pipeline import Log
from bitnet.prepare.unfinished import Unfinished
from bitnet.shard import SUFFIX, ShardWriter, read_manifest
from bitnet.tokenizer import Tokenizer


def pack_chat(
    paths: Iterable[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    template: str = "auto",
    *,
    val_fraction: float | None = None,
    log: Log = print,
) -> Path:
    """Conversations of `.jsonl` files (bitnet/conversations.py) into a pack whose answers are marked; returns `out`.

    template: a name of bitnet.chat_template. val_fraction: share held out for validation, by what stands before the
    first answer (0.01, or 0.1 of less than 1000). A pack already there is kept if it was made from the same
    conversations and options, replaced if not; a folder that holds other files is refused. Raises DataError,
    ConfigError.
    """
    out, paths = Path(out), list(paths)
    written = choose(template, tokenizer)
    survey = Survey.of(json.dumps(messages) for messages in read_conversations(paths))
    name = ", ".join(Path(path).name for path in paths)
    log(f"text: {name}: {survey.documents:,} conversations; template: {written.name}")
    if val_fraction is None:
        val_fraction = 0.01 if survey.documents >= 1000 else 0.1
    split = replace(Split.choose(survey, val_fraction), by_position=False)
    about = (survey.sha256, split.fraction, written.name, tokenizer.chat_template, tokenizer.fingerprint())
    key, old = key_of("chat", *about), pack_in(out)
    if old.get("key") == key and is_whole(out):
        log(f"{out} already holds this pack: nothing to do")
    else:
        if old:
            log(f"{out} holds a pack of other text or options: replacing it")
            remove(out, old)
        unfinished = Unfinished(out)
        unfinished.discard()
        unfinished.folder.mkdir(parents=True)  # while it is there, shards without a manifest are known as leftovers
        sweep(out)
        try:
            with _Marked(out, SPLITS[0], tokenizer) as train, _Marked(out, SPLITS[1], tokenizer) as validation:
                for messages in read_conversations(paths):
                    side = validation if split.holds_out(opening(messages)) else train
                    side.append(*encode_conversation(tokenizer, written, messages), messages)
            if not train.tokens.tokens:
                raise DataError("no conversation was left for training: hold out less for validation")
        except BitnetError:
            sweep(out)
            unfinished.discard()
            raise
        splits = {side.split: side.describe() for side in (train, validation) if side.tokens.tokens}
        source = {"name": name, **asdict(survey), "validation": str(split), "template": written.name}
        finish(out, key, source, tokenizer, splits)
        unfinished.discard()
    for part in read_manifest(out)["splits"]:
        dataset = ShardDataset(out, part)
        learned = sum(int(marks.read(0, len(marks)).sum()) for marks in dataset.marks)
        log(f"{part}: {dataset.documents:,} conversations, {len(dataset):,} tokens, {learned:,} of them in answers")
    return out


class _Marked:
    """One split: a shard of tokens, and one of marks beside it."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer) -> None:
        self.split, self._bytes, fingerprint = split, 0, tokenizer.fingerprint()
        self.tokens = ShardWriter(folder / f"{split}-00000{SUFFIX}", tokenizer.vocab_size, fingerprint)
        self.marks = ShardWriter(folder / f"{split}-00000.answers{SUFFIX}", 2, fingerprint)

    def append(self, tokens: Sequence[int], marks: Sequence[int], messages: Sequence[Message]) -> None:
        """One conversation."""
        self.tokens.append(tokens)
        self.marks.append(marks)
        self._bytes += sum(len(message.content.encode()) for message in messages)

    def describe(self) -> dict[str, Any]:
        """The split as the manifest lists it."""
        counts = {"tokens": self.tokens.tokens, "documents": self.tokens.documents}
        entry = {**_listed(self.tokens), **counts, "answers": _listed(self.marks)}
        return {**counts, "text_bytes": self._bytes, "files": [entry]}

    def __enter__(self) -> _Marked:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for writer in (self.tokens, self.marks):
            if kind is None and writer.tokens:
                writer.close()
            else:
                writer.discard()


def _listed(writer: ShardWriter) -> dict[str, str]:
    return {"file": writer.path.name, "sha256": writer.sha256, "index_sha256": writer.index_sha256}

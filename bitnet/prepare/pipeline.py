"""From text to a pack: screen the corpus, choose the split, train the tokenizer, write the shards, then the manifest.

The same text and options give the same bytes in every file, with any number of workers, killed and begun again or not:
nothing of time, place or machine is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet.corpus import Corpus, Counter, Split, Survey, stdlib, stdlib_name
from bitnet.data import ShardDataset
from bitnet.errors import BitnetError, ConfigError, DataError
from bitnet.prepare.folder import SPLITS, finish, is_whole, key_of, pack_in, remove, sweep
from bitnet.prepare.progress import Progress, reading
from bitnet.prepare.screening import Guard, Preparation, Screening, screen
from bitnet.prepare.shards import Series
from bitnet.prepare.unfinished import Unfinished
from bitnet.prepare.workers import batches, ordered_map
from bitnet.shard import MAX_TOKENS, read_manifest
from bitnet.tokenizer import SPECS, Tokenizer, build_tokenizer

Source = str | Path | Iterable[str | Path]
Log = Callable[[str], None]

SHARD_TOKENS = 1 << 27  # 256 MB of 16-bit tokens
SAMPLE_BYTES = 32 << 20  # text the tokenizer is trained on: five seconds for BPE, and more text changes few pieces


def pack(
    source: Source,
    out: str | Path,
    tokenizer: str | Tokenizer = "sentencepiece",
    vocab_size: int = 4096,
    *,
    seq_len: int = 256,
    val_fraction: float | None = None,
    separator: str | None = None,
    text_field: str = "text",
    max_bytes: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    shards: int = 1,
    preparation: Preparation | None = None,
    workers: int = 1,
    guard: Guard | None = None,
    sha256: str | None = None,
    log: Log = print,
) -> Path:
    """Tokenize text into shards in folder `out`, for ShardDataset; returns the folder.

    source: "stdlib", or one or more paths (see Corpus). tokenizer: one, or see build_tokenizer. seq_len: the
    training split must hold one window of it. val_fraction: see Split.choose; 0 makes no validation split. separator,
    text_field, max_bytes: see Corpus. shards: equal parts the corpus is cut into, each with training shards of its own,
    more where one would exceed shard_tokens. preparation: which documents to leave out. workers: processes; no byte
    depends on them. guard: what other parts of a mixture hold out (see HeldOut). sha256: what
    that of the text (see Survey) has to be.

    A pack already there is kept if it was made from the same text and options, replaced if not; one that was killed
    in the making goes on with its first unfinished shard; a folder that holds other files is refused. Raises DataError,
    ConfigError.
    """
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise ConfigError(f"shard_tokens must be 1 to {MAX_TOKENS}, not {shard_tokens}")
    if shards < 1:
        raise ConfigError(f"shards must be at least 1, not {shards}")
    out = Path(out)
    prepare = preparation or Preparation()
    corpus, name = open_corpus(source, separator, max_bytes, text_field, prepare.filters.fields)
    old = pack_in(out)
    # A trained tokenizer follows from the text and these words; one that is loaded is known by its own fingerprint.
    spec = tokenizer if isinstance(tokenizer, str) else tokenizer.name
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else None
    if loaded is None and spec not in SPECS:
        loaded = build_tokenizer(spec, [], 0)
    made_by: list[Any] = [spec, vocab_size] if loaded is None else [loaded.fingerprint()]
    apart = [] if guard is None else [guard.key]
    options = [val_fraction, shard_tokens, shards, made_by, prepare.settings(), *apart]
    unfinished = Unfinished(out)
    stamp = key_of(corpus.stamp(), options)
    found = unfinished.screening(stamp)
    if found is None:
        with reading("reading", corpus) as went_by:
            found = screen(corpus, prepare, val_fraction, workers, went_by, guard)
    else:
        log(f"{out} holds an unfinished pack: going on with it")
    survey = Survey(found.kept_documents, found.kept_bytes, found.survey.sha256)
    log(f"text: {name}: {found.survey.documents:,} documents, {found.survey.bytes / 1e6:.2f} MB" + _skips(corpus))
    if sha256 not in (None, found.survey.sha256):
        raise DataError(f"the text of {name} has the sha256 {found.survey.sha256}, not {sha256} as the recipe says")
    if found.dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.dropped.items())
        log(f"left out: {reasons}; kept {survey.documents:,} documents, {survey.bytes / 1e6:.2f} MB")
    split = found.split
    log(f"held out for validation: {split}")
    about = [split.fraction, split.by_position, shard_tokens, shards, made_by, prepare.settings(), *apart]
    key = key_of(survey.sha256, *about)
    if old.get("key") == key and is_whole(out):
        log(f"{out} already holds this pack: nothing to do")
    else:
        if unfinished.screening(stamp) is None:
            unfinished.begin(stamp, found)
        if old:
            log(f"{out} holds a pack of other text or options: replacing it")
            remove(out, old)
        if not any(unfinished.shards(name) for name in SPLITS):
            sweep(out)
        try:
            chosen = loaded or unfinished.tokenizer()
            if chosen is None:
                chosen = _train(spec, corpus, found, split, vocab_size, log)
                unfinished.keep_tokenizer(chosen)
            splits = _write(out, corpus, found, split, chosen, (shard_tokens, shards), workers, unfinished, log)
        except BitnetError:
            sweep(out)
            unfinished.discard()  # going on would meet the same text again
            raise
        text = {"name": name, **asdict(survey), "validation": str(split), "files": found.sources}
        if not prepare.keeps_everything:
            text |= {"read": found.survey.documents, "filters": prepare.settings(), "left_out": found.dropped}
        finish(out, key, text, chosen, splits)
    unfinished.discard()
    _report(out, seq_len, log)
    return out


def open_corpus(
    source: Source,
    separator: str | None = None,
    max_bytes: int | None = None,
    text_field: str = "text",
    fields: Iterable[str] = (),
) -> tuple[Corpus, str]:
    """The corpus of a recipe or of paths, and what a manifest calls it."""
    if source == "stdlib":
        return stdlib(max_bytes), stdlib_name()
    paths = [source] if isinstance(source, (str, Path)) else list(source)
    names = [str(path) if str(path).startswith("hub:") else Path(path).name for path in paths]
    return Corpus(paths, separator, max_bytes, text_field=text_field, fields=fields), ", ".join(names)


def _report(out: Path, seq_len: int, log: Log) -> None:
    for part in read_manifest(out)["splits"]:
        dataset = ShardDataset(out, part)
        files = len(dataset.shards)
        log(f"{part}: {len(dataset):,} tokens, {dataset.bytes_per_token:.2f} bytes each, in {files} shard(s)")
        if len(dataset) <= seq_len:
            message = f"the {part} split has {len(dataset)} tokens, too few for a window of {seq_len}"
            if part == SPLITS[0]:
                raise DataError(message)
            log(f"note: {message}")


def _skips(corpus: Corpus) -> str:
    if not corpus.skipped:
        return ""
    return f" ({len(corpus.skipped)} files skipped that are not UTF-8 text, the first {min(corpus.skipped)})"


def _train(spec: str, corpus: Corpus, found: Screening, split: Split, vocab_size: int, log: Log) -> Tokenizer:
    """Trained on the training side only, except an alphabet, which has to cover the validation side too."""
    start = time.perf_counter()
    kept = (text for _, text in found.kept(corpus))
    texts = kept if spec == "chars" else (text for text in (split.parts(whole)[0] for whole in kept) if text)
    tokenizer = build_tokenizer(spec, texts, vocab_size, every=max(1, -(-found.kept_bytes // SAMPLE_BYTES)))
    seconds = time.perf_counter() - start
    log(f"tokenizer: {spec}, {tokenizer.vocab_size} ids, {seconds:.1f} s")
    if spec.startswith("sentencepiece") and tokenizer.vocab_size < vocab_size:
        log(f"note: this text supports {tokenizer.vocab_size} ids, fewer than the {vocab_size} asked for")
    return tokenizer


Part = tuple[int, int, int, str]  # number of the document, which of SPLITS, which part of the corpus, and its text
Encoded = tuple[int, int, int, int, npt.NDArray[np.integer[Any]]]  # the same with the text's bytes and its tokens


class _Encoder:
    """Tokens of a batch of documents, in any process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, batch: list[Part]) -> list[Encoded]:
        encode = self._tokenizer.encode_document
        return [
            (number, side, place, len(text.encode()), np.array(encode(text), np.int32))
            for number, side, place, text in batch
        ]


def _write(
    out: Path,
    corpus: Corpus,
    found: Screening,
    split: Split,
    tokenizer: Tokenizer,
    limits: tuple[int, int],
    workers: int,
    unfinished: Unfinished,
    log: Log,
) -> dict[str, Any]:
    """The splits as the manifest lists them. limits: pack's shard_tokens and shards."""
    check = Counter()
    shard_tokens, shards = limits
    with Progress("packing", found.kept_bytes) as bar, ExitStack() as stack:
        shape = (tokenizer.vocab_size, tokenizer.fingerprint(), shard_tokens)
        series = []
        for name in SPLITS:
            done = unfinished.shards(name)
            if done:
                log(f"{name}: {len(done)} finished shard(s) kept")
            series.append(stack.enter_context(Series(out, name, *shape, done, unfinished.keep_shard)))

        def parts() -> Iterator[tuple[Part, int]]:
            before = 0  # bytes kept
            for number, text in enumerate(corpus):
                size = check.add(text)
                if not found.keeps(number):
                    continue
                place = before * shards // found.kept_bytes
                before += size
                for side, part in enumerate(split.parts(text)):
                    if part and number >= series[side].next_document:
                        yield (number, side, 0 if side else place, part), len(part)
                    elif part:
                        bar.skip(len(part.encode()))

        for batch in ordered_map(_Encoder(tokenizer), batches(parts()), workers):
            for number, side, place, size, tokens in batch:
                series[side].append(number, tokens, size, place)
                bar.add(size, len(tokens))
        if check.survey() != found.survey:
            raise DataError("the text changed while it was packed: pack it again")
    train, validation = series
    log(f"packed {bar.tokens:,} tokens in {bar.seconds:.1f} s: {bar.bytes / 1e6 / bar.seconds:.1f} MB/s, "
        f"{bar.tokens / bar.seconds:,.0f} tokens/s")  # fmt: skip
    if train.tokens == 0:
        raise DataError("no text was left for training: hold out less for validation")
    if validation.tokens == 0 and split.fraction > 0:
        log("note: no text fell to validation")
    return {one.split: one.describe() for one in series if one.tokens}

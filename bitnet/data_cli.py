"""From text to a pack: read the corpus, choose the split, train the tokenizer, write the shards, then the manifest.

The same text and options give the same bytes in every file: nothing of time, place or machine is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitnet.corpus import RECIPES, Corpus, Split, Survey, stdlib, stdlib_name
from bitnet.data import ShardDataset
from bitnet.errors import BitnetError, ConfigError, DataError
from bitnet.shard import MANIFEST, ShardWriter, read_manifest, write_manifest
from bitnet.tokenizer import SPECS, Tokenizer, build_tokenizer

Source = str | Path | Iterable[str | Path]

SPLITS = ("train", "validation")
SHARD_TOKENS = 1 << 27  # 256 MB of 16-bit tokens
SAMPLE_BYTES = 32 << 20  # text the tokenizer is trained on: five seconds for BPE, and more text changes few pieces


def pack(
    source: Source,
    out: str | Path,
    tokenizer: str = "sentencepiece",
    vocab_size: int = 4096,
    *,
    seq_len: int = 256,
    val_fraction: float | None = None,
    separator: str | None = None,
    max_bytes: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    log: Callable[[str], None] = print,
) -> Path:
    """Tokenize a recipe or paths into shards in folder `out`, for ShardDataset; returns the folder.

    source: "stdlib", or one or more paths (see Corpus). tokenizer: see build_tokenizer. seq_len: the training split
    must hold one window of it. val_fraction: see Split.choose; 0 makes no validation split. separator, max_bytes: see
    Corpus. A pack already there is kept if it was made from the same text and options, replaced if not; a folder that
    holds other files is refused. Raises DataError, ConfigError.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be at least 1, not {shard_tokens}")
    out = Path(out)
    corpus, name = _open(source, separator, max_bytes)
    survey = Survey.of(corpus)
    log(f"text: {name}: {survey.documents:,} documents, {survey.bytes / 1e6:.2f} MB" + _skips(corpus))
    split = Split.choose(survey, val_fraction)
    log(f"held out for validation: {split}")
    # A trained tokenizer follows from the text and these words; one that is loaded is known by its own fingerprint.
    loaded = None if tokenizer in SPECS else build_tokenizer(tokenizer, [], 0)
    made_by: list[Any] = [tokenizer, vocab_size] if loaded is None else [loaded.fingerprint()]
    key = _key(survey.sha256, split.fraction, split.by_position, shard_tokens, made_by)
    old = _pack_in(out)
    if old.get("key") == key and _is_whole(out):
        log(f"{out} already holds this pack: nothing to do")
    else:
        chosen = loaded or _train(tokenizer, corpus, survey, split, vocab_size, log)
        if old:
            log(f"{out} holds a pack of other text or options: replacing it")
            _remove(out, old)
        splits = _write(out, corpus, survey, split, chosen, shard_tokens, log)
        text = {"name": name, **asdict(survey), "validation": str(split)}
        about = {
            "name": chosen.name,
            "vocab_size": chosen.vocab_size,
            "fingerprint": chosen.fingerprint(),
            "files": chosen.save(out),
        }
        write_manifest(out, {"key": key, "source": text, "tokenizer": about, "splits": splits})
    for part in read_manifest(out)["splits"]:
        dataset = ShardDataset(out, part)
        files = len(dataset.shards)
        log(f"{part}: {len(dataset):,} tokens, {dataset.bytes_per_token:.2f} bytes each, in {files} file(s)")
        if len(dataset) <= seq_len:
            message = f"the {part} split has {len(dataset)} tokens, too few for a window of {seq_len}"
            if part == SPLITS[0]:
                raise DataError(message)
            log(f"note: {message}")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bitnet data", description="Turn text into packed tokens for training.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", nargs="+", metavar="PATH", help="text, .jsonl or .jsonl.gz files, or folders of them")
    source.add_argument("--recipe", choices=RECIPES, help="text already on this machine; see datasets/README.md")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tokenizer", default="sentencepiece", metavar="SPEC", help=f"{', '.join(SPECS)}, or a .model or .json file"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="for sentencepiece (default 4096)")
    parser.add_argument("--seq", type=int, default=256, metavar="T", help="window the data must hold (default 256)")
    parser.add_argument("--val-fraction", type=float, metavar="X", help="held out (default 0.01, one document: 0.1)")
    parser.add_argument("--separator", metavar="TEXT", help="what stands between documents in text files")
    parser.add_argument("--max-mb", type=float, metavar="MB", help="stop after this much text")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="most tokens in a file")
    parser.add_argument("--verify", action="store_true", help="read the pack again and check every byte")
    args = parser.parse_args(argv)
    try:
        out = pack(
            args.recipe or args.data,
            args.out,
            args.tokenizer,
            args.vocab_size,
            seq_len=args.seq,
            val_fraction=args.val_fraction,
            separator=args.separator,
            max_bytes=None if args.max_mb is None else int(args.max_mb * 1e6),
            shard_tokens=args.shard_tokens,
        )
        if args.verify:
            for part in read_manifest(out)["splits"]:
                ShardDataset(out, part).verify()
            print("verified: every checksum and every id")
    except BitnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"next: bitnet train --data {out}")
    return 0


def _open(source: Source, separator: str | None, max_bytes: int | None) -> tuple[Corpus, str]:
    if source == "stdlib":
        return stdlib(max_bytes), stdlib_name()
    paths = [source] if isinstance(source, (str, Path)) else list(source)
    return Corpus(paths, separator, max_bytes), ", ".join(Path(path).name for path in paths)


def _skips(corpus: Corpus) -> str:
    if not corpus.skipped:
        return ""
    return f" ({len(corpus.skipped)} files skipped that are not UTF-8 text, the first {min(corpus.skipped)})"


def _train(
    spec: str, corpus: Corpus, survey: Survey, split: Split, vocab_size: int, log: Callable[[str], None]
) -> Tokenizer:
    """Trained on the training side only, except an alphabet, which has to cover the validation side too."""
    start = time.perf_counter()
    texts = corpus if spec == "chars" else (text for text in (split.parts(whole)[0] for whole in corpus) if text)
    tokenizer = build_tokenizer(spec, texts, vocab_size, every=max(1, -(-survey.bytes // SAMPLE_BYTES)))
    seconds = time.perf_counter() - start
    log(f"tokenizer: {spec}, {tokenizer.vocab_size} ids, {seconds:.1f} s")
    if spec.startswith("sentencepiece") and tokenizer.vocab_size < vocab_size:
        log(f"note: this text supports {tokenizer.vocab_size} ids, fewer than the {vocab_size} asked for")
    return tokenizer


def _write(
    out: Path,
    corpus: Corpus,
    survey: Survey,
    split: Split,
    tokenizer: Tokenizer,
    shard_tokens: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (
        tqdm(total=survey.bytes, unit="B", unit_scale=True, desc="packing", disable=None, leave=False) as bar,
        _Series(out, SPLITS[0], tokenizer, shard_tokens) as train,
        _Series(out, SPLITS[1], tokenizer, shard_tokens) as validation,
    ):
        for text in corpus:
            for series, part in zip((train, validation), split.parts(text), strict=True):
                if part:
                    bar.update(series.append(part))
            bar.set_postfix_str(f"{train.tokens + validation.tokens:,} tokens", refresh=False)
    seconds = max(time.perf_counter() - start, 1e-9)
    tokens = train.tokens + validation.tokens
    speed = f"{survey.bytes / 1e6 / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s"
    log(f"packed {tokens:,} tokens in {seconds:.1f} s: {speed}")
    if train.tokens == 0:
        raise DataError("no text was left for training: hold out less for validation")
    if validation.tokens == 0 and split.fraction > 0:
        log("note: no text fell to validation")
    return {series.split: series.describe() for series in (train, validation) if series.tokens}


class _Series:
    """The shards of one split: a new one is begun when the current one has no room for the next document."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.split = split
        self.tokens = 0
        self._folder, self._tokenizer, self._limit = folder, tokenizer, shard_tokens
        self._fingerprint = tokenizer.fingerprint()
        self._bytes = 0
        self._writers: list[ShardWriter] = []

    def append(self, text: str) -> int:
        """Encode and write one document; returns its length in bytes."""
        tokens = self._tokenizer.encode_document(text)
        size = len(text.encode())
        if not self._writers or self._writers[-1].tokens + len(tokens) > self._limit:
            if self._writers:
                self._writers[-1].close()
            path = self._folder / f"{self.split}-{len(self._writers):05d}.shard"
            self._writers.append(ShardWriter(path, self._tokenizer.vocab_size, self._fingerprint))
        self._writers[-1].append(tokens)
        self.tokens += len(tokens)
        self._bytes += size
        return size

    def describe(self) -> dict[str, Any]:
        files = [
            {"file": shard.path.name, "tokens": shard.tokens, "documents": shard.documents, "sha256": shard.sha256}
            for shard in self._writers
        ]
        documents = sum(writer.documents for writer in self._writers)
        return {"tokens": self.tokens, "documents": documents, "text_bytes": self._bytes, "files": files}

    def __enter__(self) -> _Series:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writers:
            self._writers[-1].__exit__(kind, None, None)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(["bitnet pack 1", *parts]).encode()).hexdigest()


def _pack_in(folder: Path) -> dict[str, Any]:
    """Manifest of the pack in a folder, {} where there is none yet. Raises DataError if something else is there."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    left = [path.name for path in _entries(folder) if not path.name.endswith((".partial", ".shard"))]
    if left:
        raise DataError(f"{folder} is not a pack and not empty: it holds {left[0]}")
    return {}


def _entries(folder: Path) -> Iterator[Path]:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: a pack is a folder")
    return iter(sorted(folder.iterdir()) if folder.is_dir() else [])


def _is_whole(folder: Path) -> bool:
    """Whether the splits of a pack and its tokenizer open."""
    try:
        for split in read_manifest(folder)["splits"]:
            ShardDataset(folder, split).tokenizer()
    except BitnetError:
        return False
    return True


def _remove(folder: Path, manifest: dict[str, Any]) -> None:
    """Take away a pack: the manifest first, so that what is left never looks complete; then only files it listed."""
    (folder / MANIFEST).unlink()
    shards = [entry["file"] for split in manifest["splits"].values() for entry in split["files"]]
    for name in [*manifest["tokenizer"]["files"], *shards]:
        (folder / name).unlink(missing_ok=True)

"""Perplexity as papers report it: how their text is joined, cut and scored, so that a number can stand beside theirs.

wikitext2, c4: as in GPTQ (Frantar et al. 2022, arXiv 2210.17323) and most papers on quantization since. One long text
behind one bos is cut into windows of seq_len tokens without overlap; what is left at its end is dropped; each window is
a sequence of its own, whose first token is given and whose others are predicted. WikiText-2 is the test split, its
lines joined by blank lines; C4 is the first 256 windows of the first 1100 validation documents, joined by spaces.

paper-wikitext2, paper-c4: the evaluation published with 1bitLLM's reproductions of BitNet b1.58, which their model
cards say is the authors'. A piece is a line of WikiText-2's test split or a document of C4's first validation file;
each is encoded by itself and ended by eos. Pieces are laid behind a bos until the next would exceed seq_len tokens,
which begins a new window; longer pieces are left out. The paper's perplexity is the mean of both texts'.

A loss is the mean over all predicted tokens, a perplexity e to that.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.errors import ConfigError, DataError
from bitnet.evaluation import BATCH_TOKENS, IGNORE, Tokens, measures, total_nats
from bitnet.model import BitNetForCausalLM
from bitnet.text_stream import tokenizer_of
from bitnet.tokenizer import Tokenizer

SEQ_LEN = 2048  # of the published numbers
C4_DOCUMENTS, C4_WINDOWS = 1100, 256


@dataclass(frozen=True)
class Windows:
    """Sequences to be scored. size: bytes of text that the predicted tokens stand for; pieces: how many there were."""

    tokens: list[list[int]]
    size: int
    pieces: int


@dataclass(frozen=True)
class Protocol:
    """hub: arguments of datasets.load_dataset for the published text; is_lines: a piece of it is a line."""

    name: str
    is_lines: bool
    hub: dict[str, Any]
    cut: Callable[[Tokenizer, Iterable[str], int], Windows]


def _in_order(tokenizer: Tokenizer, text: str, count: int, seq_len: int, most: int | None = None) -> Windows:
    """One text, cut into windows; the rest is dropped."""
    ids = tokenizer.encode(text)
    length = len(ids)
    ids = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
    windows = [ids[at : at + seq_len] for at in range(0, len(ids) - seq_len + 1, seq_len)][:most]
    # Bytes as many as the text has, on average, for so many tokens.
    predicted = len(windows) * (seq_len - 1)
    return Windows(windows, round(len(text.encode()) * predicted / max(length, 1)), count)


def _wikitext2(tokenizer: Tokenizer, pieces: Iterable[str], seq_len: int) -> Windows:
    lines = list(pieces)
    return _in_order(tokenizer, "\n\n".join(lines), len(lines), seq_len)


def _c4(tokenizer: Tokenizer, pieces: Iterable[str], seq_len: int) -> Windows:
    documents = list(islice(pieces, C4_DOCUMENTS))
    return _in_order(tokenizer, " ".join(documents), len(documents), seq_len, C4_WINDOWS)


def _side_by_side(tokenizer: Tokenizer, pieces: Iterable[str], seq_len: int) -> Windows:
    """Whole pieces, as many in a window as fit behind bos; a piece that fits only without it is there all the same."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    windows, window, size, pending, count = [], list(bos), 0, 0, 0
    for piece in pieces:
        ids = tokenizer.encode(piece) + eos
        if piece == "" or len(ids) > seq_len:
            continue
        count += 1
        if len(window) + len(ids) > seq_len:
            windows.append(window)
            size += pending
            window, pending = list(bos), 0
        window += ids
        pending += len(piece.encode()) + len(eos)  # eos stands for the end of a line
    if 1 < len(window) <= seq_len:
        windows.append(window)
        size += pending
    return Windows([window for window in windows if len(window) > 1], size, count)


def _lines_side_by_side(tokenizer: Tokenizer, lines: Iterable[str], seq_len: int) -> Windows:
    return _side_by_side(tokenizer, (line.removesuffix("\n") for line in lines), seq_len)


WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}
C4 = {
    "path": "allenai/c4",
    "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    "split": "validation",
}
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("wikitext2", True, WIKITEXT2, _wikitext2),
        Protocol("c4", False, C4, _c4),
        Protocol("paper-wikitext2", True, WIKITEXT2, _lines_side_by_side),
        Protocol("paper-c4", False, C4, _side_by_side),
    )
}


def perplexity(
    model: BitNetForCausalLM,
    name: str,
    paths: Sequence[Path] | None = None,
    tokenizer: Tokenizer | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[range], Iterable[int]] | None = None,
) -> dict[str, Any]:
    """Scores a model by a protocol, on files (see pieces) or on the published text, fetched by `datasets`.

    seq_len: by default 2048, as published, or all the model's positions where it has fewer. Returns what evaluate
    does, and `protocol`; documents are lines or documents. Raises ConfigError, DataError.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {name!r}")
    protocol, limit = PROTOCOLS[name], model.config.max_position_embeddings
    seq_len = min(SEQ_LEN, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise ConfigError(f"seq_len must be 2 to the model's {limit} positions, not {seq_len}")
    tokenizer = tokenizer_of(model, tokenizer)
    texts = hub_pieces(protocol) if paths is None else (text for path in paths for text in pieces(path, protocol))
    windows = protocol.cut(tokenizer, texts, seq_len)
    if not windows.tokens:
        raise DataError(f"the text of {windows.pieces} pieces does not fill one window of {seq_len} tokens")
    inputs, targets = padded(windows.tokens)
    rows = batch_size or max(1, BATCH_TOKENS // seq_len)
    total = total_nats(model, inputs, targets, rows, progress)
    counts = {"documents": windows.pieces, "windows": len(windows.tokens), "seq_len": seq_len, "protocol": name}
    return measures(total, int((targets != IGNORE).sum()), windows.size) | counts


def padded(windows: Sequence[Sequence[int]]) -> tuple[Tokens, Tokens]:
    """(inputs, targets), both (windows, longest - 1): all but the last token, and all but the first."""
    longest = max(map(len, windows)) - 1
    inputs = np.zeros((len(windows), longest), np.int32)
    targets = np.full((len(windows), longest), IGNORE, np.int32)
    for row, window in enumerate(windows):
        inputs[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
    return inputs, targets


def pieces(path: Path, protocol: Protocol) -> Iterator[str]:
    """Pieces of a local copy, as the hub gives them: of a .json or .jsonl file (.gz too) each line's "text".

    Any other file is one text: its lines with their ends, blank ones empty, or itself. Raises DataError.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable text: {error}") from None
    if path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _text_of(line, f"{path}:{number}")
    elif protocol.is_lines:
        for line in text.removesuffix("\n").split("\n"):
            yield f"{line}\n" if line.strip() else ""
    else:
        yield text


def hub_pieces(protocol: Protocol) -> Iterable[str]:
    """The published text. ConfigError without the package `datasets`, DataError where the hub does not give it."""
    try:
        from datasets import load_dataset  # type: ignore[attr-defined]  # mypy finds this project's folder of recipes
    except ImportError:
        raise ConfigError(
            f"the text of {protocol.name} is fetched by the package datasets (pip install 'bitnet[eval]'); "
            "a local copy needs no package: --data FILE"
        ) from None
    try:
        texts: Iterable[str] = load_dataset(**protocol.hub)["text"]
    except Exception as error:  # whatever the network or the hub raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the text of {protocol.name} ({protocol.hub['path']}) cannot be had from the hub: {reason}; "
            "a local copy is read with --data FILE"
        ) from None
    return texts


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where} is not a JSON object with a text") from None
    if not isinstance(text, str):
        raise DataError(f"{where} has a text that is {type(text).__name__}, not a string")
    return text

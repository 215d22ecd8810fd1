"""How well a model predicts a text: loss in nats per token, perplexity, bits per byte of UTF-8.

The documents, each with the bos and eos its tokenizer gives it, are laid end to end and cut into windows of seq_len
that do not overlap. Every token but the very first is predicted once, from what precedes it in its window. Loss and
perplexity depend on the tokenizer; bits per byte compare models that have different ones. bitnet.protocols cuts texts
as papers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet import ops
from bitnet.corpus import Corpus
from bitnet.errors import BitnetError, ConfigError, DataError
from bitnet.model import BitNetForCausalLM
from bitnet.text_stream import tokenizer_of
from bitnet.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]

IGNORE = -100  # the target that ops.cross_entropy leaves out
BATCH_TOKENS = 4096  # a batch by default: rows enough for the matrix kernels, activations of some MB a layer


def evaluate(
    model: BitNetForCausalLM,
    tokenizer: Tokenizer,
    documents: Iterable[str | Path],
    seq_len: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[range], Iterable[int]] | None = None,
) -> dict[str, Any]:
    """Score texts; a Path stands for the documents of that file or folder (see corpus.Corpus).

    seq_len: by default the length the model was trained on, if it says so, else max_position_embeddings. progress:
    wraps the range of batches, as tqdm does. Returns loss, perplexity, bits_per_byte (the unscored first token counts
    among the bytes), tokens scored, bytes, documents, windows, seq_len. Raises ConfigError, DataError.
    """
    limit = model.config.max_position_embeddings
    if seq_len is None:
        seq_len = min(limit, getattr(model, "trained_seq_len", None) or limit)
    if not 1 <= seq_len <= limit:
        raise ConfigError(f"seq_len must be 1 to the model's {limit} positions, not {seq_len}")
    tokenizer = tokenizer_of(model, tokenizer)
    ids, count, size = _read(tokenizer, documents)
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens: there is nothing to predict")
    windows = -(-(len(ids) - 1) // seq_len)
    inputs, targets = np.zeros((windows, seq_len), np.int32), np.full((windows, seq_len), IGNORE, np.int32)
    inputs.flat[: len(ids) - 1], targets.flat[: len(ids) - 1] = ids[:-1], ids[1:]
    rows = batch_size or max(1, BATCH_TOKENS // seq_len)
    total = total_nats(model, inputs, targets, rows, progress)
    return measures(total, len(ids) - 1, size) | {"documents": count, "windows": windows, "seq_len": seq_len}


def total_nats(
    model: BitNetForCausalLM,
    inputs: Tokens,
    targets: Tokens,
    rows: int,
    progress: Callable[[range], Iterable[int]] | None = None,
) -> float:
    """Sum of -log p over the targets, (windows, seq_len) as the inputs, that are not IGNORE; `rows` windows a pass.

    Raises BitnetError if it is not finite.
    """
    batches = range(0, len(inputs), rows)
    nats = []
    with ops.no_grad():
        for first in batches if progress is None else progress(batches):
            mean = model(inputs[first : first + rows], targets[first : first + rows]).item()
            nats.append(mean * int((targets[first : first + rows] != IGNORE).sum()))
    total = math.fsum(nats)
    if not math.isfinite(total):
        raise BitnetError("the model's loss is not finite: its weights may be damaged or have diverged")
    return total


def measures(total: float, tokens: int, size: int) -> dict[str, Any]:
    """What is said about so many nats, over so many tokens that stand for so many bytes of text."""
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
    }


def _read(tokenizer: Tokenizer, documents: Iterable[str | Path]) -> tuple[np.ndarray[Any, Any], int, int]:
    """Ids of all documents end to end, how many documents there are, and their bytes."""
    pieces, size = [np.zeros(0, np.int32)], 0
    for item in documents:
        for text in [item] if isinstance(item, str) else Corpus([item]):
            pieces.append(np.array(tokenizer.encode_document(text), np.int32))
            size += len(text.encode())
    return np.concatenate(pieces), len(pieces) - 1, size

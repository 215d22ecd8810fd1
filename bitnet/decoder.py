"""Decoder: next-token logits of sequences that grow; a recorded pass, a cache, and what of it can be used again.

A prompt is run in passes of many tokens. Up to STEP tokens at once are a step, recorded once per number of tokens:
every later one replays that record, which reads tokens and positions from tensors, so no Python runs between two ops.
However a sequence was cut into passes, its logits are those of the whole run at once, bit for bit. So tokens that turn
out wrong can be taken back (rewind), and a prompt that begins like the sequence in the cache is run from where it
differs (resume).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitnet import ops
from bitnet._core import ShapeError, Tape, Tensor
from bitnet.cache import CacheStep, KVCache
from bitnet.errors import BitnetError, ConfigError
from bitnet.model import BitNetForCausalLM

Logits = npt.NDArray[np.float32]

# Prompt tokens of one pass: enough rows to fill the matrix kernels, few enough to bound the activations.
PREFILL = 512

# Tokens of a recorded step at most. Few rows read each weight once, so eight take little longer than one.
STEP = 8


class ContextFullError(BitnetError, ValueError):
    """More tokens than the context holds."""


class Step:
    """A recorded pass: tokens (B, T) in, logits (B, T, V) out; `cache`: where they go, `top`: see Decoder."""

    def __init__(self, cache: CacheStep, time: int, top: int | None = None) -> None:
        self.cache, self.top = cache, top
        self.tokens = ops.zeros((cache.batch, time), "i32")
        self._tape: Tape | None = None
        self._logits: Tensor | None = None

    def run(self, model: BitNetForCausalLM) -> Logits:
        """Logits (B, T, V) after each of self.tokens."""
        if self._tape is None or self._logits is None:
            tape = Tape()
            with ops.no_grad(), tape:
                self._logits = model.logits(model.head_input(self.tokens, self.cache), self.top)
            self._tape = tape
        else:
            self._tape.replay()
        logits: Logits = self._logits.numpy()
        return logits


class Decoder:
    """Next-token logits of `batch` sequences that grow together; follows the model's weights if they change.

    capacity: positions of the cache, by default max_position_embeddings, which is also the most; cache_dtype: how it
    keeps numbers (KVCache). The attribute top, None at first, may be set at any time: a number says that only so many
    of the largest logits are of interest, so that a screened head (bitnet.head) need not make the others.
    """

    def __init__(
        self, model: BitNetForCausalLM, batch: int = 1, capacity: int | None = None, cache_dtype: str = "f32"
    ) -> None:
        limit = model.config.max_position_embeddings
        capacity = limit if capacity is None else capacity
        if batch < 1 or not 1 <= capacity <= limit:
            raise ConfigError(
                f"a decoder needs a batch of at least 1 and 1 to {limit} positions, not {batch} and {capacity}"
            )
        self.model, self.batch, self.capacity = model, batch, capacity
        self.cache = KVCache(model.config, batch, capacity, cache_dtype)
        self.tokens: list[list[int]] = [[] for _ in range(batch)]  # what the cache was made from
        self.top: int | None = None
        self.reused = 0  # tokens that the last resume() did not have to run
        self._places = self.cache.step(batch)
        self._steps: dict[tuple[int, int | None], Step] = {}  # by tokens of each sequence, and top

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(B,) positions filled."""
        return np.array([len(row) for row in self.tokens], np.int32)

    def reset(self) -> None:
        """Forgets all sequences; the recorded steps stay."""
        self.rewind(0)

    def rewind(self, length: int) -> None:
        """Forgets what comes after the first `length` tokens of each sequence; nothing is computed."""
        for row in self.tokens:
            del row[length:]

    def resume(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Makes each sequence this prompt; logits (batch, V) after it. What both begin with is not run again.

        Raises as prefill, and then keeps what was common.
        """
        self._require_prompts(prompts)
        same = [shared_prefix(row, prompt) for row, prompt in zip(self.tokens, prompts, strict=True)]
        # The last token is run in any case, for its logits.
        same = [min(count, len(prompt) - 1) for count, prompt in zip(same, prompts, strict=True)]
        for row, count in zip(self.tokens, same, strict=True):
            del row[count:]
        self.reused = sum(same)
        rest = [list(prompt[count:]) for prompt, count in zip(prompts, same, strict=True)]
        if len({len(row) for row in rest}) == 1 and len(rest[0]) <= STEP:
            return self.extend(rest)[:, -1]
        return self.prefill(rest)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Appends one or more tokens to each sequence; logits (batch, V) after the last token of each.

        Shorter prompts are padded on the right, and what padding leaves in the cache is overwritten before a query
        reaches it; so there must be room for the longest prompt after the longest sequence.
        """
        self._require_prompts(prompts)
        counts = np.array([len(prompt) for prompt in prompts])
        starts = self.lengths
        self._require_room(counts.max())
        tokens = np.zeros((self.batch, counts.max()), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        last = np.zeros((self.batch, self.model.config.hidden_size), np.float32)
        with ops.no_grad():
            for first in range(0, tokens.shape[1], PREFILL):
                chunk = tokens[:, first : first + PREFILL]
                self._places.start.copy_(starts + first)
                hidden = self.model.head_input(chunk, self._places)
                place = counts - 1 - first
                ends = (place >= 0) & (place < chunk.shape[1])
                rows = np.arange(self.batch) * chunk.shape[1] + np.where(ends, place, 0)
                last[ends] = ops.embedding(rows, hidden.reshape(-1, hidden.shape[-1])).numpy()[ends]
            logits: Logits = self.model.logits(ops.tensor(last), self.top).numpy()
        self._append(prompts)
        return logits

    def step(self, tokens: Sequence[int]) -> Logits:
        """Appends one token to each sequence; logits (batch, V) after it."""
        return self.extend(np.reshape(tokens, (self.batch, 1)).tolist())[:, 0]

    def extend(self, tokens: Sequence[Sequence[int]]) -> Logits:
        """Appends the same number of tokens, 1 to STEP, to each sequence; logits (batch, count, V) after each."""
        counts = [len(row) for row in tokens]
        if len(counts) != self.batch or len(set(counts)) != 1 or not 1 <= counts[0] <= STEP:
            raise ShapeError(f"extend: needs {self.batch} rows of equally many tokens, 1 to {STEP}, not {counts}")
        count = counts[0]
        self._require_room(count)
        self._places.start.copy_(self.lengths)
        step = self._steps.get((count, self.top)) or Step(self._places, count, self.top)
        step.tokens.copy_(np.array(tokens, np.int32))
        logits = step.run(self.model)
        self._steps[count, self.top] = step
        self._append(tokens)
        return logits

    def is_recorded(self, count: int) -> bool:
        """Whether extend() by `count` tokens replays, and so takes as long as it will the next time."""
        return (count, self.top) in self._steps

    def _append(self, tokens: Sequence[Sequence[int]]) -> None:
        for row, more in zip(self.tokens, tokens, strict=True):
            row.extend(more)

    def _require_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        counts = [len(prompt) for prompt in prompts]
        if len(counts) != self.batch or min(counts) < 1:
            raise ShapeError(f"prefill: needs {self.batch} prompts of at least one token, not lengths {counts}")

    def _require_room(self, count: int) -> None:
        taken = max(len(row) for row in self.tokens)
        if taken + count > self.capacity:
            raise ContextFullError(f"{count} more tokens do not fit: {taken} of {self.capacity} positions are taken")


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = min(len(a), len(b))
    a, b = list(a[:count]), list(b[:count])
    if a == b:
        return count
    return int(np.flatnonzero(np.array(a) != np.array(b))[0])

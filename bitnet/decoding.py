"""Generation: Decoder makes logits, TokenStream draws ids from them, TextStream turns ids into text; generate() is all.

A Decoder runs the prompt in one pass and records the pass of one token; every later token replays that record, which
reads the token and its position from tensors, so no Python runs between two ops. Its logits equal those of the whole
sequence run at once, bit for bit. Text is handed out as soon as no later token can change it: whole characters, and
nothing that may still become a stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet import ops
from bitnet._core import ShapeError, Tape, Tensor
from bitnet.cache import KVCache
from bitnet.errors import BitnetError, ConfigError
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler
from bitnet.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]
Stops = str | Sequence[str]

# Prompt tokens of one pass: enough rows to fill the matrix kernels, few enough to bound the activations.
PREFILL = 512


class ContextFullError(BitnetError, ValueError):
    """More tokens than the context holds."""


class Decoder:
    """Next-token logits of `batch` sequences that grow a token at a time; follows the model's weights if they change.

    capacity: positions of the cache, by default max_position_embeddings, which is also the most.
    """

    def __init__(self, model: BitNetForCausalLM, batch: int = 1, capacity: int | None = None) -> None:
        limit = model.config.max_position_embeddings
        capacity = limit if capacity is None else capacity
        if batch < 1 or not 1 <= capacity <= limit:
            raise ConfigError(
                f"a decoder needs a batch of at least 1 and 1 to {limit} positions, not {batch} and {capacity}"
            )
        self.model, self.batch, self.capacity = model, batch, capacity
        self.cache = KVCache(model.config, batch, capacity).step(batch)
        self.lengths = np.zeros(batch, np.int32)  # positions filled
        self._tokens = ops.zeros((batch, 1), "i32")
        self._tape: Tape | None = None
        self._logits: Tensor | None = None

    def reset(self) -> None:
        """Forgets all sequences; the recorded step stays."""
        self.lengths[:] = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Appends one or more tokens to each sequence; logits (batch, V) after the last token of each.

        Shorter prompts are padded on the right, and what padding leaves in the cache is overwritten before a query
        reaches it; so there must be room for the longest prompt after the longest sequence.
        """
        counts = np.array([len(prompt) for prompt in prompts])
        if len(counts) != self.batch or counts.min() < 1:
            raise ShapeError(
                f"prefill: needs {self.batch} prompts of at least one token, not lengths {counts.tolist()}"
            )
        self._require_room(counts.max())
        tokens = np.zeros((self.batch, counts.max()), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        last = np.zeros((self.batch, self.model.config.hidden_size), np.float32)
        with ops.no_grad():
            for first in range(0, tokens.shape[1], PREFILL):
                chunk = tokens[:, first : first + PREFILL]
                self.cache.start.copy_(self.lengths + first)
                hidden = self.model.head_input(chunk, self.cache)
                place = counts - 1 - first
                ends = (place >= 0) & (place < chunk.shape[1])
                rows = np.arange(self.batch) * chunk.shape[1] + np.where(ends, place, 0)
                last[ends] = ops.embedding(rows, hidden.reshape(-1, hidden.shape[-1])).numpy()[ends]
            logits: Logits = self.model.logits(ops.tensor(last)).numpy()
        self.lengths += counts.astype(np.int32)
        return logits

    def step(self, tokens: Sequence[int]) -> Logits:
        """Appends one token to each sequence; logits (batch, V) after it."""
        self._require_room(1)
        self.cache.start.copy_(self.lengths)
        self._tokens.copy_(np.reshape(tokens, (self.batch, 1)))
        if self._tape is None or self._logits is None:
            tape = Tape()
            with ops.no_grad(), tape:
                self._logits = self.model(self._tokens, cache=self.cache)
            self._tape = tape
        else:
            self._tape.replay()
        self.lengths += 1
        logits: Logits = self._logits.numpy()[:, 0]
        return logits

    def _require_room(self, count: int) -> None:
        if self.lengths.max() + count > self.capacity:
            raise ContextFullError(
                f"{count} more tokens do not fit: {self.lengths.max()} of {self.capacity} positions are taken"
            )


class TokenStream(Iterator[int]):
    """Ids that continue a prompt of ids, drawn one at a time.

    When they end, finish_reason is "end" (the model drew end_id, which is not handed out) or "length" (max_new_tokens
    are out, or the context is full: is_context_full). Ids from vocab_size on, which a padded head has, are never drawn.
    Raises ContextFullError if the prompt alone does not fit.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        prompt: Sequence[int],
        sampler: Sampler,
        max_new_tokens: int = 200,
        end_id: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        limit = model.config.max_position_embeddings
        if len(prompt) == 0:
            raise ConfigError("a prompt of at least one token is needed")
        if len(prompt) > limit:
            raise ContextFullError(f"the prompt has {len(prompt)} tokens, more than the model's context of {limit}")
        if max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        self.prompt_tokens = len(prompt)
        self.tokens: list[int] = []  # drawn so far
        self.finish_reason: str | None = None
        self.is_context_full = False
        self.prompt_seconds = self.decode_seconds = 0.0
        self._sampler, self._most, self._end_id, self._vocab_size = sampler, max_new_tokens, end_id, vocab_size
        # The last token drawn is never run, hence the - 1.
        self._decoder = Decoder(model, capacity=min(limit, len(prompt) + max(max_new_tokens, 1) - 1))
        self._ids = self._draw(list(prompt))

    @property
    def tokens_per_second(self) -> float:
        """Of the recorded step: the first token, which comes of the prompt's pass, is not counted."""
        return max(len(self.tokens) - 1, 0) / max(self.decode_seconds, 1e-9)

    def __next__(self) -> int:
        return next(self._ids)

    def _draw(self, sequence: list[int]) -> Generator[int, None, None]:
        if self._most == 0:
            self.finish_reason = "length"
            return
        start = perf_counter()
        logits = self._decoder.prefill([sequence])
        self.prompt_seconds = perf_counter() - start
        while True:
            token = self._sampler(logits[0, : self._vocab_size], len(sequence), sequence)
            if token == self._end_id:
                self.finish_reason = "end"
                return
            sequence.append(token)
            self.tokens.append(token)
            yield token
            if len(self.tokens) == self._most or self._decoder.lengths[0] == self._decoder.capacity:
                self.finish_reason, self.is_context_full = "length", len(self.tokens) < self._most
                return
            start = perf_counter()
            logits = self._decoder.step([token])
            self.decode_seconds += perf_counter() - start


class StopFilter:
    """Passes text on until a stop string is complete; holds back an end that may be the beginning of one.

    Of several the first to be complete counts, so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Stops) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if not all(self._stops):
            raise ConfigError("a stop string must not be empty")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What of the text so far is certain and was not handed out before."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            cut = min(found)[1]
            self._held = ""
        else:
            starts = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
            cut = len(text) - max(starts, default=0)
            self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


class TextStream(Iterator[str]):
    """Pieces of the text that continues a prompt. Joined they are the text; `ids` is the TokenStream below.

    finish_reason is as TokenStream's, or "stop" when a stop string, which is not handed out, ended it. A text prompt
    begins with the tokenizer's bos where it has one; an empty one is bos, else eos, alone. tokenizer: model.tokenizer
    by default. `held()` gives what is not out yet, for when the stream is left early.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        prompt: str | Sequence[int],
        sampler: Sampler,
        max_new_tokens: int = 200,
        stop: Stops = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ConfigError("this model came without a tokenizer: pass one, or use generate_ids")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's {model.config.vocab_size}"
            )
        ids = prompt_ids(tokenizer, prompt)
        self.ids = TokenStream(model, ids, sampler, max_new_tokens, tokenizer.eos_id, tokenizer.vocab_size)
        self.finish_reason: str | None = None
        self._filter = StopFilter(stop)
        # The prompt goes through the decoder as well: the first new token may end a character it began, and keeps the
        # space that some tokenizers take off the beginning of a text.
        self._decoder = tokenizer.decode_stream()
        for token in ids:
            self._decoder.push(token)
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    def held(self) -> str:
        """Text drawn and not handed out; the stream has ended after that."""
        self._pieces.close()
        return self._rest()

    def _read(self) -> Generator[str, None, None]:
        for token in self.ids:
            piece = self._filter.push(self._decoder.push(token))
            if self._filter.stopped:
                self.finish_reason = "stop"
            if piece:
                yield piece
            if self._filter.stopped:
                return
        piece = self._rest()
        self.finish_reason = "stop" if self._filter.stopped else self.ids.finish_reason
        if piece:
            yield piece

    def _rest(self) -> str:
        if self._filter.stopped:
            return ""
        return self._filter.push(self._decoder.flush()) + self._filter.flush()


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """What a model is given for a prompt, see TextStream. ConfigError if nothing can stand for an empty one."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if len(prompt) == 0:
        first = eos if bos is None else bos
        if first is None:
            raise ConfigError("a prompt is needed: this tokenizer has no token that begins or ends a text")
        return [first]
    if isinstance(prompt, str):
        return ([] if bos is None else [bos]) + tokenizer.encode(prompt)
    return list(prompt)


def generate(
    model: BitNetForCausalLM,
    prompt: str | Sequence[int],
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Stops = (),
    stream: Callable[[str], Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> str:
    """The text that continues a prompt, without the prompt; `stream` is called with each piece as it comes.

    See Sampler for the choice of tokens and TextStream for where it begins and ends.
    """
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed)
    pieces = []
    for piece in TextStream(model, prompt, sampler, max_new_tokens, stop, tokenizer):
        pieces.append(piece)
        if stream is not None:
            stream(piece)
    return "".join(pieces)


def generate_ids(
    model: BitNetForCausalLM,
    prompt: Sequence[int],
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    end_id: int | None = None,
) -> TokenStream:
    """The ids that continue a prompt of ids, as an iterator."""
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed)
    return TokenStream(model, prompt, sampler, max_new_tokens, end_id)

"""TokenStream: the ids that continue a prompt, drawn one at a time.

What is drawn depends on model, prompt and sampler alone: not on drafts (bitnet.drafting), which only save time, and not
on what the decoder held before. A context that is full ends the stream with an error, with a finish reason, or makes it
slide: the caller chooses.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from time import perf_counter

from bitnet.decoder import ContextFullError, Decoder, Logits
from bitnet.drafting import NgramDrafter, Speculation
from bitnet.errors import ConfigError
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler

CONTEXTS = ("error", "stop", "slide")


class TokenStream(Iterator[int]):
    """Ids that continue a prompt of ids.

    end_id: drawn, it ends the stream and is not handed out; several may. vocab_size: ids from there on, which a padded
    head has, are never drawn. decoder: one of batch 1 of this model, by default a new one; what it holds that the
    prompt begins with is not run again; a new one keeps its cache in cache_dtype. speculation: by default drafts from
    the text itself where that pays.

    context: what happens when more tokens are wanted than the model's context (or the decoder) has positions. "error":
    ContextFullError, after all that fitted was handed out. "stop": the stream ends. "slide": the first `keep` tokens
    stay, the newest half of the others is run again behind them, and there is room for as many once more; `slides`
    counts. A prompt that does not fit alone is an error, or slides at once.

    When the ids end, finish_reason is "end" or "length" (max_new_tokens are out, or the context is full:
    is_context_full).
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        prompt: Sequence[int],
        sampler: Sampler,
        max_new_tokens: int = 200,
        end_id: int | Collection[int] | None = None,
        vocab_size: int | None = None,
        *,
        context: str = "error",
        keep: int = 0,
        speculation: Speculation | None = None,
        decoder: Decoder | None = None,
        cache_dtype: str = "f32",
    ) -> None:
        limit = model.config.max_position_embeddings if decoder is None else decoder.capacity
        require_request(prompt, max_new_tokens, limit, context, keep)
        self.prompt_tokens = len(prompt)
        self.tokens: list[int] = []  # drawn so far
        self.finish_reason: str | None = None
        self.is_context_full = False
        self.slides = 0
        self.reused_tokens = 0  # of the prompt, which the decoder held already
        self.drafted_tokens = self.accepted_tokens = 0
        self.prompt_seconds = self.decode_seconds = 0.0
        self._sampler, self._most, self._vocab_size = sampler, max_new_tokens, vocab_size
        self._ends = frozenset([end_id] if isinstance(end_id, int) else end_id or ())
        self._context, self._keep = context, keep
        self._speculation = Speculation([NgramDrafter()]) if speculation is None else speculation
        if decoder is None:
            # The last token drawn is never run, hence the - 1.
            needed = len(prompt) + max(max_new_tokens, 1) - 1
            decoder = Decoder(model, capacity=min(limit, needed), cache_dtype=cache_dtype)
        decoder.top = _largest_needed(model, sampler, vocab_size)
        self._decoder = decoder
        self._ids = self._draw(list(prompt))

    @property
    def tokens_per_second(self) -> float:
        """Of the steps: the first token, which comes of the prompt's pass, is not counted."""
        return max(len(self.tokens) - 1, 0) / max(self.decode_seconds, 1e-9)

    def __next__(self) -> int:
        return next(self._ids)

    def _draw(self, sequence: list[int]) -> Generator[int, None, None]:
        if self._most == 0:
            self.finish_reason = "length"
            return
        start = perf_counter()
        logits = self._decoder.resume([self._window(sequence)])
        self.prompt_seconds, self.reused_tokens = perf_counter() - start, self._decoder.reused
        draft: list[int] = []
        while True:
            # logits (1 + len(draft), V): each row is that of the sequence as long as the drafts before it were right.
            for place, row in enumerate(logits):
                token = self._sampler(row[: self._vocab_size], len(sequence), sequence)
                self._speculation.see(token)
                if token in self._ends:
                    self.finish_reason = "end"
                    return
                sequence.append(token)
                self.tokens.append(token)
                is_right = place < len(draft) and token == draft[place]
                self.accepted_tokens += is_right
                yield token
                if len(self.tokens) == self._most:
                    self.finish_reason = "length"
                    return
                if not is_right:
                    break
            if draft:
                self._decoder.rewind(self._decoder.lengths[0] - len(draft) + place)
            is_full = int(self._decoder.lengths[0]) == self._decoder.capacity
            if is_full and self._context != "slide":
                self.finish_reason, self.is_context_full = "length", True
                if self._context == "stop":
                    return
                raise ContextFullError(
                    f"the context of {self._decoder.capacity} positions is full after a prompt of {self.prompt_tokens} "
                    f"tokens and {len(self.tokens)} of {self._most} new ones: ask for fewer, or let it slide"
                )
            start = perf_counter()
            if is_full:
                logits, draft = self._decoder.resume([self._window(sequence)]), []
            else:
                logits, draft = self._step(sequence)
            self.decode_seconds += perf_counter() - start

    def _step(self, sequence: list[int]) -> tuple[Logits, list[int]]:
        """(logits after the newest token and after each drafted one, the draft)."""
        free = self._decoder.capacity - int(self._decoder.lengths[0])
        draft = self._speculation.draft(sequence, min(free, self._most - len(self.tokens)) - 1)
        is_measure = self._decoder.is_recorded(1 + len(draft))
        start = perf_counter()
        self.drafted_tokens += len(draft)
        logits = self._decoder.extend([[sequence[-1], *draft]])[0]
        if is_measure:
            self._speculation.timed(1 + len(draft), perf_counter() - start)
        return logits, draft

    def _window(self, sequence: list[int]) -> list[int]:
        """What is run of a sequence that is to go on: all of it, or its first tokens and its newest."""
        if len(sequence) <= self._decoder.capacity and len(self.tokens) == 0:
            return sequence
        self.slides += 1
        return slide(sequence, self._decoder.capacity, self._keep)


def slide(sequence: list[int], capacity: int, keep: int) -> list[int]:
    """The first `keep` tokens of a sequence that is too long, and so many of the newest that as many fit again."""
    return sequence[:keep] + sequence[len(sequence) - (capacity - keep) // 2 :]


def require_request(prompt: Sequence[int], max_new_tokens: int, limit: int, context: str, keep: int) -> None:
    """ConfigError or ContextFullError, in a sentence, for what cannot be generated in `limit` positions."""
    if len(prompt) == 0:
        raise ConfigError("a prompt of at least one token is needed")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if context not in CONTEXTS:
        raise ConfigError(f"context must be one of {', '.join(CONTEXTS)}, not {context!r}")
    if context == "slide" and not 0 <= keep <= limit - 2:
        raise ConfigError(f"keep must be 0 to {limit - 2}, two less than the context, not {keep}")
    if len(prompt) > limit and context != "slide":
        raise ContextFullError(f"the prompt has {len(prompt)} tokens, more than the model's context of {limit}")


def _largest_needed(model: BitNetForCausalLM, sampler: Sampler, vocab_size: int | None) -> int | None:
    """Decoder.top for a sampler that may not draw the ids a padded head has too many; None: all logits count."""
    needed = sampler.largest_needed
    if needed is None:
        return None
    return needed + model.config.vocab_size - (vocab_size or model.config.vocab_size)

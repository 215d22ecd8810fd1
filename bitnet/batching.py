"""Many sequences in one model call: they join and leave between steps, and each gets the tokens it would get alone.

A step reads each weight once, whatever the number of sequences, so eight come nearly as fast as one. Every sequence has
a slot of one cache; a prompt that begins like what some slot holds, of a live sequence or of one that left, takes that
beginning over. Long prompts are run in pieces between the steps of the others. Since rows of a batch do not touch each
other, the tokens of a sequence depend neither on its neighbours nor on when it came, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from bitnet import ops
from bitnet._core import Tensor
from bitnet.cache import KVCache
from bitnet.decoder import PREFILL, ContextFullError, Step, shared_prefix
from bitnet.errors import ConfigError
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler
from bitnet.scored import Scored, scored
from bitnet.text_stream import Spelling, Stops, prompt_ids, tokenizer_of
from bitnet.token_stream import require_request, slide
from bitnet.tokenizer import Tokenizer

SCORED_ROWS = 32  # of a prompt at once: their logits over 128256 ids take 16 MB
COPY = 16  # tokens of a common beginning from which copying its keys and values is surely less than running it


class Event(NamedTuple):
    """One token of a request, or its end, or both.

    finish_reason: None while it goes on; "end" (an end_id was drawn, token is None), "length" (max_new_tokens are out)
    or "context" (no position is left to run this token). Of a request that asked for scores: `scored` is that of the
    token, and with the first event come those of the prompt's tokens, where they were wanted too.
    """

    request: int
    token: int | None
    finish_reason: str | None
    scored: Scored | None = None
    prompt: tuple[Scored, ...] | None = None


class Request:
    """A sequence in a batch: what it is, how its tokens are drawn, and which of them its slot is to hold."""

    def __init__(
        self, prompt: Sequence[int], sampler: Sampler, most: int, ends: frozenset[int], vocab_size: int | None
    ) -> None:
        self.tokens = list(prompt)
        self.window = self.tokens  # what the slot is to hold: all of it, until it slides
        self.sampler, self.most, self.ends, self.vocab_size = sampler, most, ends, vocab_size
        self.context, self.keep = "stop", 0
        self.prompt_tokens, self.slides, self.slot = len(prompt), 0, -1
        self.reused = 0  # tokens of the prompt that its slot, or another, held already
        self.top: int | None = None  # how many likeliest tokens a score shows; None: no scores
        self.prompt_scores: list[Scored] | None = None


class Batch:
    """Up to `slots` sequences of up to `capacity` tokens each (default: the model's context) that are decoded together.

        batch = Batch(model, slots=4)
        first = batch.add(prompt, Sampler(seed=1), max_new_tokens=100)
        while batch.live:
            for event in batch.step(): ...      # batch.add() and batch.remove() between any two steps

    cache_dtype: how keys and values are kept (KVCache).
    """

    def __init__(
        self, model: BitNetForCausalLM, slots: int = 8, capacity: int | None = None, cache_dtype: str = "f32"
    ) -> None:
        limit = model.config.max_position_embeddings
        capacity = limit if capacity is None else capacity
        if slots < 1 or not 1 <= capacity <= limit:
            raise ConfigError(
                f"a batch needs at least 1 slot and 1 to {limit} positions in each, not {slots} and {capacity}"
            )
        self.model, self.slots, self.capacity = model, slots, capacity
        self.reused_tokens = 0  # of prompts, which some slot held already
        self._cache = KVCache(model.config, slots, capacity, cache_dtype)
        self._held: list[list[int]] = [[] for _ in range(slots)]  # what each slot was made from, live or not
        self._requests: dict[int, Request] = {}
        self._next = 0
        self._steps: dict[int, Step] = {}  # by number of sequences
        self._one = self._cache.step(1)
        self._events: list[Event] = []

    @property
    def live(self) -> list[int]:
        """Requests that have not ended."""
        return list(self._requests)

    @property
    def free(self) -> int:
        """How many more can join."""
        return self.slots - len(self._requests)

    def add(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        max_new_tokens: int = 200,
        end_id: int | Collection[int] | None = None,
        vocab_size: int | None = None,
        context: str = "stop",
        keep: int = 0,
        *,
        top: int | None = None,
        score_prompt: bool = False,
    ) -> int:
        """A sequence joins; returns the number of its request. Its prompt is run by the next steps.

        Arguments are those of TokenStream, except that a context that is full ends a request ("stop") or slides. top:
        events have scores, with so many of the likeliest tokens; score_prompt: of the prompt's tokens too, all of which
        are run then. ConfigError if no slot is free, for an id that the model does not have, for scores of a prompt
        without `top`; ContextFullError if the prompt alone does not fit.
        """
        if self.free == 0:
            raise ConfigError(f"all {self.slots} slots of the batch are taken")
        if max_new_tokens == 0:
            raise ConfigError("max_new_tokens must be at least 1 in a batch, not 0")
        if context == "error":
            raise ConfigError("context must be stop or slide in a batch: an error would end its neighbours too")
        require_request(prompt, max_new_tokens, self.capacity, context, keep)
        bad = next((token for token in prompt if not 0 <= token < self.model.config.vocab_size), None)
        if bad is not None:
            raise ConfigError(f"the prompt has the id {bad}, the model knows 0 to {self.model.config.vocab_size - 1}")
        ends = frozenset([end_id] if isinstance(end_id, int) else end_id or ())
        request = Request(prompt, sampler, max_new_tokens, ends, vocab_size)
        request.context, request.keep, request.top = context, keep, top
        if score_prompt:
            if top is None or len(prompt) > self.capacity:
                raise ConfigError("score_prompt needs `top`, and a prompt that fits the context")
            request.prompt_scores = [Scored(prompt[0], None)]
        if len(prompt) > self.capacity:
            self._slide(request)
        self._take_slot(request)
        number, self._next = self._next, self._next + 1
        self._requests[number] = request
        return number

    @property
    def cache_bytes(self) -> int:
        """What keys and values of all slots take."""
        return self.slots * self.capacity * self._cache.bytes_per_position

    def reused_by(self, request: int) -> int:
        """Tokens of a live request's prompt that did not have to be run."""
        return self._requests[request].reused

    def remove(self, request: int) -> None:
        """A sequence leaves before its end; nothing happens if it has ended."""
        self._requests.pop(request, None)
        self._events = [event for event in self._events if event.request != request]

    def step(self) -> list[Event]:
        """One more token for every sequence whose prompt has been run, and up to PREFILL tokens of prompts.

        An exception on the way, such as Ctrl-C, loses nothing: the next step() goes on.
        """
        waiting = {number: self._pending(request) for number, request in self._requests.items()}
        ready = [number for number, pending in waiting.items() if len(pending) == 1]
        if ready:
            self._decode(ready)
        budget = PREFILL
        for number, pending in waiting.items():
            if len(pending) > 1 and budget > 0:
                self._prefill(number, pending[:budget], budget >= len(pending))
                budget -= len(pending)
        events, self._events = self._events, []
        return events

    def _pending(self, request: Request) -> list[int]:
        """Tokens to run: at least the newest, which an interrupted step may have run without drawing the next."""
        held = self._held[request.slot]
        del held[len(request.window) - 1 :]
        return request.window[len(held) :]

    def _decode(self, numbers: list[int]) -> None:
        requests = [self._requests[number] for number in numbers]
        step = self._steps.get(len(numbers)) or Step(self._cache.step(len(numbers)), 1)
        step.tokens.copy_([[request.window[-1]] for request in requests])
        step.cache.slot.copy_([request.slot for request in requests])
        step.cache.start.copy_([len(self._held[request.slot]) for request in requests])
        logits = step.run(self.model)[:, 0]
        self._steps[len(numbers)] = step
        for number, request, row in zip(numbers, requests, logits, strict=True):
            self._held[request.slot].append(request.window[-1])
            self._draw(number, row)

    def _prefill(self, number: int, tokens: list[int], is_last: bool) -> None:
        request = self._requests[number]
        start = len(self._held[request.slot])
        self._one.slot.copy_([request.slot])
        self._one.start.copy_([start])
        with ops.no_grad():
            hidden = self.model.head_input([tokens], self._one)
            hidden = hidden.reshape(-1, hidden.shape[-1])
            scores = self._prompt_scores(request, hidden, start)
            if is_last:
                row = self.model.logits(ops.embedding([len(tokens) - 1], hidden)).numpy()[0]
        if request.prompt_scores is not None:
            request.prompt_scores[start + 1 :] = scores
        self._held[request.slot] += tokens
        if is_last:
            self._draw(number, row)

    def _prompt_scores(self, request: Request, hidden: Tensor, start: int) -> list[Scored]:
        """Of the prompt's tokens that follow those whose hidden states (T, C) these are, the first at `start`."""
        if request.prompt_scores is None or request.top is None:
            return []
        following = request.window[start + 1 : start + 1 + hidden.shape[0]]
        scores: list[Scored] = []
        for first in range(0, len(following), SCORED_ROWS):
            some = following[first : first + SCORED_ROWS]
            rows = self.model.logits(ops.embedding(range(first, first + len(some)), hidden)).numpy()
            scores += [
                scored(row[: request.vocab_size], token, request.top) for row, token in zip(rows, some, strict=True)
            ]
        return scores

    def _draw(self, number: int, row: Any) -> None:
        """The next token of a request, from logits (V,)."""
        request = self._requests[number]
        token = request.sampler(row[: request.vocab_size], len(request.tokens), request.tokens)
        score = None if request.top is None else scored(row[: request.vocab_size], token, request.top)
        prompt, request.prompt_scores = request.prompt_scores, None
        rest = score, None if prompt is None else tuple(prompt)
        if token in request.ends:
            self._end(Event(number, None, "end", *rest))
            return
        request.tokens.append(token)
        if request.window is not request.tokens:
            request.window.append(token)
        is_full = len(request.window) > self.capacity
        if len(request.tokens) - request.prompt_tokens == request.most:
            self._end(Event(number, token, "length", *rest))
        elif is_full and request.context == "stop":
            self._end(Event(number, token, "context", *rest))
        else:
            self._events.append(Event(number, token, None, *rest))
            if is_full:
                self._slide(request)
                held = self._held[request.slot]
                del held[shared_prefix(held, request.window) :]

    def _end(self, event: Event) -> None:
        self._events.append(event)
        del self._requests[event.request]

    def _slide(self, request: Request) -> None:
        request.window = slide(request.tokens, self.capacity, request.keep)
        request.slides += 1

    def _take_slot(self, request: Request) -> None:
        """The free slot that holds most of what is to be held, or, where another holds more, a copy of that."""
        # The last token is run in any case, for its logits; for scores, all are.
        most = len(request.window) - 1 if request.prompt_scores is None else 0
        shared = [min(shared_prefix(held, request.window), most) for held in self._held]
        taken = {other.slot for other in self._requests.values()}
        free = [slot for slot in range(self.slots) if slot not in taken]
        slot = max(free, key=lambda at: (shared[at], -len(self._held[at])))
        best = max(range(self.slots), key=lambda at: shared[at])
        count = shared[slot]
        if shared[best] >= count + COPY:
            self._held[slot], count = [], shared[best]
            self._cache.copy(best, slot, count)
        self._held[slot] = request.window[:count]
        self.reused_tokens += count
        request.slot, request.reused = slot, count


def generate_batch(
    model: BitNetForCausalLM,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Stops = (),
    tokenizer: Tokenizer | None = None,
    *,
    slots: int = 8,
    context: str = "error",
    keep: int = 0,
    cache_dtype: str = "f32",
) -> list[str]:
    """The texts that continue some prompts, `slots` of them at a time: each is what generate() gives for it alone.

    Arguments as for generate(). ContextFullError, with context="error", names the prompt whose text did not fit.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed)
    sequences = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    spellings = [Spelling(tokenizer, ids, stop) for ids in sequences]
    texts = [""] * len(sequences)
    limit = model.config.max_position_embeddings
    for ids in sequences:
        require_request(ids, max_new_tokens, limit, context, keep)
    if not sequences or max_new_tokens == 0:
        return texts
    needed = limit if context == "slide" else max(len(ids) for ids in sequences) + max_new_tokens - 1
    batch = Batch(model, min(slots, len(sequences)), min(limit, needed), cache_dtype)
    waiting = list(range(len(sequences)))[::-1]
    places: dict[int, int] = {}  # of requests in `prompts`
    while waiting or batch.live:
        while waiting and batch.free:
            place = waiting.pop()
            request = batch.add(
                sequences[place], sampler, max_new_tokens, tokenizer.eos_id, tokenizer.vocab_size,
                "slide" if context == "slide" else "stop", keep,
            )  # fmt: skip
            places[request] = place
        for request, token, reason, *_ in batch.step():
            place = places[request]
            if token is not None and not spellings[place].stopped:
                texts[place] += spellings[place].push(token)
            if spellings[place].stopped:
                batch.remove(request)
            elif reason is not None:
                texts[place] += spellings[place].rest()
                if reason == "context" and context == "error" and not spellings[place].stopped:
                    raise ContextFullError(
                        f"prompt {place} of {len(sequences[place])} tokens filled the context of {batch.capacity} "
                        f"positions before it had {max_new_tokens} new ones: ask for fewer, or let it slide"
                    )
    return texts

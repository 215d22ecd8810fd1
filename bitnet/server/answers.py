"""From a request to what is decoded, and from tokens as they come to the text of its choices."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial

from bitnet.batching import Event
from bitnet.chat_template import Template, encode
from bitnet.errors import BitnetError
from bitnet.sampling import Sampler
from bitnet.scored import Scored
from bitnet.server.engine import Engine, Job, StoppedError
from bitnet.server.protocol import ApiError, ChatRequest, CompletionRequest, Options
from bitnet.server.replies import Finished
from bitnet.text_stream import Spelling, prompt_ids
from bitnet.tokenizer import Tokenizer

COMPLETION_TOKENS = 16  # where a completion does not say: as OpenAI's API
MOST_CHOICES = 256  # texts of one request: prompts times n
REASONS = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}


@dataclass(frozen=True)
class Defaults:
    """How tokens are chosen where a request does not say; temperature 1 is OpenAI's."""

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        Sampler(self.temperature, self.top_k, self.top_p, self.repetition_penalty)

    def sampler(self, o: Options, seed: int, drawn_from: int) -> Sampler:
        """Of a request's options. Raises ConfigError for values out of range."""
        return Sampler(
            self.temperature if o.temperature is None else o.temperature,
            self.top_k if o.top_k is None else o.top_k or None,  # 0: all
            self.top_p if o.top_p is None else o.top_p,
            self.repetition_penalty if o.repetition_penalty is None else o.repetition_penalty,
            seed, o.presence_penalty, o.frequency_penalty, o.logit_bias, drawn_from,
        )  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """What a request's choices continue: ids, where a text ends, and what is given back before it.

    most: tokens of a choice; None: as many as there is room for. score: whether the prompt's own tokens are scored.
    """

    ids: list[int]
    ends: frozenset[int]
    stops: tuple[str, ...]
    most: int | None
    echo: str = ""
    score: bool = False


@dataclass(frozen=True)
class Piece:
    """More of a choice: its text, with scores of the tokens behind it; finish_reason with the last one."""

    index: int
    text: str
    scored: list[Scored]
    finish_reason: str | None = None


@dataclass
class Choice:
    """One of the texts that a request asks for, as far as it has come. most: tokens of it; 0: the echo alone."""

    index: int
    job: Job
    begin: Callable[[], Spelling]
    echo: str
    most: int
    text: str = ""
    drawn: int = 0
    scored: list[Scored] = field(default_factory=list)
    shown: int = 0  # of `scored`, in pieces that are out
    finish_reason: str | None = None

    @cached_property
    def spelling(self) -> Spelling:
        """Made with the first token: each reads its prompt, and a request may have thousands."""
        return self.begin()

    def take(self, event: Event) -> Piece:
        """What an event adds."""
        text, self.echo = self.echo, ""
        if event.prompt is not None:
            self.scored += event.prompt
        reason = event.finish_reason
        if event.token is not None and self.most:
            self.drawn += 1
            text += self.spelling.push(event.token)
            if event.scored is not None:
                self.scored.append(event.scored)
        if not self.spelling.stopped and reason is not None and self.most:
            text += self.spelling.rest()
        if self.spelling.stopped:
            reason = "stop"
        self.finish_reason = None if reason is None else REASONS[reason]
        self.text += text
        scores: list[Scored] = []
        if text or reason is not None:  # scores go with the text that their tokens made certain
            scores, self.shown = self.scored[self.shown :], len(self.scored)
        return Piece(self.index, text, scores, self.finish_reason)

    def finished(self) -> Finished:
        """The choice as a whole."""
        scores = None if self.job.top is None else self.scored
        prompt, reused = len(self.job.prompt), self.job.reused_tokens
        return Finished(self.index, self.text, self.finish_reason or "stop", scores, prompt, self.drawn, reused)


def completion_prompts(request: CompletionRequest, tokenizer: Tokenizer, engine: Engine) -> list[Prompt]:
    """What a completion continues. Raises ApiError for what tokenizer or model cannot read."""
    o, ends = request.options, _ends(tokenizer)
    most = COMPLETION_TOKENS if o.max_tokens is None else o.max_tokens
    prompts = []
    for prompt in request.prompts:
        with _refusals():
            ids, echo = _readable(prompt_ids(tokenizer, prompt), engine), ""
            if request.echo:
                echo = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        prompts.append(Prompt(ids, ends, o.stop, most, echo, request.echo and o.logprobs is not None))
    return prompts


def chat_prompt(request: ChatRequest, tokenizer: Tokenizer, engine: Engine, template: Template) -> Prompt:
    """The conversation up to its next message. Raises ApiError for what template or model cannot read."""
    o = request.options
    with _refusals():
        ids = _readable(encode(tokenizer, template.parts(request.messages)), engine)
    return Prompt(ids, _ends(tokenizer) | template.end_ids, (*o.stop, *template.stops), o.max_tokens)


def _readable(ids: list[int], engine: Engine) -> list[int]:
    """Ids that the model knows, as many as it reads."""
    room, known = engine.capacity, engine.model.config.vocab_size
    if len(ids) > room:
        sentence = f"the prompt has {len(ids)} tokens, and the context holds {room}"
        raise ApiError(400, sentence, code="context_length_exceeded")
    bad = next((id_ for id_ in ids if not 0 <= id_ < known), None)
    if bad is not None:
        raise ApiError(400, f"the prompt has the id {bad}, the model knows 0 to {known - 1}", param="prompt")
    return ids


def _ends(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))


class Answer:
    """The choices of one request. Iterated over, it decodes them and gives their pieces as they come.

    Raises ApiError for what the model refuses. Whoever stops listening has to close() it.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, defaults: Defaults) -> None:
        self.choices: list[Choice] = []
        self._engine, self._tokenizer, self._defaults = engine, tokenizer, defaults
        self._events: asyncio.Queue[tuple[Choice, Event | BitnetError]] = asyncio.Queue()

    def add(self, prompts: Sequence[Prompt], o: Options) -> Answer:
        """Each prompt is continued n times, in this order. Nothing is decoded before the answer is iterated over."""
        if o.n * len(prompts) > MOST_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts times n {o.n} are more than {MOST_CHOICES} texts", param="n")
        for prompt in prompts:
            self._add(prompt, o)
        return self

    def _add(self, prompt: Prompt, o: Options) -> None:
        most = max(1, self._engine.capacity - len(prompt.ids) + 1) if prompt.most is None else prompt.most
        begin = partial(Spelling, self._tokenizer, prompt.ids, prompt.stops)
        with _refusals():
            begin()  # ids that the model has, but not the tokenizer
        seed = secrets.randbits(64) if o.seed is None else o.seed
        loop = asyncio.get_running_loop()
        for i in range(o.n):
            with _refusals():
                sampler = self._defaults.sampler(o, (seed + i) % 2**64, len(prompt.ids))

            def deliver(event: Event | BitnetError, place: int = len(self.choices)) -> None:
                with suppress(RuntimeError):  # the server has stopped
                    loop.call_soon_threadsafe(self._events.put_nowait, (self.choices[place], event))

            job = Job(
                prompt.ids, sampler, max(most, 1), prompt.ends, self._tokenizer.vocab_size, deliver, o.logprobs,
                prompt.score,
            )  # fmt: skip
            self.choices.append(Choice(len(self.choices), job, begin, prompt.echo, most))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        for choice in self.choices:
            self._engine.submit(choice.job)
        going = len(self.choices)
        while going:
            choice, event = await self._events.get()
            if isinstance(event, StoppedError):
                raise ApiError(503, str(event), "unavailable_error")
            if isinstance(event, BitnetError):
                raise ApiError(500, str(event), "server_error")
            if choice.finish_reason is not None:
                continue  # drawn behind a stop string, before the slot was given up
            piece = choice.take(event)
            if piece.finish_reason is not None:
                going -= 1
                if event.finish_reason is None:
                    self._engine.leave(choice.job)
            if piece.text or piece.finish_reason is not None:
                yield piece

    def close(self) -> None:
        """Gives up the slots of all choices that have not ended."""
        for choice in self.choices:
            if choice.finish_reason is None:
                self._engine.leave(choice.job)


@contextmanager
def _refusals() -> Iterator[None]:
    """What the model, its tokenizer or its template refuse is the request's fault."""
    try:
        yield
    except ApiError:
        raise
    except BitnetError as error:
        raise ApiError(400, str(error)) from None

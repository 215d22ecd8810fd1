"""A conversation with a model: messages, and one decoder that reads only what is new of each turn.

The ids of an answer stay as they were drawn, and what follows them is encoded behind them, so the cache of a turn
serves the next one whole. Where that cannot be (an answer that a stop string cut, a template that rewrites the past,
messages that were dropped), the conversation is encoded anew, and the cache serves as far as both agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bitnet.chat_template import Message, Part, Template, encode, joined, rest
from bitnet.decoder import ContextFullError, Decoder, shared_prefix
from bitnet.drafting import NgramDrafter, Speculation
from bitnet.errors import ConfigError
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler
from bitnet.text_stream import TextStream, tokenizer_of

CONTEXTS = ("slide", "error")


class Turn(Iterator[str]):
    """Pieces of one answer, as they come. At its end, or after interrupt(), the conversation has it.

    `text` is the answer so far, `stream` what draws it, `dropped` the number of old messages that had to go for it;
    finish_reason is TextStream's, or "interrupted".
    """

    def __init__(
        self, conversation: Conversation, question: str, parts: list[Part], ids: list[int], dropped: int
    ) -> None:
        self.text, self.finish_reason = "", ""
        self.question, self.parts, self.prompt, self.dropped = question, parts, ids, dropped
        self.stream = conversation._stream(ids)
        self._conversation = conversation

    def __next__(self) -> str:
        try:
            piece = next(self.stream)
        except StopIteration:
            if not self.finish_reason:
                self.finish_reason = str(self.stream.finish_reason)
                self._conversation._remember(self)
            raise
        self.text += piece
        return piece

    def interrupt(self) -> str:
        """Ends the answer where it is; returns what was held back of it."""
        held = self.stream.held()
        self.text += held
        if not self.finish_reason:
            self.finish_reason = "interrupted"
            self._conversation._remember(self)
        return held


class Conversation:
    """Questions and answers in turn, after an optional system message.

        conversation = Conversation(model, choose("auto", model.tokenizer), Sampler(seed=1))
        for piece in conversation.ask("Hello?"): print(piece, end="")

    context: when the conversation outgrows the model's context. "slide": its oldest questions and answers are dropped
    until half of the context is free; an answer that alone is too long goes on in a context that slides behind the
    system message. "error": ContextFullError for a question, and an answer ends ("length", is_context_full).
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        template: Template,
        sampler: Sampler,
        system: str | None = None,
        max_new_tokens: int = 1000,
        *,
        context: str = "slide",
        speculation: Speculation | None = None,
        cache_dtype: str = "f32",
    ) -> None:
        if context not in CONTEXTS:
            raise ConfigError(f"context must be one of {', '.join(CONTEXTS)}, not {context!r}")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self.model, self.template, self.sampler = model, template, sampler
        self.head = [] if system is None else [Message("system", system)]
        self.messages: list[Message] = []  # questions and answers in turn
        self.max_new_tokens, self.context = max_new_tokens, context
        self._tokenizer = tokenizer_of(model)
        self._speculation = Speculation([NgramDrafter()]) if speculation is None else speculation
        self._decoder = Decoder(model, cache_dtype=cache_dtype)
        self._parts, self._ids = list[Part](), list[int]()  # what the last turn wrote, to its answer's end
        self._again = 0

    @property
    def capacity(self) -> int:
        """Tokens that the context holds."""
        return self._decoder.capacity

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages, self._parts, self._ids, self._again = [], [], [], 0

    def ask(self, question: str) -> Turn:
        """The answer, to be iterated over; nothing is remembered of a question whose answer has not one character."""
        dropped = 0
        parts, ids = self._prompt(question)
        reserve = min(self.max_new_tokens, self.capacity // 4)
        if self.context == "slide" and len(ids) > self.capacity - reserve:
            while self.messages and len(ids) > self.capacity // 2:
                del self.messages[:2]
                dropped += 2
                self._parts, self._ids = [], []
                parts, ids = self._prompt(question)
        if len(ids) > self.capacity:
            raise ContextFullError(
                f"the conversation has {len(ids)} tokens with this question, more than the model's context of "
                f"{self.capacity}"
            )
        return Turn(self, question, parts, ids, dropped)

    def ask_again(self) -> Turn:
        """Another answer to the last question, with the next seed. ConfigError if there is none."""
        if not self.messages:
            raise ConfigError("there is no answer yet to give again")
        question = self.messages[-2].content
        del self.messages[-2:]
        self._parts, self._ids = [], []
        self._again += 1
        return self.ask(question)

    def _stream(self, ids: list[int]) -> TextStream:
        options: dict[str, Any] = {"context": "stop"}
        if self.context == "slide":
            bare = encode(self._tokenizer, self.template.parts([*self.head, Message("user", "")]))
            keep = min(shared_prefix(ids, bare), self.capacity // 2)
            options = {"context": "slide", "keep": keep}
        sampler = self.sampler
        if self._again:
            sampler = replace(sampler, seed=(sampler.seed + self._again) % 2**64)
        return TextStream(
            self.model, ids, sampler, self.max_new_tokens, self.template.stops, self._tokenizer,
            end_id=self.template.end_ids, speculation=self._speculation, decoder=self._decoder, **options,
        )  # fmt: skip

    def _prompt(self, question: str) -> tuple[list[Part], list[int]]:
        """(parts, ids) of the conversation with a new question."""
        parts = self.template.parts([*self.head, *self.messages, Message("user", question)])
        more = rest(parts, self._parts)
        if more is None:
            return parts, encode(self._tokenizer, parts)
        return parts, self._ids + encode(self._tokenizer, more)

    def _remember(self, turn: Turn) -> None:
        if not turn.text:
            return
        self.messages += [Message("user", turn.question), Message("assistant", turn.text)]
        if turn.finish_reason == "stop":  # the ids go on into the stop string
            self._parts, self._ids = [], []
        else:
            self._parts = joined(turn.parts, turn.text)
            self._ids = turn.prompt + turn.stream.ids.tokens

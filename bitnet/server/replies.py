"""What goes back: completions, chat completions, the chunks of both, usage and models, as JSON values.

Shapes are those of the OpenAI API reference ("The completion object", "The chat completion object", "The chat
completion chunk object", "The model object").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitnet.scored import Scored
from bitnet.server.logprobs import Offsets, Reply, Spell, chat_logprobs, completion_logprobs

__all__ = [
    "Finished",
    "Head",
    "Offsets",
    "Reply",
    "Scored",
    "Spell",
    "chat_chunk",
    "chat_completion",
    "chat_first_chunk",
    "chat_last_chunk",
    "chat_logprobs",
    "chat_usage_chunk",
    "completion",
    "completion_chunk",
    "completion_logprobs",
    "completion_usage_chunk",
    "model",
    "models",
    "usage",
]


@dataclass
class Finished:
    """One choice, whole. Of an echoed prompt, `text` and `scored` begin with it."""

    index: int
    text: str
    finish_reason: str  # "stop" | "length"
    scored: list[Scored] | None  # None: no logprobs were asked for
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Head:
    """What the parts of one reply have in common. include_usage: chunks have the field, null in all but the last."""

    id: str
    created: int  # seconds since 1970
    model: str
    include_usage: bool = False


def completion(head: Head, finished: Sequence[Finished], n: int, spell: Spell) -> Reply:
    """A text completion; n: choices of each prompt, those of the first prompt first."""
    choices = [
        _completion_choice(one.index, one.text, completion_logprobs(one.scored, spell, Offsets()), one.finish_reason)
        for one in _in_order(finished)
    ]
    return _reply(head, "text_completion", choices) | {"usage": usage(finished, n)}


def completion_chunk(
    head: Head, index: int, text: str, logprobs: Reply | None = None, finish_reason: str | None = None
) -> Reply:
    """A piece of one choice of a completion; finish_reason in its last. logprobs: those of completion_logprobs."""
    return _chunk(head, "text_completion", [_completion_choice(index, text, logprobs, finish_reason)])


def completion_usage_chunk(head: Head, finished: Sequence[Finished], n: int) -> Reply:
    """The last chunk of a completion, where include_usage asks for one."""
    return _reply(head, "text_completion", []) | {"usage": usage(finished, n)}


def chat_completion(head: Head, finished: Sequence[Finished], spell: Spell) -> Reply:
    """A chat completion."""
    choices = [
        {
            "index": one.index,
            "message": {"role": "assistant", "content": one.text, "refusal": None},
            "logprobs": chat_logprobs(one.scored, spell),
            "finish_reason": one.finish_reason,
        }
        for one in _in_order(finished)
    ]
    return _reply(head, "chat.completion", choices) | {"usage": usage(finished, len(finished))}


def chat_first_chunk(head: Head, index: int) -> Reply:
    """What begins a choice: who speaks."""
    return _chat_chunk(head, index, {"role": "assistant", "content": ""})


def chat_chunk(head: Head, index: int, text: str, logprobs: Reply | None = None) -> Reply:
    """A piece of a choice. logprobs: those of chat_logprobs."""
    return _chat_chunk(head, index, {"content": text}, logprobs)


def chat_last_chunk(head: Head, index: int, finish_reason: str) -> Reply:
    """What ends a choice."""
    return _chat_chunk(head, index, {}, finish_reason=finish_reason)


def chat_usage_chunk(head: Head, finished: Sequence[Finished]) -> Reply:
    """The last chunk of a chat completion, where include_usage asks for one."""
    return _reply(head, "chat.completion.chunk", []) | {"usage": usage(finished, len(finished))}


def usage(finished: Sequence[Finished], n: int) -> Reply:
    """Tokens of all choices; a prompt counts once, not for each of its n choices."""
    prompts = [one for one in finished if one.index % n == 0]
    prompt_tokens = sum(one.prompt_tokens for one in prompts)
    completion_tokens = sum(one.completion_tokens for one in finished)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
    }


def model(name: str, created: int) -> Reply:
    """A model, as GET /v1/models/NAME has it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "bitnet"}


def models(names: Sequence[str], created: int) -> Reply:
    """The list of GET /v1/models."""
    return {"object": "list", "data": [model(name, created) for name in names]}


def _in_order(finished: Sequence[Finished]) -> list[Finished]:
    return sorted(finished, key=lambda one: one.index)


def _reply(head: Head, kind: str, choices: list[Reply]) -> Reply:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model, "choices": choices}


def _chunk(head: Head, kind: str, choices: list[Reply]) -> Reply:
    return _reply(head, kind, choices) | ({"usage": None} if head.include_usage else {})


def _completion_choice(index: int, text: str, logprobs: Reply | None, finish_reason: str | None) -> Reply:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _chat_chunk(
    head: Head, index: int, delta: Reply, logprobs: Reply | None = None, finish_reason: str | None = None
) -> Reply:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return _chunk(head, "chat.completion.chunk", [choice])

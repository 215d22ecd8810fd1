"""What clients ask for: bodies of requests, parsed from JSON, as dataclasses. Nothing here knows HTTP or a model.

Names, types and ranges are those of the OpenAI API reference (Completions and Chat Completions, "Create"); where this
server goes further (20 logprobs of a completion instead of 5, top_k, repetition_penalty), a comment says so.
What changes the text there and is not done here is refused (code "unsupported"), unless its value asks for nothing.
What cannot change it (user, metadata, store, service_tier, ...) and unknown fields are ignored, as other servers do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitnet.chat_template import Message
from bitnet.server.fields import UNSUPPORTED, ApiError, Fields, checked_text, is_number, refusal, shown
from bitnet.server.messages import messages

__all__ = [
    "ApiError",
    "ChatRequest",
    "CompletionRequest",
    "Options",
    "chat_request",
    "checked_text",
    "completion_request",
]

MOST_CHOICES = MOST_PROMPTS = 128
MOST_STOPS = 4
MOST_LOGPROBS = 20  # the reference allows a completion 5; clients of other servers ask for more
IDS = re.compile("0|[1-9][0-9]{0,17}")  # one way to write each, so that no two keys of logit_bias are the same token


@dataclass(frozen=True)
class Options:
    """What both kinds of request share. None: not given, so the server's default, where nothing else is said."""

    model: str | None
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: int | None  # likeliest tokens shown beside each one; 0: the token's own alone; None: no logprobs
    seed: int | None  # 0 to 2**64 - 1
    temperature: float | None
    top_p: float | None
    top_k: int | None  # 0: all tokens
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]  # ascending by id


@dataclass(frozen=True)
class CompletionRequest:
    """prompts: texts or ids. echo: each text begins with its prompt."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    options: Options


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to be continued."""

    messages: tuple[Message, ...]
    options: Options


def completion_request(body: object) -> CompletionRequest:
    """The body of POST /v1/completions, parsed. ApiError, status 400, for what it may not say.

    Unlike OpenAI's, a prompt is required; "" asks for a text from its beginning.
    """
    fields = Fields(body)
    echo = fields.flag("echo")
    limit = fields.integer("max_tokens", low=0)
    if limit == 0 and not echo:
        raise fields.refusal("max_tokens", "must be at least 1 without echo, not 0")
    logprobs = fields.get("logprobs")
    if isinstance(logprobs, bool):
        why = (
            f"must be an integer from 0 to {MOST_LOGPROBS} here, not {shown(logprobs)}; chat completions take a boolean"
        )
        raise fields.refusal("logprobs", why)
    logprobs = fields.integer("logprobs", 0, MOST_LOGPROBS)
    options = _options(fields, limit, logprobs)
    best_of = fields.integer("best_of", 1)
    if best_of not in (None, options.n):
        raise fields.refusal(
            "best_of", f"is not supported unless it is n, {options.n}, not {shown(best_of)}", UNSUPPORTED
        )
    fields.neutral("suffix", "")
    return CompletionRequest(_prompts(fields.get("prompt")), echo, options)


def chat_request(body: object) -> ChatRequest:
    """The body of POST /v1/chat/completions, parsed. ApiError, status 400, for what it may not say.

    max_completion_tokens, the newer name, is what counts where both are given; then it may not be above max_tokens.
    """
    fields = Fields(body)
    limit, older = fields.integer("max_completion_tokens", low=1), fields.integer("max_tokens", low=1)
    if limit is None:
        limit = older
    elif older is not None and limit > older:
        raise fields.refusal(
            "max_completion_tokens", f"must not be above max_tokens, {shown(older)}, but is {shown(limit)}"
        )
    top = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    logprobs = (top or 0) if fields.flag("logprobs") else None
    if top is not None and logprobs is None:
        raise fields.refusal("top_logprobs", f"needs logprobs to be true, but is {top} without it")
    for name in ("tools", "functions"):
        fields.neutral(name, [])
    for name in ("tool_choice", "function_call", "reasoning_effort"):
        fields.neutral(name, "none")
    for name in ("audio", "moderation", "prediction", "web_search_options"):
        fields.neutral(name)
    fields.neutral("modalities", ["text"])
    fields.neutral("response_format", {"type": "text"})
    fields.neutral("verbosity", "medium")
    return ChatRequest(messages(fields.get("messages")), _options(fields, limit, logprobs))


def _options(fields: Fields, max_tokens: int | None, logprobs: int | None) -> Options:
    n, seed = fields.integer("n", 1, MOST_CHOICES), fields.integer("seed")
    top_k = fields.integer("top_k", low=-1)  # an extension; 0 and -1 are what clients send for "all tokens"
    stream = fields.flag("stream")
    include_usage = False
    if fields.get("stream_options") is not None:
        include_usage = Fields(fields.get("stream_options"), "stream_options").flag("include_usage")
        if not stream:
            raise fields.refusal("stream_options", "needs stream to be true")
    return Options(
        model=fields.text("model"),
        max_tokens=max_tokens,
        n=1 if n is None else n,
        stop=_stops(fields),
        stream=stream,
        include_usage=include_usage,
        logprobs=logprobs,
        seed=None if seed is None else seed % 2**64,
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 0, 1, above=True),
        top_k=None if top_k is None else max(top_k, 0),
        # An extension. Within these bounds no logit becomes infinite, whatever f32 it was.
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100),
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        logit_bias=_biases(fields.get("logit_bias")),
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    stops = value if isinstance(value, list) else [value]
    if len(stops) > MOST_STOPS:
        raise fields.refusal("stop", f"must be a string or at most {MOST_STOPS} of them, not {shown(value)}")
    if "" in stops:
        raise fields.refusal("stop", 'must not be empty, as "" is: every text has it at its beginning')
    return tuple(checked_text(stop, "stop") for stop in stops)


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise refusal("logit_bias", f"must be an object of token ids and numbers, not {shown(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and IDS.fullmatch(key) else key
        if not _is_id(token) or token in biases:
            raise refusal("logit_bias", f"must have token ids as keys, each once, not {shown(key)}")
        if not is_number(bias, -100, 100):
            raise refusal("logit_bias", f"must have numbers from -100 to 100, not {shown(bias)} for {shown(key)}")
        biases[token] = float(bias)
    return tuple(sorted(biases.items()))


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise refusal("prompt", f"must be a string, a list of token ids or a list of those, not {shown(value)}")
        return (checked_text(value, "prompt"),)
    if not value:
        raise refusal("prompt", "must not be an empty list")
    if not isinstance(value[0], (str, list)):
        return (_ids(value, "prompt"),)
    if len(value) > MOST_PROMPTS:
        raise refusal("prompt", f"must be at most {MOST_PROMPTS} prompts, not {len(value)}")
    one = checked_text if isinstance(value[0], str) else _ids
    return tuple(one(prompt, f"prompt[{at}]") for at, prompt in enumerate(value))


def _ids(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise refusal(name, f"must be a list of token ids, at least one, not {shown(value)}")
    for at, token in enumerate(value):
        if not _is_id(token):
            raise refusal(f"{name}[{at}]", f"must be a token id, an integer of at least 0, not {shown(token)}")
    return tuple(value)


def _is_id(value: object) -> bool:
    return type(value) is int and value >= 0

"""Replies have the shapes that the openai client declares, and the numbers and places in them are right."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="its types say what a reply must look like")
httpx = pytest.importorskip("httpx", reason="the openai client speaks through it")

from openai.types import Completion, Model  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402
from pydantic import BaseModel, ValidationError  # noqa: E402

from bitnet.server import replies  # noqa: E402
from bitnet.server.replies import Finished, Head, Offsets, Scored  # noqa: E402

HEAD = Head("id-1", 1700000000, "nano")
WITH_USAGE = Head("id-1", 1700000000, "nano", include_usage=True)
SPELLED = {0: b"", 1: b"a", 2: b"bc", 3: "é".encode(), 4: b"\xe2\x82", 5: b"\xac!", 6: b"\xff"}
SCORED = [Scored(1, -0.5, ((1, -0.5), (2, -1.5))), Scored(4, -math.inf, ((2, -0.25), (3, -2.0)))]
CHOICE = Finished(0, "a\ufffd", "length", SCORED, 5, 2, 3)


def spell(token: int) -> bytes:
    return SPELLED[token]


def valid(kind: Any, reply: replies.Reply) -> Any:
    """The reply as a client's type: strict, without a field that the type does not have, nothing changed or dropped."""
    text = json.dumps(reply, allow_nan=False)
    read = kind.model_validate_json(text, strict=True)
    assert read.model_dump(exclude_unset=True) == json.loads(text)
    unknown(read)
    return read


def unknown(read: object) -> None:
    if isinstance(read, BaseModel):
        assert not read.model_extra
        for name in type(read).model_fields:
            unknown(getattr(read, name))
    elif isinstance(read, list):
        for one in read:
            unknown(one)


WHOLE = [
    (Completion, replies.completion(HEAD, [CHOICE], 1, spell)),
    (ChatCompletion, replies.chat_completion(HEAD, [CHOICE], spell)),
    (ChatCompletionChunk, replies.chat_first_chunk(HEAD, 0)),
    (ChatCompletionChunk, replies.chat_chunk(HEAD, 0, "a", replies.chat_logprobs(SCORED, spell))),
    (ChatCompletionChunk, replies.chat_last_chunk(HEAD, 0, "stop")),
    (ChatCompletionChunk, replies.chat_chunk(WITH_USAGE, 0, "a")),
    (ChatCompletionChunk, replies.chat_usage_chunk(WITH_USAGE, [CHOICE])),
    (Completion, replies.completion_chunk(HEAD, 0, "a", None, "stop")),
    (Completion, replies.completion_usage_chunk(WITH_USAGE, [CHOICE], 1)),
    (Model, replies.model("nano", 1700000000)),
]


@pytest.mark.parametrize(("kind", "reply"), WHOLE)
def test_shapes_are_those_of_the_client(kind: Any, reply: replies.Reply) -> None:
    valid(kind, reply)
    for name in ("id", "object", "created", *(["model", "choices"] if "choices" in reply else ["owned_by"])):
        with pytest.raises(ValidationError):
            valid(kind, {key: value for key, value in reply.items() if key != name})


def test_completion() -> None:
    other = Finished(1, "", "stop", None, 5, 0)
    read = valid(Completion, replies.completion(HEAD, [other, CHOICE], 2, spell))
    assert (read.id, read.object, read.created, read.model) == ("id-1", "text_completion", 1700000000, "nano")
    assert [choice.index for choice in read.choices] == [0, 1]
    assert [choice.text for choice in read.choices] == ["a\ufffd", ""]
    assert [choice.finish_reason for choice in read.choices] == ["length", "stop"]
    assert read.choices[1].logprobs is None
    logprobs = read.choices[0].logprobs
    assert logprobs.tokens == ["a", "\ufffd"]
    assert logprobs.token_logprobs == [-0.5, -9999.0]
    assert logprobs.top_logprobs == [{"a": -0.5, "bc": -1.5}, {"bc": -0.25, "é": -2.0, "\ufffd": -9999.0}]
    assert logprobs.text_offset == [0, 1]


def test_an_echoed_prompt_begins_without_a_logprob() -> None:
    scored = [Scored(2, None, ()), Scored(3, -1.0, ()), Scored(1, -2.0, ())]
    logprobs = replies.completion_logprobs(scored, spell, Offsets())
    assert logprobs == {
        "tokens": ["bc", "é", "a"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [None, {"é": -1.0}, {"a": -2.0}],
        "text_offset": [0, 2, 3],
    }
    with pytest.raises(ValueError, match="token 2 of a chat completion has no logprob"):
        replies.chat_logprobs(scored, spell)


def test_of_tokens_spelled_alike_the_likeliest_is_shown() -> None:
    logprobs = replies.completion_logprobs([Scored(6, -3.0, ((4, -1.0), (6, -3.0)))], spell, Offsets())
    assert logprobs is not None
    assert logprobs["top_logprobs"] == [{"\ufffd": -1.0}]


@pytest.mark.parametrize(
    ("spelled", "places"),
    [
        ([b"ab", b"c", b""], [0, 2, 3]),
        ([b"a", b"\xe2", b"\x82", b"\xac", b"b"], [0, 1, 1, 1, 2]),
        ([b"\xe2\x82", b"\xacx", b"y"], [0, 0, 2]),
        ([b"\xe2", b"", b"a"], [0, 0, 1]),  # a character that is never finished is one U+FFFD
        ([b"\xe2\x82", "é".encode(), b"x"], [0, 1, 2]),
        ([b"\xff", b"\xe2", b"\xe2\x82\xac", b"."], [0, 1, 2, 3]),
        (["🙂".encode(), b"a"], [0, 1]),
    ],
)
def test_offsets_count_characters(spelled: list[bytes], places: list[int]) -> None:
    offsets = Offsets()
    assert [offsets.push(piece) for piece in spelled] == places


def test_offsets_point_at_each_token_in_the_text() -> None:
    pieces = ["one", " é", "🙂", "", "\n€uro"]
    text, offsets = "".join(pieces), Offsets()
    for piece in pieces:
        assert text.startswith(piece, offsets.push(piece.encode()))


def test_chunks_of_a_choice_share_its_offsets() -> None:
    offsets = Offsets()
    whole = replies.completion_logprobs(SCORED + SCORED, spell, Offsets())
    parts = [replies.completion_logprobs([one], spell, offsets) for one in SCORED + SCORED]
    assert whole is not None
    for name, values in whole.items():
        assert [value for part in parts if part is not None for value in part[name]] == values


def test_chat_completion() -> None:
    reply = replies.chat_completion(HEAD, [Finished(1, "x", "stop", None, 5, 7), CHOICE], spell)
    read = valid(ChatCompletion, reply)
    assert [choice.index for choice in read.choices] == [0, 1]
    assert [choice.message.content for choice in read.choices] == ["a\ufffd", "x"]
    assert {choice.message.role for choice in read.choices} == {"assistant"}
    assert [choice.finish_reason for choice in read.choices] == ["length", "stop"]
    assert read.choices[1].logprobs is None
    assert read.usage.prompt_tokens == 5
    assert read.usage.completion_tokens == 9
    second = reply["choices"][0]["logprobs"]["content"][1]
    assert second == {
        "token": "\ufffd",
        "logprob": -9999.0,
        "bytes": [0xE2, 0x82],
        "top_logprobs": [
            {"token": "bc", "logprob": -0.25, "bytes": [98, 99]},
            {"token": "é", "logprob": -2.0, "bytes": [0xC3, 0xA9]},
        ],
    }
    assert reply["choices"][0]["logprobs"]["refusal"] is None


def test_usage_counts_a_prompt_once() -> None:
    choices = [Finished(index, "", "stop", None, 10 + index // 2, 1 + index, index // 2) for index in (3, 0, 2, 1)]
    assert replies.usage(choices, 2) == {
        "prompt_tokens": 10 + 11,
        "completion_tokens": 1 + 2 + 3 + 4,
        "total_tokens": 31,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_only_include_usage_brings_usage_into_chunks() -> None:
    plain = [
        replies.chat_first_chunk(HEAD, 0),
        replies.chat_chunk(HEAD, 0, "a"),
        replies.completion_chunk(HEAD, 0, "a"),
    ]
    assert not any("usage" in chunk for chunk in plain)
    asked = [replies.chat_last_chunk(WITH_USAGE, 0, "stop"), replies.completion_chunk(WITH_USAGE, 0, "a")]
    assert [chunk["usage"] for chunk in asked] == [None, None]
    last = replies.chat_usage_chunk(WITH_USAGE, [CHOICE])
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 7)


def client(path: str, content: bytes, kind: str = "application/json") -> Any:
    """The real client before a server that gives one answer."""

    def answer(request: Any) -> Any:
        assert request.url.path == path
        return httpx.Response(200, content=content, headers={"content-type": kind})

    http = httpx.Client(transport=httpx.MockTransport(answer))
    return openai.OpenAI(api_key="none", base_url="http://server/v1", http_client=http, max_retries=0)


def events(chunks: list[replies.Reply]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def test_the_client_reads_models_and_echoed_logprobs() -> None:
    with client("/v1/models", json.dumps(replies.models(["nano", "twin"], 1)).encode()) as api:
        assert [model.id for model in api.models.list()] == ["nano", "twin"]
    echoed = Finished(0, "bca", "length", [Scored(2, None, ()), Scored(1, -1.0, ())], 1, 1)
    body = json.dumps(replies.completion(HEAD, [echoed], 1, spell)).encode()
    with client("/v1/completions", body) as api:
        choice = api.completions.create(model="nano", prompt="bc", echo=True, logprobs=0).choices[0]
    assert choice.logprobs.token_logprobs == [None, -1.0]


def test_the_client_reads_streams() -> None:
    chat = [
        replies.chat_first_chunk(WITH_USAGE, 0),
        replies.chat_chunk(WITH_USAGE, 0, "Hel"),
        replies.chat_chunk(WITH_USAGE, 0, "lo", replies.chat_logprobs(SCORED, spell)),
        replies.chat_last_chunk(WITH_USAGE, 0, "stop"),
        replies.chat_usage_chunk(WITH_USAGE, [CHOICE]),
    ]
    with client("/v1/chat/completions", events(chat), "text/event-stream") as api:
        messages = [{"role": "user", "content": "Hi"}]
        got = list(api.chat.completions.create(model="nano", messages=messages, stream=True))
    assert got[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in got[:-1]) == "Hello"
    assert [chunk.choices[0].finish_reason for chunk in got[:-1]] == [None, None, None, "stop"]
    assert (got[-1].choices, got[-1].usage.prompt_tokens_details.cached_tokens) == ([], 3)

    text = [replies.completion_chunk(HEAD, 0, "Hel"), replies.completion_chunk(HEAD, 0, "lo", None, "length")]
    with client("/v1/completions", events(text), "text/event-stream") as api:
        pieces = list(api.completions.create(model="nano", prompt="", stream=True))
    assert [(piece.choices[0].text, piece.choices[0].finish_reason) for piece in pieces] == [
        ("Hel", None),
        ("lo", "length"),
    ]

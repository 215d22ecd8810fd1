"""Bodies of requests: every field is honoured, or refused by a sentence that names it and its value."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet.chat_template import Message
from bitnet.server.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Options,
    chat_request,
    completion_request,
)

PLAIN = Options(None, None, 1, (), False, False, None, None, None, None, None, None, 0.0, 0.0, ())
TALK = [{"role": "user", "content": "Hi"}]


def completion(**fields: Any) -> CompletionRequest:
    return completion_request({"prompt": "Once"} | fields)


def chat(**fields: Any) -> ChatRequest:
    return chat_request({"messages": TALK} | fields)


def test_plain_requests_leave_everything_to_the_server() -> None:
    assert completion() == CompletionRequest(("Once",), False, PLAIN)
    assert chat() == ChatRequest((Message("user", "Hi"),), PLAIN)


@pytest.mark.parametrize("request_", [completion, chat])
@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ({"model": "nano"}, {"model": "nano"}),
        ({"max_tokens": 1}, {"max_tokens": 1}),
        ({"n": 128}, {"n": 128}),
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": []}, {"stop": ()}),
        ({"stop": ["a", "b", "c", "é"]}, {"stop": ("a", "b", "c", "é")}),
        ({"stream": True}, {"stream": True}),
        ({"stream": True, "stream_options": {}}, {"stream": True}),
        ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True, "include_usage": True}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"seed": 2**64 + 3}, {"seed": 3}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"top_p": 1e-9}, {"top_p": 1e-9}),
        ({"top_k": 40}, {"top_k": 40}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
        ({"logit_bias": {}}, {}),
        ({"logit_bias": {"20": -100, "3": 0.5, 7: 100}}, {"logit_bias": ((3, 0.5), (7, 100.0), (20, -100.0))}),
        ({"user": 3, "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "no_such_field": [1]}, {}),
    ],
)
def test_shared_fields(request_: Any, sent: dict[str, Any], read: dict[str, Any]) -> None:
    options = request_(**sent).options
    assert options == replace(PLAIN, **read)
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
        assert getattr(options, name) is None or type(getattr(options, name)) is float


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", ("",)),
        (["a", ""], ("a", "")),
        ([5, 0], ((5, 0),)),
        ([[5], [6, 7]], ((5,), (6, 7))),
        (["a"] * 128, ("a",) * 128),
        ([1] * 200, ((1,) * 200,)),
    ],
)
def test_prompts(prompt: object, prompts: tuple[object, ...]) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_fields_of_completions() -> None:
    assert completion(echo=True, max_tokens=0).echo
    assert completion(echo=True, max_tokens=0).options.max_tokens == 0
    assert [completion(logprobs=count).options.logprobs for count in (None, 0, 20)] == [None, 0, 20]
    assert completion(best_of=3, n=3, suffix="").options.n == 3


def test_fields_of_chats() -> None:
    assert chat(logprobs=True).options.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).options.logprobs == 20
    assert chat(logprobs=False).options.logprobs is None
    assert chat(max_completion_tokens=3).options.max_tokens == 3
    assert chat(max_completion_tokens=3, max_tokens=4).options.max_tokens == 3
    neutral = {"tools": [], "tool_choice": "none", "functions": [], "modalities": ["text"], "parallel_tool_calls": True}
    assert chat(response_format={"type": "text"}, **neutral).options == PLAIN


def test_messages() -> None:
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]},
        {"role": "user", "content": "", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
        {"role": "assistant"},
        {"role": "user", "content": "🙂"},
    ]
    assert chat(messages=talk).messages == (
        Message("system", "Be brief."),
        Message("system", "a b"),
        Message("user", ""),
        Message("assistant", ""),
        Message("assistant", ""),
        Message("user", "🙂"),
    )


SHARED_FIELDS = (
    "model max_tokens n stop stream stream_options logprobs seed temperature top_p top_k repetition_penalty "
    "presence_penalty frequency_penalty logit_bias user"
).split()
COMPLETION_FIELDS = "echo best_of suffix".split()
CHAT_FIELDS = (
    "max_completion_tokens top_logprobs tools tool_choice functions function_call response_format audio modalities "
    "prediction reasoning_effort verbosity web_search_options moderation store metadata service_tier"
).split()


def test_null_means_not_given() -> None:
    assert completion(**dict.fromkeys(SHARED_FIELDS + COMPLETION_FIELDS)) == completion()
    assert chat(**dict.fromkeys(SHARED_FIELDS + CHAT_FIELDS)) == chat()


NAN, INF = float("nan"), float("inf")
SHARED = [
    ({"model": 3}, "model", "3"),
    ({"model": "\ud83d"}, "model", r"\ud83d"),
    ({"max_tokens": -1}, "max_tokens", "-1"),
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"max_tokens": "5"}, "max_tokens", '"5"'),
    ({"max_tokens": 5.0}, "max_tokens", "5.0"),
    ({"max_tokens": True}, "max_tokens", "true"),
    ({"n": 0}, "n", "0"),
    ({"n": 129}, "n", "129"),
    ({"n": True}, "n", "true"),
    ({"stop": ["a"] * 5}, "stop", "a list of length 5"),
    ({"stop": ""}, "stop", '""'),
    ({"stop": ["a", ""]}, "stop", '""'),
    ({"stop": 3}, "stop", "3"),
    ({"stop": ["a", 3]}, "stop", "3"),
    ({"stop": "x\udc00"}, "stop", r"\udc00"),
    ({"stream": 1}, "stream", "1"),
    ({"stream": "true"}, "stream", '"true"'),
    ({"stream_options": {}}, "stream_options", "stream to be true"),
    ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options", "stream to be true"),
    ({"stream_options": [], "stream": True}, "stream_options", "[]"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage", "1"),
    ({"seed": True}, "seed", "true"),
    ({"seed": 1.5}, "seed", "1.5"),
    ({"temperature": -0.1}, "temperature", "-0.1"),
    ({"temperature": 2.1}, "temperature", "2.1"),
    ({"temperature": NAN}, "temperature", "NaN"),
    ({"temperature": INF}, "temperature", "Infinity"),
    ({"temperature": "1"}, "temperature", '"1"'),
    ({"temperature": False}, "temperature", "false"),
    ({"temperature": 10**4000}, "temperature", "bits"),
    ({"top_p": 0}, "top_p", "0"),
    ({"top_p": 1.01}, "top_p", "1.01"),
    ({"top_p": NAN}, "top_p", "NaN"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"top_k": 1.0}, "top_k", "1.0"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0"),
    ({"repetition_penalty": INF}, "repetition_penalty", "Infinity"),
    ({"presence_penalty": 2.5}, "presence_penalty", "2.5"),
    ({"presence_penalty": NAN}, "presence_penalty", "NaN"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-3"),
    ({"frequency_penalty": []}, "frequency_penalty", "[]"),
    ({"logit_bias": [[1, 2]]}, "logit_bias", "a list of length 1"),
    ({"logit_bias": {"x": 1}}, "logit_bias", '"x"'),
    ({"logit_bias": {"-1": 1}}, "logit_bias", '"-1"'),
    ({"logit_bias": {-1: 1}}, "logit_bias", "-1"),
    ({"logit_bias": {True: 1}}, "logit_bias", "true"),
    ({"logit_bias": {"05": 1}}, "logit_bias", '"05"'),
    ({"logit_bias": {"٣": 1}}, "logit_bias", r"\u0663"),
    ({"logit_bias": {"5": 1, 5: 2}}, "logit_bias", "5"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", '999.."'),
    ({"logit_bias": {"5": 100.5}}, "logit_bias", "100.5"),
    ({"logit_bias": {"5": True}}, "logit_bias", "true"),
    ({"logit_bias": {"5": NAN}}, "logit_bias", "NaN"),
    ({"logit_bias": {"5": None}}, "logit_bias", "null"),
]
COMPLETIONS = [
    ({"prompt": None}, "prompt", "null"),
    ({"prompt": 3}, "prompt", "3"),
    ({"prompt": {"a": 1}}, "prompt", '{"a": 1}'),
    ({"prompt": []}, "prompt", "an empty list"),
    ({"prompt": [[]]}, "prompt[0]", "[]"),
    ({"prompt": ["a", 3]}, "prompt[1]", "3"),
    ({"prompt": ["a", [3]]}, "prompt[1]", "[3]"),
    ({"prompt": [[3], "a"]}, "prompt[1]", '"a"'),
    ({"prompt": [1, -1]}, "prompt[1]", "-1"),
    ({"prompt": [True]}, "prompt[0]", "true"),
    ({"prompt": [1, 2.0]}, "prompt[1]", "2.0"),
    ({"prompt": [1, "a"]}, "prompt[1]", '"a"'),
    ({"prompt": [None]}, "prompt[0]", "null"),
    ({"prompt": [[1], [2, -5]]}, "prompt[1][1]", "-5"),
    ({"prompt": ["a"] * 129}, "prompt", "129"),
    ({"prompt": [[1]] * 129}, "prompt", "129"),
    ({"prompt": "\ud800"}, "prompt", r"\ud800"),
    ({"prompt": ["a", "b\udfff"]}, "prompt[1]", r"\udfff"),
    ({"echo": 1}, "echo", "1"),
    ({"max_tokens": -1, "echo": True}, "max_tokens", "-1"),
    ({"logprobs": True}, "logprobs", "true"),
    ({"logprobs": False}, "logprobs", "false"),
    ({"logprobs": 21}, "logprobs", "21"),
    ({"logprobs": -1}, "logprobs", "-1"),
    ({"best_of": True}, "best_of", "true"),
]
CHATS = [
    ({"messages": None}, "messages", "null"),
    ({"messages": []}, "messages", "[]"),
    ({"messages": "Hi"}, "messages", '"Hi"'),
    ({"messages": ["Hi"]}, "messages[0]", '"Hi"'),
    ({"messages": [*TALK, {"content": "x"}]}, "messages[1].role", "null"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", '"robot"'),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", '["user"]'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "null"),
    ({"messages": [{"role": "system", "content": None}]}, "messages[0].content", "null"),
    ({"messages": [{"role": "assistant", "content": 3}]}, "messages[0].content", "3"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", r"\ud800"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "an empty list"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", '"x"'),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "null"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type", "null"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "0"),
    ({"max_completion_tokens": 5, "max_tokens": 4}, "max_completion_tokens", "5"),
    ({"max_completion_tokens": 5, "max_tokens": 0}, "max_tokens", "0"),
    ({"logprobs": 1}, "logprobs", "1"),
    ({"top_logprobs": 1}, "top_logprobs", "1"),
    ({"top_logprobs": 0, "logprobs": False}, "top_logprobs", "0"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "21"),
    ({"top_logprobs": True, "logprobs": True}, "top_logprobs", "true"),
]


def refusals() -> list[Any]:
    tables = [(completion, SHARED + COMPLETIONS), (chat, SHARED + CHATS)]
    return [pytest.param(request_, *row, id=f"{request_.__name__}-{row[1]}") for request_, t in tables for row in t]


@pytest.mark.parametrize(("request_", "sent", "param", "value"), refusals())
def test_refused(request_: Any, sent: dict[str, Any], param: str, value: str) -> None:
    with pytest.raises(ApiError) as caught:
        request_(**sent)
    error = caught.value
    assert (error.status, error.kind, error.param, error.code) == (400, "invalid_request_error", param, None)
    assert error.message.startswith(f"{param} ")
    assert value in error.message
    assert len(error.message) < 300
    assert error.message.isascii()
    body = {"message": error.message, "type": "invalid_request_error", "param": param, "code": None}
    assert error.body() == {"error": body}


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}


@pytest.mark.parametrize(
    ("request_", "sent", "param"),
    [
        (completion, {"best_of": 2}, "best_of"),
        (completion, {"best_of": 1, "n": 2}, "best_of"),
        (completion, {"suffix": "end"}, "suffix"),
        (completion, {"suffix": 3}, "suffix"),
        (chat, {"tools": [{"type": "function"}]}, "tools"),
        (chat, {"tools": {}}, "tools"),
        (chat, {"tool_choice": "auto"}, "tool_choice"),
        (chat, {"functions": [{"name": "f"}]}, "functions"),
        (chat, {"function_call": {"name": "f"}}, "function_call"),
        (chat, {"response_format": {"type": "json_object"}}, "response_format"),
        (chat, {"response_format": "text"}, "response_format"),
        (chat, {"audio": {"voice": "alloy"}}, "audio"),
        (chat, {"modalities": ["text", "audio"]}, "modalities"),
        (chat, {"modalities": []}, "modalities"),
        (chat, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
        (chat, {"reasoning_effort": "high"}, "reasoning_effort"),
        (chat, {"verbosity": "low"}, "verbosity"),
        (chat, {"web_search_options": {}}, "web_search_options"),
        (chat, {"moderation": {"model": "m"}}, "moderation"),
        (chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        (chat, {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls"),
        (chat, {"messages": [{"role": "assistant", "refusal": "No."}]}, "messages[0].refusal"),
    ],
)
def test_unsupported(request_: Any, sent: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError, match="is not supported") as caught:
        request_(**sent)
    error = caught.value
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert error.code == "unsupported"


@pytest.mark.parametrize("body", [None, [], "x", 3, True])
@pytest.mark.parametrize("request_", [completion_request, chat_request])
def test_body_must_be_an_object(request_: Any, body: object) -> None:
    with pytest.raises(ApiError, match=r"^the body must be a JSON object, not ") as caught:
        request_(body)
    assert caught.value.param is None


def test_a_long_value_is_not_sent_back_whole() -> None:
    with pytest.raises(ApiError) as caught:
        completion(temperature="x" * 10**6)
    assert caught.value.message == f'temperature must be a number from 0 to 2, not "{"x" * 60}.."'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inside: st.lists(inside, max_size=5) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=8,
)
NAMES = ["prompt", "messages", "echo", "best_of", *SHARED_FIELDS, *CHAT_FIELDS]


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_whatever_is_sent_is_read_or_refused(fields: dict[str, Any]) -> None:
    for request_ in (completion, chat):
        try:
            assert isinstance(request_(**fields).options, Options)
        except ApiError as error:
            assert error.status == 400  # noqa: PT017 - most of what is drawn is refused, some is not
            json.dumps(error.body(), allow_nan=False).encode()

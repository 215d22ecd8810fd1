"""`bitnet serve` by its clients: the openai package, plain HTTP, and what the model gives without a server."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

httpx = pytest.importorskip("httpx", reason="the server's tests need bitnet[test]")
openai = pytest.importorskip("openai", reason="the server's tests need bitnet[test]")

from served import served, service_of, wait_for  # noqa: E402

import bitnet  # noqa: E402
from bitnet import checkpoint, serve  # noqa: E402
from bitnet.chat_template import Message, choose, encode  # noqa: E402
from bitnet.decoding import generate  # noqa: E402
from bitnet.errors import CheckpointError  # noqa: E402
from bitnet.sampling import Sampler  # noqa: E402
from bitnet.server.app import MOST_BYTES, Access, Application  # noqa: E402
from bitnet.tokenizer import ByteTokenizer  # noqa: E402

SHAPE = bitnet.BitNetConfig(257, 32, 48, 2, 2, max_position_embeddings=160)
PROMPTS = ["To be", "or not to be", "", "a" * 40, "Grüße", "To be, or"]


@pytest.fixture(scope="module")
def model() -> bitnet.BitNetForCausalLM:
    made = bitnet.BitNetForCausalLM(SHAPE, seed=3)
    made.tokenizer = ByteTokenizer()  # type: ignore[attr-defined]
    made.head_weight.copy_(8 * made.head_weight.numpy(copy=True))  # so that some tokens are likely
    return made.pack()


@pytest.fixture(scope="module")
def place(model: bitnet.BitNetForCausalLM) -> Iterator[tuple[str, Application]]:
    with served(lambda: service_of(model, ByteTokenizer())) as (url, application):
        wait_for(lambda: application.service is not None)
        yield url, application


@pytest.fixture
def client(place: tuple[str, Application]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{place[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def alone(model: bitnet.BitNetForCausalLM, prompt: str, seed: int, most: int, **options: Any) -> str:
    """The text without a server."""
    return generate(model, prompt, most, seed=seed, **{"temperature": 1.0, "context": "stop", **options})


# ---- the same text --------------------------------------------------------------------------------------------------


def test_each_of_many_gets_the_text_it_would_get_alone(
    model: bitnet.BitNetForCausalLM, place: tuple[str, Application]
) -> None:
    """Eighteen at once on four slots, streamed and whole."""
    jobs = [(prompt, seed, seed % 2 == 0) for prompt in PROMPTS for seed in (0, 1, 2)]

    async def ask(client: Any, prompt: str, seed: int, stream: bool) -> str:
        options: dict[str, Any] = {"model": "any", "prompt": prompt, "seed": seed, "max_tokens": 24}
        if not stream:
            return (await client.completions.create(**options)).choices[0].text
        return "".join([c.choices[0].text async for c in await client.completions.create(**options, stream=True)])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{place[0]}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, *job) for job in jobs))

    assert asyncio.run(ask_all()) == [alone(model, prompt, seed, 24) for prompt, seed, _ in jobs]


def test_a_list_of_prompts_and_n_of_each(model: bitnet.BitNetForCausalLM, client: openai.OpenAI) -> None:
    """Choice i of a prompt has the seed plus i; ids are a prompt as well as text is."""
    texts = PROMPTS[:2]
    whole = client.completions.create(model="m", prompt=texts, n=3, seed=5, max_tokens=9, extra_body={"top_k": 40})
    assert [choice.index for choice in whole.choices] == list(range(6))
    wanted = [alone(model, text, seed, 9, top_k=40) for text in texts for seed in (5, 6, 7)]
    assert [choice.text for choice in whole.choices] == wanted
    ids = [list(text.encode()) for text in texts]
    again = client.completions.create(model="m", prompt=ids, n=3, seed=5, max_tokens=9, extra_body={"top_k": 40})
    assert [choice.text for choice in again.choices] == wanted
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(map(len, ids))
    assert whole.usage.completion_tokens <= 6 * 9


def test_a_conversation(model: bitnet.BitNetForCausalLM, client: openai.OpenAI) -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "Who?"),
        Message("assistant", "I."),
        Message("user", "?"),
    ]
    template = choose("auto", ByteTokenizer())
    ids = encode(ByteTokenizer(), template.parts(messages))
    wanted = generate(model, ids, 20, temperature=0.7, seed=4, stop=template.stops)
    sent: Any = [{"role": role, "content": content} for role, content in messages]
    sent[1]["content"] = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
    options: Any = {"model": "m", "messages": sent, "temperature": 0.7, "seed": 4, "max_completion_tokens": 20}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == wanted
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_strings_and_the_end_of_the_context(model: bitnet.BitNetForCausalLM, client: openai.OpenAI) -> None:
    full = alone(model, "To be", 1, 60)
    stop = full[10:12]
    found = client.completions.create(model="m", prompt="To be", seed=1, max_tokens=60, stop=["never there", stop])
    assert found.choices[0].text == full[: full.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    bias = {str(ByteTokenizer.eos_id): -100}
    long = client.completions.create(model="m", prompt="x" * 150, seed=1, max_tokens=500, logit_bias=bias)
    assert long.choices[0].finish_reason == "length"
    assert long.usage is not None
    assert long.usage.total_tokens == SHAPE.max_position_embeddings + 1  # the last is drawn and not run
    short = client.completions.create(model="m", prompt="To be", seed=1, logit_bias=bias)
    assert short.usage is not None
    assert short.usage.completion_tokens == 16


def test_penalties_and_biases(model: bitnet.BitNetForCausalLM, client: openai.OpenAI) -> None:
    """Token by token by the formula: logits + bias - presence - frequency * count, of what was drawn."""
    prompt = list(b"abcabc")
    bias = {97: 2.5, 98: -100.0}
    found = client.completions.create(
        model="m", prompt=prompt, temperature=0, max_tokens=12, presence_penalty=0.5, frequency_penalty=1.5,
        logit_bias={str(k): int(v * 2) / 2 for k, v in bias.items()}, logprobs=0,
    )  # fmt: skip
    drawn: list[int] = []
    for _ in range(12):
        with bitnet.no_grad():
            scores = model([[*prompt, *drawn]]).numpy()[0, -1].astype(np.float64)
        for token in set(drawn):
            scores[token] -= 0.5 + 1.5 * drawn.count(token)
        for token, value in bias.items():
            scores[token] += value
        drawn.append(int(scores.argmax()))
        if drawn[-1] == ByteTokenizer.eos_id:
            drawn.pop()
            break
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [bytes([token]).decode("utf-8", "replace") for token in drawn]
    assert Sampler(frequency_penalty=1.0).largest_needed is None


# ---- logprobs -------------------------------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_an_echoed_prompt(model: bitnet.BitNetForCausalLM, client: openai.OpenAI, stream: bool) -> None:
    """To the last bits of a float64: the same logits, and the same formula in another order of sums."""
    text = "To be, or not to be: that is the question. " * 2
    ids = list(text.encode())
    options: Any = {"model": "m", "prompt": ids, "echo": True, "logprobs": 3, "temperature": 0, "max_tokens": 2}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
        whole = "".join(chunk.text for chunk in chunks)
        parts = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
        tokens = [token for part in parts for token in part.tokens or []]
        values = [value for part in parts for value in part.token_logprobs or []]
        tops = [top for part in parts for top in part.top_logprobs or []]
        offsets = [offset for part in parts for offset in part.text_offset or []]
    else:
        choice = client.completions.create(**options).choices[0]
        found = choice.logprobs
        assert found is not None
        whole, tokens, values, tops = choice.text, found.tokens, found.token_logprobs, found.top_logprobs
        offsets = found.text_offset
    assert whole.startswith(text)
    with bitnet.no_grad():
        wanted = log_softmax(model([ids]).numpy()[0])
    assert values[0] is None
    assert values[1 : len(ids)] == pytest.approx([wanted[i, ids[i + 1]] for i in range(len(ids) - 1)], rel=1e-12)
    assert tokens[: len(ids)] == list(text)
    assert offsets[: len(ids)] == list(range(len(ids)))
    assert [max(top.values()) for top in tops[1 : len(ids)]] == pytest.approx(list(wanted[:-1].max(-1)), rel=1e-12)


def test_the_echo_alone(client: openai.OpenAI) -> None:
    found = client.completions.create(model="m", prompt="To be", echo=True, max_tokens=0, logprobs=1)
    assert found.choices[0].text == "To be"
    assert found.usage is not None
    assert found.usage.completion_tokens == 0
    assert found.choices[0].logprobs is not None
    assert len(found.choices[0].logprobs.tokens or []) == 5


def test_logprobs_of_a_conversation(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "?"}], temperature=0, max_tokens=5, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    for one in logprobs.content or []:
        assert len(one.top_logprobs) == 2
        assert one.logprob == one.top_logprobs[0].logprob  # greedy: the likeliest
        assert one.bytes == one.top_logprobs[0].bytes


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_refusals_are_exceptions_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt has 161 tokens, and the context holds 160") as long:
        client.completions.create(model="m", prompt="x" * 161)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the prompt has the id 300, the model knows 0 to 256"):
        client.completions.create(model="m", prompt=[1, 300])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="m", prompt="x", temperature=3)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here, but 'tiny'"):
        client.models.retrieve("gpt-4")
    assert client.models.retrieve("tiny").id == "tiny"
    assert [one.id for one in client.models.list()] == ["tiny"]


def test_bodies_that_are_none(place: tuple[str, Application]) -> None:
    url, json_type = f"{place[0]}/v1/completions", {"Content-Type": "application/json"}
    with httpx.Client() as http:
        assert http.post(url, content=b"{}").status_code == 415
        assert http.post(url, content=b"{", headers=json_type).status_code == 400
        assert http.post(url, content=b"[" * 100_000, headers=json_type).status_code == 400
        assert http.post(url, content=b" " * (MOST_BYTES + 1), headers=json_type).status_code == 413
        wrong = http.get(url)
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
        reply = http.get(f"{place[0]}/v2")
        assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")


def test_tokens_and_texts(place: tuple[str, Application]) -> None:
    with httpx.Client(base_url=place[0]) as http:
        assert http.post("/tokenize", json={"content": "Grüße"}).json() == {"tokens": list("Grüße".encode())}
        assert http.post("/detokenize", json={"tokens": [65, 66]}).json() == {"content": "AB"}
        assert http.post("/tokenize", json={"content": 3}).status_code == 400
        assert http.post("/detokenize", json={"tokens": [True]}).status_code == 400
        assert http.post("/detokenize", json={"tokens": [999]}).status_code == 400


def test_keys(model: bitnet.BitNetForCausalLM) -> None:
    access = Access(("one", "zwei ü"), ("https://page.example",))
    with served(lambda: service_of(model, ByteTokenizer()), access) as (url, application):
        wait_for(lambda: application.service is not None)
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="two", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError, match="a key is needed"):
            wrong.completions.create(model="m", prompt="x")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="one", max_retries=0) as right:
            assert right.completions.create(model="m", prompt="x", max_tokens=1).choices
        with httpx.Client(base_url=url) as http:
            assert http.get("/health").json() == {"status": "ok"}
            assert http.get("/").status_code == 200
            assert http.get("/v1/models").status_code == 401
            assert http.get("/metrics").status_code == 401
            asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
            assert http.options("/v1/completions", headers=asked).headers["access-control-allow-origin"]
            asked["Origin"] = "https://other.example"
            assert "access-control-allow-origin" not in http.options("/v1/completions", headers=asked).headers


def test_a_crowd_is_told_to_come_again(place: tuple[str, Application]) -> None:
    """Texts wait up to the queue's length; one request alone may be longer."""
    url, application = place
    assert application.service is not None
    engine, application.service.queue = application.service.engine, 3
    body = {"prompt": "x", "max_tokens": 150, "logit_bias": {"256": -100}}
    try:
        with httpx.Client(base_url=url) as http:
            assert http.post("/v1/completions", json={**body, "n": 200, "prompt": ["x", "y"]}).status_code == 400
            with http.stream("POST", "/v1/completions", json={**body, "n": 60, "stream": True}) as reply:
                lines = reply.iter_lines()  # kept: the connection goes with it
                next(lines)
                refused = http.post("/v1/completions", json=body)
                assert refused.status_code == 429, refused.text
                assert refused.headers["retry-after"] == "1"
        wait_for(lambda: engine.running == 0)
    finally:
        application.service.queue = 256


# ---- a server's life ------------------------------------------------------------------------------------------------


def test_while_the_model_is_opened(model: bitnet.BitNetForCausalLM) -> None:
    go = threading.Event()

    def load() -> Any:
        assert go.wait(10)
        return service_of(model, ByteTokenizer())

    with served(load) as (url, application), httpx.Client(base_url=url) as http:
        for path in ("/health", "/v1/models"):
            reply = http.get(path)
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "unavailable_error")
        assert http.get("/").status_code == 200
        go.set()
        wait_for(lambda: application.service is not None)
        assert http.get("/health").status_code == 200


def test_who_leaves_gives_up_the_slot(place: tuple[str, Application]) -> None:
    url, application = place
    assert application.service is not None
    engine = application.service.engine
    body = {"prompt": "x", "max_tokens": 159, "n": 12, "logit_bias": {"256": -100}}
    with httpx.Client(base_url=url) as http:
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
            next(reply.iter_lines())
        wait_for(lambda: engine.running == 0 and engine.waiting == 0)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json={**body, "n": 128}, timeout=0.05)
        wait_for(lambda: engine.running == 0 and engine.waiting == 0)


def test_a_model_that_is_damaged_fails_alone() -> None:
    """What a step cannot do is told to those that were in it, and the server goes on."""
    broken = bitnet.BitNetForCausalLM(SHAPE, seed=3)
    with served(lambda: service_of(broken, ByteTokenizer())) as (url, application):
        wait_for(lambda: application.service is not None)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            good = broken.head_weight.numpy(copy=True)
            broken.head_weight.copy_(np.full_like(good, np.nan))
            with pytest.raises(openai.InternalServerError, match="not finite"):
                client.completions.create(model="m", prompt="x")
            with pytest.raises(openai.APIError, match="not finite"):
                list(client.completions.create(model="m", prompt="x", stream=True))
            broken.head_weight.copy_(good)
            assert client.completions.create(model="m", prompt="x", max_tokens=1).choices


def test_what_it_did_can_be_read(place: tuple[str, Application], client: openai.OpenAI) -> None:
    def counts() -> dict[str, float]:
        lines = httpx.get(f"{place[0]}/metrics").text.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    wait_for(lambda: counts()["bitnet_running"] == 0)
    before = counts()
    text = "a common beginning of some length, and"
    for _ in range(2):
        used = client.completions.create(model="m", prompt=text, max_tokens=3, logit_bias={"256": -100}).usage
    after = counts()
    assert after["bitnet_requests_total"] == before["bitnet_requests_total"] + 2
    assert after["bitnet_generated_tokens_total"] == before["bitnet_generated_tokens_total"] + 6
    assert used is not None
    assert used.prompt_tokens_details is not None
    assert used.prompt_tokens_details.cached_tokens == len(text) - 1


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "run"
    checkpoint.save(folder, 1, bitnet.BitNetForCausalLM(SHAPE, seed=3), {}, {}, ByteTokenizer())
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_a_signal(run: Path, number: int, status: int) -> None:
    command = [sys.executable, "-m", "bitnet.cli", "serve", str(run), "--port", "0", "--name", "mine"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = ""
    while not url:
        line = process.stdout.readline()
        assert line, process.communicate()
        found = re.match(r"ready: (\S+),", line)
        url = found[1] if found else ""
    body = {"prompt": "x", "max_tokens": 100_000, "n": 128, "stream": True, "logit_bias": {"256": -100}}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as reply:
        lines = reply.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["model"] == "mine"
        start = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    assert time.monotonic() - start < 5  # a second and what a loaded machine adds
    assert process.returncode == status
    assert "Traceback" not in err
    assert out.endswith("stopped\n")


def test_requests_to_the_command_that_cannot_be_met(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n \n")
    for words, sentence in (
        (["--api-key-file", str(empty)], "holds no key"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1 port 8080"),
        (["--port", "99999"], "cannot listen on 127.0.0.1 port 99999"),
        (["--port", "0", "--slots", "0"], "at least 1 slot"),
        (["--port", "0", "--context", "5000"], "1 to 160 positions"),
        (["--port", "0", "--temperature", "-1"], "temperature"),
        (["--port", "0", "--threads", "1000"], "threads must be 0 (one a core) to 64, not 1000"),
    ):
        assert serve.main([str(run), *words]) == 2
        assert sentence in capsys.readouterr().err
    assert serve.main([str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "bitnet.server.listen", raising=False)
    assert serve.main([str(run)]) == 2
    assert "pip install 'bitnet[server]'" in capsys.readouterr().err
    assert issubclass(CheckpointError, ValueError)

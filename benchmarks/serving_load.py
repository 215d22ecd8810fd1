"""Clients of serving.py: each sends one streaming completion after the other, and notes when each token came.

The tokenizer of the model has one character for each id, so that the characters of a text are its tokens, whichever
server wrote it, and every token is sent as soon as it is drawn.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import numpy as np

LONGEST = 600.0  # seconds without a word from a server, after which it counts as stuck
FIRST_CHARACTER = 0x10000  # behind the surrogates, so that every number from here is a character

Prompts = list[list[str]]  # of each client, in the order in which it sends them


class ServerError(Exception):
    """A server that answered otherwise than it was asked."""


@dataclass(frozen=True)
class Ask:
    """What all requests have in common: tokens of a prompt and of its continuation, and how those are drawn."""

    prompt: int
    gen: int
    temperature: float
    seed: int

    def body(self, prompt: str) -> dict[str, Any]:
        """Of a request; each server ignores the fields that only the other knows. All ids may be drawn."""
        return {
            "prompt": prompt, "max_tokens": self.gen, "temperature": self.temperature, "seed": self.seed,
            "stream": True, "stream_options": {"include_usage": True},
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0,
        }  # fmt: skip


@dataclass
class Reply:
    """A text with the times, in seconds of one clock, at which it was asked for and each of its tokens came."""

    sent: float
    text: str = ""
    arrived: list[float] = field(default_factory=list)
    reused: int = 0  # tokens of the prompt that the server held already, where it tells

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrived[0] - self.sent

    @property
    def between(self) -> list[float]:
        """Seconds from each token to the next; 0 between those that came together."""
        return [later - sooner for sooner, later in pairwise(self.arrived)]


@dataclass(frozen=True)
class Turn:
    """What the clients saw. cpu_seconds: of this process, which clients and server share the machine with."""

    replies: list[Reply]  # in the order of in_order()
    seconds: float
    cpu_seconds: float


def alphabet(size: int) -> str:
    """So many characters, in code point order."""
    return "".join(chr(FIRST_CHARACTER + i) for i in range(size))


def draw(vocab_size: int, clients: int, requests: int, length: int, shared: int, seed: Sequence[int]) -> Prompts:
    """Prompts of random tokens, no two with a common beginning but for the `shared` first tokens of all of them."""
    known = alphabet(vocab_size)
    beginning = np.random.default_rng(0).integers(0, vocab_size, shared)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, vocab_size, (clients, requests, length - shared))
    return [["".join(known[i] for i in (*beginning, *rest)) for rest in of_client] for of_client in drawn]


def in_order(prompts: Prompts) -> list[str]:
    """The prompts about as they are sent: the first of each client, then the second."""
    return [prompt for of_all in zip(*prompts, strict=True) for prompt in of_all]


def load(url: str, prompts: Prompts, ask: Ask) -> Turn:
    """All clients at once, until each has its last text. Raises ServerError, httpx.HTTPError."""
    return asyncio.run(_load(url, prompts, ask))


def check_llama_cpp(url: str, length: int) -> None:
    """Raises ServerError unless llama-cpp-python's server, which does not tell, takes characters for tokens too."""
    text = alphabet(length)
    answer = httpx.post(f"{url}/extras/tokenize/count", json={"input": text}, timeout=LONGEST, trust_env=False)
    if answer.status_code != 200 or answer.json()["count"] != length:
        raise ServerError(f"{url} takes {length} tokens for others: {answer.text[:500]}")


async def _load(url: str, prompts: Prompts, ask: Ask) -> Turn:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=LONGEST, limits=limits, trust_env=False) as http:
        began, cpu = time.perf_counter(), time.process_time()
        found = await asyncio.gather(*(_client(http, of_client, ask) for of_client in prompts))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Turn([reply for of_all in zip(*found, strict=True) for reply in of_all], seconds, cpu)


async def _client(http: httpx.AsyncClient, prompts: list[str], ask: Ask) -> list[Reply]:
    return [await _reply(http, prompt, ask) for prompt in prompts]


async def _reply(http: httpx.AsyncClient, prompt: str, ask: Ask) -> Reply:
    reply, reason = Reply(time.perf_counter()), None
    async with http.stream("POST", "/v1/completions", json=ask.body(prompt)) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise ServerError(f"{http.base_url} answered with status {response.status_code}: {text[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            now, chunk = time.perf_counter(), json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ServerError(f"{http.base_url} ended a stream with {chunk['error']}")
            for choice in chunk["choices"]:
                reply.text += choice["text"]
                reply.arrived += [now] * len(choice["text"])
                reason = choice["finish_reason"] or reason
            if chunk.get("usage"):
                _read_usage(reply, chunk["usage"], ask)
    if len(reply.text) != ask.gen or reason != "length":
        raise ServerError(f"{http.base_url} gave {len(reply.text)} tokens and the reason {reason!r}, not {ask.gen}")
    return reply


def _read_usage(reply: Reply, usage: dict[str, Any], ask: Ask) -> None:
    if usage["prompt_tokens"] != ask.prompt:
        raise ServerError(f"a prompt of {ask.prompt} tokens was read as {usage['prompt_tokens']}")
    reply.reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)

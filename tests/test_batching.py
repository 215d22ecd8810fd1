"""Sequences that share steps: each gets what it would get alone, whoever else is there and whenever it came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitnet
from bitnet import batching
from bitnet.batching import COPY, Batch, generate_batch
from bitnet.decoder import ContextFullError
from bitnet.decoding import generate
from bitnet.drafting import Speculation
from bitnet.errors import ConfigError
from bitnet.sampling import Sampler
from bitnet.token_stream import TokenStream
from bitnet.tokenizer import ByteTokenizer

CONTEXT = 64
CONFIG = bitnet.BitNetConfig(
    257, 32, 64, 2, 4, 2, max_position_embeddings=CONTEXT, initializer_range=0.3, tie_word_embeddings=True
)
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> bitnet.BitNetForCausalLM:
    return bitnet.BitNetForCausalLM(CONFIG, seed=1)


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 257, length).tolist()


def alone(
    model: bitnet.BitNetForCausalLM, prompt: list[int], sampler: Sampler, most: int, **options: object
) -> list[int]:
    options = {"context": "stop"} | options
    return list(TokenStream(model, prompt, sampler, most, speculation=Speculation(), **options))


def drain(batch: Batch) -> dict[int, tuple[list[int], str | None]]:
    """Tokens and finish reason of every request, to the end."""
    found: dict[int, tuple[list[int], str | None]] = {}
    while batch.live:
        for request, token, reason, *_ in batch.step():
            tokens, before = found.get(request, ([], None))
            assert before is None
            found[request] = (tokens + [token] * (token is not None), reason)
    return found


# ---- each as if alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", ["f32", "bf16", "int8"])
def test_each_is_as_if_alone(
    model: bitnet.BitNetForCausalLM, isa: str, cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different lengths, samplers and ends; prompts run in pieces of nine tokens between the steps of the others."""
    monkeypatch.setattr(batching, "PREFILL", 9)
    batch = Batch(model, slots=5, cache_dtype=cache_dtype)
    wanted = {}
    for i, (length, most) in enumerate([(1, 30), (40, 5), (7, 57), (23, 1), (9, 20)]):
        sampler = Sampler(i / 4, top_k=50 + i, repetition_penalty=1 + i / 20, seed=i)
        prompt = prompt_of(i, length)
        wanted[batch.add(prompt, sampler, most)] = alone(model, prompt, sampler, most, cache_dtype=cache_dtype)
    assert {request: tokens for request, (tokens, _) in drain(batch).items()} == wanted


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_joining_and_leaving_at_any_time(model: bitnet.BitNetForCausalLM, data: st.DataObject) -> None:
    """A random life: prompts with common beginnings join, some are removed, contexts end or slide."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(batching, "PREFILL", data.draw(st.integers(1, 40)))
        monkeypatch.setattr(batching, "COPY", data.draw(st.integers(1, 30)))
        found, wanted = live(model, data)
    assert found == wanted


def live(model: bitnet.BitNetForCausalLM, data: st.DataObject) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """(tokens of each request, what they should be)."""
    batch = Batch(model, slots=3)
    wanted: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    for _ in range(8):
        if batch.free and data.draw(st.booleans()):
            prompt = prompt_of(0, data.draw(st.integers(0, 50))) + prompt_of(data.draw(st.integers(1, 9)), 3)
            sampler, most = Sampler(1.0, seed=data.draw(st.integers(0, 3))), data.draw(st.integers(1, 60))
            options = {"context": data.draw(st.sampled_from(["stop", "slide"])), "keep": data.draw(st.integers(0, 9))}
            request = batch.add(prompt, sampler, most, **options)
            wanted[request] = alone(model, prompt, sampler, most, **options)
            found[request] = []
        elif batch.live and data.draw(st.integers(0, 5)) == 0:
            request = batch.live[0]
            batch.remove(request)
            wanted[request] = wanted[request][: len(found[request])]
        for _ in range(data.draw(st.integers(0, 15))):
            for request, token, *_ in batch.step():
                found[request] += [token] * (token is not None)
    for request, (tokens, _) in drain(batch).items():
        found[request] += tokens
    return found, wanted


def test_every_sequence_moves_at_every_step(model: bitnet.BitNetForCausalLM) -> None:
    """Those whose prompt is in get one token each; a long prompt holds nobody up."""
    batch = Batch(model, slots=3)
    first, second = batch.add([1], Sampler(0), 9), batch.add([2, 3], Sampler(0), 9)
    assert [event.request for event in batch.step()] == [first, second]
    third = batch.add(prompt_of(0, 50), Sampler(0), 9)
    for _ in range(8):
        assert [event.request for event in batch.step()].count(first) == 1
    assert batch.live == [third]
    assert batch.free == 2


def test_the_model_is_called_once_a_step(model: bitnet.BitNetForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And replayed without Python once that number of sequences has been there."""
    batch = Batch(model, slots=4)
    for i in range(4):
        batch.add([i], Sampler(0), 5 + i)
    calls, head_input = [], bitnet.BitNetForCausalLM.head_input
    monkeypatch.setattr(
        bitnet.BitNetForCausalLM,
        "head_input",
        lambda self, tokens, cache=None: calls.append(tokens.shape) or head_input(self, tokens, cache),
    )
    drain(batch)
    assert calls == [(4, 1), (3, 1), (2, 1), (1, 1)]
    monkeypatch.undo()
    for i in range(4):
        batch.add([i + 9], Sampler(0), 5 + i)
    monkeypatch.setattr(bitnet.BitNetForCausalLM, "head_input", None)
    drain(batch)


class Interrupted(Sampler):
    """Is interrupted at every third draw, once."""

    def __init__(self) -> None:
        super().__init__(seed=5)
        object.__setattr__(self, "draws", 0)

    def __call__(self, logits: np.ndarray, position: int, seen: Sequence[int] = ()) -> int:
        object.__setattr__(self, "draws", self.draws + 1)
        if self.draws % 3 == 0:
            raise KeyboardInterrupt
        return super().__call__(logits, position, seen)


def test_an_interrupted_step_loses_nothing(model: bitnet.BitNetForCausalLM) -> None:
    """Whoever had drawn is reported by the next step, and whoever had not draws then."""
    batch, sampler = Batch(model, slots=4), Interrupted()
    wanted = {batch.add([i, i + 1], sampler, 9): alone(model, [i, i + 1], Sampler(seed=5), 9) for i in range(4)}
    found: dict[int, list[int]] = {request: [] for request in wanted}
    interruptions = 0
    while batch.live:
        try:
            for request, token, *_ in batch.step():
                found[request].append(token)
        except KeyboardInterrupt:
            interruptions += 1
    for request, token, *_ in batch.step():
        found[request].append(token)
    assert found == wanted
    assert interruptions > 10


# ---- ends ----------------------------------------------------------------------------------------------------------


def test_how_requests_end(model: bitnet.BitNetForCausalLM) -> None:
    prompt = prompt_of(1, 10)
    ids = alone(model, prompt, Sampler(0), 30)
    batch = Batch(model, slots=4)
    at_length = batch.add(prompt, Sampler(0), 4)
    at_id = batch.add(prompt, Sampler(0), 30, ids[6])
    at_ids = batch.add(prompt, Sampler(0), 30, {ids[6], ids[3]})
    at_context = batch.add(prompt, Sampler(0), 1000)
    found = drain(batch)
    assert found[at_length] == (ids[:4], "length")
    assert found[at_id] == (ids[: ids.index(ids[6])], "end")
    assert found[at_ids] == (ids[: min(ids.index(ids[6]), ids.index(ids[3]))], "end")
    tokens, reason = found[at_context]
    assert (len(tokens), reason) == (CONTEXT - 10 + 1, "context")
    assert batch.step() == []
    batch.remove(at_id)


def test_refusals_change_nothing(model: bitnet.BitNetForCausalLM) -> None:
    batch = Batch(model, slots=1, capacity=20)
    for prompt, options, message in (
        ([], {}, "at least one token"),
        ([1] * 21, {}, "21 tokens, more than .* 20"),
        ([257], {}, "the prompt has the id 257, the model knows 0 to 256"),
        ([-1], {}, "id -1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens .* not 0"),
        ([1], {"context": "error"}, "stop or slide"),
        ([1], {"context": "slide", "keep": 19}, "keep must be 0 to 18"),
    ):
        with pytest.raises((ConfigError, ContextFullError), match=message):
            batch.add(prompt, Sampler(), **options)
    assert (batch.live, batch.free) == ([], 1)
    batch.add([1], Sampler(0), 3)
    with pytest.raises(ConfigError, match="all 1 slots"):
        batch.add([2], Sampler())
    assert drain(batch)[0][0] == alone(model, [1], Sampler(0), 3)
    for slots, capacity in ((0, 5), (1, 0), (1, CONTEXT + 1)):
        with pytest.raises(ConfigError, match=f"not {slots} and {capacity}"):
            Batch(model, slots, capacity)


# ---- common beginnings ---------------------------------------------------------------------------------------------


def test_a_common_beginning_is_copied_or_used_in_place(model: bitnet.BitNetForCausalLM) -> None:
    """From a live slot it is copied; the slot of one that left is taken over with what it holds."""
    shared = prompt_of(2, 30)
    batch = Batch(model, slots=2)
    first = batch.add([*shared, 1], Sampler(0), 20)
    ((_, token, *_),) = batch.step()
    second = batch.add([*shared, 2, 3], Sampler(0), 20)
    assert batch.reused_tokens == len(shared)
    found = drain(batch)
    assert [token, *found[first][0]] == alone(model, [*shared, 1], Sampler(0), 20)
    assert found[second][0] == alone(model, [*shared, 2, 3], Sampler(0), 20)
    again = [*shared, 2, 3, *found[second][0], 5]
    third = batch.add(again, Sampler(0), 5)
    assert batch.reused_tokens == len(shared) + len(again) - 2  # the last token drawn before was never run
    assert drain(batch)[third][0] == alone(model, again, Sampler(0), 5)
    batch.add(shared[: COPY - 1], Sampler(0), 2)
    assert drain(batch)


# ---- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_texts_are_those_of_generate(model: bitnet.BitNetForCausalLM, slots: int) -> None:
    prompts = ["a", "Hello there", [72, 105], "x" * 30, "", "naïve"]
    options = {"temperature": 1.1, "top_k": 90, "seed": 6, "repetition_penalty": 1.1, "tokenizer": BYTES}
    expected = [generate(model, prompt, 25, **options) for prompt in prompts]
    assert generate_batch(model, prompts, 25, slots=slots, **options) == expected
    stops = [text[5:7] for text in expected[:3]]
    expected = [generate(model, prompt, 25, stop=stops, **options) for prompt in prompts]
    assert generate_batch(model, prompts, 25, stop=stops, slots=slots, **options) == expected


def test_no_texts(model: bitnet.BitNetForCausalLM) -> None:
    assert generate_batch(model, [], tokenizer=BYTES) == []
    assert generate_batch(model, ["a", "b"], 0, tokenizer=BYTES) == ["", ""]
    with pytest.raises(ConfigError, match="without a tokenizer"):
        generate_batch(model, ["a"])


def test_texts_longer_than_the_context(model: bitnet.BitNetForCausalLM) -> None:
    prompts = ["ab", "c" * 60, "d" * CONTEXT]
    with pytest.raises(ContextFullError, match=r"prompt \d of \d+ tokens filled .* 64 positions before .* 99"):
        generate_batch(model, prompts, 99, temperature=0, tokenizer=BYTES)
    for options in ({"context": "stop"}, {"context": "slide", "keep": 3}):
        expected = [generate(model, prompt, 99, temperature=0, tokenizer=BYTES, **options) for prompt in prompts]
        assert generate_batch(model, prompts, 99, temperature=0, tokenizer=BYTES, **options) == expected
    with pytest.raises(ContextFullError, match="65 tokens"):
        generate_batch(model, ["a", "b" * 65], tokenizer=BYTES)

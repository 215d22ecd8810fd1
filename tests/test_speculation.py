"""Drafts change no token; what a decoder holds is used again; a full context slides, stops or refuses, as asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet
from bitnet.decoder import STEP, ContextFullError, Decoder, shared_prefix
from bitnet.decoding import generate, generate_ids
from bitnet.drafting import LENGTHS, MOST, RETRY, ModelDrafter, NgramDrafter, Speculation
from bitnet.errors import ConfigError
from bitnet.optim import AdamW
from bitnet.sampling import Sampler
from bitnet.text_stream import TextStream
from bitnet.token_stream import TokenStream
from bitnet.tokenizer import ByteTokenizer

CONTEXT = 96
CONFIG = bitnet.BitNetConfig(
    257, 32, 64, 2, 4, 2, max_position_embeddings=CONTEXT, initializer_range=0.2, tie_word_embeddings=True
)
PROMPT = list(b"the cat sat on the mat. the cat ")
SAMPLERS = {
    "greedy": Sampler(0),
    "sampled": Sampler(0.9, seed=3),
    "cut": Sampler(1.3, top_k=12, top_p=0.9, seed=4),
    "penalized": Sampler(0.6, repetition_penalty=1.3, seed=5),
}


def trained(config: bitnet.BitNetConfig, steps: int) -> bitnet.BitNetForCausalLM:
    """A model that has seen some words."""
    model = bitnet.BitNetForCausalLM(config, seed=1)
    text = np.frombuffer(b"the cat sat on the mat. the dog ran to the cat. " * 40, np.uint8).astype(np.int32)
    optimizer = AdamW(model, lr=1e-2)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = [text[at : at + 33] for at in rng.integers(0, len(text) - 33, 8)]
        batch = np.stack(rows)
        optimizer.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def model() -> bitnet.BitNetForCausalLM:
    return trained(CONFIG, 60)


@pytest.fixture(scope="module")
def small() -> bitnet.BitNetForCausalLM:
    return trained(CONFIG.replace(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1), 40)


def whole(model: bitnet.BitNetForCausalLM, tokens: Sequence[int]) -> np.ndarray:
    with bitnet.no_grad():
        return model(np.array([tokens])).numpy()[0]


class Wild:
    """A drafter that is right sometimes."""

    seconds = 0.0

    def __init__(self, truth: Sequence[int], rate: float) -> None:
        self._truth, self._rate, self._rng = truth, rate, np.random.default_rng(1)

    def match(self, sequence: Sequence[int]) -> str | None:
        return "wild" if self._rng.random() < 0.8 else None

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        guess = [*self._truth[len(sequence) : len(sequence) + count], *[0] * count][:count]
        return [token if self._rng.random() < self._rate else int(self._rng.integers(256)) for token in guess]


# ---- no token changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_any_drafts_give_the_same_tokens(
    model: bitnet.BitNetForCausalLM, small: bitnet.BitNetForCausalLM, sampler: Sampler
) -> None:
    """N-grams, a small model, and guesses that are wrong in any place; any number of them."""
    plain = TokenStream(model, PROMPT, sampler, 60, speculation=Speculation())
    expected = list(plain)
    assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
    truth = [*PROMPT, *expected]
    for most in (None, 0, 1, 2, 5, MOST):
        for drafters in ([NgramDrafter()], [ModelDrafter(small, sampler)], [NgramDrafter(), Wild(truth, 0.7)]):
            stream = TokenStream(model, PROMPT, sampler, 60, speculation=Speculation(drafters, most))
            assert list(stream) == expected
            assert 0 <= stream.accepted_tokens <= stream.drafted_tokens
            assert (stream.drafted_tokens == 0) == (most == 0) or most is None
    stream = TokenStream(model, PROMPT, sampler, 60, speculation=Speculation([Wild(truth, 1.0)], MOST))
    assert list(stream) == expected
    assert stream.accepted_tokens == stream.drafted_tokens > 30


@pytest.mark.parametrize("cache_dtype", ["bf16", "int8"])
def test_with_a_rounded_cache(model: bitnet.BitNetForCausalLM, cache_dtype: str) -> None:
    """Rounding is part of what is computed, however the sequence is cut; so is sliding."""
    options = {"context": "slide", "keep": 3, "cache_dtype": cache_dtype, "top_k": 20, "seed": 8}
    plain = list(generate_ids(model, PROMPT, 150, speculation=Speculation(), **options))
    for most in (1, MOST):
        drafted = generate_ids(model, PROMPT, 150, speculation=Speculation([NgramDrafter()], most), **options)
        assert list(drafted) == plain
        assert drafted.accepted_tokens > 0
    with pytest.raises(ConfigError, match="'i4'"):
        generate_ids(model, PROMPT, cache_dtype="i4")


def test_good_drafts_save_steps(model: bitnet.BitNetForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text repeats itself, so n-grams are right more often than not."""
    steps, extend = [], Decoder.extend
    monkeypatch.setattr(Decoder, "extend", lambda self, tokens: steps.append(len(tokens[0])) or extend(self, tokens))
    stream = TokenStream(model, PROMPT, Sampler(0), 60, speculation=Speculation([NgramDrafter()], MOST))
    list(stream)
    assert stream.accepted_tokens > 30
    assert len(steps) == 59 - stream.accepted_tokens
    assert max(steps) == STEP


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_on_every_instruction_set(model: bitnet.BitNetForCausalLM, isa: str, threads: int) -> None:
    """The tokens of the whole sequence run again for each: no cache, no drafts."""
    sequence = list(PROMPT)
    for token in generate_ids(
        model, PROMPT, 12, temperature=0, speculation=Speculation([NgramDrafter()], MOST), context="stop"
    ):
        assert token == whole(model, sequence)[-1].argmax()
        sequence.append(token)


def test_ends_and_stops_inside_a_draft(model: bitnet.BitNetForCausalLM) -> None:
    """Wherever a text ends, by id, by stop string or by number, a draft that goes past it changes nothing."""
    ids = list(generate_ids(model, PROMPT, 40, temperature=0, speculation=Speculation()))
    truth = [*PROMPT, *ids]
    text = bytes(ids).decode("utf-8", "replace")
    for end in range(1, 20):

        def speculation() -> Speculation:
            return Speculation([Wild(truth, 1.0)], MOST)

        stream = TokenStream(model, PROMPT, Sampler(0), end, speculation=speculation())
        assert (list(stream), stream.finish_reason) == (ids[:end], "length")
        stream = TokenStream(model, PROMPT, Sampler(0), 40, ids[end], speculation=speculation())
        assert (list(stream), stream.finish_reason) == (ids[: ids.index(ids[end])], "end")
        several = {ids[end], ids[end + 3], 255}
        stream = TokenStream(model, PROMPT, Sampler(0), 40, several, speculation=speculation())
        assert list(stream) == ids[: min(ids.index(ids[end]), ids.index(ids[end + 3]))]
        stop = text[end : end + 3]
        pieces = TextStream(model, PROMPT, Sampler(0), 40, stop, ByteTokenizer(), speculation=speculation())
        assert "".join(pieces) == text[: text.index(stop)]
        assert pieces.finish_reason == "stop"


# ---- drafters ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, MOST), st.data())
def test_ngrams_by_search(sequence: list[int], count: int, data: st.DataObject) -> None:
    """The longest suffix of four to two tokens that was there before, where it was last, however the text was grown."""
    drafter = NgramDrafter()
    for length in sorted(data.draw(st.sets(st.integers(1, len(sequence)), max_size=5))):
        drafter.match(sequence[:length])
    name = drafter.match(sequence)
    for size in (4, 3, 2):
        places = [end for end in range(size, len(sequence)) if sequence[end - size : end] == sequence[-size:]]
        if places:
            assert name == f"{size} tokens"
            grown = list(sequence)
            for place in range(places[-1], places[-1] + count):
                grown.append(grown[place])
            assert drafter.propose(sequence, count) == grown[len(sequence) :]
            return
    assert name is None


def test_a_shorter_text_starts_the_index_anew() -> None:
    drafter = NgramDrafter()
    assert drafter.match([1, 2, 3, 1, 2]) == "2 tokens"
    assert drafter.match([1, 2]) is None
    assert drafter.match([1, 2, 9, 1, 2]) == "2 tokens"
    assert drafter.propose([1, 2, 9, 1, 2], 4) == [9, 1, 2, 9]


def test_a_model_drafts_what_it_would_write(small: bitnet.BitNetForCausalLM) -> None:
    for sampler in SAMPLERS.values():
        drafter = ModelDrafter(small, sampler, 200)
        for length in (40, 41, 43, 30):
            start = (PROMPT * 2)[:length]
            assert drafter.match(start) == "model"
            expected = list(TokenStream(small, start, sampler, 5, vocab_size=200))
            assert drafter.propose(start, 5) == expected
    assert drafter.match([1] * (CONTEXT - MOST)) == "model"
    assert drafter.match([1] * (CONTEXT - MOST + 1)) is None


def test_the_model_itself_is_always_right(model: bitnet.BitNetForCausalLM) -> None:
    """It draws from the same logits at the same random numbers."""
    sampler = SAMPLERS["sampled"]
    stream = TokenStream(model, PROMPT, sampler, 40, speculation=Speculation([ModelDrafter(model, sampler)], 4))
    list(stream)
    assert stream.accepted_tokens == stream.drafted_tokens >= 30


# ---- how many ------------------------------------------------------------------------------------------------------


class Always(NgramDrafter):
    """Has a guess about anything."""

    def match(self, sequence: Sequence[int]) -> str | None:
        return "always"

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        return [0] * count


@pytest.mark.parametrize(("right", "more", "expected"), [(0.95, 0.03, 7), (0.5, 0.3, 1), (0.0, 0.03, 0), (1.0, 2.0, 0)])
def test_drafts_are_as_long_as_pays(right: float, more: float, expected: int) -> None:
    """By the share that is right and what each further token adds to the time of a step."""
    rng = np.random.default_rng(4)
    speculation = Speculation([Always()])
    assert speculation.draft([1], 100) == []  # nothing measured yet
    speculation.timed(1, 1.0)
    lengths = []
    for _ in range(400):
        length = len(speculation.draft([1], 100))
        assert length in (0, *LENGTHS)
        lengths.append(length)
        is_right = True
        for _ in range(1 + length):
            is_right = is_right and rng.random() < right
            speculation.see(0 if is_right else 1)
        speculation.timed(1 + length, 1 + more * length)
    late = lengths[200:]
    assert max(set(late), key=late.count) == expected
    if expected == 0:
        assert 200 // RETRY <= sum(length > 0 for length in late) <= 200 // RETRY + 1


def test_a_changed_text_is_noticed() -> None:
    """Drafts that were all wrong are judged though they are not run, and are long again when they are right."""
    speculation = Speculation([Always()])
    for tokens in (1, 2, 4, 8):
        speculation.timed(tokens, 1.0 + 0.1 * tokens)
    for right in (False, True):
        for _ in range(40):
            for _ in range(1 + len(speculation.draft([1], 100)) * right):
                speculation.see(0 if right else 1)
        assert (len(speculation.draft([1], 100)) == 7) == right


def test_a_slow_small_model_is_left_alone() -> None:
    drafter = Always()
    drafter.seconds = 2.0
    speculation = Speculation([drafter])
    speculation.timed(1, 1.0)
    assert not any(speculation.draft([1], 100) for _ in range(RETRY - 1))
    better = Always()
    better.match = lambda sequence: "better"
    assert len(Speculation([drafter, better], 3).draft([1], 2)) == 2


@pytest.mark.parametrize("most", [-1, MOST + 1])
def test_a_number_out_of_range(most: int) -> None:
    with pytest.raises(ConfigError, match=f"speculate.*0 to {MOST}, not {most}"):
        Speculation([], most)


# ---- the decoder: steps of several tokens, taken back, used again ---------------------------------------------------


def test_extend_and_rewind(model: bitnet.BitNetForCausalLM, isa: str) -> None:
    """Logits after each token of a step are those of the whole run; what was taken back leaves no trace."""
    rng = np.random.default_rng(2)
    decoder = Decoder(model, batch=2)
    tokens = rng.integers(0, 257, (2, 5)).tolist()
    decoder.prefill(tokens)
    for count in (1, 8, 3, 8, 2, 7, 5, 1, 4, 6):
        wrong = rng.integers(0, 257, (2, STEP)).tolist()
        decoder.extend(wrong)
        decoder.rewind(len(tokens[0]))
        more = rng.integers(0, 257, (2, count)).tolist()
        logits = decoder.extend(more)
        tokens = [row + new for row, new in zip(tokens, more, strict=True)]
        assert decoder.tokens == tokens
        assert np.array_equal(logits, [whole(model, row)[-count:] for row in tokens])
    assert [n for n in range(1, 10) if decoder.is_recorded(n)] == list(range(1, 9))


def test_extend_refuses(model: bitnet.BitNetForCausalLM) -> None:
    decoder = Decoder(model, batch=2, capacity=10)
    for rows in ([[1]], [[1], []], [[], []], [[1], [1, 2]], [[1] * 9] * 2):
        with pytest.raises(bitnet.ShapeError, match=r"extend: needs 2 rows .* not \["):
            decoder.extend(rows)
    decoder.extend([[1] * 8] * 2)
    with pytest.raises(ContextFullError, match="3 more tokens do not fit: 8 of 10 positions are taken"):
        decoder.extend([[1] * 3] * 2)
    assert decoder.lengths.tolist() == [8, 8]


def test_a_common_beginning_is_not_run_again(model: bitnet.BitNetForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(model)
    run = []
    head_input = bitnet.BitNetForCausalLM.head_input
    monkeypatch.setattr(
        bitnet.BitNetForCausalLM,
        "head_input",
        lambda self, tokens, cache=None: run.append(tokens.shape[1]) or head_input(self, tokens, cache),
    )
    text = list(b"one two three four five six seven eight nine ten")
    other = [*text[:30], *b" and then some more"]
    for prompt, reused in (
        (text, 0),
        ([*text, 33, *text[:20]], 48),
        (other, 30),
        (other, 48),
        (other[:9], 8),
        ([1], 0),
    ):
        run.clear()
        logits = decoder.resume([prompt])
        assert decoder.reused == min(reused, len(prompt) - 1)
        assert sum(run) in (0, len(prompt) - decoder.reused)  # 0: a recorded step
        assert decoder.tokens == [prompt]
        assert np.array_equal(logits[0], whole(model, prompt)[-1])


def test_a_batch_resumes_each_by_itself(model: bitnet.BitNetForCausalLM) -> None:
    decoder = Decoder(model, batch=2)
    decoder.prefill([[1, 2, 3, 4], [1, 2, 3]])
    prompts = [[1, 2, 9], [1, 2, 3, 4, 5]]
    logits = decoder.resume(prompts)
    assert decoder.reused == 2 + 3
    for row, prompt in zip(logits, prompts, strict=True):
        assert np.array_equal(row, whole(model, prompt)[-1])
    with pytest.raises(bitnet.ShapeError, match=r"not lengths \[1, 0\]"):
        decoder.resume([[1], []])


@settings(deadline=None)
@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_shared_prefix(a: list[int], b: list[int]) -> None:
    count = shared_prefix(a, b)
    assert a[:count] == b[:count]
    assert count == min(len(a), len(b)) or a[count] != b[count]


def test_a_decoder_is_used_again_by_the_next_stream(model: bitnet.BitNetForCausalLM) -> None:
    """Whatever it held; also when the stream before was left in the middle of a draft."""
    decoder = Decoder(model)
    first = TokenStream(model, PROMPT, Sampler(0), 40, decoder=decoder, speculation=Speculation([NgramDrafter()], 7))
    answer = [token for token, _ in zip(first, range(17), strict=False)]
    sequence = [*PROMPT, *answer, *b"and"]
    second = TokenStream(model, sequence, Sampler(0), 20, decoder=decoder)
    assert list(second) == list(TokenStream(model, sequence, Sampler(0), 20))
    assert len(PROMPT) + 16 <= second.reused_tokens < len(sequence)


# ---- full contexts ---------------------------------------------------------------------------------------------------


def slid(model: bitnet.BitNetForCausalLM, sequence: list[int], most: int, keep: int) -> tuple[list[int], int]:
    """Greedy, by running the window anew for each token."""
    window, slides, out = list(sequence), 0, []
    while len(out) < most:
        if len(window) > CONTEXT:
            newest = (CONTEXT - keep) // 2
            window = (sequence + out)[:keep] + (sequence + out)[-newest:]
            slides += 1
        out.append(int(whole(model, window)[-1].argmax()))
        window.append(out[-1])
    return out, slides


@pytest.mark.parametrize(("prompt", "keep"), [(20, 0), (20, 20), (CONTEXT, 5), (300, 7), (20, CONTEXT - 2)])
@pytest.mark.parametrize("most", [0, 7])
def test_sliding(model: bitnet.BitNetForCausalLM, prompt: int, keep: int, most: int) -> None:
    """The first `keep` tokens and the newest half of the rest; drafts do not change when."""
    start = np.random.default_rng(5).integers(97, 123, prompt).tolist()
    expected, slides = slid(model, start, 130, keep)
    stream = TokenStream(
        model, start, Sampler(0), 130, context="slide", keep=keep, speculation=Speculation([NgramDrafter()], most)
    )
    assert list(stream) == expected
    assert stream.slides == slides > 0
    assert (stream.finish_reason, stream.is_context_full) == ("length", False)


def test_positions_of_draws_go_on_after_a_slide(model: bitnet.BitNetForCausalLM) -> None:
    """A sampled text does not repeat its random numbers, and is the same with drafts."""
    texts = [
        list(generate_ids(model, PROMPT, 200, seed=3, context="slide", speculation=speculation))
        for speculation in (Speculation(), Speculation([NgramDrafter()], 7), None)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_full_context_is_an_error_that_names_numbers(model: bitnet.BitNetForCausalLM) -> None:
    """After all that fitted was handed out."""
    stream = generate_ids(model, PROMPT, 1000, temperature=0)
    out: list[int] = []
    with pytest.raises(ContextFullError, match=f"of {CONTEXT} positions is full after .* 32 tokens and 65 of 1000 new"):
        out.extend(stream)
    assert out == stream.tokens
    assert len(out) == CONTEXT - len(PROMPT) + 1
    assert (stream.finish_reason, stream.is_context_full) == ("length", True)
    assert out == list(generate_ids(model, PROMPT, 1000, temperature=0, context="stop"))
    pieces: list[str] = []
    with pytest.raises(ContextFullError):
        generate(model, PROMPT, 1000, temperature=0, stop="zzz", stream=pieces.append, tokenizer=ByteTokenizer())
    assert "".join(pieces) == ByteTokenizer().decode(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context": "wrap"}, "context must be one of error, stop, slide, not 'wrap'"),
     ({"context": "slide", "keep": CONTEXT - 1}, f"keep must be 0 to {CONTEXT - 2}.* not {CONTEXT - 1}"),
     ({"context": "slide", "keep": -1}, "not -1")],
)  # fmt: skip
def test_bad_contexts(model: bitnet.BitNetForCausalLM, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_ids(model, PROMPT, **options)

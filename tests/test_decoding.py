"""Cached decoding equals the whole forward pass; tokens are drawn as their distribution says; text leaves whole."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Script

import bitnet
from bitnet import checkpoint, decoding
from bitnet import decoder as decoder_module
from bitnet.decoding import ContextFullError, Decoder, StopFilter, TextStream, TokenStream, generate, generate_ids
from bitnet.errors import BitnetError, ConfigError
from bitnet.generate import main as command
from bitnet.sampling import Sampler, uniform
from bitnet.tokenizer import ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer

CONTEXT = 48
CONFIG = bitnet.BitNetConfig(
    257, 48, 80, 2, 6, 3, max_position_embeddings=CONTEXT, initializer_range=0.3, tie_word_embeddings=True
)
SHAPES = {
    "bitnet": CONFIG,
    "2b-4t": CONFIG.replace(hidden_act="relu2", rope_theta=5e5),
    "paper": CONFIG.replace(use_rms_norm=True, input_norms=False, tie_word_embeddings=False, quantize_head=True),
    "twin": CONFIG.replace(linear="linear", tie_word_embeddings=False),
}
TOKENS = np.random.default_rng(3).integers(0, 257, (3, CONTEXT)).astype(np.int32)
GREEDY = Sampler(temperature=0)


@pytest.fixture(scope="module")
def model() -> bitnet.BitNetForCausalLM:
    return bitnet.BitNetForCausalLM(CONFIG, seed=1)


def whole(model: bitnet.BitNetForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with bitnet.no_grad():
        return model(tokens).numpy()


# ---- Decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_equals_whole(isa: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with the prompt in one pass or in chunks of seven, after a reset too."""
    model = bitnet.BitNetForCausalLM(SHAPES[shape], seed=1)
    expected = whole(model, TOKENS)
    decoder = Decoder(model, batch=3)
    for prompt, chunk in ((1, 512), (7, 7), (20, 7), (41, 512)):
        monkeypatch.setattr(decoder_module, "PREFILL", chunk)
        decoder.reset()
        assert np.array_equal(decoder.prefill(TOKENS[:, :prompt].tolist()), expected[:, prompt - 1])
        for at in range(prompt, CONTEXT):
            assert np.array_equal(decoder.step(TOKENS[:, at].tolist()), expected[:, at]), at


def test_each_sequence_is_as_if_alone(model: bitnet.BitNetForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths, in chunks, appended to twice."""
    monkeypatch.setattr(decoder_module, "PREFILL", 5)
    decoder = Decoder(model, batch=3, capacity=40)
    firsts, seconds = (3, 14, 9), (2, 6, 1)
    logits = [decoder.prefill([row[:n].tolist() for row, n in zip(TOKENS, firsts, strict=True)])]
    pieces = [row[n : n + m].tolist() for row, n, m in zip(TOKENS, firsts, seconds, strict=True)]
    logits.append(decoder.prefill(pieces))
    logits += [
        decoder.step([int(row[length]) for row, length in zip(TOKENS, decoder.lengths, strict=True)]) for _ in range(5)
    ]
    for row, first, second, *after in zip(TOKENS, firsts, seconds, *logits, strict=True):
        expected = whole(model, row[None])[0]
        places = [first - 1, *range(first + second - 1, first + second + 5)]
        assert np.array_equal(np.array(after), expected[places])


def test_only_the_first_step_runs_python(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bitnet.BitNetForCausalLM(CONFIG, seed=1)
    decoder = Decoder(model)
    decoder.prefill([[1, 2]])
    decoder.step([3])
    monkeypatch.setattr(bitnet.BitNetForCausalLM, "forward", None)
    logits = decoder.step([4])
    monkeypatch.undo()
    assert np.array_equal(logits[0], whole(model, np.array([[1, 2, 3, 4]]))[0, -1])


def test_changed_weights_are_followed() -> None:
    model = bitnet.BitNetForCausalLM(CONFIG, seed=1)
    decoder = Decoder(model)
    for seed in (1, 2):
        model.load_state_dict(bitnet.BitNetForCausalLM(CONFIG, seed=seed).state_dict())
        decoder.reset()
        decoder.prefill([TOKENS[0, :4].tolist()])
        assert np.array_equal(decoder.step([TOKENS[0, 4]])[0], whole(model, TOKENS[:1, :5])[0, -1])


def test_a_full_context_is_refused(model: bitnet.BitNetForCausalLM) -> None:
    decoder = Decoder(model, capacity=4)
    decoder.prefill([[1, 2, 3]])
    with pytest.raises(ContextFullError, match="2 more tokens do not fit: 3 of 4 positions are taken"):
        decoder.prefill([[4, 5]])
    decoder.step([4])
    with pytest.raises(ContextFullError, match="4 of 4"):
        decoder.step([5])
    for capacity in (0, CONTEXT + 1):
        with pytest.raises(ConfigError, match=str(capacity)):
            Decoder(model, capacity=capacity)


def test_bad_tokens_change_nothing(model: bitnet.BitNetForCausalLM) -> None:
    decoder = Decoder(model)
    expected = whole(model, np.array([[1, 2]]))[0]
    for prompts in ([], [[]], [[1], [2]]):
        with pytest.raises(bitnet.ShapeError, match="1 prompts"):
            decoder.prefill(prompts)
    with pytest.raises(IndexError, match="257"):
        decoder.prefill([[257]])
    assert np.array_equal(decoder.prefill([[1]])[0], expected[0])
    with pytest.raises(IndexError, match="-1"):
        decoder.step([-1])
    assert np.array_equal(decoder.step([2])[0], expected[1])


# ---- Sampler -------------------------------------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_the_whole_pass(model: bitnet.BitNetForCausalLM) -> None:
    sequence = [72, 105]
    for token in generate_ids(model, [72, 105], max_new_tokens=30, temperature=0):
        assert token == whole(model, np.array([sequence]))[0, -1].argmax()
        sequence.append(token)
    assert len(sequence) == 32


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


values = st.lists(st.integers(-6, 6), min_size=1, max_size=30)  # integers: ties are common


@given(values, st.integers(1, 35), st.floats(0.01, 1.0))
def test_top_k_and_top_p_sets(scores: list[int], k: int, p: float) -> None:
    """The k likeliest, then the fewest of them that reach p; the first of equals. Probabilities in proportion."""
    logits = np.array(scores, np.float32)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    ids, probabilities = Sampler(temperature=1, top_k=k).candidates(logits)
    assert ids.tolist() == sorted(order)
    np.testing.assert_allclose(probabilities, softmax(logits[ids]), rtol=1e-14)
    sums = np.cumsum(softmax(logits[order]))
    ids, probabilities = Sampler(temperature=1, top_k=k, top_p=p).candidates(logits)
    reached = [n for n in range(1, len(order) + 1) if sums[n - 1] >= p - 1e-12]  # rounding decides within 1e-12
    surely = [n for n in range(1, len(order) + 1) if sums[n - 1] >= p + 1e-12]
    assert min(reached, default=len(order)) <= len(ids) <= min(surely, default=len(order))
    assert ids.tolist() == sorted(order[: len(ids)])
    np.testing.assert_allclose(probabilities, softmax(logits[ids]), rtol=1e-14)


def test_transformers_keeps_the_same_sets() -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(8)
    seen = [3, 7, 7, 41]
    for k, p, temperature, penalty in ((50, 0.9, 0.7, 1.3), (5, 0.999, 1.5, 0.8), (300, 0.05, 1.0, 2.0)):
        logits = rng.normal(scale=3, size=300).astype(np.float32)
        ours = Sampler(temperature, k, p, penalty).candidates(logits, seen)
        scores = torch.tensor(logits[None]).double()
        for step in (
            process.RepetitionPenaltyLogitsProcessor(penalty),
            process.TemperatureLogitsWarper(temperature),
            process.TopKLogitsWarper(k),
            process.TopPLogitsWarper(p),
        ):
            scores = step(torch.tensor([seen]), scores)
        theirs = torch.softmax(scores[0], 0).numpy()
        assert ours[0].tolist() == np.flatnonzero(theirs).tolist()
        np.testing.assert_allclose(ours[1], theirs[ours[0]], rtol=1e-12)


def test_repetition_penalty() -> None:
    """CTRL: positive logits are divided, negative ones multiplied, once however often the token was seen."""
    logits = np.array([2.0, -1.0, 1.0, 0.5], np.float32)
    ids, probabilities = Sampler(temperature=1, repetition_penalty=2).candidates(logits, [0, 0, 1, 99])
    assert ids.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(probabilities, softmax(np.array([1.0, -2.0, 1.0, 0.5])))
    assert Sampler(0, repetition_penalty=3)(logits, 0, [0]) == 2


def test_edges_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.array([0.0, 80.0, 80.0, -1e30], np.float32)
    assert Sampler(0)(logits, 0) == 1  # the first of equals
    assert {Sampler(1e-300)(logits, position) for position in range(50)} == {1, 2}
    assert {Sampler(1.0, seed=2**64 - 1)(logits, position) for position in range(50)} == {1, 2}
    assert Sampler(5.0)(np.zeros(1, np.float32), 0) == 0
    for number, drawn in ((0.0, 1), (1 - 2.0**-53, 2)):  # the ends of [0, 1) never hit a probability of 0
        monkeypatch.setattr("bitnet.sampling.uniform", lambda seed, position, number=number: number)
        assert Sampler(1.0)(np.array([-1e30, 0, 0, -1e30], np.float32), 0) == drawn
    for bad in (np.nan, np.inf):
        with pytest.raises(BitnetError, match="not finite"):
            Sampler()(np.array([0, bad], np.float32), 0)


def test_uniform_numbers() -> None:
    """Independent of the order of asking, and of each other in seed and position."""
    numbers = np.array([[uniform(seed, position) for position in range(200)] for seed in (0, 1, 2**64 - 1)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(np.unique(numbers)) == numbers.size
    assert abs(numbers.mean() - 0.5) < 5 / (12 * numbers.size) ** 0.5
    assert uniform(1, 17) == numbers[1, 17]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**64},
        {"max_new_tokens": -1},
        {"stop": [""]},
    ],
)
def test_bad_options_are_named(model: bitnet.BitNetForCausalLM, options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name}.*{'empty' if name == 'stop' else value}"):
        generate(model, "a", tokenizer=ByteTokenizer(), **options)


# ---- streams -------------------------------------------------------------------------------------------------------


def test_a_continuation_does_not_depend_on_the_cut(model: bitnet.BitNetForCausalLM) -> None:
    """Same seed, same tokens; going on from what came out is the same as never stopping; another seed differs."""
    options = {"temperature": 1.2, "top_k": 100, "repetition_penalty": 1.1, "seed": 4}
    at_once = list(generate_ids(model, [65], max_new_tokens=20, **options))
    first = list(generate_ids(model, [65], max_new_tokens=8, **options))
    assert first + list(generate_ids(model, [65, *first], max_new_tokens=12, **options)) == at_once
    assert list(generate_ids(model, [65], max_new_tokens=20, **(options | {"seed": 5}))) != at_once


def test_how_ids_end(model: bitnet.BitNetForCausalLM) -> None:
    stream = TokenStream(model, [1], Script([5, 6, 256, 7]), end_id=256)
    assert stream.finish_reason is None
    assert list(stream) == stream.tokens == [5, 6]
    assert (stream.finish_reason, stream.prompt_tokens, stream.is_context_full) == ("end", 1, False)
    assert stream.tokens_per_second > 0
    for most in (0, 1, 3):
        stream = TokenStream(model, [1, 2], Script(range(9)), max_new_tokens=most)
        assert len(list(stream)) == most
        assert (stream.finish_reason, stream.is_context_full) == ("length", False)


@pytest.mark.parametrize("prompt", [1, 40, CONTEXT])
def test_a_full_context_ends_generation(model: bitnet.BitNetForCausalLM, prompt: int) -> None:
    """The token after the last position can still be drawn; there is no place to go on from it."""
    stream = generate_ids(model, TOKENS[0, :prompt].tolist(), max_new_tokens=1000, temperature=0, context="stop")
    ids = list(stream)
    assert len(ids) == CONTEXT - prompt + 1
    assert (stream.finish_reason, stream.is_context_full) == ("length", True)
    sequence = np.array([*TOKENS[0, :prompt], *ids[:-1]])
    assert ids[-1] == whole(model, sequence[None])[0, -1].argmax()


def test_too_long_a_prompt(model: bitnet.BitNetForCausalLM) -> None:
    with pytest.raises(ContextFullError, match=f"{CONTEXT + 1} tokens.*{CONTEXT}"):
        generate_ids(model, [1] * (CONTEXT + 1))
    with pytest.raises(ConfigError, match="at least one token"):
        generate_ids(model, [])


def test_ids_the_tokenizer_lacks_are_never_drawn() -> None:
    model = bitnet.BitNetForCausalLM(CONFIG.replace(vocab_size=400), seed=1)
    ids = list(generate_ids(model, [65], max_new_tokens=30, temperature=5.0))
    assert max(ids) > 256
    stream = TextStream(model, [65], Sampler(5.0), 30, tokenizer=ByteTokenizer())
    list(stream)
    assert max(stream.ids.tokens) <= 256
    with pytest.raises(ConfigError, match="257 ids, more than the model's 100"):
        generate(bitnet.BitNetForCausalLM(CONFIG.replace(vocab_size=100)), "a", tokenizer=ByteTokenizer())


TEXT = "naïve – 😀 ends.\nNext"


def scripted(model: bitnet.BitNetForCausalLM, text: str, stop: decoding.Stops = ()) -> TextStream:
    return TextStream(model, "Hi", Script([*text.encode(), 256]), stop=stop, tokenizer=ByteTokenizer())


def test_only_whole_characters_are_streamed(model: bitnet.BitNetForCausalLM) -> None:
    stream = scripted(model, TEXT)
    assert list(stream) == list(TEXT)  # one piece a character: as early as possible
    assert stream.finish_reason == "end"
    broken = TextStream(model, "Hi", Script([97, 0xF0, 0x9F]), 3, tokenizer=ByteTokenizer())
    assert "".join(broken) == "a\ufffd"
    assert broken.finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        ("\n", "naïve – 😀 ends."),
        (["😀 e", "zz"], "naïve – "),
        (["Next", "ends.\nNex"], "naïve – 😀 "),
        ("n", ""),
        ("zz", TEXT),
    ],
)
def test_stop_strings(model: bitnet.BitNetForCausalLM, stop: str | list[str], kept: str) -> None:
    stream = scripted(model, TEXT, stop)
    pieces = list(stream)
    assert "".join(pieces) == kept
    assert all(pieces)
    assert stream.finish_reason == ("end" if kept == TEXT else "stop")
    assert stream.held() == ""


def test_leaving_early_gives_what_was_held(model: bitnet.BitNetForCausalLM) -> None:
    """Ctrl-C arrives while "--" may still become the stop string and a character lacks its last byte."""

    def interrupted() -> Iterator[int]:
        yield from b"ab--"
        yield 0xC3
        raise KeyboardInterrupt

    stream = TextStream(model, "Hi", Script(interrupted()), stop="--\u00e9", tokenizer=ByteTokenizer())
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        pieces += iter(stream)
    assert stream.held() == "--\ufffd"
    assert stream.finish_reason is None
    assert list(stream) == []


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3), st.data())
def test_stops_do_not_depend_on_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    """The text is cut before the stop that is complete first; of those complete at once, before the longest."""
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    expected = text
    if ends:
        expected = text[: ends[0] - max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))]
    stop_filter = StopFilter(stops)
    out, rest = "", text
    while rest and not stop_filter.stopped:
        cut = data.draw(st.integers(1, len(rest)))
        out += stop_filter.push(rest[:cut])
        rest = rest[cut:]
        assert expected.startswith(out)
    assert out + stop_filter.flush() == expected
    assert stop_filter.stopped == bool(ends)


def test_the_stop_that_is_complete_first_counts() -> None:
    """Also where one that began earlier arrives in the same piece."""
    for piece, kept in (("xabca", "xa"), ("xaba", "x")):
        assert StopFilter(["abca", "bc", "aba"]).push(piece) == kept


def test_generate(model: bitnet.BitNetForCausalLM) -> None:
    pieces: list[str] = []
    options = {"max_new_tokens": 40, "temperature": 1.5, "seed": 3}
    text = generate(model, "Hi", stream=pieces.append, tokenizer=ByteTokenizer(), **options)
    ids = list(generate_ids(model, list(b"Hi"), end_id=256, **options))
    assert text == "".join(pieces) == ByteTokenizer().decode(ids) != ""
    assert text == generate(model, list(b"Hi"), tokenizer=ByteTokenizer(), **options)
    assert text == model.generate("Hi", tokenizer=ByteTokenizer(), **options)
    with pytest.raises(ConfigError, match="without a tokenizer"):
        model.generate("Hi")
    model.tokenizer = ByteTokenizer()
    assert text == model.generate("Hi", **options)
    del model.tokenizer


def test_an_empty_prompt(model: bitnet.BitNetForCausalLM) -> None:
    separated, plain = CharTokenizer("ab", separator=True), CharTokenizer("ab")
    for prompt in ("", []):
        assert decoding.prompt_ids(separated, prompt) == [2]
        with pytest.raises(ConfigError, match="a prompt is needed"):
            generate(model, prompt, tokenizer=plain)
    assert decoding.prompt_ids(plain, "ab") == decoding.prompt_ids(plain, [0, 1]) == [0, 1]


@pytest.fixture(scope="module")
def llama_like() -> Tokenizer:
    """A tokenizer that puts a space before every text, so takes one off when decoding."""
    from sentencepiece import SentencePieceTrainer

    out = io.BytesIO()
    text = ["the cat sat on the mat and the dog ran"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=out,
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return SentencePieceTokenizer(out.getvalue())


def test_bos_and_the_space_between_prompt_and_text(model: bitnet.BitNetForCausalLM, llama_like: Tokenizer) -> None:
    ids = llama_like.encode("the cat")
    assert decoding.prompt_ids(llama_like, "the cat") == [llama_like.bos_id, *ids]
    assert decoding.prompt_ids(llama_like, "") == [llama_like.bos_id]
    for prompt, text in (("the", " cat sat"), ("", "cat sat")):
        script = Script([*llama_like.encode("cat sat"), llama_like.eos_id or 0])
        assert "".join(TextStream(model, prompt, script, tokenizer=llama_like)) == text


# ---- command line --------------------------------------------------------------------------------------------------

LETTERS = CharTokenizer("".join(sorted(" \nabcdefghijklmnopqrstuvwxyz")))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an untrained model that never ends a text by itself."""
    folder = tmp_path_factory.mktemp("run")
    config = CONFIG.replace(vocab_size=LETTERS.vocab_size, max_position_embeddings=30_000)
    checkpoint.save(folder, 7, bitnet.BitNetForCausalLM(config, seed=1), {}, {"step": 7}, LETTERS)
    return folder


def test_command_line(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The text and nothing else on stdout; the same streamed or not, run or checkpoint folder, flag or stdin."""
    model = bitnet.from_pretrained(run)
    text = model.generate("ab\n", 60, temperature=1.1, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=3)
    flags = "--max-new-tokens 60 --temperature 1.1 --top-k 20 --top-p 0.9 --repetition-penalty 1.2 --seed 3".split()
    flags += ["--speculate", "off"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n\n"))
    for folder, more in (
        (run, ["-p", "ab\n"]),
        (run / "checkpoints" / "step-00000007", ["-p", "ab\n", "--no-stream", "--threads", "1"]),
        (run, ["--prompt", "-"]),
    ):
        assert command([str(folder), *flags, *more]) == 0
        out, err = capsys.readouterr()
        assert out == text + "\n"
        assert re.fullmatch(
            r"60 tokens, [\d.]+ tokens/s; prompt: 3 tokens in [\d.]+ s; finish reason: length", last_line(err)
        )
    bitnet.set_threads(0)
    assert command([str(run), "-p", "ab\n", *flags, "--stop", text[40:45], "--stop", "zzzzz"]) == 0
    out, err = capsys.readouterr()
    assert out == text[: text.index(text[40:45])] + "\n"
    assert err.endswith("finish reason: stop\n")


def test_command_line_drafts_and_slides(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same text with and without drafts, of a context that slides; what happened is said in the last line."""
    short = bitnet.BitNetForCausalLM(CONFIG.replace(vocab_size=LETTERS.vocab_size), seed=1)
    checkpoint.save(tmp_path / "short", 7, short, {}, {"step": 7}, LETTERS)
    flags = [str(tmp_path / "short"), "-p", "ab", "--max-new-tokens", "120", "--context", "slide", "--keep", "2"]
    outs = []
    for more in (["--speculate", "off"], ["--speculate", "7"], [], ["--speculate", "3", "--draft", str(run)]):
        assert command([*flags, *more]) == 0
        out, err = capsys.readouterr()
        outs.append(out)
        drafts = re.search(r"tokens/s(, (\d+) of (\d+) drafted tokens right)?, 4 slides of the context; prompt", err)
        assert drafts is not None
        assert (drafts[1] is None) == ("off" in more) or not more
    assert len(set(outs)) == 1
    assert command([*flags[:5], "--context", "stop"]) == 0
    assert capsys.readouterr().err.endswith("finish reason: length (the model's context is full)\n")
    assert command(flags[:5]) == 2
    out, err = capsys.readouterr()
    assert len(out.removesuffix("\n")) >= CONTEXT - 2
    assert f"finish reason: error: the context of {CONTEXT} positions is full after a prompt of 2" in err
    other = bitnet.BitNetForCausalLM(CONFIG, seed=1)
    checkpoint.save(tmp_path / "other", 7, other, {}, {"step": 7}, ByteTokenizer())
    assert command([*flags, "--draft", str(tmp_path / "other")]) == 2
    assert "cannot draft: its tokenizer is not the model's" in capsys.readouterr().err


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_command_line_refuses_in_a_sentence(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for flags, message in (
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([str(run), "-p", "A"], "'A'"),
        ([str(run)], "a prompt is needed"),
        ([str(run), "-p", "a" * 30_001], "30001 tokens, more than the model's context of 30000"),
        ([str(run), "-p", "a", "--top-p", "2"], "top_p must be above 0 and at most 1, not 2.0"),
    ):
        assert command(flags) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_an_interruption_gives_held_text_away(
    run: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = bitnet.from_pretrained(run).generate("a", 6)
    steps, extend = iter(range(6)), Decoder.extend  # the prompt and five more

    def interrupted(self: Decoder, tokens: list[list[int]]) -> np.ndarray:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return extend(self, tokens)

    monkeypatch.setattr(Decoder, "extend", interrupted)
    assert command([str(run), "-p", "a", "--speculate", "off", "--stop", text[3:6] + "zzz", *flags]) == 130
    out, err = capsys.readouterr()
    assert out == text + "\n" * (text[-1] != "\n")
    assert last_line(err).startswith("6 tokens, ")
    assert err.endswith("finish reason: interrupted\n")


def test_ctrl_c_prints_what_there_is(run: Path) -> None:
    """Within a second on an idle machine; the test allows more. The token in hand when the signal comes may be lost."""
    with background(run) as process:
        out = process.stdout.read(64)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        out += process.stdout.read()
        err = process.stderr.read()
        assert process.wait() == 130
        assert time.monotonic() - sent < 5
    assert out.startswith(bitnet.from_pretrained(run).generate("a", 64))
    assert out.endswith("\n")
    counted = re.match(r"(\d+) tokens, .*; finish reason: interrupted$", last_line(err))
    assert counted is not None
    assert int(counted[1]) - len(out.removesuffix("\n")) in (0, 1)


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    with background(run) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait() == 0
        assert "Error" not in process.stderr.read()


def background(run: Path) -> subprocess.Popen[str]:
    """The command on a text that takes seconds."""
    start = [sys.executable, "-m", "bitnet.generate", str(run), "-p", "a", "--max-new-tokens", "30000"]
    return subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

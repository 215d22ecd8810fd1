"""Every tokenizer gives back the text it was given, whole or streamed, and never a special token for user text."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitnet.errors import ConfigError, DataError
from bitnet.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
)

SOURCE = Path(__file__).read_text(encoding="utf-8")
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
SPECIALS = ("<s>", "</s>", "<unk>", "<0x41>", "<|end_of_text|>")


def make_file_tokenizer(folder: Path) -> FileTokenizer:
    """A byte-level BPE of the kind LLaMA-3 has, trained here."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SOURCE], trainer)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": {"content": "<|end_of_text|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return FileTokenizer.load(folder / "tokenizer.json")


def make_spaced_model() -> bytes:
    """A SentencePiece model with LLaMA's habit of putting a space before the text."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        "bytes": ByteTokenizer(),
        "bpe": SentencePieceTokenizer.train([SOURCE], 512),
        "unigram": SentencePieceTokenizer.train([SOURCE], 512, "unigram"),
        "spaced": SentencePieceTokenizer(make_spaced_model()),
        "file": make_file_tokenizer(tmp_path_factory.mktemp("file")),
    }


EXACT = pytest.mark.parametrize("name", ["bytes", "bpe", "unigram", "file"])


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> str:
    stream = tokenizer.decode_stream()
    return "".join([stream.push(token) for token in tokens] + [stream.flush()])


@EXACT
@given(text=TEXT)
@example(text=SOURCE)
@example(text="def f():\n\tif x:\r\n        return 12345  \n\n\n")
@example(text=" \u2581\u2581 \u2585 \ufffd\ufeff\0 e\u0301 \U0001f600")
@example(text="".join(SPECIALS))
def test_text_comes_back(tokenizers: dict[str, Tokenizer], name: str, text: str) -> None:
    tokenizer = tokenizers[name]
    tokens = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.decode(tokens) == text
    assert streamed(tokenizer, tokens) == text


@EXACT
def test_stream_gives_only_whole_characters(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    tokens = tokenizer.encode("\u65e5\U0001f600")  # in no vocabulary here: one token a byte
    stream = tokenizer.decode_stream()
    assert [stream.push(token) for token in tokens] == ["", "", "\u65e5", "", "", "", "\U0001f600"]
    assert stream.flush() == ""
    cut = tokenizer.decode_stream()
    assert [cut.push(tokens[0]), cut.push(tokens[1])] == ["", ""]
    assert set(cut.flush()) == {"\ufffd"}


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@given(data=st.data())
def test_stream_equals_decode_for_any_ids(tokenizers: dict[str, Tokenizer], name: str, data: st.DataObject) -> None:
    tokenizer = tokenizers[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


@EXACT
def test_special_tokens_do_not_come_from_text(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    special = {tokenizer.bos_id, tokenizer.eos_id} - {None}
    assert special
    for text in SPECIALS:
        tokens = tokenizer.encode(f"a{text} {text}")
        assert not special & set(tokens)
        assert len(tokens) > 4
    assert tokenizer.decode(sorted(token for token in special if token is not None)) == ""


@EXACT
def test_document_stands_between_bos_and_eos(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    tokens = tokenizer.encode_document("ab")
    assert tokens[-1] == tokenizer.eos_id
    assert (tokens[0] == tokenizer.bos_id) == (tokenizer.bos_id is not None)
    assert tokenizer.decode(tokens) == "ab"


@EXACT
@pytest.mark.parametrize("token", [-1, 1 << 20])
def test_ids_outside_the_vocabulary_are_refused(tokenizers: dict[str, Tokenizer], name: str, token: int) -> None:
    with pytest.raises(DataError, match=rf"token id {token} is outside"):
        tokenizers[name].decode([token])


@EXACT
def test_save_and_load(tokenizers: dict[str, Tokenizer], name: str, tmp_path: Path) -> None:
    tokenizer = tokenizers[name]
    files = tokenizer.save(tmp_path)
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.vocab_size, again.bos_id, again.eos_id) == (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    assert again.encode(SOURCE) == tokenizer.encode(SOURCE)
    assert build_tokenizer(str(tmp_path / files[0]), [], 0).fingerprint() == tokenizer.fingerprint()


def test_fingerprints_differ(tokenizers: dict[str, Tokenizer]) -> None:
    chars = [CharTokenizer("ab"), CharTokenizer("abc"), CharTokenizer("ab", separator=True)]
    prints = {tokenizer.fingerprint() for tokenizer in [*tokenizers.values(), *chars]}
    assert len(prints) == len(tokenizers) + len(chars)


@given(text=TEXT.filter(bool), separator=st.booleans())
def test_chars(text: str, separator: bool) -> None:
    tokenizer = CharTokenizer.train([text[:3], text], separator)
    assert tokenizer.vocab_size == len(set(text)) + separator
    assert tokenizer.decode(tokenizer.encode_document(text)) == text
    assert streamed(tokenizer, tokenizer.encode(text)) == text
    assert tokenizer.encode_document(text)[len(text) :] == ([tokenizer.eos_id] if separator else [])
    assert tokenizer.encode("".join(sorted(set(text)))) == list(range(len(set(text))))


def test_chars_name_the_unknown_character(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.train(["hello"], separator=True)
    with pytest.raises(DataError, match=r"'\u00e9' \(U\+00E9\) is not among the 4"):
        tokenizer.encode("h\u00e9llo")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("characters", ["", "ba", "aa"])
def test_chars_refuse_an_alphabet_out_of_order(characters: str) -> None:
    with pytest.raises(DataError, match="distinct characters"):
        CharTokenizer(characters)


def test_sentencepiece_training_is_deterministic() -> None:
    for model_type in ("bpe", "unigram"):
        first, second = (SentencePieceTokenizer.train([SOURCE], 400, model_type) for _ in range(2))
        assert first.fingerprint() == second.fingerprint()


def test_sentencepiece_trains_on_every_nth_stretch() -> None:
    documents = ["x = alpha", "y = omega"] * 50
    assert SentencePieceTokenizer.train(documents, 300, every=2).fingerprint() == (
        SentencePieceTokenizer.train(documents[::2], 300).fingerprint()
    )


def test_sentencepiece_keeps_indentation_and_digits(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    assert [len(tokenizer.encode(" " * n)) for n in (1, 2, 7, 16, 17)] == [1, 1, 1, 1, 2]
    assert len(tokenizer.encode("\t")) == 1
    assert len(tokenizer.encode("2024")) == 4


def test_sentencepiece_reduces_a_vocabulary_the_text_cannot_fill() -> None:
    tokenizer = SentencePieceTokenizer.train(["a tiny text"], 5000)
    assert 256 < tokenizer.vocab_size < 320


def test_sentencepiece_training_refusals() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 100 is too small: this text needs at least \d{3}"):
        SentencePieceTokenizer.train([SOURCE], 100)
    with pytest.raises(DataError, match="no text to train"):
        SentencePieceTokenizer.train([], 400)
    with pytest.raises(ConfigError, match="cannot train"):
        SentencePieceTokenizer.train([SOURCE], 400, "no such type")


@given(text=TEXT)
def test_sentencepiece_with_a_leading_space(tokenizers: dict[str, Tokenizer], text: str) -> None:
    tokenizer = tokenizers["spaced"]
    text = text.replace("\u2581", " ")  # such a model cannot tell them apart
    tokens = tokenizer.encode(text)
    decoded = tokenizer.decode(tokens)
    assert streamed(tokenizer, tokens) == decoded
    assert decoded.split() == text.split()  # it merges runs of spaces
    assert not decoded.startswith(" ")


def test_file_tokenizer_reads_its_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    assert (tokenizers["file"].bos_id, tokenizers["file"].eos_id) == (0, 2)


def test_special_names_that_are_words_come_out_of_no_text() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {letter: i for i, letter in enumerate([*sorted(ByteLevel.alphabet()), "end", "aa"])}
    backend = Backend(BPE(vocabulary, [], ignore_merges=True))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    backend.add_special_tokens(["end", "aa"])
    tokenizer = FileTokenizer(backend.to_str(), eos="end")
    for text in ("end", "end end", "endend", "aa", "aaa", "aaaa aa", "bend"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens().values())
        assert len(ids) == len(text)


def test_load_refusals(tmp_path: Path) -> None:
    def refuse(path: Path, match: str) -> None:
        with pytest.raises(DataError, match=match):
            load_tokenizer(path)

    refuse(tmp_path, "holds no")
    refuse(tmp_path / "absent.json", "there is no tokenizer at")
    for name, data, match in (
        ("tokenizer.txt", b"", "should end in"),
        ("junk.model", b"junk", r"junk\.model is not a SentencePiece model"),
        ("junk.json", b"{}", r"junk\.json is not a tokenizer"),
        ("latin.json", b"\xe9", "not UTF-8"),
        ("bitnet_tokenizer.json", b"[", "is not JSON"),
        ("bitnet_tokenizer.json", b"[]", "not a JSON object"),
        ("bitnet_tokenizer.json", b'{"kind": "runes"}', "kind 'runes'"),
        ("bitnet_tokenizer.json", b'{"kind": "chars"}', "kind 'chars'"),
    ):
        (tmp_path / name).write_bytes(data)
        refuse(tmp_path / name, match)
    tokenizer = make_file_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no token '<bos>'"):
        FileTokenizer((tmp_path / "tokenizer.json").read_text(encoding="utf-8"), bos="<bos>")
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint() == tokenizer.fingerprint()


def test_unknown_spec_is_refused() -> None:
    with pytest.raises(ConfigError, match="'wordpiece' is neither bytes, chars"):
        build_tokenizer("wordpiece", [], 0)


def test_import_stays_light() -> None:
    code = "import sys, bitnet.tokenizer; assert not {'sentencepiece', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Tokenizers as Hugging Face's files: transformers gives the same ids, and load_tokenizer the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import SOURCE, TEXT, make_file_tokenizer, make_spaced_model

from bitnet.errors import ConfigError, DataError
from bitnet.formats import sentencepiece_file
from bitnet.formats.hf_tokenizer import byte_letters, save_hf_tokenizer
from bitnet.formats.sentencepiece_file import Kind, Piece
from bitnet.tokenizer import (
    AddedToken,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)

transformers = pytest.importorskip("transformers")
ALPHABET = '\t\n !"<>/|_adelmnstx0123456789\u2581\u00e9\u65e5\U0001f600'
NAMES = ["bytes", "chars", "bpe", "spaced", "added", "file"]
PAPER = (AddedToken(0, "<pad>", True), AddedToken(1, "</line>", True))


def added_behind(model: bytes) -> SentencePieceTokenizer:
    """With the paper's tokens behind the model's."""
    size = SentencePieceTokenizer(model).vocab_size
    return SentencePieceTokenizer(model, added=[token._replace(id=size + token.id) for token in PAPER])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Both by kind; the folders have a config that calls for LLaMA's tokenizer."""
    ours: dict[str, Tokenizer] = {
        "bytes": ByteTokenizer(),
        "chars": CharTokenizer("".join(sorted(ALPHABET)), separator=True),
        "bpe": SentencePieceTokenizer.train([SOURCE], 700),
        "spaced": SentencePieceTokenizer(make_spaced_model()),
        "added": added_behind(make_spaced_model()),
        "file": make_file_tokenizer(tmp_path_factory.mktemp("file")),
    }
    found = {}
    for name, tokenizer in ours.items():
        folder = tmp_path_factory.mktemp(name)
        files = save_hf_tokenizer(tokenizer, folder)
        assert sorted(files) == sorted(path.name for path in folder.iterdir())
        assert load_tokenizer(folder).fingerprint() == tokenizer.fingerprint()
        assert type(load_tokenizer(folder)) is type(tokenizer)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        found[name] = Pair(tokenizer, transformers.AutoTokenizer.from_pretrained(str(folder)))
    return found


class Pair(NamedTuple):
    """Ours, and what AutoTokenizer makes of our files."""

    ours: Tokenizer
    theirs: Any

    def __repr__(self) -> str:
        return self.ours.name


def theirs_of(theirs: Any, text: str) -> list[int]:
    ids: list[int] = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200)
@given(text=TEXT | st.text(st.sampled_from(ALPHABET), max_size=80))
@example(text=SOURCE)
@example(text="=" * 37 + " " * 41 + "\t\t\n\n  \n-- 12345 1 23")
@example(text="</s><s><unk><0x41><0xFF> <|end_of_text|></line> <pad>")
@example(text=" \u2581\u2581 a \u2585 \ufffd\ufeff\0 e\u0301 \U0001f600 ")
@example(text="")
def test_ids_are_those_of_auto_tokenizer(both: dict[str, Pair], name: str, text: str) -> None:
    ours, theirs = both[name]
    if name == "chars":
        text = "".join(letter for letter in text if letter in ALPHABET)
    ids = ours.encode(text)
    assert theirs_of(theirs, text) == ids
    if name != "spaced" and name != "added":
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_special_ids_are_those_of_auto_tokenizer(both: dict[str, Pair], name: str) -> None:
    ours, theirs = both[name]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    if name != "file":  # whose file says what comes first
        assert theirs("a")["input_ids"] == [*([] if ours.bos_id is None else [ours.bos_id]), *ours.encode("a")]


def test_auto_tokenizer_refuses_a_character_as_ours_does(both: dict[str, Pair]) -> None:
    ours, theirs = both["chars"]
    with pytest.raises(DataError):
        ours.encode("Z")
    with pytest.raises(Exception, match="UNK"):
        theirs_of(theirs, "Z")


def test_the_letters_of_bytes_are_those_of_gpt2() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_letters()) == set(ByteLevel.alphabet())
    spelled = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a \n\u00e9\u0101")
    assert "".join(byte_letters()[byte] for byte in "a \n\u00e9\u0101".encode()) == spelled[0][0]


def with_pieces(model: bytes, change: dict[int, Piece]) -> SentencePieceTokenizer:
    pieces, others = sentencepiece_file.parse(model)
    for i, piece in change.items():
        pieces[i] = piece
    return SentencePieceTokenizer(sentencepiece_file.build(pieces, others))


def test_models_that_cannot_be_exact_are_refused(tmp_path: Path) -> None:
    def refuse(tokenizer: Tokenizer, match: str) -> None:
        with pytest.raises(ConfigError, match=f"no tokenizer.json with the same ids: .*{match}"):
            save_hf_tokenizer(tokenizer, tmp_path)
        assert not list(tmp_path.iterdir())

    model = SentencePieceTokenizer.train([SOURCE], 700).model
    pieces, _ = sentencepiece_file.parse(model)
    last = next(i for i in reversed(range(700)) if len(pieces[i].text) > 1)
    refuse(SentencePieceTokenizer.train([SOURCE], 700, "unigram"), "it is a unigram model")
    refuse(with_pieces(model, {last: Piece("zqzq", -900.0, Kind.UNUSED)}), "unused pieces")
    refuse(with_pieces(model, {last: Piece("zqzq", pieces[last - 1].score, Kind.NORMAL)}), "one score")
    refuse(with_pieces(model, {last: Piece("\u00e9\u00e8", -900.0, Kind.NORMAL)}), "a character that is no piece")
    refuse(with_pieces(model, {last: Piece("zqzq", float("nan"), Kind.NORMAL)}), "no number")
    size = SentencePieceTokenizer(make_spaced_model()).vocab_size
    refuse(SentencePieceTokenizer(make_spaced_model(), added=[AddedToken(size, "x", False)]), "changes the spaces")


def test_a_chat_template_stays(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(make_spaced_model(), chat_template="{{ bos_token }}{{ messages[0].content }}")
    save_hf_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.chat_template == tokenizer.chat_template

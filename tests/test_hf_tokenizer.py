"""Tokenizers as Hugging Face's files: transformers gives the same ids, and load_tokenizer the same tokenizer."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import SOURCE, TEXT, make_file_tokenizer, make_spaced_model

from bitnet.errors import DataError
from bitnet.formats.hf_tokenizer import byte_letters, save_hf_tokenizer
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

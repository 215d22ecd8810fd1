"""SentencePiece's file taken apart and put together; bytes that are no model are refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import SOURCE, make_spaced_model

from bitnet.errors import DataError
from bitnet.formats import sentencepiece_file
from bitnet.formats.sentencepiece_file import Kind, Piece, Settings
from bitnet.tokenizer import SentencePieceTokenizer

PIECES = st.lists(
    st.builds(
        Piece,
        st.text(st.characters(codec="utf-8"), max_size=300),
        st.floats(width=32, allow_nan=False),
        st.sampled_from(Kind),
    )
)


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {
        "bpe": SentencePieceTokenizer.train([SOURCE], 400).model,
        "unigram": SentencePieceTokenizer.train([SOURCE], 400, "unigram").model,
        "spaced": make_spaced_model(),
    }


def test_models_are_put_together_again(models: dict[str, bytes]) -> None:
    for model in models.values():
        pieces, others = sentencepiece_file.parse(model)
        assert sentencepiece_file.build(pieces, others) == model
        assert sentencepiece_file.is_plain(others)
        tokenizer = SentencePieceTokenizer(model)
        processor = tokenizer._processor
        assert [piece.text for piece in pieces] == [processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
        assert [piece.score for piece in pieces] == [processor.get_score(i) for i in range(tokenizer.vocab_size)]
        for i, piece in enumerate(pieces):
            assert (piece.kind == Kind.CONTROL) == processor.is_control(i)
            assert (piece.kind == Kind.BYTE) == processor.is_byte(i)
            assert (piece.kind == Kind.UNKNOWN) == processor.is_unknown(i)


def test_settings(models: dict[str, bytes]) -> None:
    found = {name: sentencepiece_file.settings(sentencepiece_file.parse(model)[1]) for name, model in models.items()}
    ours = Settings("bpe", byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False)
    assert found["bpe"] == ours
    assert found["unigram"].model_type == "unigram"
    assert found["spaced"] == Settings("bpe", byte_fallback=True)
    bare = sentencepiece_file.without_prefix(models["spaced"])
    assert not sentencepiece_file.settings(sentencepiece_file.parse(bare)[1]).add_dummy_prefix
    assert sentencepiece_file.settings(b"") == Settings()  # the defaults of SentencePiece
    made = sentencepiece_file.settings(sentencepiece_file.settings_bytes({"unk": "<unk>"}, True, True))
    assert made == Settings("bpe", byte_fallback=True, remove_extra_whitespaces=False)


@given(pieces=PIECES)
def test_pieces_come_back(pieces: list[Piece]) -> None:
    assert sentencepiece_file.parse(sentencepiece_file.build(pieces, b"\x12\x00")) == (pieces, b"\x12\x00")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x0a\x05ab", "should have . bytes, but"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "should have 9223372036854775807 bytes"),  # a length near 2**63
        (b"\x0d\x00", "should have . bytes, but"),
        (b"\x80" * 100, "no number below 2\\^64"),
        (b"\x08\xff", "a number is cut off"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\x03\x0a\x01\xff", "not UTF-8"),
        (b"\x0a\x02\x18\x07", "unknown type 7"),
        (b"\x0a\x02\x0a\x09", "should have . bytes, but"),
    ],
)
def test_bytes_that_are_no_model_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(DataError, match=match):
        sentencepiece_file.parse(data)


def test_fields_of_another_type_are_skipped_as_protocol_buffers_do() -> None:
    assert sentencepiece_file.settings(b"\x12\x03\x1a\x01\x02") == Settings()  # the model type, as bytes
    with pytest.raises(DataError, match="type 9"):
        sentencepiece_file.settings(b"\x12\x02\x18\x09")


def test_mutated_models_are_read_or_refused(models: dict[str, bytes]) -> None:
    rng = random.Random(3)
    refused = 0
    for _ in range(300):
        data = bytearray(rng.choice(sorted(models.values())))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            if rng.random() < 0.3:
                del data[at : at + rng.randrange(40)]
            else:
                data[at] ^= 1 << rng.randrange(8)
        try:
            pieces, others = sentencepiece_file.parse(bytes(data))
            sentencepiece_file.settings(others)
            assert sum(len(piece.text) for piece in pieces) <= len(data)
        except DataError:
            refused += 1
    assert 20 < refused < 300

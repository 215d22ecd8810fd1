"""Tokenizers inside GGUF: llama.cpp gives the same ids, all come back, and no metadata does harm.

llama.cpp is asked where LLAMA_PYTHON, or else this interpreter, has llama_cpp.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from made_tokenizers import BOS, EOS, EOT, llama3_tokenizer, nasty_texts
from test_tokenizer import SOURCE, TEXT, make_file_tokenizer, make_spaced_model

from bitnet.chat_template import choose
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats import sentencepiece_file
from bitnet.formats.gguf_file import Value
from bitnet.formats.gguf_tokenizer import GGML, OWN, TEMPLATE, metadata_of, tokenizer_of
from bitnet.formats.sentencepiece_file import Kind, Piece
from bitnet.tokenizer import (
    AddedToken,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON", sys.executable)
PATH = Path("model.gguf")
NAMES = ["bytes", "chars", "chars+end", "llama3", "smaug", "qwen2", "gpt2", "bpe", "html", "llama2", "paper"]
CHARACTERS = "".join(sorted({letter for text in nasty_texts() for letter in text} | set("\\\t\x7f")))
ASK = """
import ctypes, json, sys
import llama_cpp
job = json.load(sys.stdin)
parameters = llama_cpp.llama_model_default_params()
parameters.vocab_only = True
answers = {}
for name, path in job["files"].items():
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    vocab = llama_cpp.llama_model_get_vocab(model)
    ids = []
    for text in job["texts"]:
        data = text.encode()
        room = 2 * len(data) + 8
        found = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), found, room, False, False)
        ids.append(found[:count])
    pieces = []
    for id_ in range(llama_cpp.llama_vocab_n_tokens(vocab)):
        room = ctypes.create_string_buffer(512)
        count = llama_cpp.llama_token_to_piece(vocab, id_, room, 512, 0, False)
        pieces.append(room.raw[:count].hex())
    answers[name] = {
        "ids": ids,
        "pieces": pieces,
        "bos": llama_cpp.llama_vocab_bos(vocab),
        "eos": llama_cpp.llama_vocab_eos(vocab),
        "adds_bos": llama_cpp.llama_vocab_get_add_bos(vocab),
        "ends": [i for i in range(len(pieces)) if llama_cpp.llama_vocab_is_eog(vocab, i)],
    }
    llama_cpp.llama_model_free(model)
json.dump(answers, sys.stdout)
"""


def llama2_model() -> bytes:
    """SentencePiece with the settings of LLaMA-2: a space first, digits apart, nothing rewritten."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()),
        model_writer=model,
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def html_model() -> bytes:
    """With the pieces that a typed "</s>" would be put together from."""
    pieces, others = sentencepiece_file.parse(SentencePieceTokenizer.train([SOURCE], 500).model)
    longer = [i for i, piece in enumerate(pieces) if piece.kind == Kind.NORMAL and len(piece.text) > 1]
    for i, text in zip(longer, ["</", "</s"], strict=False):
        assert text not in {piece.text for piece in pieces}
        pieces[i] = Piece(text, pieces[i].score, Kind.NORMAL)
    return sentencepiece_file.build(pieces, others)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    llama2 = llama2_model()
    size = SentencePieceTokenizer(llama2).vocab_size
    paper = [AddedToken(size, "<pad>", True), AddedToken(size + 1, "</line>", True)]
    llama3 = llama3_tokenizer(SOURCE)
    merged = llama3.text.replace('"ignore_merges":true', '"ignore_merges":false')
    return {
        "smaug": FileTokenizer(merged, BOS, EOS),
        "qwen2": FileTokenizer(merged.replace("{N}{1,3}", "{N}"), BOS, EOS),
        "bytes": ByteTokenizer(),
        "chars": CharTokenizer(CHARACTERS),
        "chars+end": CharTokenizer(CHARACTERS, separator=True),
        "llama3": llama3,
        "gpt2": make_file_tokenizer(tmp_path_factory.mktemp("gpt2")),
        "bpe": SentencePieceTokenizer.train([SOURCE], 700),
        "html": SentencePieceTokenizer(html_model()),
        "llama2": SentencePieceTokenizer(llama2),
        "paper": SentencePieceTokenizer(llama2, added=paper, chat_template="{{ messages }}"),
    }


def write_vocabulary(path: Path, metadata: Mapping[str, Value]) -> None:
    """A GGUF file without tensors."""
    numbers = {"u8": (0, "B"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "str": (8, "")}

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def one(kind: str, value: Any) -> bytes:
        return text(value) if kind == "str" else struct.pack("<" + numbers[kind][1], value)

    out = [b"GGUF", struct.pack("<IQQ", 3, 0, len(metadata) + 1)]
    for key, value in {"general.architecture": Value("str", "llama"), **metadata}.items():
        kind = value.type_name.strip("[]")
        out.append(text(key))
        if kind == value.type_name:
            out += [struct.pack("<I", numbers[kind][0]), one(kind, value.value)]
        else:
            out.append(struct.pack("<IIQ", 9, numbers[kind][0], len(value.value)))
            out += [one(kind, item) for item in value.value]
    path.write_bytes(b"".join(out) + bytes(64))


def back(tokenizer: Tokenizer, more: int = 5) -> Tokenizer:
    found = tokenizer_of(metadata_of(tokenizer, tokenizer.vocab_size + more), PATH)
    assert found is not None
    return found


def test_llama_cpp_gives_the_same_ids(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    if subprocess.run([LLAMA_PYTHON, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(f"{LLAMA_PYTHON} has no llama_cpp; LLAMA_PYTHON names an interpreter that does")
    texts = nasty_texts()
    files = {}
    for name, tokenizer in tokenizers.items():
        files[name] = str(tmp_path / f"{name}.gguf")
        write_vocabulary(Path(files[name]), metadata_of(tokenizer, tokenizer.vocab_size + 5))
    job = json.dumps({"files": files, "texts": texts})
    done = subprocess.run([LLAMA_PYTHON, "-c", ASK], input=job, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    for name, tokenizer in tokenizers.items():
        answer = answers[name]
        for text, ids in zip(texts, answer["ids"], strict=True):
            assert ids == tokenizer.encode(text), (name, text)
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        assert answer["adds_bos"] == (bos is not None)
        assert bos in (None, answer["bos"])
        assert answer["eos"] == (-1 if eos is None else eos)
        special = tokenizer.special_tokens()
        ends = {eos, special.get(EOT), special.get("</s>")} - {None}  # of which llama.cpp knows the names
        assert set(answer["ends"]) == ends, name
        for id_, piece in enumerate(answer["pieces"][: tokenizer.vocab_size]):
            ours = tokenizer.token_bytes(id_) if hasattr(tokenizer, "token_bytes") else None
            assert ours in (None, b"\xef\xbf\xbd", bytes.fromhex(piece)), (name, id_)


def test_ways_of_splitting_have_their_names(tokenizers: dict[str, Tokenizer]) -> None:
    ways = {"llama3": "llama-bpe", "smaug": "smaug-bpe", "qwen2": "qwen2", "gpt2": "gpt-2", "bytes": "gpt-2"}
    for name, way in ways.items():
        assert metadata_of(tokenizers[name], 2000)[GGML + "pre"].value == way
    assert len({tuple(tokenizers[name].encode(" qzx 1234")) for name in ("llama3", "smaug", "qwen2")}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_come_back(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    again = back(tokenizer)
    assert type(again) is type(tokenizer)
    assert (again.vocab_size, again.bos_id, again.eos_id) == (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    assert (again.special_tokens(), again.chat_template) == (tokenizer.special_tokens(), tokenizer.chat_template)
    if not isinstance(tokenizer, FileTokenizer):
        assert again.fingerprint() == tokenizer.fingerprint()
    for text in nasty_texts():
        assert again.encode(text) == tokenizer.encode(text)
    assert metadata_of(back(again), 2000) == metadata_of(tokenizer, 2000)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "bpe", "llama2"])
@given(text=TEXT)
def test_ids_of_any_text_come_back(
    again: dict[str, Tokenizer], tokenizers: dict[str, Tokenizer], name: str, text: str
) -> None:
    assert again[name].encode(text) == tokenizers[name].encode(text)


@pytest.fixture(scope="module")
def again(tokenizers: dict[str, Tokenizer]) -> dict[str, Tokenizer]:
    return {name: back(tokenizer) for name, tokenizer in tokenizers.items()}


# ---- what other tools write ----------------------------------------------------------------------------------------


def changed(metadata: Mapping[str, Value], **values: Value | None) -> dict[str, Value]:
    """Metadata with other values of tokenizer.ggml keys; None takes the key away."""
    found = dict(metadata) | {GGML + name: value for name, value in values.items() if value is not None}
    return {key: value for key, value in found.items() if values.get(key.removeprefix(GGML), value) is not None}


def foreign(metadata: Mapping[str, Value]) -> dict[str, Value]:
    """Without the keys of our own."""
    return {key: value for key, value in metadata.items() if not key.startswith(OWN)}


def of(metadata: Mapping[str, Value]) -> Tokenizer:
    found = tokenizer_of(metadata, PATH)
    assert found is not None
    return found


def test_a_file_without_tokenizer_gives_none() -> None:
    assert tokenizer_of({}, PATH) is None
    assert tokenizer_of({GGML + "model": Value("str", "no_vocab")}, PATH) is None


@pytest.mark.parametrize("name", ["bpe", "llama2", "paper", "bytes", "chars+end"])
def test_ids_come_back_without_keys_of_our_own(tokenizers: dict[str, Tokenizer], name: str) -> None:
    ours, found = tokenizers[name], of(foreign(metadata_of(tokenizers[name], 2000)))
    assert (found.vocab_size, found.bos_id, found.eos_id) == (ours.vocab_size, ours.bos_id, ours.eos_id)
    assert found.special_tokens() == ours.special_tokens()
    for text in nasty_texts():
        assert found.encode(text) == ours.encode(text)
        assert found.decode(found.encode(text)) == ours.decode(ours.encode(text))


def test_bos_that_readers_do_not_add(tokenizers: dict[str, Tokenizer]) -> None:
    for name in ("llama3", "llama2"):
        metadata = foreign(metadata_of(tokenizers[name], 2000))
        assert of(changed(metadata, add_bos_token=Value("bool", False))).bos_id is None
        assert of(changed(metadata, add_bos_token=None)).bos_id == tokenizers[name].bos_id
    metadata = changed(metadata_of(tokenizers["gpt2"], 400), add_bos_token=None)
    assert of(metadata).bos_id is None


def published(tokenizer: FileTokenizer, template: str) -> dict[str, Value]:
    """Like the published GGUF of 2B-4T: 128256 tokens, no name for how text is split, a template that is wrong."""
    metadata = changed(metadata_of(tokenizer, 128256), pre=None, eot_token_id=None)
    return metadata | {TEMPLATE: Value("str", template)}


def test_the_published_file_of_2b_4t(tokenizers: dict[str, Tokenizer]) -> None:
    ours = tokenizers["llama3"]
    assert isinstance(ours, FileTokenizer)
    found = of(published(ours, "{{ bos_token }}Human: {{ m }}\n\nBITNETAssistant: "))
    assert [found.encode(text) for text in nasty_texts()] == [ours.encode(text) for text in nasty_texts()]
    assert (found.bos_id, found.eos_id) == (ours.bos_id, ours.eos_id)
    assert found.chat_template is None
    template = choose("auto", found)
    special = found.special_tokens()
    assert template.name == "bitnet"
    assert template.end_ids == {special[EOS], special[EOT]}
    assert of(published(ours, "{{ right }}")).chat_template == "{{ right }}"
    with pytest.raises(CheckpointError, match=r"ggml\.pre .* named by nothing"):
        of(changed(metadata_of(ours, 2000), pre=None))


def test_special_tokens_that_a_file_calls_user_defined(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(tokenizers["llama3"], 2000)
    kinds = [4 if kind == 3 else kind for kind in metadata[GGML + "token_type"].value]
    found = of(changed(metadata, token_type=Value("[i32]", kinds)))
    assert found.special_tokens() == tokenizers["llama3"].special_tokens()
    assert not set(found.encode(BOS + EOS + EOT)) & set(found.special_tokens().values())


# ---- what cannot be written ----------------------------------------------------------------------------------------


def with_pieces(change: dict[int, Piece], model: bytes) -> SentencePieceTokenizer:
    pieces, others = sentencepiece_file.parse(model)
    for i, piece in change.items():
        pieces[i] = piece
    return SentencePieceTokenizer(sentencepiece_file.build(pieces, others))


def test_refusals_name_the_reason(tokenizers: dict[str, Tokenizer]) -> None:
    llama3 = tokenizers["llama3"]
    assert isinstance(llama3, FileTokenizer)

    def refuse(tokenizer: Tokenizer, match: str, size: int = 2000) -> None:
        with pytest.raises(ConfigError, match=match):
            metadata_of(tokenizer, size)

    def edited(**fields: Any) -> FileTokenizer:
        text = json.loads(llama3.text)
        for key, value in fields.items():
            text["model" if key in text["model"] else key] = (
                text["model"] | {key: value} if key in text["model"] else value
            )
        return FileTokenizer(json.dumps(text), BOS, EOS)

    refuse(tokenizers["bytes"], "has 257 ids, the model only 256", 256)
    refuse(SentencePieceTokenizer.train([SOURCE], 500, "unigram"), "for a unigram model gives other ids")
    refuse(SentencePieceTokenizer(make_spaced_model()), "rewrites text")
    size = SentencePieceTokenizer(llama2_model()).vocab_size
    loose = SentencePieceTokenizer(llama2_model(), added=[AddedToken(size, "</line>", False)])
    refuse(loose, "a space behind '</line>'")
    model = SentencePieceTokenizer.train([SOURCE], 500).model
    refuse(with_pieces({450: Piece("zzzzqq", -7.0, Kind.UNUSED)}, model), "unused pieces")
    hexes = {450: Piece("<0x4", -7.5, Kind.NORMAL), 451: Piece("1>", -7.25, Kind.NORMAL)}
    refuse(with_pieces(hexes, model), "'<0x41>', which is no text")
    crossing = {450: Piece("abx", 0.0, Kind.USER_DEFINED), 451: Piece("bxcd", 0.0, Kind.USER_DEFINED)}
    refuse(with_pieces(crossing, model), "'abx' and 'bxcd' can overlap")
    refuse(edited(normalizer={"type": "NFC"}), "with a normalizer")
    refuse(edited(ignore_merges=False, pre_tokenizer={"type": "Whitespace"}), "few ways of splitting")
    refuse(edited(dropout=0.5), "with dropout")
    refuse(FileTokenizer(llama3.text, BOS), "takes token 11 for the end")
    text = llama3.text.replace("<|reserved_special_token_7|>", "word")
    refuse(FileTokenizer(text, BOS, EOS), "special token 'word' out of typed text")


# ---- what is wrong in a file ---------------------------------------------------------------------------------------


def refused(metadata: Mapping[str, Value], match: str, **values: Value | None) -> None:
    with pytest.raises(CheckpointError, match=match):
        tokenizer_of(changed(metadata, **values), PATH)


def test_unknown_kinds_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(tokenizers["llama3"], 1000)
    refused(metadata, "of the kind 't5'", model=Value("str", "t5"))
    refused(metadata, "named 'deepseek-v3'", pre=Value("str", "deepseek-v3"))
    refused(metadata, "is of type u32, not str", model=Value("u32", 1))


def test_missing_and_empty_arrays_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(tokenizers["bpe"], 1000)
    refused(metadata, "tokens is missing or empty", tokens=None)
    refused(metadata, "tokens is missing or empty", tokens=Value("[str]", []))
    refused(metadata, "scores is missing", scores=None)
    refused(metadata, "no token that is used", token_type=Value("[i32]", [5] * 1000))


def test_arrays_of_other_lengths_and_types_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(tokenizers["bpe"], 1000)
    refused(metadata, "token_type has 999 values for 1000 tokens", token_type=Value("[i32]", [1] * 999))
    refused(metadata, "scores has 1001 values", scores=Value("[f32]", [0.0] * 1001))
    refused(metadata, r"scores is of type \[f64\]", scores=Value("[f64]", [0.0] * 1000))
    refused(metadata, "tokens is of type str", tokens=Value("str", "a"))


def test_ids_outside_the_tokens_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    for name in ("bpe", "llama3", "chars+end"):
        tokenizer = tokenizers[name]
        metadata = metadata_of(tokenizer, 2000)
        for id_ in (tokenizer.vocab_size, 2**32 - 1, 2**64 - 1, -1):
            kind = "i64" if id_ < 0 else "u64"
            refused(metadata, rf"eos_token_id {id_} is outside 0\.\.", eos_token_id=Value(kind, id_))
        refused(metadata, "is of type f32", eos_token_id=Value("f32", 1.0))


def test_unknown_token_types_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in (0, 7, -1, 2**31 - 1):
        metadata = metadata_of(tokenizers["bpe"], 700)
        refused(metadata, f"token_type {kind} of token 0", token_type=Value("[i32]", [kind] + [1] * 699))


def test_duplicate_tokens_and_merges_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(tokenizers["llama3"], 2000)
    tokens, merges = list(metadata[GGML + "tokens"].value), list(metadata[GGML + "merges"].value)
    refused(metadata, "has .* twice", tokens=Value("[str]", [tokens[0], tokens[0], *tokens[2:]]))
    refused(metadata, "one merge twice", merges=Value("[str]", [*merges, merges[0]]))


def test_merges_that_name_no_token_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(tokenizers["llama3"], 2000)
    for merge in ("a", "", " ", "a  b", "zzz zzz", "\u00e9\u00e9 a", "a" * 10000 + " b", f"{BOS} {EOS}"):
        refused(metadata, "not two tokens that make a third", merges=Value("[str]", [merge]))


def test_a_missing_byte_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(tokenizers["llama3"], 2000)
    tokens = ["another" if text == "a" else text for text in metadata[GGML + "tokens"].value]
    refused(metadata, "none for the byte 0x61", tokens=Value("[str]", tokens), merges=Value("[str]", []))


def test_a_word_that_a_file_calls_special_comes_out_of_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(tokenizers["llama3"], 2000)
    tokens, kinds = metadata[GGML + "tokens"].value, list(metadata[GGML + "token_type"].value)
    word = next(text for text in tokens if text.isascii() and text.isalpha() and len(text) > 2)
    id_ = tokens.index(word)
    assert tokenizers["llama3"].encode(word) == [id_]
    kinds[id_] = 3
    found = of(changed(metadata, token_type=Value("[i32]", kinds)))
    text = f"{word} {word}{word} x{word}"
    assert id_ not in found.encode(text)
    assert found.decode(found.encode(text)) == text
    kinds[tokens.index("a")] = 3
    refused(metadata, "'a', which any text may hold", token_type=Value("[i32]", kinds))


def test_pieces_that_are_wrong_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = foreign(metadata_of(tokenizers["bpe"], 700))
    tokens, kinds = list(metadata[GGML + "tokens"].value), list(metadata[GGML + "token_type"].value)
    byte = kinds.index(6)

    def with_text(text: str, at: int) -> Value:
        return Value("[str]", [*tokens[:at], text, *tokens[at + 1 :]])

    refused(metadata, "'<0x1G>' for a byte", tokens=with_text("<0x1G>", byte))
    refused(metadata, "'' for the token 600", tokens=with_text("", 600))
    refused(metadata, "for the token 600", tokens=with_text("a\0b", 600))
    refused(metadata, "one that is no number", scores=Value("[f32]", [float("nan")] * 700))
    refused(metadata, "one token that it is the unknown one", token_type=Value("[i32]", [1, *kinds[1:]]))
    refused(metadata, "one token that it is the unknown one", token_type=Value("[i32]", [2, 2, *kinds[2:]]))


def test_settings_of_our_own_that_are_wrong_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(tokenizers["bpe"], 700)
    pieces, others = sentencepiece_file.parse(SentencePieceTokenizer.train([SOURCE], 500, "unigram").model)
    model = sentencepiece_file.build(pieces, others)
    charsmap = b"\x1a\x04\x12\x02xx"
    for data in (b"\x0a", b"\xff" * 12, model, others, charsmap, b"\x22\x00", b"\x2a\x02\x12\x00"):
        with pytest.raises(CheckpointError):
            tokenizer_of(metadata | {OWN + "sentencepiece": Value("[u8]", list(data))}, PATH)
    for count in (0, 701, 2**32 - 1):
        with pytest.raises(CheckpointError, match=r"pieces .* is outside"):
            tokenizer_of(metadata | {OWN + "pieces": Value("u32", count)}, PATH)
    with pytest.raises(CheckpointError, match="control has 1 values for 2 tokens"):
        tokenizer_of(metadata | {OWN + "control": Value("[str]", ["<s>"])}, PATH)


def test_characters_that_are_wrong_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    metadata = metadata_of(CharTokenizer("abc", separator=True), 4)
    refused(metadata, "cannot be made", tokens=Value("[str]", ["b", "a", "c", r"<|end_of_text|>\xff"]))
    refused(metadata, "single characters", tokens=Value("[str]", [r"\x61", "b", "c", r"<|end_of_text|>\xff"]))
    refused(metadata, "single characters", tokens=Value("[str]", ["a", "b", "c", "d"]))
    refused(metadata, "0 is not the last", eos_token_id=Value("u32", 0))


def test_mutated_metadata_is_read_or_refused(tokenizers: dict[str, Tokenizer]) -> None:
    """Whatever stands in the keys: a tokenizer, none, or CheckpointError."""
    rng = random.Random(11)
    small = {
        "llama3": metadata_of(tokenizers["llama3"], 900),
        "bpe": metadata_of(SentencePieceTokenizer.train([SOURCE], 360), 365),
        "bytes": metadata_of(ByteTokenizer(), 260),
        "chars": metadata_of(CharTokenizer("\n\\ab", separator=True), 9),
    }
    counts = {"read": 0, "refused": 0}
    for _ in range(600):
        metadata = dict(small[rng.choice(sorted(small))])
        for _ in range(rng.randint(1, 2)):
            key = rng.choice(sorted(metadata))
            metadata[key] = mutated(metadata[key], rng)
        try:
            tokenizer_of(metadata, PATH)
            counts["read"] += 1
        except CheckpointError:
            counts["refused"] += 1
    assert min(counts.values()) > 100


def mutated(value: Value, rng: random.Random) -> Value:
    """Another value, mostly of the same type."""
    odd: dict[str, list[Any]] = {
        "str": ["", "a", "\0", "\ud800", "<s>", "\u0120", "gpt2", "llama", "rwkv", "x" * 9999, "\\", r"\x", "a b"],
        "u32": [0, 1, 2, 3, 255, 2**31, 2**32 - 1],
        "i32": [-(2**31), -1, 0, 1, 2, 3, 4, 5, 6, 7],
        "f32": [float("nan"), float("inf"), 0.0, -1e30],
        "u8": list(range(256)),
        "bool": [False, True],
    }
    kind = value.type_name.strip("[]")
    if rng.random() < 0.05 or kind not in odd:
        return rng.choice([Value("[str]", []), Value("u64", 5), Value("[[u8]]", [[1]]), Value("f64", 0.5)])
    if kind == value.type_name:
        return Value(kind, rng.choice(odd[kind]))
    items = list(value.value)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(items) + 1)
        act = rng.randrange(5)
        if act == 0:
            del items[at:]
        elif act == 1:
            items[at : at + 1] = [rng.choice(odd[kind])]
        elif act == 2 and items:
            items[at:at] = [rng.choice(items)]
        elif act == 3 and items:
            items[rng.randrange(len(items))] = rng.choice(items)
        else:
            items[at:at] = [rng.choice(odd[kind])]
    return Value(value.type_name, items)

"""Tokenizers inside GGUF: llama.cpp gives the same ids, all come back, and no metadata does harm.

llama.cpp is asked where LLAMA_PYTHON, or else this interpreter, has llama_cpp.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from made_tokenizers import EOT, llama3_tokenizer, nasty_texts
from test_tokenizer import SOURCE, TEXT, make_file_tokenizer

from bitnet.formats.gguf_file import Value
from bitnet.formats.gguf_tokenizer import metadata_of, tokenizer_of
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
NAMES = ["bytes", "chars", "chars+end", "llama3", "gpt2", "bpe", "html", "llama2", "paper"]
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


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    llama2 = llama2_model()
    size = SentencePieceTokenizer(llama2).vocab_size
    paper = [AddedToken(size, "<pad>", True), AddedToken(size + 1, "</line>", True)]
    return {
        "bytes": ByteTokenizer(),
        "chars": CharTokenizer(CHARACTERS),
        "chars+end": CharTokenizer(CHARACTERS, separator=True),
        "llama3": llama3_tokenizer(SOURCE),
        "gpt2": make_file_tokenizer(tmp_path_factory.mktemp("gpt2")),
        "bpe": SentencePieceTokenizer.train([SOURCE], 700),
        "html": SentencePieceTokenizer.train(["<span>a</span>\n<s>b</s> " * 30], 330),
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

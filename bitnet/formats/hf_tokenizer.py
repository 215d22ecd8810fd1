"""A tokenizer as the files that transformers reads: the same ids from AutoTokenizer, and from load_tokenizer.

Every kind becomes a tokenizer.json of the library `tokenizers`:

  bytes          byte-level BPE without merges
  characters     a word each, all of one character; a character outside the alphabet is refused there as it is here
  SentencePiece  BPE only: a piece merges whatever two pieces it is made of, the best score first; a unigram model
                 adds scores in float32 and ties are broken by its rounding, which the library cannot repeat
  a tokenizer.json stays as it is

Text there may spell special tokens unless asked not to (split_special_tokens=True); here it never does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.errors import ConfigError
from bitnet.formats import sentencepiece_file
from bitnet.formats.sentencepiece_file import Kind, Piece, Settings
from bitnet.tokenizer import (
    OWN_FILE,
    SPACE,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

END = "<|end_of_text|>"  # the name given to an end that has none
Json = dict[str, Any]


def save_hf_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Writes what AutoTokenizer and load_tokenizer need into an existing folder; returns the names of the files.

    Raises ConfigError, naming the reason, for a SentencePiece model that tokenizer.json cannot say exactly.
    """
    files = []
    if isinstance(tokenizer, FileTokenizer):
        text, config = tokenizer.text, dict(tokenizer.names)
    else:
        written, config = _written(tokenizer)
        text = json.dumps(written, ensure_ascii=False)
        if isinstance(tokenizer, SentencePieceTokenizer):
            (folder / "tokenizer.model").write_bytes(tokenizer.model)
            _write(folder / OWN_FILE, {"kind": tokenizer.name})
            files = ["tokenizer.model", OWN_FILE]
        else:
            files = tokenizer.save(folder)
    (folder / "tokenizer.json").write_bytes(text.encode())
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write(folder / "tokenizer_config.json", plain | config)
    return [*files, "tokenizer.json", "tokenizer_config.json"]


def _written(tokenizer: Tokenizer) -> tuple[Json, Json]:
    """The tokenizer.json, and fields of the tokenizer_config.json."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        by_id: dict[int | None, str] = {id_: name for name, id_ in tokenizer.special_tokens().items()}
        names = {"bos_token": by_id.get(tokenizer.bos_id), "eos_token": by_id.get(tokenizer.eos_id)}
        return sentencepiece_json(tokenizer), names | tokenizer.config_fields()
    names = {"bos_token": None, "eos_token": None if tokenizer.eos_id is None else END}
    if isinstance(tokenizer, ByteTokenizer):
        return bytes_json(), names
    if isinstance(tokenizer, CharTokenizer):
        return chars_json(tokenizer), names
    raise ConfigError(f"a tokenizer of type {type(tokenizer).__name__} has no tokenizer.json")


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: the byte itself where it prints, else the next code point from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) if byte in printing else chr(0x100 + others.index(byte)) for byte in range(256)]


def bpe(vocab: dict[str, int], merges: Sequence[tuple[str, str]] = (), **more: Any) -> Json:
    """The "model" of a tokenizer.json; more: fields that differ from the plain ones."""
    plain = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return plain | more | {"vocab": vocab, "merges": [list(pair) for pair in merges]}


def tokenizer_json(
    model: Json,
    *,
    added: Sequence[tuple[int, str, bool]] = (),
    normalizer: Json | None = None,
    pre_tokenizer: Json | None = None,
    decoder: Json | None = None,
    bos: tuple[str, int] | None = None,
) -> Json:
    """A whole tokenizer.json. added: (id, text, special) in the order of ids; bos: put before every text."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id_,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }
            for id_, text, special in added
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if bos is None else _bos_first(*bos),
        "decoder": decoder,
        "model": model,
    }


def byte_level(*, use_regex: bool) -> Json:
    """The pre-tokenizer and decoder that spell bytes as letters."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def bytes_json() -> Json:
    """ByteTokenizer's tokenizer.json."""
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    return tokenizer_json(
        bpe(vocab),
        added=[(ByteTokenizer.eos_id, END, True)],
        pre_tokenizer=byte_level(use_regex=False),
        decoder=byte_level(use_regex=False),
    )


def chars_json(tokenizer: CharTokenizer) -> Json:
    """CharTokenizer's tokenizer.json."""
    vocab = {character: i for i, character in enumerate(tokenizer.characters)}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return tokenizer_json(
        {"type": "WordLevel", "vocab": vocab, "unk_token": ""},
        added=[] if tokenizer.eos_id is None else [(tokenizer.eos_id, END, True)],
        pre_tokenizer=split,
        decoder={"type": "Fuse"},
    )


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> Json:
    """A SentencePiece model's tokenizer.json. Raises ConfigError where it cannot be exact.

    Where a typed U+2581 is not a space to the model, spaces stand in the pieces as they are, and U+2581 is spelled in
    bytes; elsewhere spaces become U+2581 first, as in SentencePiece.
    """
    pieces, others = sentencepiece_file.parse(tokenizer.model)
    settings = sentencepiece_file.settings(others)
    defined = [i for i, piece in enumerate(pieces) if piece.kind == Kind.USER_DEFINED]
    loose = any(not token.special for token in tokenizer.added)
    _check_sayable(pieces, settings, bool(defined), loose)
    literal = settings.byte_fallback and not settings.add_dummy_prefix
    if literal:
        pieces = [Piece(piece.text.replace(SPACE, " "), piece.score, piece.kind) for piece in pieces]
    added = [(i, piece.text, True) for i, piece in enumerate(pieces) if piece.kind in (Kind.UNKNOWN, Kind.CONTROL)]
    added = sorted(added + [(i, pieces[i].text, False) for i in defined])
    added += tokenizer.added
    steps: list[Json] = []
    if settings.remove_extra_whitespaces:
        steps += [_replace(r"\A +| +\z", ""), _replace(" {2,}", " ")]
    if settings.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    if not literal:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    if settings.remove_extra_whitespaces:
        steps.append(_replace(SPACE + r"+\z", ""))
    decoders: list[Json] = [] if literal else [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if settings.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bos = None if tokenizer.bos_id is None else (pieces[tokenizer.bos_id].text, tokenizer.bos_id)
    return tokenizer_json(
        _bpe_of(pieces, settings),
        added=added,
        normalizer={"type": "Sequence", "normalizers": steps} if steps else None,
        decoder={"type": "Sequence", "decoders": decoders},
        bos=bos,
    )


def formable(text: str, texts: set[str]) -> list[tuple[str, str]]:
    """The pairs of known texts that a text is put together from."""
    cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
    return [pair for pair in cuts if pair[0] in texts and pair[1] in texts]


def _check_sayable(pieces: list[Piece], settings: Settings, has_defined: bool, loose: bool) -> None:
    prefixed = settings.add_dummy_prefix or settings.remove_extra_whitespaces
    scores = [piece.score for piece in pieces if piece.kind == Kind.NORMAL and len(piece.text) > 1]
    texts = {piece.text for piece in pieces if piece.kind == Kind.NORMAL}
    reason = None
    if settings.model_type != "bpe":
        reason = f"it is a {settings.model_type} model, not a bpe one"
    elif settings.charsmap:
        reason = "it rewrites characters before it looks for pieces"
    elif settings.space_behind or not settings.escape_whitespaces:
        reason = "it does not put spaces before words"
    elif prefixed and (has_defined or loose):
        reason = "it changes the spaces of a text, which has tokens that are cut out before"
    elif any(piece.kind == Kind.UNUSED for piece in pieces):
        reason = "it has unused pieces"
    elif not np.isfinite(scores).all():
        reason = "it has a score that is no number"
    elif len(set(scores)) < len(scores):
        reason = "two of its pieces have one score"
    elif not {letter for text in texts for letter in text} <= texts:
        reason = "a piece has a character that is no piece"
    if reason is not None:
        raise ConfigError(f"this SentencePiece model has no tokenizer.json with the same ids: {reason}")


def _bpe_of(pieces: list[Piece], settings: Settings) -> Json:
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    normal = {piece.text for piece in pieces if piece.kind == Kind.NORMAL}
    best = sorted((piece for piece in pieces if piece.kind == Kind.NORMAL), key=lambda piece: -piece.score)
    merges = [pair for piece in best for pair in formable(piece.text, normal)]
    unknown = next((piece.text for piece in pieces if piece.kind == Kind.UNKNOWN), None)
    return bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=settings.byte_fallback)


def _replace(pattern: str, content: str) -> Json:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _bos_first(name: str, id_: int) -> Json:
    def text(kind: str, type_id: int) -> Json:
        return {"Sequence": {"id": kind, "type_id": type_id}}

    def first(type_id: int) -> Json:
        return {"SpecialToken": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [first(0), text("A", 0)],
        "pair": [first(0), text("A", 0), first(1), text("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [id_], "tokens": [name]}},
    }


def _write(path: Path, fields: Json) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

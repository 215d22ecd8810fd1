"""A tokenizer as the metadata of a GGUF file, and back: the same ids in llama.cpp.

  kind here                  `tokenizer.ggml.model`
  bytes                      gpt2: byte-level BPE without merges
  a tokenizer.json           gpt2, if it is byte-level BPE and splits text by one of the ways that have a name (WAYS)
  SentencePiece BPE          llama: pieces are merged by score, as SentencePiece does
  characters                 rwkv: the longest token that fits, spelled with escapes; a character outside the alphabet
                             has the id -1 there, where this package raises DataError

What the model's vocabulary has more than the tokenizer is filled with `[PADi]`, unused. A typed U+2581 is a space to
llama.cpp whatever the model says. Keys of our own, which other readers skip, let a SentencePiece model come back byte
for byte: `bitnet.tokenizer.sentencepiece` (its fields that are no pieces), `.pieces` (how many are the model's; added
tokens follow) and `.control` (names of the control tokens, where llama.cpp would make them out of typed text).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet.chat_template import EOT
from bitnet.errors import CheckpointError, ConfigError, DataError
from bitnet.formats import sentencepiece_file
from bitnet.formats.gguf_file import Value
from bitnet.formats.hf_tokenizer import END, bpe, byte_letters, byte_level, formable, tokenizer_json
from bitnet.formats.sentencepiece_file import Kind, Piece, Settings
from bitnet.tokenizer import (
    SPACE,
    AddedToken,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

Metadata = Mapping[str, Value]
Token = tuple[str, Kind]

GGML = "tokenizer.ggml."
OWN = "bitnet.tokenizer."
TEMPLATE = "tokenizer.chat_template"
# In the template inside the published GGUF of BitNet b1.58 2B-4T, which is not the one that the model was trained with.
WRONG_TEMPLATE = "BITNETAssistant"
NOT_UTF8 = r"\xff"  # as rwkv's tokens escape it; a token that ends in it comes out of no text
UNTYPED = "\ufdd0"  # a noncharacter, behind the name of a control token that pieces could be put together to

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is split before merging, by `tokenizer.ggml.pre`: pattern (None: GPT-2's own), and ignore_merges.
WAYS: dict[str, tuple[str | None, bool]] = {
    "llama-bpe": (_WORDS % "{1,3}", True),
    "smaug-bpe": (_WORDS % "{1,3}", False),
    "qwen2": (_WORDS % "", False),
    "gpt-2": (None, False),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
LLAMA_3_SIZE = 128256  # files of this size that name no way were made from LLaMA-3's tokenizer
INTEGERS = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")


# ---- to metadata ---------------------------------------------------------------------------------------------------


def metadata_of(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Value]:
    """The keys of a tokenizer for a model with vocab_size embeddings. Raises ConfigError where ids would differ."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}")
    if isinstance(tokenizer, ByteTokenizer):
        tokens = [(letter, Kind.NORMAL) for letter in byte_letters()] + [(END, Kind.CONTROL)]
        found = _merging(tokens, vocab_size, "gpt-2", [])
    elif isinstance(tokenizer, CharTokenizer):
        tokens = [(_escaped(character), Kind.NORMAL) for character in tokenizer.characters]
        tokens += [] if tokenizer.eos_id is None else [(END + NOT_UTF8, Kind.CONTROL)]
        found = {"model": Value("str", "rwkv")} | _tokens(tokens, vocab_size, NOT_UTF8)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece_metadata(tokenizer, vocab_size)
    elif isinstance(tokenizer, FileTokenizer):
        found = _file_metadata(tokenizer, vocab_size)
    else:
        raise ConfigError(f"a tokenizer of type {type(tokenizer).__name__} has no form in GGUF")
    return _named(found, tokenizer)


def _named(found: dict[str, Value], tokenizer: Tokenizer) -> dict[str, Value]:
    special = tokenizer.special_tokens()
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "eot": special.get(EOT), "padding": special.get("<pad>")}
    found |= {f"{name}_token_id": Value("u32", id_) for name, id_ in ids.items() if id_ is not None}
    found |= {"add_bos_token": Value("bool", tokenizer.bos_id is not None), "add_eos_token": Value("bool", False)}
    keys = {GGML + name: value for name, value in found.items()}
    return keys | ({} if tokenizer.chat_template is None else {TEMPLATE: Value("str", tokenizer.chat_template)})


def _tokens(tokens: Sequence[Token], vocab_size: int, ending: str = "") -> dict[str, Value]:
    padding = [f"[PAD{i}]{ending}" for i in range(len(tokens), vocab_size)]
    texts = [text for text, _ in tokens] + padding
    if len(set(texts)) < len(texts):
        twice, _ = Counter(texts).most_common(1)[0]
        raise ConfigError(f"two tokens are spelled {twice!r}, which GGUF cannot tell apart")
    kinds = [int(kind) for _, kind in tokens] + [int(Kind.UNUSED)] * len(padding)
    return {"tokens": Value("[str]", texts), "token_type": Value("[i32]", kinds)}


def _merging(tokens: Sequence[Token], vocab_size: int, way: str, merges: list[str]) -> dict[str, Value]:
    return {
        "model": Value("str", "gpt2"),
        "pre": Value("str", way),
        **_tokens(tokens, vocab_size),
        "merges": Value("[str]", merges),
    }


def _file_metadata(tokenizer: FileTokenizer, vocab_size: int) -> dict[str, Value]:
    if tokenizer.eos_id is None:
        raise ConfigError(
            "llama.cpp takes token 11 for the end where there is none: name eos_token in tokenizer_config.json"
        )
    fields = json.loads(tokenizer.text)
    model, way = fields["model"], _way(fields)
    added = {token["content"]: token for token in fields.get("added_tokens", [])}
    texts = {id_: text for text, id_ in tokenizer.vocabulary().items()}
    special = tokenizer.special_tokens()
    tokens = []
    for id_ in range(tokenizer.vocab_size):
        text = texts.get(id_, f"[PAD{id_}]")
        kind = Kind.NORMAL if id_ in texts else Kind.UNUSED
        if text in special:
            kind = Kind.CONTROL
        elif text in added:
            kind = Kind.USER_DEFINED
        tokens.append((text, kind))
        if text in added and any(added[text].get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise ConfigError(f"the added token {text!r} takes spaces or word ends into account, which GGUF cannot say")
        if kind == Kind.CONTROL and WAYS[way][1] and tokenizer.is_one_stretch(text):
            raise ConfigError(f"llama.cpp would make the special token {text!r} out of typed text")
    _check_cut(text for text, kind in tokens if kind == Kind.USER_DEFINED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    for merge in merges:
        if merge.count(" ") != 1:
            raise ConfigError(f"the merge {merge!r} is not one of two tokens without spaces")
    return _merging(tokens, vocab_size, way, merges)


def _way(fields: dict[str, Any]) -> str:
    """The name of how a tokenizer.json splits text; ConfigError if it has none, or is not byte-level BPE."""
    model, before = fields["model"], fields.get("pre_tokenizer") or {}
    odd = [
        key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)
    ]
    if model.get("type") != "BPE" or odd:
        raise ConfigError(f"GGUF has no form for a tokenizer.json with {', '.join(odd) or model.get('type')}")
    if fields.get("normalizer") is not None:
        raise ConfigError("GGUF has no form for a tokenizer.json with a normalizer")
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        first = [(step.get("pattern"), step.get("behavior"), step.get("invert")) for step in steps[:-1]]
        for name, (pattern, ignore_merges) in WAYS.items():
            wanted = [] if pattern is None else [({"Regex": pattern}, "Isolated", False)]
            own = last.get("use_regex", True) is (pattern is None)
            if first == wanted and own and bool(model.get("ignore_merges")) is ignore_merges:
                return name
    raise ConfigError(
        f"GGUF has a name for few ways of splitting text ({', '.join(WAYS)}), and this tokenizer.json's is none"
    )


def _sentencepiece_metadata(tokenizer: SentencePieceTokenizer, vocab_size: int) -> dict[str, Value]:
    pieces, others = sentencepiece_file.parse(tokenizer.model)
    settings = sentencepiece_file.settings(others)
    size = len(pieces)
    for token in tokenizer.added:
        pieces += [Piece(f"[PAD{i}]", 0.0, Kind.UNUSED) for i in range(len(pieces), token.id)]
        pieces.append(Piece(token.text, 0.0, Kind.CONTROL if token.special else Kind.USER_DEFINED))
    cut = [piece.text for piece in pieces if piece.kind == Kind.USER_DEFINED]
    reason = _unsayable(settings)
    if reason is None and settings.add_dummy_prefix and cut:
        reason = f"llama.cpp would put a space behind {cut[0]!r}"
    if any(piece.kind == Kind.UNUSED for piece in pieces[:size]):
        reason = "it has unused pieces"
    if reason is not None:
        raise ConfigError(f"this SentencePiece model has no form in GGUF: {reason}")
    _check_cut(cut)
    symbols = {piece.text for piece in pieces}
    symbols |= {letter for text in symbols for letter in text}
    names = [piece.text for piece in pieces if piece.kind == Kind.CONTROL]
    tokens, changed = [], False
    for piece in pieces:
        text = piece.text
        if piece.kind == Kind.USER_DEFINED:
            text = text.replace(SPACE, " ")
        elif piece.kind != Kind.NORMAL and formable(text, symbols):
            if piece.kind != Kind.CONTROL:
                raise ConfigError(f"llama.cpp would make {text!r}, which is no text, of pieces that are typed")
            text, changed = text + UNTYPED, True
        tokens.append((text, piece.kind))
    padding = any(formable(f"[PAD{i}]", symbols) for i in range(len(pieces), vocab_size))
    found = {"model": Value("str", "llama"), "pre": Value("str", "default")}
    found |= _tokens(tokens, vocab_size, UNTYPED if padding else "")
    scores = [piece.score for piece in pieces] + [0.0] * (vocab_size - len(pieces))
    found |= {"scores": Value("[f32]", scores), "add_space_prefix": Value("bool", settings.add_dummy_prefix)}
    unknown = [i for i, piece in enumerate(pieces) if piece.kind == Kind.UNKNOWN]
    found |= {"unknown_token_id": Value("u32", unknown[0])} if unknown else {}
    own = {"control": Value("[str]", names)} if changed else {}
    if sentencepiece_file.is_plain(others):
        own |= {"sentencepiece": Value("[u8]", list(others)), "pieces": Value("u32", size)}
    return _named(found, tokenizer) | {OWN + name: value for name, value in own.items()}


def _unsayable(settings: Settings) -> str | None:
    """Why the settings of a SentencePiece model cannot be said in GGUF."""
    if settings.model_type != "bpe":
        return f"llama.cpp merges pieces by score, which for a {settings.model_type} model gives other ids"
    if settings.charsmap or settings.remove_extra_whitespaces:
        return "it rewrites text before it looks for pieces"
    if settings.space_behind or not settings.escape_whitespaces:
        return "it does not put spaces before words"
    if not settings.byte_fallback:
        return "it has no bytes for characters it does not know"
    return None


def _check_cut(texts: Iterable[str]) -> None:
    """llama.cpp cuts the longest of all texts out first, other libraries the first in the text: both must be one."""
    known = sorted(texts, key=len)
    for i, short in enumerate(known):
        for long in known[i + 1 :]:
            for left, right in ((short, long), (long, short)):
                overlap = any(right.startswith(left[k:]) for k in range(1, len(left)))
                if overlap and len(set(left + right)) > 1:
                    raise ConfigError(
                        f"the tokens {left!r} and {right!r} can overlap, and llama.cpp would cut otherwise"
                    )


# ---- from metadata -------------------------------------------------------------------------------------------------


def tokenizer_of(metadata: Metadata, path: Path) -> Tokenizer | None:
    """The tokenizer of a file; None if it has none. Raises CheckpointError for what is wrong or unknown."""
    reader = _Reader(metadata, path)
    model = reader.text(GGML + "model")
    if model is None or model in ("none", "no_vocab"):
        return None
    makers = {"gpt2": _merging_tokenizer, "llama": _sentencepiece_tokenizer, "rwkv": _chars_tokenizer}
    if model not in makers:
        raise CheckpointError(f"{path}: its tokenizer is of the kind {model!r}, which this version does not read")
    try:
        return makers[model](reader)
    except (ConfigError, DataError, UnicodeError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be made: {error}") from None


class _Reader:
    """Metadata of a tokenizer, each value checked as it is asked for."""

    def __init__(self, metadata: Metadata, path: Path) -> None:
        self._metadata, self.path = metadata, path
        self.size = 0  # tokens with the unused ones, once they are read

    def wrong(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} {why}")

    def _value(self, key: str, *types: str) -> Any:
        value = self._metadata.get(key)
        if value is None:
            return None
        if value.type_name not in types:
            raise self.wrong(key, f"is of type {value.type_name}, not {types[0]}")
        return value.value

    def text(self, key: str) -> str | None:
        found: str | None = self._value(key, "str")
        return found

    def flag(self, name: str, default: bool) -> bool:
        found = self._value(GGML + name, "bool")
        return default if found is None else bool(found)

    def array(self, key: str, *types: str, size: int | None = None) -> list[Any] | None:
        found = self._value(key, *(f"[{name}]" for name in types))
        if found is None:
            return None
        if size is not None and len(found) != size:
            raise self.wrong(key, f"has {len(found)} values for {size} tokens")
        return list(found)

    def token(self, name: str, count: int) -> int | None:
        """An id below count."""
        return self.number(f"{GGML}{name}_token_id", 0, count - 1)

    def number(self, key: str, least: int, most: int) -> int | None:
        found = self._value(key, *INTEGERS)
        if found is not None and not least <= found <= most:
            raise self.wrong(key, f"{found} is outside {least}..{most}")
        return None if found is None else int(found)

    def tokens(self) -> list[Token]:
        """All of them, but for the unused ones behind."""
        texts = self.array(GGML + "tokens", "str")
        if not texts:
            raise self.wrong(GGML + "tokens", "is missing or empty")
        self.size = len(texts)
        types = self.array(GGML + "token_type", "i32", "u32", size=len(texts)) or [1] * len(texts)
        for i, number in enumerate(types):
            if not 1 <= number <= len(Kind):
                raise self.wrong(GGML + "token_type", f"{number} of token {i} is unknown")
        count = len(texts)
        while count and types[count - 1] == Kind.UNUSED:
            count -= 1
        seen: set[str] = set()
        for text in texts[:count]:
            if text in seen:
                raise self.wrong(GGML + "tokens", f"has {text!r} twice")
            seen.add(text)
        if not count:
            raise self.wrong(GGML + "tokens", "has no token that is used")
        return [(text, Kind(number)) for text, number in zip(texts[:count], types[:count], strict=True)]

    def template(self) -> str | None:
        found = self.text(TEMPLATE)
        return None if found is None or WRONG_TEMPLATE in found else found


def _merging_tokenizer(reader: _Reader) -> Tokenizer:
    tokens = reader.tokens()
    merges = reader.array(GGML + "merges", "str") or []
    bos, eos, eot = (reader.token(name, len(tokens)) for name in ("bos", "eos", "eot"))
    texts = [text for text, _ in tokens]
    if texts == [*byte_letters(), END] and not merges and eos == ByteTokenizer.eos_id:
        return ByteTokenizer()
    way = reader.text(GGML + "pre")
    if way is None and reader.size == LLAMA_3_SIZE:
        way = "llama-bpe"
    way = ALIASES.get(way or "", way)
    if way not in WAYS:
        named = "named by nothing" if way is None else f"named {way!r}"
        raise reader.wrong(GGML + "pre", f"is not one of {', '.join(WAYS)}: how text is split is {named}")
    pattern, ignore_merges = WAYS[way]
    if not reader.flag("add_bos_token", way == "llama-bpe"):
        bos = None
    ends = {bos, eos, eot}
    added = []
    for i, (text, kind) in enumerate(tokens):
        looks = kind == Kind.USER_DEFINED and text.startswith("<|") and text.endswith("|>")
        special = looks or i in ends or kind in (Kind.CONTROL, Kind.UNKNOWN)
        if special or kind == Kind.USER_DEFINED:
            if not text:
                raise reader.wrong(GGML + "tokens", f"has no text for the token {i}")
            added.append((i, text, special))
    first = _first_of_tail([i for i, _, _ in added], len(tokens))
    vocab = {text: i for i, text in enumerate(texts[:first])}
    missing = [letter for letter in byte_letters() if letter not in vocab]
    if missing:
        raise reader.wrong(GGML + "tokens", f"has none for the byte {byte_letters().index(missing[0]):#04x}")
    before: dict[str, Any] = byte_level(use_regex=pattern is None)
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        before = {"type": "Sequence", "pretokenizers": [split, before]}
    fields = tokenizer_json(
        bpe(vocab, _pairs(reader, merges, vocab), ignore_merges=ignore_merges),
        added=added,
        pre_tokenizer=before,
        decoder=byte_level(use_regex=True),
        bos=None if bos is None else (texts[bos], bos),
    )
    return FileTokenizer(
        json.dumps(fields, ensure_ascii=False),
        None if bos is None else texts[bos],
        None if eos is None else texts[eos],
        str(reader.path),
        reader.template(),
    )


def _first_of_tail(ids: Sequence[int], count: int) -> int:
    """Where the ids begin that run on to the last of count."""
    for id_ in reversed(ids):
        if id_ != count - 1:
            break
        count -= 1
    return count


def _pairs(reader: _Reader, merges: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise reader.wrong(GGML + "merges", f"has {merge!r}, which is not two tokens that make a third")
        pairs.append((left, right))
    if len(set(pairs)) < len(pairs):
        raise reader.wrong(GGML + "merges", "has one merge twice")
    return pairs


def _sentencepiece_tokenizer(reader: _Reader) -> Tokenizer:
    tokens = reader.tokens()
    scores = reader.array(GGML + "scores", "f32", size=reader.size)
    if scores is None:
        raise reader.wrong(GGML + "scores", "is missing")
    if not all(math.isfinite(score) for score in scores):
        raise reader.wrong(GGML + "scores", "has one that is no number")
    bos, eos, unknown, padding = (reader.token(name, len(tokens)) for name in ("bos", "eos", "unknown", "padding"))
    control = reader.array(OWN + "control", "str", size=sum(kind == Kind.CONTROL for _, kind in tokens))
    names = iter(control or [])
    pieces = []
    for i, (text, kind) in enumerate(tokens):
        if kind == Kind.CONTROL:
            text = next(names, text)
        if kind == Kind.USER_DEFINED:
            text = text.replace(" ", SPACE)
        if kind == Kind.BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", text):
            raise reader.wrong(GGML + "tokens", f"has {text!r} for a byte")
        if not text or "\0" in text:
            raise reader.wrong(GGML + "tokens", f"has {text!r} for the token {i}")
        if kind == Kind.NORMAL and i in (bos, eos):
            kind = Kind.CONTROL
        pieces.append(Piece(text, scores[i], kind))
    if sum(piece.kind == Kind.UNKNOWN for piece in pieces) != 1:
        raise reader.wrong(GGML + "token_type", "should say of one token that it is the unknown one")
    spaced = reader.flag("add_space_prefix", True)
    own = reader.array(OWN + "sentencepiece", "u8")
    if own is not None:
        others = bytes(own)
        said = sentencepiece_file.settings(others)
        if not sentencepiece_file.is_plain(others) or _unsayable(said) or said.add_dummy_prefix != spaced:
            raise reader.wrong(OWN + "sentencepiece", "contradicts the other keys")
        count = reader.number(OWN + "pieces", 1, len(pieces)) or len(pieces)
    else:
        if not reader.flag("add_bos_token", True):
            bos = None
        ids = {"unk": unknown, "bos": bos, "eos": eos, "pad": padding}
        named = {name: None if id_ is None else pieces[id_].text for name, id_ in ids.items()}
        named["unk"] = next((piece.text for piece in pieces if piece.kind == Kind.UNKNOWN), None)
        in_bytes = {piece.text for piece in pieces if piece.kind == Kind.BYTE}
        others = sentencepiece_file.settings_bytes(named, len(in_bytes) == 256, spaced)
        count = len(pieces)
    added = [
        AddedToken(i, pieces[i].text.replace(SPACE, " "), pieces[i].kind != Kind.USER_DEFINED)
        for i in range(count, len(pieces))
        if pieces[i].kind != Kind.UNUSED
    ]
    model = sentencepiece_file.build(pieces[:count], others)
    return SentencePieceTokenizer(model, str(reader.path), added, chat_template=reader.template())


def _chars_tokenizer(reader: _Reader) -> Tokenizer:
    tokens = reader.tokens()
    eos = reader.token("eos", len(tokens))
    if eos is not None and eos != len(tokens) - 1:
        raise reader.wrong(GGML + "eos_token_id", f"{eos} is not the last token")
    characters = "".join(_unescaped(text) for text, kind in tokens if kind == Kind.NORMAL)
    made = CharTokenizer(characters, separator=eos is not None)
    expected = [(_escaped(character), Kind.NORMAL) for character in characters]
    if tokens != expected + ([] if eos is None else [(END + NOT_UTF8, Kind.CONTROL)]):
        raise reader.wrong(GGML + "tokens", "are not single characters in code point order, the only rwkv read here")
    made.chat_template = reader.template()
    return made


def _escaped(character: str) -> str:
    r"""As rwkv spells it: \t, \n, \r, \\ and \xHH for what does not print in ASCII."""
    plain = {"\t": r"\t", "\n": r"\n", "\r": r"\r", "\\": r"\\"}
    if character in plain:
        return plain[character]
    return character if character.isprintable() or ord(character) > 127 else f"\\x{ord(character):02x}"


def _unescaped(text: str) -> str:
    plain = {"t": "\t", "n": "\n", "r": "\r"}
    return re.sub(
        r"\\(?:x([0-7][0-9a-f])|(.))",
        lambda found: chr(int(found[1], 16)) if found[1] else plain.get(found[2], found[2]),
        text,
    )

"""Text to token ids and back: one interface, four tokenizers.

ByteTokenizer needs no training, CharTokenizer is an alphabet, SentencePieceTokenizer is trained here or loaded from a
`.model`, FileTokenizer runs a `tokenizer.json`. Those trained here give back exactly the text they were given; a
loaded one is as exact as its own normalizer. Special tokens never come out of user text: "</s>" typed by a user is
four characters. The libraries behind the last two are imported when first used.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bitnet.errors import ConfigError, DataError
from bitnet.formats import sentencepiece_file

SPECS = ("bytes", "chars", "sentencepiece", "sentencepiece-unigram")
OWN_FILE = "bitnet_tokenizer.json"
FILES = (OWN_FILE, "tokenizer.json", "tokenizer.model")  # of which a folder has one; the first that is there counts
SPACE = "\u2581"  # how SentencePiece spells a space inside a piece


class DecodeStream(Protocol):
    """Turns ids into text one at a time, holding back a character until all its bytes are there."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Tokenizer(ABC):
    """What the rest of the package asks of a tokenizer. bos_id opens a document, eos_id ends it; either may be None."""

    name: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    chat_template: str | None = None  # Jinja, as published with chat models

    def special_tokens(self) -> dict[str, int]:
        """Ids by name of the tokens that no text gives, as far as they have names."""
        return {}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos, no eos."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the ids: special tokens give none, bytes that are no UTF-8 give U+FFFD."""

    @abstractmethod
    def decode_stream(self) -> DecodeStream:
        """A decoder for ids that come one at a time."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hex of what defines the tokenizer: equal fingerprints give equal ids."""

    @abstractmethod
    def save(self, folder: str | Path) -> list[str]:
        """Write what load_tokenizer(folder) needs and return the file names."""

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document, between bos and eos where the tokenizer has them."""
        bos = [] if self.bos_id is None else [self.bos_id]
        eos = [] if self.eos_id is None else [self.eos_id]
        return bos + self.encode(text) + eos

    def checked(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise DataError(f"token id {token} is outside this tokenizer's 0..{self.vocab_size - 1}")
        return int(token)


class ByteSpelledTokenizer(Tokenizer):
    """A tokenizer each of whose ids stands for fixed bytes of UTF-8, so that decoding is joining them."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id, possibly part of a character; empty for a special token."""

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.token_bytes(self.checked(token)) for token in tokens).decode("utf-8", "replace")

    def decode_stream(self) -> DecodeStream:
        return _ByteStream(self)


class _ByteStream:
    def __init__(self, tokenizer: ByteSpelledTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(self._tokenizer.checked(token)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer(ByteSpelledTokenizer):
    """Ids 0..255 are the bytes of UTF-8; id 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def fingerprint(self) -> str:
        return _sha256(b"bitnet bytes 1")

    def save(self, folder: str | Path) -> list[str]:
        return _write_json(folder, OWN_FILE, {"kind": self.name})


class CharTokenizer(ByteSpelledTokenizer):
    """One id per distinct character of the training text, in code point order; with `separator`, one more as eos."""

    name = "chars"

    def __init__(self, characters: str, separator: bool = False) -> None:
        if not characters or list(characters) != sorted(set(characters)):
            raise DataError("a character vocabulary is a non-empty string of distinct characters in code point order")
        self.characters = characters
        self.eos_id = len(characters) if separator else None
        self.vocab_size = len(characters) + separator
        self._ids = {character: i for i, character in enumerate(characters)}

    @classmethod
    def train(cls, documents: Iterable[str], separator: bool = False) -> CharTokenizer:
        characters: set[str] = set()
        for text in documents:
            characters.update(text)
        return cls("".join(sorted(characters)), separator)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as unknown:
            character = unknown.args[0]
            raise DataError(
                f"character {character!r} (U+{ord(character):04X}) is not among the {len(self.characters)} "
                "characters of the training text"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == self.eos_id else self.characters[token].encode()

    def fingerprint(self) -> str:
        return _sha256(json.dumps(["bitnet chars 1", self.characters, self.eos_id]).encode())

    def save(self, folder: str | Path) -> list[str]:
        fields = {"kind": self.name, "characters": self.characters, "separator": self.eos_id is not None}
        return _write_json(folder, OWN_FILE, fields)


class AddedToken(NamedTuple):
    """A token behind those of a SentencePiece model; text gives it only if it is not special."""

    id: int
    text: str
    special: bool


class SentencePieceTokenizer(ByteSpelledTokenizer):
    """A SentencePiece model. Those made by `train` have 0 unknown (never used), 1 bos, 2 eos, every byte, then pieces.

    Decoding is done here from the bytes of each piece, not by the library, which would turn a literal U+2581 into a
    space. Published folders may name added tokens beside the model; prefix_once: whether a space that the model puts
    before a text is put before its beginning only, and not behind each added token as well. Raises DataError if the
    model cannot be read.
    """

    name = "sentencepiece"

    def __init__(
        self,
        model: bytes,
        source: str = "SentencePiece model",
        added: Sequence[AddedToken] = (),
        prefix_once: bool = True,
        chat_template: str | None = None,
    ) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            processor: Any = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{source} is not a SentencePiece model: {_first_line(error)}") from None
        self._model = model
        self._processor = processor
        self.vocab_size = processor.vocab_size()
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_id = processor.eos_id() if processor.eos_id() >= 0 else None
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]
        # LLaMA's models put a space before the text when encoding, so it is taken off again when decoding.
        self._adds_space = processor.encode("a", out_type=str)[0].startswith(SPACE)
        space = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        has_bytes = all(processor.is_byte(i) for i in space)
        self._literal = space if has_bytes and not self._adds_space else None
        self.chat_template = chat_template
        loose = any(not token.special for token in added)
        self.added, self.prefix_once = tuple(added), prefix_once or not (loose and self._adds_space)
        self._add(source)

    @classmethod
    def load(cls, path: Path) -> SentencePieceTokenizer:
        """A `.model`, with the added tokens and the chat template that Hugging Face's files beside it name."""
        if not path.is_file():
            raise DataError(f"there is no tokenizer at {path}")
        model = path.read_bytes()
        size = cls(model, str(path)).vocab_size
        fields = {
            name: _read_json(path.with_name(name)) if path.with_name(name).is_file() else {}
            for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
        }
        config = fields["tokenizer_config.json"]
        added = _added_tokens(fields["added_tokens.json"], config, fields["special_tokens_map.json"], str(path))
        behind = [token for token in added if token.id >= size]
        template = _chat_template(config.get("chat_template"))
        return cls(model, str(path), behind, config.get("legacy") is not True, template)

    @property
    def model(self) -> bytes:
        """The bytes of the `.model` file."""
        return self._model

    def _add(self, source: str) -> None:
        """Makes the added tokens known."""
        self._by_text: dict[str, int] = {}
        self._added_bytes: dict[int, bytes] = {}
        texts = [self._processor.id_to_piece(i) for i in range(self.vocab_size)] if self.added else []
        known = set(texts)
        for id_, text, special in self.added:
            if id_ < len(texts) or id_ in self._added_bytes or not text or text in known:
                raise DataError(f"{source}: the added token {text!r} cannot have the id {id_}")
            known.add(text)
            self._added_bytes[id_] = b"" if special else text.encode()
            if not special:
                self._by_text[text] = id_
        self.vocab_size = max([self.vocab_size - 1, *self._added_bytes]) + 1
        longest = sorted(map(re.escape, self._by_text), key=len, reverse=True)
        self._split = re.compile("|".join(longest)) if longest else None
        self._inner = self._processor
        if longest and self._adds_space and self.prefix_once:
            self._inner = type(self._processor)(model_proto=sentencepiece_file.without_prefix(self._model))

    def special_tokens(self) -> dict[str, int]:
        names = {self._processor.id_to_piece(i): i for i in range(len(self._bytes)) if self._processor.is_control(i)}
        return names | {token.text: token.id for token in self.added if token.special}

    @classmethod
    def train(
        cls, documents: Iterable[str], vocab_size: int, model_type: str = "bpe", every: int = 1
    ) -> SentencePieceTokenizer:
        """Learn pieces from every `every`-th stretch (about 4000 characters) of the documents.

        Nothing is normalized; a character too rare for a piece of its own is spelled in bytes. The same text gives the
        same model, byte for byte. A text too small for vocab_size gives a smaller vocabulary: look at `vocab_size`.
        """
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=islice(_stretches(documents), 0, None, every),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                hard_vocab_limit=False,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                # Indentation: with every run of 2..16 spaces 4096 pieces cover 2 % more Python than with 2, 4, 8, 16.
                user_defined_symbols=[SPACE * n for n in range(2, 17)] + ["\t"],
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                max_sentence_length=1 << 20,
                num_threads=4,  # fixed: unigram adds floats per thread
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            message = str(error)
            if needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
                message = f"vocab_size {vocab_size} is too small: this text needs at least {needed[1]}"
                raise ConfigError(message) from None
            if "sentences_.empty()" in message:
                raise DataError("there is no text to train a tokenizer on") from None
            raise ConfigError(f"SentencePiece cannot train {vocab_size} ids: {_first_line(error)}") from None
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        if self._split is None:
            return self._stretch(text, self._processor)
        ids: list[int] = []
        at = 0
        for found in self._split.finditer(text):
            ids += self._stretch(text[at : found.start()], self._inner if at else self._processor)
            ids.append(self._by_text[found[0]])
            at = found.end()
        return ids + self._stretch(text[at:], self._inner if at else self._processor)

    def _stretch(self, text: str, processor: Any) -> list[int]:
        """Ids of text without added tokens."""
        if self._literal is None or SPACE not in text:
            ids: list[int] = processor.encode(text)
            return ids
        head, *rest = text.split(SPACE)
        ids = processor.encode(head)
        for part in rest:
            ids += self._literal
            ids += processor.encode(part)
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token] if token < len(self._bytes) else self._added_bytes.get(token, b"")

    def decode(self, tokens: Iterable[int]) -> str:
        text = super().decode(tokens)
        return text.removeprefix(" ") if self._adds_space else text

    def decode_stream(self) -> DecodeStream:
        return _SpaceStrippingStream(self) if self._adds_space else _ByteStream(self)

    def fingerprint(self) -> str:
        added = json.dumps([self.added, self.prefix_once]).encode() if self.added else b""
        return _sha256(self._model + added)

    def save(self, folder: str | Path) -> list[str]:
        (Path(folder) / "tokenizer.model").write_bytes(self._model)
        fields = self.config_fields()
        return ["tokenizer.model", *(_write_json(folder, "tokenizer_config.json", fields) if fields else [])]

    def config_fields(self) -> dict[str, Any]:
        """What a tokenizer_config.json has to say for `load` to give this tokenizer again."""
        fields: dict[str, Any] = {}
        if self.added:
            fields["added_tokens_decoder"] = {
                str(token.id): {"content": token.text, "special": token.special} for token in self.added
            }
            fields["legacy"] = not self.prefix_once
        if self.chat_template is not None:
            fields["chat_template"] = self.chat_template
        return fields

    def _piece_bytes(self, token: int) -> bytes:
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_unknown(token):
            return "\ufffd".encode()
        return b"" if self._processor.is_control(token) else piece.replace(SPACE, " ").encode()


class _SpaceStrippingStream(_ByteStream):
    _started = False

    def push(self, token: int) -> str:
        text = super().push(token)
        if text and not self._started:
            self._started = True
            return text.removeprefix(" ")
        return text


class FileTokenizer(Tokenizer):
    """A `tokenizer.json`; bos and eos are named by the `tokenizer_config.json` beside it, or by the caller.

    Added tokens marked special are ordinary text to `encode`, and nothing to `decode`: a name that the library would
    take for its token all the same is encoded in two parts.
    """

    name = "file"

    def __init__(
        self,
        text: str,
        bos: str | None = None,
        eos: str | None = None,
        source: str = "tokenizer.json",
        chat_template: str | None = None,
    ) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            backend: Any = Backend.from_str(text)
        except Exception as error:  # the library raises the bare class
            raise DataError(f"{source} is not a tokenizer in this format: {_first_line(error)}") from None
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self.text, self._backend = text, backend
        self.names = {"bos_token": bos, "eos_token": eos}
        self.chat_template = chat_template
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{source} has no tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        for name in (bos, eos):
            if name is not None and name not in vocabulary:
                raise DataError(f"{source} has no token {name!r}, which its configuration names")
        self.bos_id = None if bos is None else vocabulary[bos]
        self.eos_id = None if eos is None else vocabulary[eos]
        # Names that the library would make their tokens of, special or not: whole words of the vocabulary.
        leaks = [name for name, id_ in self.special_tokens().items() if id_ in self._ids(name)]
        if short := [name for name in leaks if len(name) < 2]:
            raise DataError(f"{source} has the special token {short[0]!r}, which any text may hold")
        self._leaks = re.compile(f"(?={'|'.join(map(re.escape, leaks))})") if leaks else None

    @classmethod
    def load(cls, path: Path) -> FileTokenizer:
        names: list[str | None] = [None, None]
        template = None
        config = path.with_name("tokenizer_config.json")
        if config.is_file():
            fields = _read_json(config)
            for i, key in enumerate(("bos_token", "eos_token")):
                value = fields.get(key)
                names[i] = value.get("content") if isinstance(value, dict) else value
            template = _chat_template(fields.get("chat_template"))
        file = path.with_name("chat_template.jinja")
        if file.is_file():
            template = _read_text(file)
        return cls(_read_text(path), names[0], names[1], str(path), template)

    def vocabulary(self) -> dict[str, int]:
        """Every token's id by its spelling."""
        found: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found

    def is_one_stretch(self, text: str) -> bool:
        """Whether text is merged as a whole: it is not split before."""
        splitter = self._backend.pre_tokenizer
        return splitter is None or len(splitter.pre_tokenize_str(text)) == 1

    def special_tokens(self) -> dict[str, int]:
        added = self._backend.get_added_tokens_decoder()
        names = {token.content: id_ for id_, token in added.items() if token.special}
        for name, id_ in zip(self.names.values(), (self.bos_id, self.eos_id), strict=True):
            if name is not None and id_ is not None:
                names[name] = id_
        return names

    def encode(self, text: str) -> list[int]:
        if self._leaks is None:
            return self._ids(text)
        cuts = [0, *(found.start() + 1 for found in self._leaks.finditer(text)), len(text)]
        return [id_ for begin, end in pairwise(cuts) for id_ in self._ids(text[begin:end])]

    def _ids(self, text: str) -> list[int]:
        # The batch's encoder keeps no offsets into the text, which saves a quarter of the time.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        text: str = self._backend.decode([self.checked(token) for token in tokens], skip_special_tokens=True)
        return text

    def decode_stream(self) -> DecodeStream:
        return _WindowStream(self)

    def fingerprint(self) -> str:
        return _sha256(json.dumps([self.text, self.names]).encode())

    def save(self, folder: str | Path) -> list[str]:
        (Path(folder) / "tokenizer.json").write_bytes(self.text.encode())
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return ["tokenizer.json", *_write_json(folder, "tokenizer_config.json", self.names | template)]


class _WindowStream:
    """For a decoder known only as a function: decodes a short window of ids twice and hands out the difference."""

    LONGEST = 8  # ids held back at most; a UTF-8 character has four bytes, so what is still broken then is broken

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = 0  # ids whose text is out; they stay as context, since a first token may lose its space

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._fresh()
        if text.endswith("\ufffd") and len(self._ids) - self._sent < self.LONGEST:
            return ""
        return self._release(text)

    def flush(self) -> str:
        return self._release(self._fresh())

    def _fresh(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._sent])) :]

    def _release(self, text: str) -> str:
        if text:
            self._ids = self._ids[self._sent :]
        self._sent = len(self._ids)
        return text


def tokenizer_file(folder: Path) -> Path | None:
    """The file by which load_tokenizer knows the tokenizer in a folder; None if there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer saved in a folder, or of one file ending in `.model` or `.json`. Raises DataError naming the path."""
    path = Path(path)
    if path.is_dir():
        found = tokenizer_file(path)
        if found is None:
            raise DataError(f"{path} holds no {OWN_FILE}, tokenizer.json or tokenizer.model")
        path = found
    if not path.is_file():
        raise DataError(f"there is no tokenizer at {path}")
    if path.suffix == ".model":
        return SentencePieceTokenizer.load(path)
    if path.suffix != ".json":
        raise DataError(f"{path} is no tokenizer: its name should end in .model or .json")
    if path.name != OWN_FILE:
        return FileTokenizer.load(path)
    fields = _read_json(path)
    kind, characters = fields.get("kind"), fields.get("characters")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars" and isinstance(characters, str):
        return CharTokenizer(characters, fields.get("separator") is True)
    if kind == "sentencepiece":
        return SentencePieceTokenizer.load(path.with_name("tokenizer.model"))
    raise DataError(f"{path} describes no tokenizer this version knows: kind {kind!r}")


def build_tokenizer(spec: str, documents: Iterable[str], vocab_size: int, every: int = 1) -> Tokenizer:
    """Tokenizer for a spec: one of SPECS, trained on the documents where it needs to be, or a path for load_tokenizer.

    vocab_size and every (see SentencePieceTokenizer.train) matter to the SentencePiece specs only.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "chars":
        return CharTokenizer.train(documents)
    if spec == "sentencepiece":
        return SentencePieceTokenizer.train(documents, vocab_size, "bpe", every)
    if spec == "sentencepiece-unigram":
        return SentencePieceTokenizer.train(documents, vocab_size, "unigram", every)
    if not Path(spec).exists():
        raise ConfigError(f"tokenizer {spec!r} is neither {', '.join(SPECS)} nor a file")
    return load_tokenizer(spec)


def _stretches(documents: Iterable[str]) -> Iterator[str]:
    """Text as SentencePiece likes its sentences: short, cut between words, without the characters it reserves."""
    for text in documents:
        for part in re.split("[\t\0\u2581\u2585]", text):
            yield from re.findall(r"(?s).{1,4000}(?!\S)|.{1,4000}", part)


def _added_tokens(
    listed: dict[str, Any], config: dict[str, Any], named: dict[str, Any], source: str
) -> list[AddedToken]:
    """Of an added_tokens.json ({text: id}) and of a tokenizer_config.json, which knows more and has the last word."""
    special = set()
    for value in [*config.values(), *named.values()]:
        for item in value if isinstance(value, list) else [value]:
            text = item.get("content") if isinstance(item, dict) else item
            if isinstance(text, str):
                special.add(text)
    described = config.get("added_tokens_decoder", {})
    try:
        found = {id_: AddedToken(id_, text, text in special) for text, id_ in listed.items()}
        for name, fields in described.items():
            found[int(name)] = AddedToken(int(name), fields["content"], fields.get("special") is True)
        if not all(isinstance(token.text, str) and type(token.id) is int for token in found.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"the added tokens named beside {source} are not texts and ids") from None
    return sorted(found.values())


def _chat_template(value: Any) -> str | None:
    """Of a tokenizer_config.json: one template, or several of which one is named default."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}.get("default")
    return value if isinstance(value, str) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text") from None


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{path} is not a JSON object")
    return fields


def _write_json(folder: str | Path, name: str, fields: dict[str, Any]) -> list[str]:
    (Path(folder) / name).write_text(json.dumps(fields, ensure_ascii=True, indent=1) + "\n", encoding="utf-8")
    return [name]

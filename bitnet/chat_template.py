"""How a conversation is written for a model: as text between special tokens.

A template turns messages into parts: strings, which are encoded as ordinary text, and ids of special tokens. What
people type is always inside the strings, so "<|eot_id|>" in a message is ten characters and ends nothing. Three
templates: the tokenizer's own (Jinja), that of BitNet b1.58 2B-4T, and a plain dialogue for models that know neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from bitnet.errors import ConfigError
from bitnet.tokenizer import Tokenizer

Part = str | int

NAMES = ("auto", "bitnet", "plain")
EOT = "<|eot_id|>"
# Tokens that end a turn in published chat models, beside the tokenizer's eos.
TURN_ENDS = (EOT, "<|im_end|>", "<|end|>", "<end_of_turn>")
# Noncharacters of Unicode, which no text may contain: they mark where a message begins and ends in a rendered template.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKS = re.compile(f"[{OPEN}{CLOSE}]")


class Message(NamedTuple):
    """role: "system", "user" or "assistant"."""

    role: str
    content: str


class Template(Protocol):
    """Writes a conversation, and knows where an answer ends: at one of end_ids, or before one of stops."""

    name: str
    end_ids: frozenset[int]
    stops: tuple[str, ...]

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The conversation up to the first word of the next answer; no two strings in a row, none empty."""


class BitnetTemplate:
    """BitNet b1.58 2B-4T: "System: ..<|eot_id|>User: ..<|eot_id|>Assistant: ", contents trimmed."""

    name = "bitnet"
    stops: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        eot = tokenizer.special_tokens().get(EOT)
        if eot is None:
            raise ConfigError(f"the template bitnet needs a tokenizer with the special token {EOT}")
        self._eot, self._bos = eot, tokenizer.bos_id
        self.end_ids = frozenset([eot] if tokenizer.eos_id is None else [eot, tokenizer.eos_id])

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """See Template."""
        parts: list[Part] = [] if self._bos is None else [self._bos]
        for role, content in messages:
            parts += [f"{role.capitalize()}: {content.strip()}", self._eot]
        return [*parts, "Assistant: "]


class PlainTemplate:
    """A dialogue in plain text, for models without special tokens: "User: ..", "Assistant: ..", a line each."""

    name = "plain"
    stops: tuple[str, ...] = ("\nUser:",)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bos = tokenizer.bos_id
        self.end_ids = frozenset[int]() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """See Template; a system message is a paragraph of its own at the head."""
        text = ""
        for role, content in messages:
            content = content.strip()
            text += f"{content}\n\n" if role == "system" else f"{role.capitalize()}: {content}\n"
        text += "Assistant:"
        return [text] if self._bos is None else [self._bos, text]


class JinjaTemplate:
    """The template that came with a tokenizer, rendered in Jinja's sandbox. ConfigError where it refuses."""

    name = "the tokenizer's own"
    stops: tuple[str, ...] = ()

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ConfigError(
                "the tokenizer's chat template needs the package jinja2 (pip install 'bitnet[chat]'); "
                "--template bitnet and --template plain do not"
            ) from None
        self._special = tokenizer.special_tokens()
        names = {id_: name for name, id_ in self._special.items()}
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        self._names = {
            "bos_token": "" if bos is None else names.get(bos, ""),
            "eos_token": "" if eos is None else names.get(eos, ""),
        }
        ends = {eos, *(self._special.get(name) for name in TURN_ENDS)}
        self.end_ids = frozenset(end for end in ends if end is not None)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._error: type[Exception] = TemplateError
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the tokenizer's chat template cannot be read: {error}") from None

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """See Template."""
        marked = [
            {"role": role, "content": OPEN + MARKS.sub("", content).strip() + CLOSE} for role, content in messages
        ]
        try:
            text = self._template.render(messages=marked, add_generation_prompt=True, **self._names)
        except self._error as error:
            raise ConfigError(f"the tokenizer's chat template refuses this conversation: {error}") from None
        return self._split(text)

    def _split(self, text: str) -> list[Part]:
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        parts: list[Part] = []
        at = 0
        for found in re.finditer(f"(?s){OPEN}(?P<message>.*?){CLOSE}|(?P<name>{'|'.join(names) or '(?!)'})", text):
            _append(parts, MARKS.sub("", text[at : found.start()]))
            _append(parts, self._special[found["name"]] if found["name"] else MARKS.sub("", found["message"]))
            at = found.end()
        _append(parts, MARKS.sub("", text[at:]))
        return parts


def choose(name: str, tokenizer: Tokenizer) -> Template:
    """A template by name. auto: the tokenizer's own, else bitnet where its special token is known, else plain."""
    if name == "auto":
        if tokenizer.chat_template is not None:
            return JinjaTemplate(tokenizer.chat_template, tokenizer)
        name = "bitnet" if EOT in tokenizer.special_tokens() else "plain"
    if name not in NAMES:
        raise ConfigError(f"template must be one of {', '.join(NAMES)}, not {name!r}")
    return BitnetTemplate(tokenizer) if name == "bitnet" else PlainTemplate(tokenizer)


def encode(tokenizer: Tokenizer, parts: Sequence[Part]) -> list[int]:
    """Ids of the parts."""
    ids: list[int] = []
    for part in parts:
        ids += tokenizer.encode(part) if isinstance(part, str) else [part]
    return ids


def joined(parts: Sequence[Part], text: str) -> list[Part]:
    """The parts with more text behind them."""
    longer = list(parts)
    _append(longer, text)
    return longer


def rest(parts: Sequence[Part], beginning: Sequence[Part]) -> list[Part] | None:
    """What follows a beginning of the parts, which may end inside a string; None where they begin otherwise."""
    if not beginning:
        return list(parts)
    last, count = beginning[-1], len(beginning)
    if len(parts) < count or list(parts[: count - 1]) != list(beginning[:-1]):
        return None
    here = parts[count - 1]
    if isinstance(here, str) and isinstance(last, str) and here.startswith(last):
        return joined([], here[len(last) :]) + list(parts[count:])
    return list(parts[count:]) if here == last else None


def _append(parts: list[Part], part: Part) -> None:
    if isinstance(part, str) and parts and isinstance(parts[-1], str):
        parts[-1] += part
    elif part != "":
        parts.append(part)


def _refuse(message: str) -> Any:
    from jinja2 import TemplateError

    raise TemplateError(message)

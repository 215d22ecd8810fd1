"""Conversations to learn from: lines of JSON to messages, messages to tokens with a mark on those that are learned.

A line is {"messages": [{"role": "user", "content": "..."}, ...]}, roles system, user and assistant, or
{"prompt": "...", "response": "..."}. The tokens are those that bitnet.conversation gives a model: what stands between
two answers is encoded as one piece, and each answer as one. Learned is each answer and what ends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bitnet.chat_template import Message, Part, Template, encode, joined, rest
from bitnet.corpus.readers import json_lines
from bitnet.errors import DataError
from bitnet.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


def read_conversations(paths: Iterable[str | Path]) -> Iterator[list[Message]]:
    """Conversations of `.jsonl` files (also `.gz`, `.zst`), in order. Raises DataError naming file and line."""
    for path in map(Path, paths):
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        for where, fields in json_lines(path):
            yield _messages(fields, where)


def opening(messages: Sequence[Message]) -> str:
    """All before the first answer as text, by which a conversation is held out: one question is on one side only."""
    first = next(i for i, message in enumerate(messages) if message.role == "assistant")
    return json.dumps(messages[:first])


def encode_conversation(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """(tokens, marks) up to the end of the last answer, equally long; marks: 1 for a token that is learned, else 0.

    Raises DataError where a template writes an answer in another way than it is given, or the past anew.
    """
    tokens: list[int] = []
    marks: list[int] = []
    written: list[Part] = []

    def write(parts: list[Part], learned: int) -> None:
        ids = encode(tokenizer, parts)
        tokens.extend(ids)
        marks.extend([learned] * len(ids))

    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    for i, message in enumerate(messages[: last + 1]):
        if message.role != "assistant":
            continue
        prompt = template.parts(messages[:i])
        before = rest(prompt, written)
        after = rest(template.parts(messages[: i + 1]), prompt)
        answer = message.content.strip()
        if before is None or not after or not isinstance(after[0], str) or answer not in after[0]:
            raise DataError(f"the template {template.name} does not go on from an answer to the next: {answer[:40]!r}")
        write(before, 0)
        text = after[0][: after[0].index(answer) + len(answer)]
        written = joined(prompt, text)
        end = _end(tokenizer, template, rest(after, [text]) or [], i == last)
        write([text], 1)
        write(end, 1)
        if i != last:
            written = joined(written, end[0]) if end and isinstance(end[0], str) else [*written, *end]
    return tokens, marks


def _end(tokenizer: Tokenizer, template: Template, following: list[Part], is_last: bool) -> list[Part]:
    """What ends an answer: the token that the template puts there, else eos at the last, else a stop string."""
    if following and following[0] in template.end_ids:
        return following[:1]
    if is_last and tokenizer.eos_id in template.end_ids:
        return [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    return list(template.stops[:1])


def _messages(fields: Any, where: str) -> list[Message]:
    pairs: list[tuple[Any, Any]]
    if isinstance(fields, dict) and "messages" not in fields and {"prompt", "response"} <= fields.keys():
        pairs = [("user", fields["prompt"]), ("assistant", fields["response"])]
    elif isinstance(fields, dict) and isinstance(fields.get("messages"), list):
        messages: list[dict[str, Any]] = [one if isinstance(one, dict) else {} for one in fields["messages"]]
        pairs = [(one.get("role"), one.get("content")) for one in messages]
    else:
        raise DataError(f"{where} has neither a list 'messages' nor 'prompt' and 'response'")
    for role, content in pairs:
        if role not in ROLES:
            raise DataError(f"{where} has a message of role {role!r}, which is none of {', '.join(ROLES)}")
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise DataError(f"{where} has a message of the {role} without text")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} is not Unicode text: {error}") from None
    if not any(role == "assistant" for role, _ in pairs):
        raise DataError(f"{where} has no answer to learn from")
    return [Message(role, content) for role, content in pairs]

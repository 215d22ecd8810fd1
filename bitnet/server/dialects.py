"""The two ways in which an answer is told: as completions and as chat completions, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Protocol

from bitnet.server import replies
from bitnet.server.answers import Piece
from bitnet.server.protocol import Options
from bitnet.server.replies import Finished, Head, Offsets, Reply, Spell
from bitnet.tokenizer import ByteSpelledTokenizer, Tokenizer


class Dialect(Protocol):
    """Of one answer."""

    def whole(self, finished: Sequence[Finished]) -> Reply:
        """All choices at once."""

    def chunks(self, piece: Piece) -> list[Reply]:
        """What a piece is told in."""

    def usage(self, finished: Sequence[Finished]) -> Reply:
        """The last chunk, where a request asks for usage."""


class Completions:
    """POST /v1/completions."""

    def __init__(self, name: str, options: Options, spell: Spell) -> None:
        self._head, self._options, self._spell = _head("cmpl", name, options), options, spell
        self._offsets: dict[int, Offsets] = {}

    def whole(self, finished: Sequence[Finished]) -> Reply:
        """See Dialect."""
        return replies.completion(self._head, finished, self._options.n, self._spell)

    def chunks(self, piece: Piece) -> list[Reply]:
        """See Dialect."""
        offsets = self._offsets.setdefault(piece.index, Offsets())
        scores = piece.scored if self._options.logprobs is not None else None
        logprobs = replies.completion_logprobs(scores, self._spell, offsets)
        return [replies.completion_chunk(self._head, piece.index, piece.text, logprobs, piece.finish_reason)]

    def usage(self, finished: Sequence[Finished]) -> Reply:
        """See Dialect."""
        return replies.completion_usage_chunk(self._head, finished, self._options.n)


class Chats:
    """POST /v1/chat/completions."""

    def __init__(self, name: str, options: Options, spell: Spell) -> None:
        self._head, self._options, self._spell = _head("chatcmpl", name, options), options, spell
        self._begun: set[int] = set()

    def whole(self, finished: Sequence[Finished]) -> Reply:
        """See Dialect."""
        return replies.chat_completion(self._head, finished, self._spell)

    def chunks(self, piece: Piece) -> list[Reply]:
        """See Dialect."""
        out = []
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            out.append(replies.chat_first_chunk(self._head, piece.index))
        scores = piece.scored if self._options.logprobs is not None else None
        if piece.text or scores:
            logprobs = replies.chat_logprobs(scores, self._spell)
            out.append(replies.chat_chunk(self._head, piece.index, piece.text, logprobs))
        if piece.finish_reason is not None:
            out.append(replies.chat_last_chunk(self._head, piece.index, piece.finish_reason))
        return out

    def usage(self, finished: Sequence[Finished]) -> Reply:
        """See Dialect."""
        return replies.chat_usage_chunk(self._head, finished)


def _head(kind: str, name: str, options: Options) -> Head:
    return Head(f"{kind}-{secrets.token_hex(12)}", int(time.time()), name, options.include_usage)


def spelling(tokenizer: Tokenizer) -> Spell:
    """What a token adds to a text, in bytes; of a tokenizer that has no bytes of its own, as it is decoded alone."""
    if isinstance(tokenizer, ByteSpelledTokenizer):
        return tokenizer.token_bytes
    return lambda token: tokenizer.decode([token]).encode()

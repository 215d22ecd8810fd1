"""Logprobs as a reply has them: in one shape beside completions, in another beside chat completions.

Source: OpenAI API reference, "The completion object" and "The chat completion object". There is no infinity in JSON: a
token that could not be drawn has the logprob -9999.0, which the reference has for "very unlikely".
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from bitnet.scored import Scored

Reply = dict[str, Any]
Spell = Callable[[int], bytes]  # the bytes that a token adds to the text

LEAST = -9999.0


class Offsets:
    """Where the tokens of one choice begin in its text, in characters, one token after the other.

    A token that goes on with a character begins where that character does.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def push(self, spelled: bytes) -> int:
        """Where the next token begins."""
        self._characters += len(self._decoder.decode(spelled[:1]))
        unfinished = bool(self._decoder.getstate()[0])
        at = self._characters - (1 if spelled and not unfinished else 0)
        self._characters += len(self._decoder.decode(spelled[1:]))
        return at


def completion_logprobs(scored: Sequence[Scored] | None, spell: Spell, offsets: Offsets) -> Reply | None:
    """Logprobs of a completion or of its chunk; the chunks of one choice share its offsets.

    A token's own logprob is always among the top ones, "so there may be up to logprobs + 1" of them. Of tokens that are
    spelled alike, as unfinished characters are, the likeliest is shown.
    """
    if scored is None:
        return None
    return {
        "tokens": [_text(spell(one.token)) for one in scored],
        "token_logprobs": [None if one.logprob is None else _number(one.logprob) for one in scored],
        "top_logprobs": [_top_by_text(one, spell) for one in scored],
        "text_offset": [offsets.push(spell(one.token)) for one in scored],
    }


def chat_logprobs(scored: Sequence[Scored] | None, spell: Spell) -> Reply | None:
    """Logprobs of a chat completion's choice or of its chunk, where every token has one."""
    if scored is None:
        return None
    content = []
    for one in scored:
        top = [_token_logprob(token, logprob, spell) for token, logprob in one.top]
        content.append(_token_logprob(one.token, one.logprob, spell) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _top_by_text(one: Scored, spell: Spell) -> dict[str, float] | None:
    if one.logprob is None:
        return None
    top: dict[str, float] = {}
    for token, logprob in (*one.top, (one.token, one.logprob)):
        top.setdefault(_text(spell(token)), _number(logprob))
    return top


def _token_logprob(token: int, logprob: float | None, spell: Spell) -> Reply:
    if logprob is None:
        raise ValueError(f"token {token} of a chat completion has no logprob; only an echoed prompt begins without one")
    spelled = spell(token)
    return {"token": _text(spelled), "logprob": _number(logprob), "bytes": list(spelled)}


def _text(spelled: bytes) -> str:
    return spelled.decode("utf-8", "replace")


def _number(logprob: float) -> float:
    return max(float(logprob), LEAST)

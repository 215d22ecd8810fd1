"""TextStream: the text that continues a prompt, handed out as soon as no later token can change it.

That is whole characters, and nothing that may still become a stop string.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

from bitnet.decoder import ContextFullError
from bitnet.errors import ConfigError
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler
from bitnet.token_stream import TokenStream
from bitnet.tokenizer import Tokenizer

Stops = str | Sequence[str]


class StopFilter:
    """Passes text on until a stop string is complete; holds back an end that may be the beginning of one.

    Of several the first to be complete counts, so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Stops) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if not all(self._stops):
            raise ConfigError("a stop string must not be empty")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What of the text so far is certain and was not handed out before."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            cut = min(found)[1]
            self._held = ""
        else:
            longest = len(text) + 1  # of a beginning that may be its end
            starts = (n for stop in self._stops for n in range(1, min(len(stop), longest)) if text.endswith(stop[:n]))
            cut = len(text) - max(starts, default=0)
            self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


class Spelling:
    """Ids in, text out: decodes the ids that follow a prompt and holds back what is not certain yet."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Stops = ()) -> None:
        self._filter = StopFilter(stop)
        # The prompt goes through the decoder as well: the first new token may end a character it began, and keeps the
        # space that some tokenizers take off the beginning of a text.
        self._decoder = tokenizer.decode_stream()
        for token in prompt:
            self._decoder.push(token)

    @property
    def stopped(self) -> bool:
        """Whether a stop string, which is not handed out, has ended the text."""
        return self._filter.stopped

    def push(self, token: int) -> str:
        """What is certain now and was not handed out before; often nothing."""
        return self._filter.push(self._decoder.push(token))

    def rest(self) -> str:
        """What was held back, when no more ids come."""
        if self._filter.stopped:
            return ""
        return self._filter.push(self._decoder.flush()) + self._filter.flush()


class TextStream(Iterator[str]):
    """Pieces of the text that continues a prompt. Joined they are the text; `ids` is the TokenStream below.

    finish_reason is as TokenStream's, or "stop" when a stop string, which is not handed out, ended it. A text prompt
    begins with the tokenizer's bos where it has one; an empty one is bos, else eos, alone. tokenizer: model.tokenizer
    by default. options are those of TokenStream. `held()` gives what is not out yet, for when the stream is left early.
    """

    def __init__(
        self,
        model: BitNetForCausalLM,
        prompt: str | Sequence[int],
        sampler: Sampler,
        max_new_tokens: int = 200,
        stop: Stops = (),
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> None:
        tokenizer = tokenizer_of(model, tokenizer)
        ids = prompt_ids(tokenizer, prompt)
        options = {"end_id": tokenizer.eos_id} | options
        self.ids = TokenStream(model, ids, sampler, max_new_tokens, vocab_size=tokenizer.vocab_size, **options)
        self.finish_reason: str | None = None
        self._spelling = Spelling(tokenizer, ids, stop)
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    def held(self) -> str:
        """Text drawn and not handed out; the stream has ended after that."""
        self._pieces.close()
        return self._spelling.rest()

    def _read(self) -> Generator[str, None, None]:
        try:
            for token in self.ids:
                piece = self._spelling.push(token)
                if self._spelling.stopped:
                    self.finish_reason = "stop"
                if piece:
                    yield piece
                if self._spelling.stopped:
                    return
        except ContextFullError:
            self.finish_reason = self.ids.finish_reason
            yield self._spelling.rest()
            raise
        piece = self._spelling.rest()
        self.finish_reason = "stop" if self._spelling.stopped else self.ids.finish_reason
        if piece:
            yield piece


def tokenizer_of(model: BitNetForCausalLM, tokenizer: Tokenizer | None = None) -> Tokenizer:
    """The tokenizer given, or the one the model came with. ConfigError if there is none, or none that fits."""
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ConfigError("this model came without a tokenizer: pass one, or use generate_ids")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's {model.config.vocab_size}"
        )
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """What a model is given for a prompt, see TextStream. ConfigError if nothing can stand for an empty one."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if len(prompt) == 0:
        first = eos if bos is None else bos
        if first is None:
            raise ConfigError("a prompt is needed: this tokenizer has no token that begins or ends a text")
        return [first]
    if isinstance(prompt, str):
        return ([] if bos is None else [bos]) + tokenizer.encode(prompt)
    return list(prompt)

"""Speculative decoding: guess some tokens cheaply, run them in one step, keep those that would have been drawn anyway.

A step of eight tokens takes little longer than one of one, because it reads each weight once. The choice of a token is
a pure function of logits, tokens before it, seed and position, and a step's logits do not depend on how many tokens it
has; so drafts change how long a text takes and nothing else, greedy or sampled (Leviathan et al. 2023, arXiv
2211.17192, without need of its rejections). Drafts come from what followed the same few tokens earlier in the text
(NgramDrafter) or from a small model (ModelDrafter); Speculation decides how many are worth their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

from bitnet.decoder import STEP, Decoder
from bitnet.errors import ConfigError
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler

MOST = STEP - 1  # drafted tokens of one step; the token before them is run too
LENGTHS = (1, 3, 7)  # tried where nobody asked for a number: steps of 2, 4 and 8 tokens
RETRY = 64  # one chance in so many tries another number: at worst it costs 1/64 of the difference of two steps
MEMORY = 0.95  # weight of an earlier token in the rate, per later one: about the last twenty count
PRIOR = (1.0, 2.0)  # right, judged: where a rate begins
GROWTH = 0.05  # share of a one-token step that each further token is taken to cost until it is measured


class Drafter(Protocol):
    """Guesses how a sequence of ids goes on."""

    seconds: float  # that one guessed token takes

    def match(self, sequence: Sequence[int]) -> str | None:
        """What a guess would rest on, the name its acceptance is counted under; None: there is no guess. Cheap."""

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        """At most `count` next tokens, after match() of the same sequence gave a name."""


class NgramDrafter:
    """What followed the last four tokens the last time they were there, or the last three, or two; the prompt counts.

    Each token is looked at once while the sequence grows; a shorter one starts anew, another one only guesses worse.
    """

    SIZES = (4, 3, 2)
    seconds = 0.0  # beside any model

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token after its last occurrence
        self._known = 0
        self._at = 0

    def match(self, sequence: Sequence[int]) -> str | None:
        """Name of the n-gram's size."""
        if len(sequence) < self._known:
            self._after, self._known = {}, 0
        for end in range(max(self._known, 1), len(sequence)):
            for size in self.SIZES:
                if end >= size:
                    self._after[tuple(sequence[end - size : end])] = end
        self._known = len(sequence)
        for size in self.SIZES:
            at = self._after.get(tuple(sequence[-size:])) if len(sequence) >= size else None
            if at is not None:
                self._at = at
                return f"{size} tokens"
        return None

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        """Always `count` tokens: where the text ends, the guess is followed round."""
        draft: list[int] = []
        for place in range(self._at, self._at + count):
            draft.append(sequence[place] if place < len(sequence) else draft[place - len(sequence)])
        return draft


class ModelDrafter:
    """A small model of the same vocabulary, which draws with the same sampler, so at the same random numbers.

    Its own cache follows the sequence; once the sequence is longer than its context it has no guess.
    """

    def __init__(self, model: BitNetForCausalLM, sampler: Sampler, vocab_size: int | None = None) -> None:
        self._decoder = Decoder(model)
        self._sampler, self._vocab_size = sampler, vocab_size
        self.seconds = 0.0  # not measured yet

    def match(self, sequence: Sequence[int]) -> str | None:
        """Always "model", while there is room."""
        return "model" if len(sequence) + MOST <= self._decoder.capacity else None

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        """`count` tokens, each a step of the small model."""
        grown = list(sequence)
        logits = self._decoder.resume([grown])
        while True:
            grown.append(self._sampler(logits[0, : self._vocab_size], len(grown), grown))
            if len(grown) == len(sequence) + count:
                return grown[len(sequence) :]
            start = perf_counter()
            logits = self._decoder.step(grown[-1:])
            self.seconds = _blend(self.seconds or None, perf_counter() - start)


class Speculation:
    """How many tokens to draft, by how often they were right lately and by what steps take.

    most: a number from 0 (never) to MOST always drafts that many. None drafts as many as make a token cheapest, often
    none, and another number now and again to measure it. Times decide about time only. A guess that costs nothing is
    judged even when it is not run, so it is noticed when the text begins to repeat itself.
    """

    def __init__(self, drafters: Sequence[Drafter] = (), most: int | None = None) -> None:
        if most is not None and not 0 <= most <= MOST:
            raise ConfigError(f"speculate must be auto, off or a number from 0 to {MOST}, not {most}")
        self.drafters, self.most = list(drafters) if most != 0 else [], most
        self._rates: dict[str, tuple[float, float]] = {}  # right, judged, both fading
        self._seconds: dict[int, float] = {}  # of a step by its tokens
        self._chances: dict[str, int] = {}
        self._name, self._open = "", list[int]()  # the draft that see() judges

    def draft(self, sequence: Sequence[int], room: int) -> list[int]:
        """Tokens to run after the last of `sequence`, at most `room`; often none."""
        plans = []
        for drafter in self.drafters:
            name = drafter.match(sequence)
            if name is not None:
                plans.append((*self._plan(name, drafter.seconds, room), name, drafter))
        self._open = []
        for _, count, name, drafter in sorted(plans, key=lambda plan: plan[0], reverse=True):
            if count > 0 or drafter.seconds == 0:
                self._name, self._open = name, drafter.propose(sequence, max(count, 1))
                return list(self._open[:count])
        return []

    def see(self, token: int) -> None:
        """The token that was drawn next: judges the draft up to its first wrong token."""
        if self._open:
            is_right = token == self._open[0]
            right, judged = self._rates.get(self._name, PRIOR)
            self._rates[self._name] = (right * MEMORY + is_right, judged * MEMORY + 1)
            self._open = self._open[1:] if is_right else []

    def timed(self, tokens: int, seconds: float) -> None:
        """What a step of that many tokens took, when it was not its first."""
        self._seconds[tokens] = _blend(self._seconds.get(tokens), seconds)

    def rate(self, name: str) -> float:
        """Share of drafted tokens that lately were right, of those whose predecessors were."""
        right, judged = self._rates.get(name, PRIOR)
        return right / judged

    def _plan(self, name: str, seconds: float, room: int) -> tuple[float, int]:
        """(how many times faster a token comes, with how many drafted tokens)."""
        if self.most is not None:
            count = min(self.most, room)
            return self._gain(name, seconds, count), count
        counts = [n for n in LENGTHS if n <= room]
        if 1 not in self._seconds or not counts:  # nothing to compare with yet
            return 0.0, 0
        self._chances[name] = self._chances.get(name, 0) + 1
        turn, left = divmod(self._chances[name], RETRY)
        if left == 0:
            return 1.0, counts[turn % len(counts)]
        gain, count = max((self._gain(name, seconds, n), n) for n in counts)
        return (gain, count) if gain > 1 else (gain, 0)

    def _gain(self, name: str, seconds: float, count: int) -> float:
        one = self._seconds.get(1, 1.0)
        step = self._seconds.get(count + 1, one * (1 + GROWTH * count))
        tokens = sum(self.rate(name) ** n for n in range(count + 1))  # the one after the last right one comes free
        return tokens * one / (step + count * seconds)


def _blend(before: float | None, now: float) -> float:
    return now if before is None else 0.8 * before + 0.2 * now

"""How closely two models agree on a text: their logits token by token, in numbers that a reader can judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitnet import ops
from bitnet.errors import ConfigError
from bitnet.model import BitNetForCausalLM
from bitnet.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
Logits = Callable[[Array], Array]  # tokens (1, T) -> logits (1, T, V), f32

# What is compared where nobody gave a text: prose, numbers, code, a script without spaces, in few tokens.
TEXT = """\
The weather had turned by noon, and the ferry that usually left at 12:40 stayed in the harbour with its lights on.
"We will wait," said the captain, "until the wind falls below 9 m/s; after that it takes 35 minutes."

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / max(len(values), 1)

Быстрые шаги на лестнице; 三つの窓に明かりが見えた。 1 + 2 = 3, 10 % of 250 is 25.
"""
MOST_TOKENS = 256


@dataclass(frozen=True)
class Agreement:
    """Of `tokens` places: the largest and the mean difference of a logit, the standard deviation of the first model's
    logits to judge them by, how often both prefer the same token, and the mean divergence in nats (KL, first from
    second)."""

    tokens: int
    max_difference: float
    mean_difference: float
    deviation: float
    top1: float
    divergence: float

    def __str__(self) -> str:
        return (
            f"logits over {self.tokens} tokens: difference max {self.max_difference:.3g}, mean "
            f"{self.mean_difference:.3g} (standard deviation of logits {self.deviation:.3g}); same first choice "
            f"{100 * self.top1:.1f} %; KL divergence {self.divergence:.3g} nats"
        )

    def as_dict(self) -> dict[str, float]:
        """By name, for JSON."""
        return asdict(self)


def tokens_of(model: BitNetForCausalLM, tokenizer: Tokenizer | None, text: str | None = None) -> Array:
    """Tokens (1, T) of a text as both models are to see it; of a model without a tokenizer, a fixed random sequence."""
    c = model.config
    most = min(MOST_TOKENS, c.max_position_embeddings)
    if tokenizer is None:
        if text is not None:
            raise ConfigError("the model has no tokenizer, so a text cannot be turned into its tokens")
        return np.random.default_rng(0).integers(0, c.vocab_size, (1, most)).astype(np.int32)
    if text is not None:
        ids = tokenizer.encode(text)
    else:
        ids = _what_it_can_say(tokenizer, TEXT)
    ids = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *ids][:most]
    if not ids:
        raise ConfigError("the text has no tokens: there is nothing to compare")
    return np.array([ids], np.int32)


def _what_it_can_say(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the lines that a tokenizer knows the characters of, or of all of its ids."""
    ids: list[int] = []
    for line in text.splitlines(keepends=True):
        try:
            ids += tokenizer.encode(line)
        except ValueError:
            continue
    return ids or list(range(tokenizer.vocab_size))


def logits_of(model: BitNetForCausalLM) -> Logits:
    """A model as a function of tokens."""

    def run(tokens: Array) -> Array:
        with ops.no_grad():
            logits: Array = model(tokens).numpy()
        return logits

    return run


def compare_logits(first: Array, second: Array) -> Agreement:
    """Two results (1, T, V) for the same tokens."""
    if first.shape != second.shape:
        raise ConfigError(f"logits of shape {first.shape} and {second.shape} cannot be compared")
    vocabulary = first.shape[-1]
    rows = list(zip(first.reshape(-1, vocabulary), second.reshape(-1, vocabulary), strict=True))
    found = np.array([_one_token(a.astype(np.float64), b.astype(np.float64)) for a, b in rows])  # a row at a time
    worst, mean, square, same, divergence = found.T
    return Agreement(
        tokens=len(rows),
        max_difference=float(worst.max()),
        mean_difference=float(mean.mean()),
        deviation=float(np.sqrt(square.mean())),
        top1=float(same.mean()),
        divergence=float(divergence.mean()),
    )


def _one_token(a: Array, b: Array) -> tuple[float, ...]:
    """Largest and mean difference, variance of a, whether both prefer the same, divergence."""
    difference = np.abs(a - b)
    p, q = _log_softmax(a), _log_softmax(b)
    kl = (np.exp(p) * (p - q)).sum()
    return difference.max(), difference.mean(), a.var(), a.argmax() == b.argmax(), kl


def _log_softmax(x: Array) -> Array:
    x = x - x.max()
    out: Array = x - np.log(np.exp(x).sum())
    return out

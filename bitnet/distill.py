"""Distillation: a student learns from the text and from the probabilities that a trained teacher gives.

    loss = (1 - share) * cross entropy + share * T^2 * KL(softmax(t / T) || softmax(s / T))

with s, t the logits of student and teacher, both terms means over the tokens, and T the temperature; T^2 keeps the
size of the second gradient, which is known in closed form, share * T * (softmax(s / T) - softmax(t / T)) / tokens for
each logit. So no logarithm is taken: what is differentiated is the sum of logits times that difference, held constant.
Its value means nothing; what is reported is the cross entropy, comparable with that of any other run.
The teacher's work is not counted in mfu.

Source: Hinton et al. 2015, arXiv 1503.02531; of full-precision into ternary models: Wu et al. 2025, arXiv 2510.13998.
"""

from __future__ import annotations

import hashlib

import numpy as np

from bitnet import _core, ops
from bitnet._core import Tensor
from bitnet.config import BitNetConfig
from bitnet.errors import ConfigError
from bitnet.model import BitNetForCausalLM
from bitnet.pretrained import from_pretrained
from bitnet.tokenizer import Tokenizer

SAME_TEXT = "The 2nd state: x = {'a': 1.5}\n\tgrößer"  # what two tokenizers have to cut alike


class Teacher:
    """A trained model whose probabilities are learned from: a run, checkpoint or file that from_pretrained opens.

    Raises ConfigError if it has other tokens than the student or fewer positions than seq_len.
    """

    def __init__(self, path: str, config: BitNetConfig, tokenizer: Tokenizer, seq_len: int) -> None:
        self.model = from_pretrained(path)
        own, other = self.model.config, getattr(self.model, "tokenizer", None)
        if own.vocab_size != config.vocab_size:
            raise ConfigError(f"teacher {path} has a vocabulary of {own.vocab_size} ids, not {config.vocab_size}")
        if other is not None and other.encode(SAME_TEXT) != tokenizer.encode(SAME_TEXT):
            raise ConfigError(f"teacher {path} cuts text into other tokens: train it on the same packed text")
        if own.max_position_embeddings < seq_len:
            raise ConfigError(f"teacher {path} has {own.max_position_embeddings} positions, seq_len is {seq_len}")

    def fingerprint(self) -> str:
        """Changes when the teacher does: a hash of its logits for a few tokens, the same bits on every machine."""
        shape = self.model.config
        tokens = np.arange(min(8, shape.max_position_embeddings), dtype=np.int32) % shape.vocab_size
        with ops.no_grad():
            logits = self.model(tokens[None])
        return hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]


def distilled(
    student: BitNetForCausalLM,
    teacher: BitNetForCausalLM,
    tokens: Tensor,
    targets: Tensor,
    share: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(what to differentiate, cross entropy), scalars, for tokens and targets (B, T).

    The logits of both models exist as a whole, B * T * V floats each, unlike those of a plain loss.
    """
    cool = 1.0 / temperature
    with ops.no_grad():
        wanted = ops.softmax(_core.scale(teacher(tokens), cool))
    hidden = student.head_input(tokens)
    loss = ops.cross_entropy(hidden, student.head_weight, targets, student.config.quantize_head)
    logits = student.logits(hidden)
    with ops.no_grad():
        excess = _core.add(ops.softmax(_core.scale(logits.detach(), cool)), wanted, 1.0, -1.0)
    pull = ops.sum(ops.mul(logits, excess))
    return _core.add(loss, pull, 1.0 - share, share * temperature / tokens.size), loss

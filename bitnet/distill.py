"""Distillation: a student learns from the text and from the probabilities that a trained teacher gives.

    loss = (1 - share) * cross entropy + share * T^2 * KL(softmax(t / T) || softmax(s / T))

with s, t the logits of student and teacher, both terms means over the targets, and T the temperature; T^2 keeps the
size of the second gradient, which is known in closed form, share * T * (softmax(s / T) - softmax(t / T)) / targets for
each logit. So no logarithm is taken: what is differentiated is the sum of logits times that difference, held constant.
Its value means nothing; what is reported is the cross entropy, comparable with that of any other run. A term of
attention, weight * that of bitnet/attention_distill.py, may stand beside these two.
The teacher's work is not counted in mfu.

Source: Hinton et al. 2015, arXiv 1503.02531; of full-precision into ternary models: Wu et al. 2025, arXiv 2510.13998.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext

import numpy as np

from bitnet import _core, ops
from bitnet._core import Tensor
from bitnet.attention_distill import AttentionDistillation
from bitnet.config import BitNetConfig
from bitnet.errors import ConfigError, DataError
from bitnet.model import BitNetForCausalLM
from bitnet.pretrained import from_pretrained
from bitnet.target_mask import TargetMask
from bitnet.tokenizer import Tokenizer

SAME_TEXT = "The 2nd state: x = {'a': 1.5}\n\tgrößer"  # what two tokenizers have to cut alike


class Teacher:
    """A trained model whose probabilities are learned from: a run, checkpoint or file that from_pretrained opens.

    Raises ConfigError if it has other tokens than the student or fewer positions than seq_len.
    """

    def __init__(self, path: str, config: BitNetConfig, tokenizer: Tokenizer, seq_len: int) -> None:
        self.model = from_pretrained(path)
        own, other = self.model.config, getattr(self.model, "tokenizer", None)
        check_teacher(path, own, config, seq_len)
        if other is not None and not cut_alike(other, tokenizer):
            raise ConfigError(f"teacher {path} cuts text into other tokens: train it on the same packed text")

    def fingerprint(self) -> str:
        """Changes when the teacher does: a hash of its logits for a few tokens, the same bits on every machine."""
        shape = self.model.config
        tokens = np.arange(min(8, shape.max_position_embeddings), dtype=np.int32) % shape.vocab_size
        with ops.no_grad():
            logits = self.model(tokens[None])
        return hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]


def check_teacher(path: str, own: BitNetConfig, config: BitNetConfig, seq_len: int) -> None:
    """Raises ConfigError for a teacher whose shape does not fit that of the student, config."""
    if own.vocab_size != config.vocab_size:
        raise ConfigError(f"teacher {path} has a vocabulary of {own.vocab_size} ids, not {config.vocab_size}")
    if own.max_position_embeddings < seq_len:
        raise ConfigError(f"teacher {path} has {own.max_position_embeddings} positions, seq_len is {seq_len}")


def cut_alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers are the same, or cut SAME_TEXT into the same ids: one of other origin may be the same."""
    if one.fingerprint() == other.fingerprint():
        return True
    try:
        return one.encode(SAME_TEXT) == other.encode(SAME_TEXT)
    except DataError:  # one of characters alone, that are not those of the sentence
        return False


class Distillation:
    """The loss of the file's head for one shape of batch, made of ops that a tape can replay.

    attention, attention_weight: the third term, and what multiplies it.
    Targets of -100 take no part in any term. The logits of both models exist as a whole, B * T * V floats each,
    unlike those of a plain loss.
    """

    def __init__(
        self,
        student: BitNetForCausalLM,
        teacher: BitNetForCausalLM,
        batch_size: int,
        seq_len: int,
        share: float,
        temperature: float,
        attention: AttentionDistillation | None = None,
        attention_weight: float = 1.0,
    ) -> None:
        self.attention, self.attention_weight = attention, attention_weight
        self.student, self.teacher, self.share, self.temperature = student, teacher, share, temperature
        teacher.activation_checkpointing = True  # no backward pass will read its results
        self.mask = TargetMask(batch_size, seq_len)  # to be set before each pass or replay

    def __call__(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(what to differentiate, cross entropy), scalars, for tokens and targets (B, T)."""
        with nullcontext() if self.attention is None else self.attention.watching():
            objective, loss = self._probabilities(tokens, targets)
            if self.attention is not None:
                objective = _core.add(objective, self.attention.term(self.mask), 1.0, self.attention_weight)
        return objective, loss

    def _probabilities(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The same without the term of attention."""
        student, cool = self.student, 1.0 / self.temperature
        with ops.no_grad():
            wanted = ops.softmax(_core.scale(self.teacher(tokens), cool))
        hidden = student.head_input(tokens)
        loss = ops.cross_entropy(hidden, student.head_weight, targets, student.config.quantize_head)
        # A row of zeros before the head: no gradient reaches the head's weight from it, nor what made it.
        logits = student.logits(ops.mul(hidden, self.mask.wide(hidden.shape[-1])))
        with ops.no_grad():
            excess = _core.add(ops.softmax(_core.scale(logits.detach(), cool)), wanted, 1.0, -1.0)
        pull = ops.mul(ops.sum(ops.mul(logits, excess)), self.mask.each)
        return _core.add(loss, pull, 1.0 - self.share, self.share * self.temperature), loss

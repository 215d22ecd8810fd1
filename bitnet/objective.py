"""What a training step differentiates: the loss of the text, and of a teacher beside it, recorded for replay."""

from __future__ import annotations

from bitnet._core import Tensor
from bitnet.attention_distill import AttentionDistillation
from bitnet.distill import Distillation
from bitnet.model import BitNetForCausalLM
from bitnet.ramp import blended
from bitnet.recorded_loss import RecordedLoss
from bitnet.trainer_config import TrainerConfig


def training_loss(
    model: BitNetForCausalLM, teacher: BitNetForCausalLM | None, config: TrainerConfig, share: float = 1.0
) -> RecordedLoss:
    """The loss of the text, and of the teacher if there is one, of layers that are ternary by this share (ramp.py).

    ConfigError for a teacher whose attention states the student's heads cannot cut.
    """
    c, taught = config, None
    shape = c.batch_size, c.seq_len
    if teacher is not None:
        attention = AttentionDistillation(model, teacher, c.distill_layer) if c.distill_attention else None
        taught = Distillation(model, teacher, *shape, c.distill, c.temperature, attention, c.distill_attention)

    def objective(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with blended(model, share):
            if taught is not None:
                return taught(tokens, targets)
            loss = model(tokens, targets)
            return loss, loss

    prepare = None if taught is None else taught.mask.set
    return RecordedLoss(*shape, c.precision, objective, prepare)

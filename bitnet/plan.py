"""What training and generation take in memory, known before anything is made.

The model, its optimizer and one step are run on the device "meta", where tensors have sizes and no values
(bitnet.ops.device): the very code of a run, in milliseconds, whose memory is counted block by block as the CPU's is.

    from bitnet.plan import training_plan
    training_plan(BitNetConfig.preset("700m"), TrainerConfig(batch_size=4, seq_len=2048)).total

What a process takes beside its tensors is process_bytes().
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from bitnet import _core, nn, ops
from bitnet.config import BitNetConfig
from bitnet.decoder import PREFILL, Decoder
from bitnet.ema import WeightAverage
from bitnet.model import BitNetForCausalLM, Factory
from bitnet.objective import training_loss
from bitnet.ramp import ternary_share
from bitnet.requantize import HeldCodes
from bitnet.trainer import check_readable
from bitnet.trainer_config import OPTIMIZERS, TrainerConfig

META = "meta"
LIBRARIES = 100_000_000  # Python with NumPy and what a command imports: 40 MB were measured, 110 MB with pictures
SCRATCH = 2 << 20  # of each thread: BN_SCRATCH_BYTES of csrc/base/parallel.h
_one_at_a_time = threading.Lock()  # what is counted is the device's, of all threads


@dataclass(frozen=True)
class Plan:
    """Bytes of tensors by what they are for, in the order in which they are taken."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """What is held in the end, for reuse too: the most, since nothing of it is given back on the way."""
        return sum(self.parts.values())


def process_bytes() -> int:
    """What a process takes beside its tensors, with the present number of threads."""
    return LIBRARIES + SCRATCH * _core.get_threads()


class _Meter:
    """What has come to be in use, from one stage to the next."""

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self._before = _core.memory_stats(META)["in_use"]

    @property
    def in_use(self) -> int:
        """Bytes that tensors take, of those that were made since."""
        return _core.memory_stats(META)["in_use"] - self._before

    def take(self, name: str, of_these: int | None = None) -> None:
        """Names what was taken since the last call; of_these: so many bytes of it, the rest is for the next name."""
        grown = self.in_use - sum(self.parts.values())
        taken = grown if of_these is None else min(of_these, grown)
        if taken:
            self.parts[name] = self.parts.get(name, 0) + taken

    def rest(self, name: str) -> None:
        """Names what is held beside: taken for a while, and kept for reuse."""
        self.parts[name] = self.in_use + _core.memory_stats(META)["cached"] - sum(self.parts.values())


@contextmanager
def _metered() -> Iterator[_Meter]:
    with _one_at_a_time, ops.device(META):
        _core.memory_trim(META)
        yield _Meter()


def training_plan(model: BitNetConfig, trainer: TrainerConfig, teacher: BitNetConfig | None = None) -> Plan:
    """Of a run that trains all weights of a model of this shape, to its end: of its steps and evaluations.

    teacher: the shape of the one that trainer names. Samples, which come after an evaluation, are not in it. Raises
    ConfigError for sequences that the model cannot read.
    """
    check_readable(model, trainer.seq_len)
    with _metered() as meter:
        weights = _train(meter, model, trainer, teacher)
    parts = meter.parts
    if trainer.background_save:
        parts["copy that is written meanwhile"] = weights * (12 + 4 * bool(trainer.ema))
    return Plan(parts)


def _train(meter: _Meter, shape: BitNetConfig, c: TrainerConfig, teacher_shape: BitNetConfig | None) -> int:
    """What Trainer makes, in its order, two steps and an evaluation; returns the number of weights."""
    model = BitNetForCausalLM(shape)
    model.activation_checkpointing = c.activation_checkpointing
    meter.take("weights")
    optimizer = OPTIMIZERS[c.optimizer](model, moments=c.moments)
    meter.take("gradients", sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
    meter.take("moments")
    average = WeightAverage(model, c.ema) if c.ema else None
    meter.take("averaged weights")
    codes = HeldCodes(model, c.requantize_every)
    teacher = None if teacher_shape is None else BitNetForCausalLM(teacher_shape)
    meter.take("teacher")
    for one in filter(None, (model, teacher)):
        one.ternary_stats()  # makes the codes
    meter.take("ternary codes")
    batch = (np.zeros((c.batch_size, c.seq_len), np.int32),) * 2
    first, last = c.ternary_from, c.ternary_from + c.ternary_ramp
    for share in dict.fromkeys(ternary_share(step, first, c.ternary_ramp) for step in (0, first, last)):
        loss = training_loss(model, teacher, c, share)
        for _ in range(2):
            with codes.in_force(0):
                loss(*batch)
                loss.loss.backward()
            optimizer.clip_grad_norm(c.clip)
            optimizer.step()
            if average is not None:
                average.update(0)
            model.ternary_stats()
    meter.take(f"activations of {c.batch_size} x {c.seq_len} tokens")
    for one in filter(None, (model, None if average is None else average.model)):
        with ops.no_grad():
            one(*batch)
    meter.rest("for a while in each step")
    return model.num_parameters()


class PackedFactory(Factory):
    """Ternary layers as they are packed, of no values."""

    def __init__(self, config: BitNetConfig, seed: int, layout: str) -> None:
        super().__init__(config, seed)
        self.layout = layout

    def projection(self, name: str, in_features: int, out_features: int) -> nn.Linear:
        if self.config.linear == "linear":
            return super().projection(name, in_features, out_features)
        codes = ops.zeros((out_features, in_features), "i8")
        if self.config.weight_scales == "channel":
            weight = _core.prepare_ternary(codes, ops.zeros((out_features,)), self.layout)
        else:
            weight = _core.prepare_ternary(codes, 1.0, self.layout)
        return nn.BitLinear(in_features, out_features, weight=weight, activation_bits=self.config.activation_bits)


def generation_plan(
    model: BitNetConfig, context: int, batch: int = 1, layout: str = "2", head: str | None = None, cache: str = "f32"
) -> Plan:
    """Of `batch` sequences of `context` tokens each, by a packed model: layout "2" or "1.6", head and cache as in
    `bitnet generate`. Raises ConfigError for more tokens than the model can read.
    """
    with _metered() as meter:
        _generate(meter, model, context, batch, layout, head, cache)
    return Plan(meter.parts)


def _generate(
    meter: _Meter, shape: BitNetConfig, context: int, batch: int, layout: str, head: str | None, cache: str
) -> None:
    model = BitNetForCausalLM(shape, factory=partial(PackedFactory, layout=layout))
    others = sum(p.nbytes for p in model.parameters()) + model.model.rope.cos.nbytes + model.model.rope.sin.nbytes
    meter.take("ternary weights", meter.in_use - others)
    model.pack(layout, head)
    meter.take("embedding, head and norms")
    decoder = Decoder(model, batch, context, cache)
    meter.take(f"keys and values of {batch} x {context} tokens")
    decoder.prefill([[0] * min(context, 2 * PREFILL)] * batch)
    if context > 2 * PREFILL:
        decoder.step([0] * batch)
    meter.take("a step")
    meter.rest("for a while in each pass")

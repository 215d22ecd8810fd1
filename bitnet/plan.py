"""What training and generation take in memory, known before anything is made.

The model, its optimizer and one step are run on the device "meta", where tensors have sizes and no values
(bitnet.ops.device): the very code of a run, in milliseconds, whose memory is counted block by block as the CPU's is.

    from bitnet.plan import training_plan
    training_plan(BitNetConfig.preset("700m"), TrainerConfig(batch_size=4, seq_len=2048)).total

What a process takes beside its tensors is process_bytes().
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from bitnet import _core, nn, ops
from bitnet._core import Tensor
from bitnet.config import BitNetConfig
from bitnet.decoder import PREFILL, Decoder
from bitnet.distill import check_teacher
from bitnet.ema import WeightAverage
from bitnet.head import Head
from bitnet.lora import LoraConfig, place
from bitnet.model import BitNetForCausalLM, Factory
from bitnet.objective import training_loss
from bitnet.ramp import ternary_share
from bitnet.requantize import HeldCodes
from bitnet.trainer import check_levers, check_readable
from bitnet.trainer_config import OPTIMIZERS, TrainerConfig

T = TypeVar("T")

META = "meta"
LIBRARIES = 100_000_000  # Python with NumPy and what a command imports: 40 MB were measured, 110 MB with pictures
SCRATCH = 2 << 20  # of each thread: BN_SCRATCH_BYTES of csrc/base/parallel.h
_one_at_a_time = threading.Lock()  # what is counted is the device's, of all threads


@dataclass(frozen=True)
class Plan:
    """Bytes of tensors by what they are for, in the order in which they are taken.

    opening: the most while a model that is there is opened, before the parts are what they are; 0 where nothing is.
    """

    parts: dict[str, int]
    opening: int = 0

    @property
    def total(self) -> int:
        """What is held in the end, for reuse too: the most, since nothing of it is given back on the way."""
        return sum(self.parts.values())

    @property
    def most(self) -> int:
        """What is held at any time."""
        return max(self.total, self.opening)


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


def _metered(work: Callable[[_Meter], T]) -> T:
    """work on meta, on a thread of its own: what the caller's records, or does not, has no part in it."""

    def alone() -> T:
        with ops.device(META):
            _core.memory_trim(META)
            return work(_Meter())

    with _one_at_a_time, ThreadPoolExecutor(1) as thread:
        return thread.submit(alone).result()


def training_plan(
    model: BitNetConfig,
    trainer: TrainerConfig,
    teacher: BitNetConfig | None = None,
    lora: LoraConfig | None = None,
) -> Plan:
    """Of a run that trains a model of this shape, to its end: of its steps and evaluations.

    teacher: the shape of the one that trainer names. lora: the adapters that are trained instead of all weights.
    Samples and pictures, which come after an evaluation, are not in it. Raises ConfigError for what a Trainer refuses:
    sequences that the model cannot read, a teacher or levers that do not fit it.
    """
    check_readable(model, trainer.seq_len)
    if teacher is not None:
        check_teacher(str(trainer.teacher), teacher, model, trainer.seq_len)
    return _metered(lambda meter: _train(meter, model, trainer, teacher, lora))


def _train(
    meter: _Meter, shape: BitNetConfig, c: TrainerConfig, teacher_shape: BitNetConfig | None, lora: LoraConfig | None
) -> Plan:
    """What Trainer makes, in its order, two steps and an evaluation."""
    model = BitNetForCausalLM(shape)
    if lora is not None:
        place(model, lora)
    check_levers(model, c)
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
    first, last = c.ternary_from, c.ternary_from + c.ternary_ramp
    for share in dict.fromkeys(ternary_share(step, first, c.ternary_ramp) for step in (0, first, last)):
        loss = training_loss(model, teacher, c, share)
        for _ in range(2):
            with codes.in_force(0):
                loss.again()
                loss.loss.backward()
            optimizer.clip_grad_norm(c.clip)
            optimizer.step()
            if average is not None:
                average.update(0)
            model.ternary_stats()
    meter.take(f"activations of {c.batch_size} x {c.seq_len} tokens")
    for one in filter(None, (model, None if average is None else average.model)):
        with ops.no_grad():
            tokens, targets = (ops.zeros((c.batch_size, c.seq_len), "i32") for _ in range(2))
            one(tokens, targets)
            del tokens, targets
    meter.rest("for a while in each step")
    if c.background_save:
        meter.parts["copy that is written meanwhile"] = model.num_parameters() * (12 + 4 * bool(c.ema))
    return Plan(meter.parts)


def packed_weight(config: BitNetConfig, out_features: int, in_features: int, layout: str) -> Tensor:
    """A ternary matrix as it is packed, of no values."""
    codes = ops.zeros((out_features, in_features), "i8")
    scale = ops.zeros((out_features,)) if config.weight_scales == "channel" else 1.0
    return _core.prepare_ternary(codes, scale, layout)


class PackedFactory(Factory):
    """Ternary layers as they are packed, of no values."""

    def __init__(self, config: BitNetConfig, seed: int, layout: str = "2") -> None:
        super().__init__(config, seed)
        self.layout = layout

    def projection(self, name: str, in_features: int, out_features: int) -> nn.Linear:
        """A ternary layer, packed, or a plain one in the twin."""
        c = self.config
        if c.linear == "linear":
            return super().projection(name, in_features, out_features)
        weight = packed_weight(c, out_features, in_features, self.layout)
        return nn.BitLinear(in_features, out_features, weight=weight, activation_bits=c.activation_bits)


def generation_plan(
    model: BitNetConfig, context: int, batch: int = 1, layout: str = "2", head: str | None = None, cache: str = "f32",
    is_latent: bool = False,
) -> Plan:  # fmt: skip
    """Of `batch` sequences of `context` tokens each, by a packed model: layout "2" or "1.6", head and cache as in
    `bitnet generate`. is_latent: it is opened as f32, and packed then (pretrained.Outline).

    Raises ConfigError for more tokens than the model can read.
    """

    def work(meter: _Meter) -> Plan:
        opening = _opened_and_packed(meter, model, layout, head) if is_latent else 0
        _core.memory_trim(META)
        _generate(meter, model, context, batch, layout, head, cache)
        return Plan(meter.parts, opening)

    return _metered(work)


def _opened_and_packed(meter: _Meter, shape: BitNetConfig, layout: str, head: str | None) -> int:
    """The most that this takes: memory that a latent weight leaves is kept until the last layer is packed."""
    model = BitNetForCausalLM(shape)
    for _, layer in model.bitlinears():
        _packed(layer, shape, layout)
    form = None if shape.quantize_head else Head(model.head_weight, head or "f32")
    most = meter.in_use + _core.memory_stats(META)["cached"]
    del form  # not before
    return most


def _packed(layer: nn.BitLinear, shape: BitNetConfig, layout: str) -> None:
    """BitLinear.pack without values."""
    if not layer.is_packed:
        layer.codes()
        layer.weight = packed_weight(shape, layer.out_features, layer.in_features, layout)


def _generate(
    meter: _Meter, shape: BitNetConfig, context: int, batch: int, layout: str, head: str | None, cache: str
) -> None:
    model = BitNetForCausalLM(shape, factory=partial(PackedFactory, layout=layout))
    for _, layer in model.bitlinears():  # a head that is one
        _packed(layer, shape, layout)
    _core.memory_trim(META)
    if model.num_ternary():
        others = sum(p.nbytes for p in model.parameters()) + model.model.rope.cos.nbytes + model.model.rope.sin.nbytes
        meter.take("ternary weights", meter.in_use - others)
    model.pack(layout, head)
    meter.take("embedding, head and norms" if model.num_ternary() else "weights")
    decoder = Decoder(model, batch, context, cache)
    meter.take(f"keys and values of {batch} x {context} tokens")
    decoder.prefill([[0] * min(context, 2 * PREFILL)] * batch)
    if context > 2 * PREFILL:
        decoder.step([0] * batch)
    meter.take("a step")
    meter.rest("for a while in each pass")

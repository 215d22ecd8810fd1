"""How to train: every option of a run with its default, its help line and what may not be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from bitnet import mfu, optim
from bitnet.errors import ConfigError
from bitnet.muon import Muon
from bitnet.option import option

DEFAULT_STEPS = 1000
OPTIMIZERS: dict[str, type[optim.AdamW] | type[Muon]] = {"adamw": optim.AdamW, "muon": Muon}


@dataclass(frozen=True)
class TrainerConfig:
    """How to train. None means: derived from the other options, once, when the run begins."""

    steps: int | None = option(None, f"optimizer steps ({DEFAULT_STEPS}; with minutes: as many as fit)", True)
    minutes: float | None = option(None, "stop after this long", True)
    batch_size: int = option(8, "sequences in a micro-batch")
    grad_accum: int = option(1, "micro-batches in a step")
    seq_len: int = option(256, "tokens in a sequence")
    order: str = option("shuffled", "shuffled: every window once an epoch; random: windows start anywhere")
    documents: str = option("joined", "joined: windows run across documents; separate: none does, the rest is padding")
    seed: int = option(0, "of initial weights, batches and samples")
    lr: float = option(2e-3, "peak learning rate", True)
    min_lr: float | None = option(None, "final rate (lr / 10); two-stage: second peak (lr * 2/3)", True)
    warmup: int | None = option(None, "steps of linear warm-up (a tenth, at most 100)", True)
    schedule: str = option(
        "cosine", "cosine; two-stage: linear decay, second half lower, without weight decay; wsd", True
    )
    decay_share: float = option(0.2, "wsd (warm-up, stable, decay): the share of all steps in its linear decay", True)
    weight_decay: float = option(0.1, "of matrices", True)
    ema: float = option(0.0, "decay of averaged weights, such as 0.999, evaluated and saved too; 0: none")
    ternary_from: int = option(0, "step from which layers are ternary; before, full precision on the same weights")
    ternary_ramp: int = option(0, "steps over which they become so, from ternary_from on; evaluations always are")
    requantize_every: int = option(1, "steps that multiply the same ternary codes, until they are made anew")
    teacher: str | None = option(None, "run, such as a --twin, whose probabilities are learned from beside the text")
    distill: float = option(0.5, "with a teacher: the share of its probabilities in the loss")
    temperature: float = option(1.0, "with a teacher: what both models' logits are divided by")
    distill_attention: float = option(0.0, "with a teacher: weight of how attention states relate, such as 1; 0: none")
    distill_layer: int | None = option(None, "whose attention states these are, from 0; the teacher's as deep (last)")
    clip: float = option(1.0, "largest gradient norm; 0: any", True)
    precision: str = option("fast", "of the backward pass: fast (bf16), int8 (dx in integers, dW bf16) or fp32 (exact)")
    optimizer: str = option("adamw", "adamw, or muon for the matrices of the layers (AdamW for all others; same lr)")
    moments: str = option("f32", "AdamW's moments: f32, or bf16 rounded at random: 4 bytes a parameter less")
    activation_checkpointing: bool = option(
        False, "keep only each block's input and make the rest again: less memory, up to a third more time", True
    )
    eval_every: int | None = option(None, "steps between evaluations (a tenth of all)", True)
    eval_blocks: int = option(0, "most held-out sequences in an evaluation; 0: all", True)
    save_every: int | None = option(None, "steps between checkpoints (a tenth of all)", True)
    keep: int = option(3, "newest checkpoints kept, beside the best", True)
    sample_prompt: str | None = option(None, "what samples begin with (the first held-out words)", True)
    sample_tokens: int = option(64, "length of a sample; 0: no samples", True)
    plots: bool = option(True, "draw pictures at the end, and now and then before", True)
    layer_stats: int | None = option(None, "steps between lines of layers.jsonl (a tenth of all); 0: none", True)
    spike: float = option(10.0, "roll back at a loss so many mean deviations above the mean of late; 0: never", True)
    rollbacks: int = option(5, "most rollbacks; then a loss that is no number is an error", True)
    rollback_lr: float = option(0.5, "times the learning rate after a rollback, rising back to it", True)
    patience: int = option(0, "stop after so many evaluations in a row without a lower loss; 0: never", True)
    background_save: bool = option(
        False, "write checkpoints while training goes on: 12 bytes a parameter more memory meanwhile, 16 with ema", True
    )
    tensorboard: bool = option(False, "write RUN/tensorboard (pip install 'bitnet[tensorboard]')", True)
    wandb: str | None = option(None, "project for Weights & Biases, offline unless WANDB_MODE says otherwise", True)
    compare: str | None = option(None, "another run (a twin), drawn beside this one; the gap to it is told", True)

    def __post_init__(self) -> None:
        ones = dict.fromkeys(
            "batch_size grad_accum seq_len keep steps eval_every save_every requantize_every".split(), 1
        )
        zeros = dict.fromkeys("warmup eval_blocks sample_tokens weight_decay clip min_lr seed".split(), 0)
        zeros |= dict.fromkeys("ternary_from ternary_ramp layer_stats spike rollbacks patience".split(), 0)
        for name, minimum in {**ones, **zeros}.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ConfigError(f"{name} must be at least {minimum}, not {value}")
        for name in ("lr", "minutes", "temperature"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} must be positive, not {value}")
        for name in ("rollback_lr", "decay_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, not {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be at least 0 and below 1, not {self.ema}")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill must be at least 0 and at most 1, not {self.distill}")
        if not 0 <= self.distill_attention < math.inf:
            raise ConfigError(f"distill_attention must be at least 0, not {self.distill_attention}")
        if self.distill_attention and self.teacher is None:
            raise ConfigError(f"distill_attention {self.distill_attention} needs a teacher, whose states these are")
        if self.distill_layer is not None and not self.distill_attention:
            raise ConfigError(f"distill_layer {self.distill_layer} needs distill_attention, the weight of its term")
        words = {
            "order": ("shuffled", "random"), "documents": ("joined", "separate"), "precision": mfu.PRECISIONS,
            "schedule": ("cosine", "two-stage", "wsd"), "moments": optim.MOMENTS, "optimizer": tuple(OPTIMIZERS),
        }  # fmt: skip
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    @property
    def tokens_per_step(self) -> int:
        return self.grad_accum * self.batch_size * self.seq_len

    def resolved(self, steps: int) -> TrainerConfig:
        """Every None that depends on the number of steps filled in."""
        tenth = max(1, steps // 10)
        derived: dict[str, Any] = {"steps": steps, "warmup": min(100, tenth), "eval_every": tenth, "save_every": tenth}
        derived["layer_stats"] = tenth
        derived["min_lr"] = self.lr * (2 / 3 if self.schedule == "two-stage" else 0.1)
        return replace(self, **{name: value for name, value in derived.items() if getattr(self, name) is None})

    def rates(self, step: int) -> tuple[float, float]:
        """(learning rate, weight decay) of a step counted from 0, of a resolved config."""
        assert self.steps is not None
        assert self.min_lr is not None
        assert self.warmup is not None
        if self.schedule == "wsd":
            share = self.decay_share
            return optim.stable_decay(step, self.steps, self.lr, self.min_lr, self.warmup, share), self.weight_decay
        if self.schedule == "cosine":
            return optim.warmup_cosine(step, self.steps, self.lr, self.min_lr, self.warmup), self.weight_decay
        return optim.two_stage(step, self.steps, self.lr, self.min_lr, self.warmup, self.weight_decay)

"""Ternary layers that begin as full-precision ones: how ternary they are at each step.

    y = (1 - share) * x W^T + share * bitlinear(x, W)

on the same latent weights W: share is 0 before step `first`, then rises by equal stages (at most STAGES of them, since
each is recorded on a tape of its own) over `ramp` steps, and stays 1. Only the training loss is made so. Evaluations,
samples and checkpoints are always of the ternary model, which is the one that is wanted in the end: a validation loss
before the ramp is that of the weights rounded as they are, and comes down with it. A ternary head is not part of this.

Source: Nielsen et al. 2025, arXiv 2502.11895 (from 16 to 1.58 bits within pretraining, at once or phased in).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bitnet.model import BitNetForCausalLM

STAGES = 16


def ternary_share(step: int, first: int, ramp: int) -> float:
    """How ternary the layers are in a step, counted from 0: in stages, and 1 from step first + ramp - 1 on."""
    if step < first:
        return 0.0
    stages = min(STAGES, ramp)
    done = step - first + 1
    return 1.0 if done >= ramp else (-(-done * stages // ramp)) / stages


@contextmanager
def blended(model: BitNetForCausalLM, share: float) -> Iterator[None]:
    """Inside, the blocks' ternary layers compute with this share: what is recorded here keeps it."""
    layers = [layer for _, layer in model.model.bitlinears()]
    try:
        for layer in layers:
            layer.ternary_share = share
        yield
    finally:
        for layer in layers:
            layer.ternary_share = 1.0

"""A full-precision LLaMA made ternary, to be trained further: the same matrices as latent weights, and norms between.

Every projection becomes a BitLinear with the matrix that it had. Before o_proj and down_proj stand RMSNorms, the
sub-norms, inserted where there were none. A new norm with gain 1 would give every row the size 1; its gain, one number
for all channels, is instead the mean over rows of the size that they have without it,

    gain = mean over rows of sqrt(mean over channels of x^2 + eps)

which is the number g with the least sum of |g x / size(x) - x|^2 / C, that is, which changes what o_proj and down_proj
read the least. The rows are those of the first batch of the training text whose targets take part in the loss; they
are measured in the full-precision model as it was, before any norm is in. Gains are trained on from there.

Sums are ours and in one order, so that the gains are the same bits on every machine.
Source: the norms: Wu et al. 2025, arXiv 2510.13998; the gain: least squares, as above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from bitnet import nn, ops
from bitnet._core import Tensor
from bitnet.config import BitNetConfig
from bitnet.errors import ConfigError
from bitnet.formats.source import GivenFactory
from bitnet.model import Attention, BitNetForCausalLM, FeedForward
from bitnet.rows import IGNORE

Array = np.ndarray[Any, Any]

ABOUT = ("tokenizer", "checkpoint", "provenance", "step", "trained_seq_len")  # what a model that was opened tells


def refuse_ternary(model: BitNetForCausalLM, where: str) -> None:
    """ConfigError if there is nothing to convert: convert is for full precision."""
    if model.config.linear != "linear":
        raise ConfigError(f"{where} is ternary already: convert is for a full-precision model; leave it away")


def ternary_shape(config: BitNetConfig) -> BitNetConfig:
    """Of the ternary form of a full-precision model of this shape."""
    return config.replace(linear="bitlinear", sub_norms=True)


def to_ternary(source: BitNetForCausalLM, tokens: Array, targets: Array) -> BitNetForCausalLM:
    """The ternary model of a full-precision one, whose matrices it takes over; calibrated on a batch (B, T).

    ConfigError for a model that is ternary already, and for a batch without targets where norms are to be inserted.
    """
    refuse_ternary(source, "the model")
    gains = {} if source.config.sub_norms else mean_sizes(source, tokens, targets)
    given = dict(source.named_parameters())
    factory = partial(GivenFactory, give=lambda name, rows, cols: given[name])
    model = BitNetForCausalLM(ternary_shape(source.config), factory=factory)
    for path, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            name = f"{path}.weight"
            old = given.get(name)
            module.weight.copy_(np.full(module.weight.shape, gains[path], np.float32) if old is None else old)
    vars(model).update({name: getattr(source, name) for name in ABOUT if hasattr(source, name)})
    return model


def mean_sizes(model: BitNetForCausalLM, tokens: Array, targets: Array) -> dict[str, float]:
    """Mean size of the rows that would enter each sub-norm, by its path, in a model that has none."""
    rows = targets.reshape(-1) != IGNORE
    if not rows.any():
        raise ConfigError(f"the first batch of {targets.size} targets has none that takes part: nothing to measure on")
    with _rulers(model) as rulers, ops.no_grad():
        model.head_input(tokens)
    return {path: math.fsum(ruler.sizes[rows].tolist()) / int(rows.sum()) for path, ruler in rulers.items()}


class _Ruler(nn.Module):
    """Stands where a norm would, and lets rows pass as they are: `sizes` has one number for each."""

    def __init__(self, eps: float) -> None:
        self.eps, self.sizes = np.float32(eps), np.zeros(0, np.float32)

    def forward(self, x: Tensor, quantized: bool = False) -> Tensor:
        """x (B, T, C), the same back."""
        width = x.shape[-1]
        means = ops.linear(ops.mul(x, x), ops.tensor(np.full((1, width), 1 / width, np.float32)))
        self.sizes = np.sqrt(means.numpy(copy=True).reshape(-1) + self.eps)
        return x


@contextmanager
def _rulers(model: BitNetForCausalLM) -> Iterator[dict[str, _Ruler]]:
    """Inside, a ruler stands at the place of every sub-norm; by path."""
    eps = model.config.rms_norm_eps
    names = {Attention: "attn_sub_norm", FeedForward: "ffn_sub_norm"}
    places = [(path, module, names[type(module)]) for path, module in model.named_modules() if type(module) in names]
    rulers = {f"{path}.{name}": _Ruler(eps) for path, _, name in places}
    try:
        for path, parent, name in places:
            setattr(parent, name, rulers[f"{path}.{name}"])
        yield rulers
    finally:
        for _, parent, name in places:
            setattr(parent, name, None)

"""Models and inputs on which two correct implementations must agree closely.

Quantization is a staircase: an activation within float32 rounding of a tie may land on either step, and one int8 step
moves every later logit (by up to 0.3 on logits of standard deviation 2). So exactness is tested where nothing is near
a tie: weights are nudged off the ternary threshold, and tokens are kept only if every activation they cause stays
`margin` away from a half-integer. 3e-4 is forty float32 ulps at 127, more than the rounding gathered on the way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .torch_bitnet import FakeQuantInput, TorchBitNet

MARGIN = 3e-4


def random_weights(model: TorchBitNet, rng: np.random.Generator, std: float) -> dict[str, np.ndarray]:
    """float32 weights by name: gains around one, matrices normal with no weight near half the mean magnitude."""
    weights = {}
    for name, p in model.named_parameters():
        gain = name.endswith("norm.weight")
        w = (rng.normal(1.0, 0.2, p.shape) if gain else rng.normal(0.0, std, p.shape)).astype(np.float32)
        if not gain:
            near = np.abs(np.abs(w) / np.abs(w).mean() - 0.5) < 1e-3
            w[near] *= np.float32(1.01)  # moves the mean by 1e-5 of itself: nothing else crosses
        weights[name] = w
    return weights


def load(model: TorchBitNet, weights: dict[str, np.ndarray]) -> TorchBitNet:
    """The same model in the dtype it already has, holding `weights`."""
    model.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()})
    return model


class TieDistance:
    """While open, records for each sequence and place the least distance of any quantized activation to a tie."""

    def __enter__(self) -> TieDistance:
        self.least: Tensor | None = None
        self.original = FakeQuantInput.forward
        FakeQuantInput.forward = staticmethod(self.measured)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        FakeQuantInput.forward = staticmethod(self.original)  # type: ignore[method-assign]

    def measured(self, ctx: Any, x: Tensor, most: float = 127.0) -> Tensor:
        scaled = x * (most / x.abs().amax(-1, keepdim=True).clamp(min=1e-5))
        distance = (scaled - scaled.floor() - 0.5).abs().amin(-1)
        self.least = distance if self.least is None else torch.minimum(self.least, distance)
        return self.original(ctx, x, most)


@torch.no_grad()
def tokens(model: TorchBitNet, vocab: int, length: int, rng: np.random.Generator, margin: float = MARGIN) -> np.ndarray:
    """A sequence (length,) built left to right from random tokens that keep their distance from every tie.

    `model` should be in float64. Attention is causal, so a token once accepted stays good.
    """
    chosen = np.zeros(0, np.int64)
    while len(chosen) < length:
        trial = rng.permutation(vocab)[:16]
        rows = np.concatenate([np.broadcast_to(chosen, (len(trial), len(chosen))), trial[:, None]], 1)
        with TieDistance() as ties:
            model(torch.from_numpy(rows))
        assert ties.least is not None, "the model quantizes no activation"
        good = trial[(ties.least[:, -1] > margin).numpy()]
        chosen = np.append(chosen, good[:1])
    return chosen

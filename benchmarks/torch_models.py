"""The PyTorch side of the training benchmark: the tests' independent BitNet, so that what is timed is what was checked.

It uses what PyTorch is fast at: fused scaled_dot_product_attention, F.cross_entropy, F.rms_norm, fused AdamW. Each
BitLinear quantizes input and weight with one autograd function, as transformers' online quantization does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from reference.torch_bitnet import TorchBitNet, adamw

Step = Callable[[np.ndarray, np.ndarray], float]


def build(config: Any, weights: dict[str, np.ndarray] | None = None) -> TorchBitNet:
    """A float32 model of this BitNetConfig, with the named weights if given."""
    model = TorchBitNet(config)
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()})
    return model


def training_step(model: TorchBitNet, lr: float, max_norm: float = 1.0, compiled: bool = False) -> Step:
    """One whole step, (tokens, targets) of shape (B, T) to loss: forward, backward, clip, AdamW.

    `compiled` runs the model through torch.compile, which needs a C++ compiler and takes a minute on first use.
    """
    optimizer = adamw(model, lr, fused=True)
    forward = torch.compile(model) if compiled else model
    parameters = list(model.parameters())

    def step(tokens: np.ndarray, targets: np.ndarray) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(torch.from_numpy(tokens).long(), torch.from_numpy(targets).long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        return float(loss.item())

    return step

"""Ternary codes that are made anew every few steps only, where the others train on older ones.

    codes, scale of step s = those of the latent weights before step s - s mod N      (--requantize-every N)

In between the latent weights move on by straight-through gradients taken at the held codes, so a code changes where N
steps agree that it should. Only training steps multiply held codes. Between two steps, and so for evaluations, samples,
callbacks and checkpoints, the model is the one of its present latent weights, which is what a checkpoint opens as.
An exchange costs nothing: a weight keeps both forms (csrc/tensor/held_weight.c). A checkpoint written between two
requantizations holds the codes too, five a byte, in held.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bitnet import _core, ops
from bitnet.checkpoint import Arrays
from bitnet.model import BitNetForCausalLM
from bitnet.nn import Parameter

SCALE = ".scale"  # of the name of a weight: that of its held codes


class HeldCodes:
    """The codes that the steps of a model in training multiply, made anew every `every` steps; 1: none are held."""

    def __init__(self, model: BitNetForCausalLM, every: int) -> None:
        self.every = every
        ternary = {id(layer.weight) for _, layer in model.bitlinears()}
        if model.config.quantize_head:
            ternary.add(id(model.head_weight))
        self._named = {name: weight for name, weight in model.named_parameters() if id(weight) in ternary}
        self._weights: list[Parameter] = list(self._named.values())

    @contextmanager
    def in_force(self, step: int) -> Iterator[None]:
        """Inside, the model multiplies the codes of a step, counted from 0."""
        if self.every == 1:
            yield
            return
        try:
            if self.is_fresh(step):
                _core.hold_ternary(self._weights)
            else:
                _core.use_held_ternary(self._weights, True)
            yield
        finally:
            _core.use_held_ternary(self._weights, False)

    def after(self, step: int) -> None:
        """To be called when a step is updated: lets go of codes whose last step it was."""
        if self.every > 1 and self.is_fresh(step + 1):
            _core.release_ternary(self._weights)

    def state(self, step: int) -> Arrays | None:
        """What the next step, number `step`, goes on with; None if it makes its codes itself."""
        if self.is_fresh(step):
            return None
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        with self.in_force(step):
            for name, weight in self._named.items():
                arrays[name] = _core.pack_fifths(_core.ternary_codes(weight))
                arrays[name + SCALE] = _core.ternary_scales(weight).numpy(copy=True)
        return arrays

    def load(self, arrays: Arrays | None) -> None:
        """Takes up what state() gave. KeyError for a weight that is not in it, ValueError for what are no codes."""
        if self.every == 1:
            return
        _core.release_ternary(self._weights)
        if arrays is None:
            return
        for name, weight in self._named.items():
            codes = _core.unpack_fifths(arrays[name], *weight.shape)
            _core.hold_ternary_codes(weight, codes, ops.tensor(arrays[name + SCALE]))
        _core.use_held_ternary(self._weights, False)

    def is_fresh(self, step: int) -> bool:
        """Whether a step makes its codes itself, of the present latent weights."""
        return step % self.every == 0

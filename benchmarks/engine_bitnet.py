"""bitnet as an engine of inference.py: packed layers, and an output head and a layout of codes that settings name."""

from __future__ import annotations

from typing import Any

import random_weights
import turns

from bitnet import BitNetConfig, BitNetForCausalLM, __version__, _core, current_isa, nn, set_threads
from bitnet.bench import step_bytes
from bitnet.decoding import Decoder
from bitnet.model import Factory


class SharedWeights(Factory):
    """The parts of the model that all engines run."""

    def matrix(self, name: str, rows: int, cols: int) -> nn.Parameter:
        return nn.Parameter(random_weights.matrix(name, rows, cols))

    def projection(self, name: str, in_features: int, out_features: int) -> nn.Linear:
        codes = _core.Tensor(random_weights.codes(name, out_features, in_features))
        weight = _core.prepare_ternary(codes, random_weights.scale(in_features))
        return nn.BitLinear(in_features, out_features, weight=weight)


class Bitnet:
    """settings: shape, capacity; pack: what BitNetForCausalLM.pack is told; float: without int8 activations."""

    def __init__(self, settings: dict[str, Any]) -> None:
        model = BitNetForCausalLM(BitNetConfig(**settings["shape"]), factory=SharedWeights)
        if settings.get("float"):
            model.to_full_precision()
        else:
            model.pack(**settings.get("pack", {}))
        self.decoder = Decoder(model, capacity=settings["capacity"])
        self.decoder.top = 1  # as greedy decoding has it; matters for a screened head alone
        self.about = f"bitnet {__version__}, {current_isa()}"
        self.weight_bytes = step_bytes(model, 1, 0)
        self.cache_bytes = step_bytes(model, 1, 1) - self.weight_bytes

    def set_threads(self, threads: int) -> None:
        set_threads(threads)

    def prefill(self, tokens: list[int]) -> turns.Logits:
        self.decoder.reset()
        return self.decoder.prefill([tokens])[0]

    def step(self, token: int) -> turns.Logits:
        return self.decoder.step([token])[0]


if __name__ == "__main__":
    turns.serve(Bitnet)

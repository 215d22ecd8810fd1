"""Small models for the tests of GGUF files: one for each flavour, with gains that differ."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet import BitNetConfig, BitNetForCausalLM, ops

SHAPE = BitNetConfig(96, 256, 512, 2, 4, 2, max_position_embeddings=128)
CONFIGS = {
    "llama.cpp": SHAPE.replace(tie_word_embeddings=True),
    "bitnet.cpp": SHAPE.replace(tie_word_embeddings=True, hidden_act="relu2", rope_theta=500000.0),
    "ik": SHAPE.replace(tie_word_embeddings=True, hidden_act="relu2"),
    "llama": SHAPE.replace(sub_norms=False),
}


def make_model(config: BitNetConfig, seed: int = 1) -> BitNetForCausalLM:
    """Random matrices, and random gains in the norms."""
    model = BitNetForCausalLM(config, seed)
    rng = np.random.default_rng(seed)
    for _, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.3 * rng.normal(size=parameter.shape).astype(np.float32))
    return model


def copy_of(model: BitNetForCausalLM) -> BitNetForCausalLM:
    """A model with the same weights, for what changes it."""
    other = BitNetForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    return other


def logits(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    """(T, V)."""
    with ops.no_grad():
        return model(np.array([tokens])).numpy()[0]

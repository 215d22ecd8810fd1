"""Logits of transformers' BitNetForCausalLM, quantizing online as the published 2B-4T does, against ours.

The model is 2B-4T in small: grouped heads, squared ReLU, sub-norms, tied embeddings, theta 500000.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the comparison runs transformers on PyTorch")
transformers = pytest.importorskip("transformers", minversion="5", reason="BitNet with online quantization needs it")

from reference import conditioning  # noqa: E402
from reference.hugging_face import assert_alike, assert_near, logits  # noqa: E402
from reference.torch_bitnet import TorchBitNet  # noqa: E402

import bitnet  # noqa: E402

SHAPE = {
    "vocab_size": 503,
    "hidden_size": 80,
    "intermediate_size": 216,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def hugging_face(weights: dict[str, np.ndarray], quantized: bool = True) -> Any:
    """transformers' model holding `weights`, in float32.

    The linear layers are replaced as its own loader replaces them; the loader itself wants one more package.
    """
    from transformers.integrations.bitnet import AutoBitLinear, replace_with_bitnet_linear

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**SHAPE, **special, rope_parameters=rope))
    if quantized:
        how = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
        replace_with_bitnet_linear(model, modules_to_not_convert=["lm_head"], quantization_config=how)
        layers = [m for m in model.modules() if isinstance(m, AutoBitLinear)]
        assert len(layers) == 7 * SHAPE["num_hidden_layers"]
        assert all(layer.online_quant for layer in layers)
    state = {name: torch.from_numpy(w.copy()) for name, w in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def setting() -> tuple[Any, dict[str, np.ndarray], np.ndarray, np.random.Generator]:
    """Ours, its weights, tokens (2, 24) off every tie, and a generator for more."""
    rope = {"rope_theta": 500000.0, "sub_norms": True, "linear": "bitlinear", "quantize_head": False}
    config = bitnet.BitNetConfig(**SHAPE, **rope, initializer_range=0.02)
    rng = np.random.default_rng(12)
    oracle = TorchBitNet(config).double()
    weights = conditioning.random_weights(oracle, rng, 0.25)
    conditioning.load(oracle, weights)
    tokens = np.stack([conditioning.tokens(oracle, 503, 24, rng) for _ in range(2)])
    ours = bitnet.BitNetForCausalLM(config, seed=0)
    ours.load_state_dict(weights)
    return ours, weights, tokens, rng


def test_conditioned_tokens_agree_closely(setting: Any) -> None:
    ours, weights, tokens, _ = setting
    want = logits(hugging_face(weights), tokens)
    assert_near(logits(ours, tokens), want)
    dense = logits(hugging_face(weights, quantized=False), tokens)
    assert np.abs(dense - want).max() > 0.5, "without the quantizers transformers computes something else"


def test_arbitrary_tokens_agree_statistically(setting: Any) -> None:
    ours, weights, _, rng = setting
    tokens = rng.integers(0, 503, (8, 48))
    assert_alike(logits(ours, tokens), logits(hugging_face(weights), tokens))

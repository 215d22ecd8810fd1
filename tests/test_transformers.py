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


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    # Its quantizers are under torch.compile, which would want a C++ compiler and half a minute.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(torch.from_numpy(tokens)).logits.numpy()


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
    got, want = ours(tokens.astype(np.int32)).numpy(), logits(hugging_face(weights), tokens)
    assert want.std() > 1
    assert np.abs(got - want).max() < 1e-4
    dense = logits(hugging_face(weights, quantized=False), tokens)
    assert np.abs(dense - want).max() > 0.5, "without the quantizers transformers computes something else"


def test_arbitrary_tokens_agree_statistically(setting: Any) -> None:
    """An int8 step that falls the other way moves its row by up to 0.12 standard deviations; most rows have none.

    So the typical row must agree to rounding (1e-6 was seen between two PyTorch programs) and the ranking must hold.
    """
    ours, weights, _, rng = setting
    tokens = rng.integers(0, 503, (8, 48))
    got, want = ours(tokens.astype(np.int32)).numpy(), logits(hugging_face(weights), tokens)
    worst = np.abs(got - want).max(-1) / want.std()  # (8, 48)
    assert np.median(worst) < 1e-4
    assert worst.max() < 0.5
    assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.97

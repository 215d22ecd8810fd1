"""transformers as the other side: small models for it and for us, checkpoints as it writes them, and its logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.bitnet import pack_weights

import bitnet
from bitnet import BitNetConfig

from . import conditioning
from .torch_bitnet import TorchBitNet

# Every output count is a multiple of 4, as transformers' packed layers want it.
SHAPE = BitNetConfig(503, 80, 216, 2, 5, 1, max_position_embeddings=64)
CONFIGS = {
    "2b-4t": SHAPE.replace(hidden_act="relu2", rope_theta=500000.0, tie_word_embeddings=True),
    "llama": SHAPE.replace(sub_norms=False, rms_norm_eps=1e-6),
    "inner norms": SHAPE.replace(sub_norms=False, use_rms_norm=True),
}
SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))


@dataclass(frozen=True)
class Case:
    """A config, weights for it off every tie, and tokens (1, T) that keep off them too."""

    config: BitNetConfig
    weights: dict[str, np.ndarray]
    tokens: np.ndarray

    def model(self) -> bitnet.BitNetForCausalLM:
        """Ours, with the weights as masters."""
        model = bitnet.BitNetForCausalLM(self.config)
        model.load_state_dict(self.weights)
        return model


def make_case(config: BitNetConfig) -> Case:
    rng = np.random.default_rng(12)
    oracle = TorchBitNet(config).double()
    weights = conditioning.random_weights(oracle, rng, 0.25)
    conditioning.load(oracle, weights)
    if config.linear == "linear":
        return Case(config, weights, rng.integers(0, config.vocab_size, (1, 24)))
    return Case(config, weights, conditioning.tokens(oracle, config.vocab_size, 24, rng)[None])


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Of ours (numpy) or of theirs, as f32 (B, T, V)."""
    if isinstance(model, bitnet.BitNetForCausalLM):
        with bitnet.no_grad():
            return model(tokens.astype(np.int32)).numpy(copy=True)
    # Its quantizers are under torch.compile, which would want a C++ compiler and half a minute.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def opened(folder: Path) -> Any:
    """transformers' model from a folder, which must hold all that it wants and nothing else."""
    with torch.compiler.set_stance("force_eager"):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def assert_near(got: np.ndarray, want: np.ndarray) -> None:
    """Two correct programs on conditioned tokens."""
    assert want.std() > 1
    assert np.abs(got - want).max() < 1e-4


def assert_alike(got: np.ndarray, want: np.ndarray) -> None:
    """Two correct programs on arbitrary tokens.

    An int8 step that falls the other way moves its row by up to 0.12 standard deviations; most rows have none. So the
    typical row must agree to rounding (1e-6 was seen between two PyTorch programs) and the ranking must hold.
    """
    worst = np.abs(got - want).max(-1) / want.std()  # (B, T)
    assert np.median(worst) < 1e-4
    assert worst.max() < 0.5
    assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.97


def their_config(config: BitNetConfig) -> Any:
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps",
             "tie_word_embeddings"]  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    kind = transformers.BitNetConfig if config.sub_norms else transformers.LlamaConfig
    return kind(**{name: getattr(config, name) for name in names}, **SPECIAL, rope_parameters=rope)


def save_dense(folder: Path, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The weights as transformers itself saves them, without a word about quantization."""
    kind = transformers.BitNetForCausalLM if case.config.sub_norms else transformers.LlamaForCausalLM
    model = kind(their_config(case.config))
    state = {name: torch.from_numpy(weight.copy()) for name, weight in case.weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if case.config.tie_word_embeddings else [], [])
    model.to(dtype).save_pretrained(folder)


def quantization(folder: Path, **fields: Any) -> None:
    """Puts a quantization_config into a folder's config.json."""
    change_config(folder, quantization_config={"quant_method": "bitnet", **fields})


def change_config(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))


def save_packed(folder: Path, case: Case, divides: bool, dtype: torch.dtype = torch.float32, **fields: Any) -> None:
    """A packed checkpoint, its codes packed by transformers' own function; scales that divide or multiply."""
    save_dense(folder, case, dtype)
    state = {}
    for name, weight in case.weights.items():
        tensor = torch.from_numpy(weight.copy())
        if "_proj." in name:
            scale = tensor.abs().mean()
            state[name] = pack_weights((tensor / scale).round().clamp(-1, 1)).contiguous()
            state[f"{name}_scale"] = (1 / scale if divides else scale).reshape(1).to(dtype)
        else:
            state[name] = tensor.to(dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    quantization(folder, **fields)

"""PyTorch as an engine of inference.py: transformers' BitNetForCausalLM in bf16.

Its layers are AutoBitLinear as for the published packed 2B-4T (offline): the codes are unpacked when the model is
loaded, activations are rounded to int8 and back, and the product is one of bf16. That rounding is compiled where there
is a C++ compiler, as its authors mean it.
"""

from __future__ import annotations

import shutil
from typing import Any

import random_weights
import torch
import transformers
import turns
from transformers.integrations.bitnet import replace_with_bitnet_linear

FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings"
).split()


class Torch:
    """settings: shape."""

    def __init__(self, settings: dict[str, Any]) -> None:
        shape = settings["shape"]
        self.model = build(shape)
        self.cache = transformers.DynamicCache()
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.weight_bytes = float(sum(p.numel() * p.element_size() for p in self.model.parameters()))
        head = shape["hidden_size"] // shape["num_attention_heads"]
        self.cache_bytes = shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * head * 2

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def prefill(self, tokens: list[int]) -> turns.Logits:
        self.cache = transformers.DynamicCache()
        return self._run(tokens)

    def step(self, token: int) -> turns.Logits:
        return self._run([token])

    def _run(self, tokens: list[int]) -> turns.Logits:
        stance = "default" if shutil.which("c++") else "force_eager"
        with torch.no_grad(), torch.compiler.set_stance(stance):
            out = self.model(torch.tensor([tokens]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().numpy()


def build(shape: dict[str, Any]) -> Any:
    """The shared model, never larger in memory than in bf16."""
    rope = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = transformers.BitNetConfig(**{name: shape[name] for name in FIELDS}, **special, rope_parameters=rope)
    with torch.device("meta"):
        model = transformers.BitNetForCausalLM(config).to(torch.bfloat16)
    how = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="offline")
    replace_with_bitnet_linear(model, modules_to_not_convert=["lm_head"], quantization_config=how)
    sizes = random_weights.sizes(shape)
    table = random_weights.matrix(random_weights.EMBEDDING, shape["vocab_size"], sizes["hidden"])
    state = {f"{random_weights.EMBEDDING}.weight": torch.from_numpy(table).bfloat16()}
    for layer in range(shape["num_hidden_layers"]):
        for name, (inputs, outputs) in random_weights.PROJECTIONS.items():
            path = f"model.layers.{layer}.{name}"
            codes = random_weights.codes(path, sizes[outputs], sizes[inputs])
            state[f"{path}.weight"] = torch.from_numpy(codes).bfloat16()
            state[f"{path}.weight_scale"] = torch.tensor([random_weights.scale(sizes[inputs])], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            state[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing != ["lm_head.weight"] or unexpected:
        raise RuntimeError(f"transformers' model lacks {unexpected} and wants {missing}")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables were never made
    return model.eval()


if __name__ == "__main__":
    turns.serve(Torch)

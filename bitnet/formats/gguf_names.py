"""What GGUF files call weights and settings, and the order in which the rows of q and k lie in a llama file."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
FROM_OUTSIDE = {theirs: ours for ours, theirs in OUTSIDE.items()}
FROM_INSIDE = {theirs: ours for ours, theirs in INSIDE.items()}
PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.weight")

# Architectures, and the activation of each where the file does not tell. Those of BitNet have sub-norms.
SUB_NORMED = {"bitnet": "silu", "bitnet-b1.58": "relu2", "bitnet-25": "relu2"}
ACTIVATIONS = {**SUB_NORMED, "llama": "silu"}
SPELLINGS = {"silu": "silu", "swish": "silu", "relu2": "relu2", "relu_sqr": "relu2", "relu_squared": "relu2"}


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a weight with this published name."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{INSIDE[rest.removesuffix('.weight')]}.weight"


def published_name(name: str) -> str:
    """The published name of a weight in a GGUF file; one that has none keeps its own."""
    found = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)\.weight", name)
    if found and found[2] in FROM_INSIDE:
        return f"model.layers.{found[1]}.{FROM_INSIDE[found[2]]}.weight"
    return FROM_OUTSIDE.get(name, name)


def scale_name(name: str) -> str:
    """The name in a GGUF file of the factor of a matrix with this published name."""
    return gguf_name(name).removesuffix("weight") + "scale"


def is_projection(name: str) -> bool:
    """Whether a published name is that of a matrix that is ternary in a ternary model."""
    return PROJECTION.fullmatch(name) is not None


def is_rotated(name: str) -> bool:
    """Whether positions turn what this matrix makes."""
    return name.endswith((".q_proj.weight", ".k_proj.weight"))


def interleaved(matrix: Array, head_dim: int) -> Array:
    """Rows of q or k (heads * head_dim, C) as a llama file has them: the two that turn together beside each other."""
    rows, cols = matrix.shape
    return matrix.reshape(-1, 2, head_dim // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def halved(matrix: Array, head_dim: int) -> Array:
    """interleaved() undone: the two rows that turn together are half a head apart."""
    rows, cols = matrix.shape
    return matrix.reshape(-1, head_dim // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)

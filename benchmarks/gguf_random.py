"""The model of random_weights.py as a GGUF file that llama.cpp runs, written with the gguf package.

    python benchmarks/gguf_random.py TYPE FILE '{"hidden_size": ...}'

Architecture `bitnet`: SiLU, sub-norms, tied embeddings, no tokenizer. TYPE is that of the ternary projections, TQ2_0,
TQ1_0 or F32 (for checks). The table of embeddings, which is the output head too, is Q6_K, llama.cpp's own choice beside
TQ types, and F32 in an F32 file; norms are F32. The scale of the codes is that of their blocks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import random_weights

BLOCK = 256  # values of a TQ or Q6_K block: widths must be multiples of it
ROWS = 8192  # of the table of embeddings, quantized at a time
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"attn_norm": "hidden", "attn_sub_norm": "hidden", "ffn_norm": "hidden", "ffn_sub_norm": "ffn"}


def q6_k(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Rows (n, C) as Q6_K blocks, (n, C / 256 * 210) bytes.

    A value is d * scale * (q - 32) with q < 64, an int8 scale for each 16 values and a half float d for each 256. The
    scale is the one that reaches the largest of its values; llama.cpp searches for a better one, of the same size.
    """
    groups = values.reshape(-1, 16, 16)  # of a block, value
    most = np.abs(groups).max(-1)
    d = np.maximum(most.max(-1, keepdims=True) / (31 * 127), 1e-7).astype(np.float16)
    unit = d.astype(np.float32)
    scales = np.clip(np.rint(most / (31 * unit)), 1, 127)
    q = np.clip(np.rint(groups / (unit * scales)[:, :, None]), -32, 31).astype(np.int8) + np.int8(32)
    q = q.view(np.uint8).reshape(-1, 2, 4, 32)  # half of a block, quarter of the half, value
    low = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    high = (q >> 4 << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(2, dtype=np.uint8)
    parts = (low.reshape(-1, 128), high.reshape(-1, 64), scales.astype(np.int8).view(np.uint8), d.view(np.uint8))
    return np.concatenate(parts, -1).reshape(len(values), -1)


def write(path: Path, kind: str, shape: dict[str, Any]) -> None:
    """Writes the model of these fields of a configuration; the file appears when it is complete."""
    import gguf

    sizes = random_weights.sizes(shape)
    for name in ("hidden", "ffn"):
        if sizes[name] % BLOCK:
            raise ValueError(f"{path}: {name} size {sizes[name]} is not a multiple of {BLOCK}, as {kind} needs it")
    type_ = gguf.GGMLQuantizationType[kind]
    part = path.with_name(f"{path.name}.part")
    file = gguf.GGUFWriter(part, "bitnet")
    file.add_block_count(shape["num_hidden_layers"])
    file.add_context_length(shape["max_position_embeddings"])
    file.add_embedding_length(shape["hidden_size"])
    file.add_feed_forward_length(shape["intermediate_size"])
    file.add_head_count(shape["num_attention_heads"])
    file.add_head_count_kv(shape["num_key_value_heads"])
    file.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    file.add_rope_freq_base(shape["rope_theta"])
    file.add_rope_dimension_count(shape["hidden_size"] // shape["num_attention_heads"])
    file.add_vocab_size(shape["vocab_size"])
    file.add_tokenizer_model("no_vocab")
    file.add_quantization_version(gguf.GGML_QUANT_VERSION)
    file.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])

    table = random_weights.matrix(random_weights.EMBEDDING, shape["vocab_size"], sizes["hidden"])
    if kind == "F32":
        file.add_tensor("token_embd.weight", table)
    else:
        blocks = np.concatenate([q6_k(table[i : i + ROWS]) for i in range(0, len(table), ROWS)])
        file.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    file.add_tensor("output_norm.weight", np.ones(sizes["hidden"], np.float32))
    for layer in range(shape["num_hidden_layers"]):
        for name, size in NORMS.items():
            file.add_tensor(f"blk.{layer}.{name}.weight", np.ones(sizes[size], np.float32))
        for name, (inputs, outputs) in random_weights.PROJECTIONS.items():
            codes = random_weights.codes(f"model.layers.{layer}.{name}", sizes[outputs], sizes[inputs])
            weight = codes * np.float32(random_weights.scale(sizes[inputs]))
            file.add_tensor(f"blk.{layer}.{NAMES[name]}.weight", gguf.quants.quantize(weight, type_), raw_dtype=type_)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    part.replace(path)


if __name__ == "__main__":
    write(Path(sys.argv[2]), sys.argv[1], json.loads(sys.argv[3]))

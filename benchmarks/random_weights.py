"""One random model for every engine of inference.py: each array is a function of its name and shape, in any process.

Numbers come straight from the bits of Philox4x64, whose stream NumPy guarantees; gigabytes of codes take seconds.
Nothing here needs more than NumPy, because llama.cpp may live in an interpreter without bitnet.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

PROJECTIONS = {  # of a block: where it is in the model, its inputs and outputs
    "self_attn.q_proj": ("hidden", "hidden"),
    "self_attn.k_proj": ("hidden", "kv"),
    "self_attn.v_proj": ("hidden", "kv"),
    "self_attn.o_proj": ("hidden", "hidden"),
    "mlp.gate_proj": ("hidden", "ffn"),
    "mlp.up_proj": ("hidden", "ffn"),
    "mlp.down_proj": ("ffn", "hidden"),
}
EMBEDDING = "model.embed_tokens"
CODE_OF_BYTE = np.resize(np.array([0, 1, -1], np.int8), 256)  # 0 of 86 bytes, each other code of 85


def sizes(shape: dict[str, int]) -> dict[str, int]:
    """What the words in PROJECTIONS are in a model with these fields of its configuration."""
    head = shape["hidden_size"] // shape["num_attention_heads"]
    return {
        "hidden": shape["hidden_size"],
        "kv": head * shape["num_key_value_heads"],
        "ffn": shape["intermediate_size"],
    }


def codes(name: str, rows: int, cols: int) -> npt.NDArray[np.int8]:
    """Ternary codes (rows, cols)."""
    return CODE_OF_BYTE[_bytes(name, rows * cols)].reshape(rows, cols)


def scale(inputs: int) -> float:
    """Of codes with so many inputs: outputs about as large as inputs. A power of two, which every format holds."""
    return float(2.0 ** np.rint(np.log2((1.5 / inputs) ** 0.5)))


def matrix(name: str, rows: int, cols: int) -> npt.NDArray[np.float32]:
    """(rows, cols), uniform, with variance 1 / cols."""
    bits = _bytes(name, 2 * rows * cols).view("<u2").astype(np.float32)
    bits -= 32767.5
    bits *= (3 / cols) ** 0.5 / 32768
    return bits.reshape(rows, cols)


def _bytes(name: str, count: int) -> npt.NDArray[np.uint8]:
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], "<u8")
    words = np.random.Philox(key=key).random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]

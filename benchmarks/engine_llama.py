"""llama.cpp as an engine of inference.py, through the low-level functions of llama-cpp-python.

The model is mapped from its file, which is written first if it is not there; the first turn, which is not counted,
brings it into memory. Keys and values are half floats, as is its default. Logits are made for the last token of a
batch alone, which is what a batch without flags means.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import turns

FLOAT32, FLOAT16 = 0, 1  # ggml's numbers of them


class Llama:
    """settings: shape, capacity, file, type (of gguf_random.py); exact: keys and values in F32, no fused attention."""

    def __init__(self, settings: dict[str, Any]) -> None:
        file, shape = Path(settings["file"]), settings["shape"]
        if not file.exists():  # in a process of its own, so that the memory it takes is not this one's
            writer = Path(__file__).with_name("gguf_random.py")
            subprocess.run([sys.executable, writer, settings["type"], file, json.dumps(shape)], check=True)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise OSError(f"{file}: llama.cpp cannot load it")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = max(512, settings["capacity"])
        exact = settings.get("exact", False)
        options.type_k = options.type_v = FLOAT32 if exact else FLOAT16
        if exact:
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(model, options)
        if not self.context:
            raise OSError(f"{file}: llama.cpp gives no context of {options.n_ctx} tokens")
        self.vocab_size = shape["vocab_size"]
        head = shape["hidden_size"] // shape["num_attention_heads"]
        system = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.about = f"llama-cpp-python {llama_cpp.__version__}, {system}"
        self.weight_bytes = float(llama_cpp.llama_model_size(model))
        self.cache_bytes = shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * head * (4 if exact else 2)

    def set_threads(self, threads: int) -> None:
        llama_cpp.llama_set_n_threads(self.context, threads, threads)

    def prefill(self, tokens: list[int]) -> turns.Logits:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        return self._decode(tokens)

    def step(self, token: int) -> turns.Logits:
        return self._decode([token])

    def _decode(self, tokens: list[int]) -> turns.Logits:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens gave {status}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocab_size,))


if __name__ == "__main__":
    turns.serve(Llama)

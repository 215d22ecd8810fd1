"""genai_config.json: what ONNX Runtime GenAI asks of the folder of a model, beside the model itself."""

from __future__ import annotations

from typing import Any

from bitnet.config import BitNetConfig
from bitnet.tokenizer import Tokenizer

GENAI_FILE = "genai_config.json"


def genai_config(config: BitNetConfig, tokenizer: Tokenizer | None, filename: str) -> dict[str, Any]:
    """The object of the file: greedy decoding, and a cache that grows by concatenation.

    Without a tokenizer no token ends a text, but GenAI takes 0 for the end then (version 0.18).
    """
    ends = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    caches = {
        f"{time}_{kind}_names": f"{prefix}.%d.{kind}"
        for time, prefix in (("past", "past_key_values"), ("present", "present"))
        for kind in ("key", "value")
    }
    decoder = {
        "filename": filename,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.kv_heads,
        "session_options": {"provider_options": []},
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {name: text for name, text in caches.items() if name.startswith("past")},
        "outputs": {"logits": "logits"} | {name: text for name, text in caches.items() if name.startswith("present")},
    }
    model = {
        "type": "decoder",
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
        **{name: token for name, token in ends.items() if token is not None},
    }
    search = {"do_sample": False, "max_length": config.max_position_embeddings, "past_present_share_buffer": False}
    return {"model": model, "search": search}

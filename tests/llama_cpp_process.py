"""Runs in an interpreter that has llama_cpp: a request in JSON on standard input, the answer on standard output.

    {"quantize": [[from, to, type], ...], "models": [file, ...], "tokens": [...], "vocabularies": {file: [text, ...]}}
    {"logits": [of each model, after each token, or null where it cannot be loaded], "ids": {file: [ids of text, ...]}}

Logits are computed a token at a time, without flash attention, with keys and values in F32; texts become tokens without
begin and end, and without looking for special tokens in them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

import llama_cpp


def load(file: str, vocab_only: bool) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    return llama_cpp.llama_model_load_from_file(file.encode(), params)


def logits(file: str, tokens: list[int]) -> list[list[float]] | None:
    model = load(file, False)
    if not model:
        return None
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = max(512, len(tokens))
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, options)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = []
    for token in tokens:
        batch = llama_cpp.llama_batch_get_one((ctypes.c_int32 * 1)(token), 1)
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"{file}: llama_decode failed")
        found.append(list(llama_cpp.llama_get_logits_ith(context, -1)[:vocab]))
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


def ids(file: str, texts: list[str]) -> list[list[int]]:
    model = load(file, True)
    vocab = llama_cpp.llama_model_get_vocab(model)
    found = []
    for text in texts:
        data = text.encode()
        room = (ctypes.c_int32 * (2 * len(data) + 8))()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), False, False)
        found.append(room[:count])
    llama_cpp.llama_model_free(model)
    return found


def quantize(source: str, target: str, file_type: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
        raise RuntimeError(f"{source}: llama_model_quantize failed")


if __name__ == "__main__":
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # llama.cpp prints
        llama_cpp.llama_backend_init()
        for job in request["quantize"]:
            quantize(*job)
        made = {
            "logits": [logits(file, request["tokens"]) for file in request["models"]],
            "ids": {file: ids(file, texts) for file, texts in request["vocabularies"].items()},
        }
        json.dump(made, answer)

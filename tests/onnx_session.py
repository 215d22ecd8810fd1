"""An exported model in ONNX Runtime, with its default options: what the tests of ONNX files run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import bitnet

Array = np.ndarray[Any, Any]


def session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxModel:
    """Logits (B, T, V) of tokens that follow those that were given before, as ours with a cache."""

    def __init__(self, path: Path, config: bitnet.BitNetConfig) -> None:
        self.config, self.session = config, session(str(path))
        self.names = [value.name for value in self.session.get_inputs()]
        self.past: dict[str, Array] = {}
        self.mask = np.zeros((0, 0), np.int64)

    def start(self, batch: int) -> None:
        c = self.config
        shape = (batch, c.kv_heads, 0, c.head_dim)
        self.past = {name: np.zeros(shape, np.float32) for name in self.names if name.startswith("past")}
        self.mask = np.zeros((batch, 0), np.int64)

    def next(self, tokens: Array, mask: Array | None = None) -> Array:
        """mask: 0 where a token is padding."""
        self.mask = np.concatenate([self.mask, np.ones_like(tokens) if mask is None else mask], 1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        feed = {"input_ids": tokens, "attention_mask": self.mask, "position_ids": positions, **self.past}
        logits, *present = self.session.run(None, feed)
        self.past = dict(zip(self.past, present, strict=True))
        return logits

    def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
        self.start(len(tokens))
        return self.next(tokens, mask)

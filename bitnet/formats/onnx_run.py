"""An ONNX file, run by ONNX Runtime: logits of a whole sequence, to be set beside those of the model it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.errors import CheckpointError, ConfigError

Array = np.ndarray[Any, Any]


def onnx_logits(path: Path) -> Callable[[Array], Array]:
    """tokens (B, T) -> logits (B, T, V), with nothing in the past. ConfigError without the package onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("running an ONNX file needs the package onnxruntime: pip install 'bitnet[onnx]'") from None
    file = path / "model.onnx" if path.is_dir() else path
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library has a class for each status, and no common one but this
        raise CheckpointError(f"{file}: ONNX Runtime refuses it: {str(error).splitlines()[0]}") from None
    pasts = [given for given in session.get_inputs() if given.name.startswith("past_key_values.")]

    def run(tokens: Array) -> Array:
        batch, time = tokens.shape
        feeds = {
            "input_ids": tokens.astype(np.int64),
            "attention_mask": np.ones((batch, time), np.int64),
            "position_ids": np.tile(np.arange(time, dtype=np.int64), (batch, 1)),
        }
        for given in pasts:  # (B, KV, 0, D)
            feeds[given.name] = np.zeros((batch, given.shape[1], 0, given.shape[3]), np.float32)
        logits: Array = session.run(["logits"], feeds)[0]
        return logits

    return run

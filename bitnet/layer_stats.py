"""What the codes of each ternary layer do: the records of layers.jsonl.

    {"step": 100, "layers": {"model.layers.0.mlp.up_proj": {"minus": 0.31, "zero": 0.38, "plus": 0.31, "flip": 0.04,
     "scale": 0.021, "histogram": [64 counts]}, ...}}

minus, zero, plus: shares of the codes. flip: how many codes changed in the steps since the last record, as a share of
the codes; one that changes and changes back counts twice. With --requantize-every N these are changes of the codes that
steps multiply, made anew every N steps; all else here is of the codes of the present latent weights. histogram: latent
weights in units of the scale, in 64 equal bins of -3 to 3; what lies beyond is in the outer bins. Of channel scales,
scale is the mean; the histogram has each row in units of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitnet.metrics import Record
from bitnet.nn import BitLinear, Module

BINS, LIMIT = 64, 3.0


def layer_record(step: int, model: Module, flips: Mapping[str, int]) -> Record | None:
    """The record of a step, None for a model without ternary layers; flips: codes changed, by layer."""
    layers = {name: _layer(layer, flips.get(name, 0)) for name, layer in model.bitlinears()}
    return {"step": step, "layers": layers} if layers else None


def _layer(layer: BitLinear, flips: int) -> Record:
    stats, scale = layer.ternary_stats(), layer.weight_scale
    latent, unit = layer.weight.numpy(copy=True), scale
    if layer.has_channel_scales:
        latent, unit = latent / layer.scales().numpy()[:, None], 1.0
    return {
        "minus": stats.minus / stats.count,
        "zero": stats.zero / stats.count,
        "plus": stats.plus / stats.count,
        "flip": flips / stats.count,
        "scale": scale,
        "histogram": histogram(latent, unit),
    }


def histogram(weights: np.ndarray[tuple[int, ...], np.dtype[np.float32]], scale: float) -> list[int]:
    """Counts of weights / scale in the bins; weights of any shape."""
    places = weights.reshape(-1) * np.float32(BINS / (2 * LIMIT * scale)) if scale > 0 else np.zeros(weights.size)
    bins = np.floor(np.clip(places + BINS / 2, 0, BINS - 1)).astype(np.int64)
    return [int(count) for count in np.bincount(bins, minlength=BINS)]

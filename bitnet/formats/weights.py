"""What a model is made of, as a file wants it: by published name, a matrix at a time, in numbers that NumPy knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bitnet import _core, nn, ops
from bitnet._core import Tensor
from bitnet.config import BitNetConfig
from bitnet.errors import ConfigError
from bitnet.formats.source import Codes
from bitnet.model import BitNetForCausalLM

Array = np.ndarray[Any, Any]
CHUNK = 1 << 20  # floats looked at together: a few MB of temporary memory


def refuse_adapters(model: BitNetForCausalLM) -> None:
    """ConfigError for a model with adapters (bitnet/lora.py): no file but a checkpoint of theirs can hold them."""
    if model.lora is not None:
        raise ConfigError(
            "adapters cannot be packed into their model: code * scale + B A has more than three values; write the "
            "base, and generate with --lora"
        )


def refuse_levers(config: BitNetConfig, scales: str) -> None:
    """ConfigError for what is computed here alone: the transform, 4 bits before ternary layers, scales of channels.

    scales: what the format has in the place of one for each row.
    """
    if config.hadamard:
        raise ConfigError("hadamard is True, and no other program transforms the inputs of o_proj and down_proj; a "
                          ".bitnet file keeps it")  # fmt: skip
    if config.activation_bits != 8 and config.linear == "bitlinear":
        raise ConfigError(f"activation_bits is {config.activation_bits}, and other programs round the inputs of "
                          "ternary layers to 8 bits; a .bitnet file keeps it")  # fmt: skip
    if config.has_channel_scales:
        raise ConfigError(f"weight_scales is channel, a scale for each row of a ternary matrix: {scales}; a .bitnet "
                          "file holds them")  # fmt: skip


def model_weights(model: BitNetForCausalLM) -> Iterator[tuple[str, nn.BitLinear | Tensor]]:
    """Everything a model is made of, by name: ternary layers, and tensors of the others."""
    for path, module in model.named_modules():
        if isinstance(module, nn.BitLinear):
            yield f"{path}.weight", module
            continue
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}", value


def codes_of(layer: nn.BitLinear) -> Codes:
    """The codes and the scale or scales that a layer multiplies, packed or not; copies."""
    # detach(): the codes that quantizing keeps beside a weight go with this window instead of staying with the model.
    weight = layer.weight if layer.is_packed else layer.weight.detach()
    scale = _core.ternary_scales(weight).numpy() if layer.has_channel_scales else _core.ternary_stats(weight)[4]
    return Codes(_core.ternary_codes(weight).numpy(), scale)


def floats_of(weight: Tensor) -> Array:
    """The numbers of a tensor in f32 or bf16, as f32."""
    with ops.no_grad():
        values: Array = weight.to("f32").numpy()
    return values


def is_bf16(values: Array) -> bool:
    """Whether every f32 is a bf16, so that bf16_bits loses nothing."""
    return not any((part & 0xFFFF).any() for part in chunks(values.reshape(-1).view(np.uint32)))


def bf16_bits(values: Array) -> Array:
    """f32 -> the upper halves of the nearest bf16 (ties to even; NaN stays NaN), uint16 of the same shape."""
    out = np.empty(values.size, np.uint16)
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    for source, target in zip(chunks(bits), chunks(out), strict=True):
        rounded = (source + (0x7FFF + (source >> 16 & 1))) >> 16
        target[:] = np.where((source & 0x7FFFFFFF) > 0x7F800000, source >> 16 | 0x40, rounded)
    return out.reshape(values.shape)


def bf16_of(weight: Tensor) -> Array:
    """The nearest bf16 of a tensor's numbers, as bf16_bits; of a bf16 matrix without all of it in f32."""
    if weight.dtype != "bf16" or weight.ndim != 2:
        return bf16_bits(floats_of(weight))
    out = np.empty(weight.shape, np.uint16)
    count, step = len(out), max(1, CHUNK // weight.shape[1])
    for i in range(0, count, step):
        with ops.no_grad():
            rows = ops.embedding(np.arange(i, min(i + step, count), dtype=np.int32), weight)
        out[i : i + step] = bf16_bits(rows.numpy())
    return out


def bf16_values(bits: Array) -> Array:
    """uint16, the upper halves -> f32 of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def chunks(flat: Array) -> Iterator[Array]:
    """A flat array in pieces of CHUNK elements."""
    return (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))

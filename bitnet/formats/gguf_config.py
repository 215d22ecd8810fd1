"""The config that the metadata of a GGUF file tells, and the metadata that tell a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.config import POSITIONS_MAX, BitNetConfig
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.gguf_file import Value
from bitnet.formats.gguf_names import ACTIVATIONS, SPELLINGS, SUB_NORMED

INTEGERS = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")
QUANTIZATION = 2  # general.quantization_version: of ggml's blocks since 2023
# Factors on what this model computes, of which each must be that of a plain model.
PLAIN = {"rope.scaling.factor": 1, "rope.scale_linear": 1, "expert_count": 0, "attention.clamp_kqv": 0,
         "attention.max_alibi_bias": 0, "logit_scale": 1, "embedding_scale": 1, "residual_scale": 1,
         "attention.sliding_window": 0}  # fmt: skip


def architecture(metadata: Mapping[str, Value], path: Path) -> str:
    """The architecture, one that is known."""
    value = metadata.get("general.architecture")
    if value is None or value.type_name != "str" or value.value not in ACTIVATIONS:
        told = "none" if value is None else repr(value.value)[:80]
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{path}: its general.architecture is {told}; those that are read are {known}")
    return str(value.value)


def config_of(
    metadata: Mapping[str, Value], path: Path, vocab_size: int, tied: bool, linear: str, hidden_act: str | None
) -> BitNetConfig:
    """The config. vocab_size, tied: of the tensors; linear, hidden_act: see Reading. Raises CheckpointError."""
    arch = architecture(metadata, path)

    def refusal(key: str, wanted: str) -> CheckpointError:
        value = metadata.get(f"{arch}.{key}")
        told = "missing" if value is None else f"{str(value.value)[:80]!r} ({value.type_name})"
        return CheckpointError(f"{path}: its {arch}.{key} is {told}, not {wanted}")

    def number(key: str, default: Any, types: tuple[str, ...]) -> Any:
        value = metadata.get(f"{arch}.{key}")
        if value is None and default is not None:
            return default
        if value is None or value.type_name not in types:
            raise refusal(key, "one number")
        return value.value

    def count(key: str, default: int | None = None) -> int:
        return int(number(key, default, INTEGERS))

    def real(key: str, default: float | None = None) -> float:
        return shortest(float(number(key, default, (*INTEGERS, "f32", "f64"))))

    hidden, heads = count("embedding_length"), count("attention.head_count")
    if count("vocab_size", vocab_size) != vocab_size:
        raise refusal("vocab_size", f"{vocab_size}, the rows of its embeddings")
    if not 1 <= count("context_length") <= POSITIONS_MAX:
        raise refusal("context_length", f"1 to {POSITIONS_MAX}")
    for key, plain in PLAIN.items():
        if real(key, plain) != plain:
            raise refusal(key, f"{plain}, and no model here has it otherwise")
    scaling = metadata.get(f"{arch}.rope.scaling.type", Value("str", "none"))
    if scaling.value not in ("none", "linear"):
        raise refusal("rope.scaling.type", "none or linear, and other rotary positions are not computed here")
    if heads > 0:
        for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
            if count(key, hidden // heads) != hidden // heads:
                raise refusal(key, f"{hidden // heads}, the width of a head")
    try:
        return BitNetConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=count("feed_forward_length"),
            num_hidden_layers=count("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=count("attention.head_count_kv", heads),
            hidden_act=hidden_act or _activation(metadata, arch, path),
            max_position_embeddings=count("context_length"),
            rms_norm_eps=real("attention.layer_norm_rms_epsilon"),
            rope_theta=real("rope.freq_base", 10000.0),
            tie_word_embeddings=tied,
            linear=linear,
            sub_norms=arch in SUB_NORMED,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: its metadata define no model: {error}") from None


def shortest(value: float) -> float:
    """The shortest decimal number with the f32 nearest to `value`: 1e-05, where f32 widened is 9.99999974e-06."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _activation(metadata: Mapping[str, Value], arch: str, path: Path) -> str:
    value = metadata.get(f"{arch}.hidden_activation")
    if value is None:
        return ACTIVATIONS[arch]
    if value.type_name != "str" or value.value not in SPELLINGS:
        raise CheckpointError(f"{path}: its {arch}.hidden_activation is {str(value.value)[:80]!r}, not one of "
                              f"{', '.join(SPELLINGS)}")  # fmt: skip
    return SPELLINGS[value.value]


def metadata_of(config: BitNetConfig, arch: str, name: str, file_type: int, quantized: bool) -> dict[str, Value]:
    """All keys but those of the tokenizer."""
    general = {
        "general.architecture": Value("str", arch),
        "general.name": Value("str", name),
        "general.file_type": Value("u32", file_type),
    }
    if quantized:
        general["general.quantization_version"] = Value("u32", QUANTIZATION)
    own = {
        "block_count": Value("u32", config.num_hidden_layers),
        "context_length": Value("u32", config.max_position_embeddings),
        "embedding_length": Value("u32", config.hidden_size),
        "feed_forward_length": Value("u32", config.intermediate_size),
        "attention.head_count": Value("u32", config.num_attention_heads),
        "attention.head_count_kv": Value("u32", config.kv_heads),
        "attention.layer_norm_rms_epsilon": Value("f32", config.rms_norm_eps),
        "rope.freq_base": Value("f32", config.rope_theta),
        "rope.dimension_count": Value("u32", config.head_dim),
        "vocab_size": Value("u32", config.vocab_size),
        "hidden_activation": Value("str", config.hidden_act),
    }
    return general | {f"{arch}.{key}": value for key, value in own.items()}

"""config.json of published checkpoints, and of this project's own: the model's shape, and how its weights are stored.

    architectures                           block                       ternary layers, if quantization_config is there
    BitNetForCausalLM                       sub-norms                   packed, or masters quantized online
    BitnetForCausalLM, model_type llama     sub-norms                   masters: weight_bits 1, input_bits 8 say so
    LlamaForCausalLM                        no sub-norms                packed (Falcon-E, HF1BitLLM), or online

quantization_config, as transformers reads it: linear_class "autobitlinear" multiplies by a packed layer's weight_scale,
"bitlinear" (what is meant where none is named) divides by it. Without it a checkpoint is in full precision: masters
that were published as plain LLaMA cannot be told from that, and are taken for ternary when Reading.linear says so.
What the block of bitnet.model does not compute is refused by name. Fields that are this project's own (`linear`,
`sub_norms` ...) go before what is concluded from the others.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bitnet.config import WRITTEN_WHERE_SET, BitNetConfig
from bitnet.errors import CheckpointError
from bitnet.formats.source import Reading
from bitnet.tokenizer import Tokenizer

CONFIG = "config.json"
CONFIG_MAX = 64 << 20
SHAPE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
# Fields of config.json that published checkpoints have; the others are this project's and have defaults.
PUBLISHED = [*SHAPE, *"num_key_value_heads hidden_act max_position_embeddings rms_norm_eps rope_theta "
             "tie_word_embeddings".split()]  # fmt: skip
# What transformers takes where a file says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "bitnet": {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "num_key_value_heads": 5},
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
}
BITNET = ("BitNetForCausalLM", "BitnetForCausalLM")
LLAMA = "LlamaForCausalLM"
LINEAR_CLASSES = ("autobitlinear", "bitlinear")
PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class HfConfig:
    """What a config.json says.

    linear_class: "autobitlinear" or "bitlinear", how packed layers use their scale; None where nothing says it, or the
    layers are not ternary. is_online: whether floats are masters, quantized when used.
    """

    config: BitNetConfig
    linear_class: str | None
    is_online: bool


# ---- reading --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        if path.stat().st_size > CONFIG_MAX:
            raise CheckpointError(f"{path} has more than the {CONFIG_MAX} bytes that are read")
        values = json.loads(path.read_bytes())
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values


def read_config(path: Path) -> BitNetConfig:
    """The model's shape from a config.json of this project's own. Raises CheckpointError naming the field."""
    return config_from(read_json(path), path)


def config_from(values: dict[str, Any], path: Path) -> BitNetConfig:
    """The model's shape from a config.json of this project's own; path: what an error names."""
    missing = [name for name in PUBLISHED if name not in values]
    if missing:
        raise CheckpointError(f"{path} is not the config of a BitNet model: it has no {', '.join(missing)}")
    return _made({f.name: values[f.name] for f in fields(BitNetConfig) if f.name in values}, path)


def hf_config(values: dict[str, Any], path: Path, reading: Reading | None = None) -> HfConfig:
    """What any config.json above says. Raises CheckpointError with what cannot be read, and why."""
    reading = reading or Reading()
    kind = _kind(values, path)
    missing = [name for name in SHAPE if values.get(name) is None]
    if missing:
        raise CheckpointError(f"{path} is not the config of a language model: it has no {', '.join(missing)}")
    _refuse_what_is_not_computed(values, path)
    known = {f.name: values[f.name] for f in fields(BitNetConfig) if values.get(f.name) is not None}
    found: dict[str, Any] = {"sub_norms": kind != LLAMA, "max_position_embeddings": 2048}
    found |= DEFAULTS["llama" if kind == LLAMA or values.get("model_type") == "llama" else "bitnet"]
    found |= known | _rope(values, path)
    if "num_key_value_heads" in values:  # null: as many as heads
        found["num_key_value_heads"] = values["num_key_value_heads"]
    quantization = values.get("quantization_config")
    linear_class, is_online = None, False
    if quantization is not None:
        linear_class, is_online, found["use_rms_norm"] = _quantization(quantization, found["rms_norm_eps"], path)
        found["linear"] = "bitlinear"
    elif "weight_bits" in values or "input_bits" in values:
        if (values.get("weight_bits"), values.get("input_bits")) != (1, 8):
            bits = f"weight_bits {values.get('weight_bits')!r}, input_bits {values.get('input_bits')!r}"
            raise CheckpointError(f"{path} has {bits}; ternary weights and int8 activations are 1 and 8")
        is_online, found["linear"] = True, "bitlinear"
    else:
        is_online = found.setdefault("linear", "linear") == "bitlinear"
    if reading.linear is not None:
        found["linear"], is_online = reading.linear, reading.linear == "bitlinear"
    if reading.hidden_act is not None:
        found["hidden_act"] = reading.hidden_act
    elif found["hidden_act"] not in ("silu", "relu2"):
        raise CheckpointError(f"{path} has the hidden_act {found['hidden_act']!r}; known are silu and relu2")
    return HfConfig(_made(found, path), linear_class, is_online)


def _made(found: dict[str, Any], path: Path) -> BitNetConfig:
    try:
        return BitNetConfig(**found)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _kind(values: dict[str, Any], path: Path) -> str:
    """The architecture; where none is named, that of the model type."""
    named = values.get("architectures")
    if named is None:
        has_bits = "weight_bits" in values
        types = {"bitnet": BITNET[0], "llama": BITNET[1] if has_bits else LLAMA}
        named = [types.get(str(values.get("model_type")), f"model_type {values.get('model_type')!r}")]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in (*BITNET, LLAMA):
        name = named[0] if isinstance(named, list) and len(named) == 1 else named
        raise CheckpointError(
            f"{path} is of the architecture {str(name)[:80]}; known are {', '.join((*BITNET, LLAMA))}"
        )
    return str(named[0])


def _refuse_what_is_not_computed(values: dict[str, Any], path: Path) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise CheckpointError(f"{path} has {name}: layers with a bias are not computed here")
    hidden, heads, dim = (values.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if dim is not None and not (all(map(_is_number, (hidden, heads, dim))) and dim * heads == hidden):
        raise CheckpointError(f"{path} has head_dim {dim!r}, but only hidden_size / num_attention_heads is computed "
                              f"here, {hidden} / {heads}")  # fmt: skip


def _is_number(value: Any) -> bool:
    return type(value) is int


def _rope(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """rope_theta, if the file has it; other rotations than plain ones are refused."""
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"{path} has the {key} {str(rope)[:80]}, which is no object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear") or (kind == "linear" and rope.get("factor", 1) != 1):
            what = f"{kind} by {rope.get('factor')!r}" if "factor" in rope else str(kind)[:80]
            raise CheckpointError(f"{path} has the {key} {what}: only unscaled rotary positions are computed here")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise CheckpointError(f"{path} has the partial_rotary_factor {rope['partial_rotary_factor']!r}: only the "
                                  "whole head is rotated here")  # fmt: skip
        if rope.get("rope_theta") is not None:
            found["rope_theta"] = rope["rope_theta"]
    if values.get("partial_rotary_factor", 1) not in (None, 1):
        raise CheckpointError(f"{path} has the partial_rotary_factor {values['partial_rotary_factor']!r}: only the "
                              "whole head is rotated here")  # fmt: skip
    return found


def _quantization(fields: Any, eps: Any, path: Path) -> tuple[str, bool, bool]:
    """linear_class, whether it is online, use_rms_norm; eps: of the model's norms."""
    if not isinstance(fields, dict) or fields.get("quant_method") != "bitnet":
        method = fields.get("quant_method") if isinstance(fields, dict) else fields
        raise CheckpointError(f"{path} has the quant_method {str(method)[:80]!r}; known is bitnet")
    linear_class, mode = fields.get("linear_class", "bitlinear"), fields.get("quantization_mode", "offline")
    if linear_class not in LINEAR_CLASSES:
        raise CheckpointError(f"{path} has the linear_class {str(linear_class)[:80]!r}; known are "
                              f"{' and '.join(LINEAR_CLASSES)}")  # fmt: skip
    if mode not in ("offline", "online"):
        raise CheckpointError(f"{path} has the quantization_mode {str(mode)[:80]!r}; known are offline and online")
    inner, inner_eps = bool(fields.get("use_rms_norm")), fields.get("rms_norm_eps", 1e-6)
    if inner and inner_eps != eps:
        raise CheckpointError(f"{path} has norms inside its ternary layers with rms_norm_eps {inner_eps!r}, but others "
                              f"with {eps!r}; one for all is computed here")  # fmt: skip
    _check_exceptions(fields.get("modules_to_not_convert"), path)
    return linear_class, mode == "online", inner


def _check_exceptions(patterns: Any, path: Path) -> None:
    """modules_to_not_convert must leave out the output head, as None does, and none of the projections."""
    if patterns is None:
        return
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise CheckpointError(f"{path} has the modules_to_not_convert {str(patterns)[:80]}, which is no list of names")
    for pattern in patterns:
        # Names are all that is understood; transformers would take others as regular expressions.
        if not re.fullmatch(r"[A-Za-z0-9_.]*", pattern):
            raise CheckpointError(f"{path} has {pattern[:80]!r} among modules_to_not_convert, which is no name")
        hit = [name for name in PROJECTIONS if _spares(pattern, name)]
        if hit:
            raise CheckpointError(f"{path} has {pattern!r} among modules_to_not_convert, but layers of which some are "
                                  f"ternary and {hit[0]} is not are not computed here")  # fmt: skip
    if not any(_spares(pattern, "lm_head") for pattern in patterns):
        raise CheckpointError(f"{path} has the modules_to_not_convert {patterns} without lm_head, but a ternary output "
                              "head is read from this project's own files only")  # fmt: skip


def _spares(pattern: str, name: str) -> bool:
    """Whether transformers would leave out a layer: by a path from the start of its name, or by any end of it."""
    number = re.search(r"layers\.(\d+)", pattern)
    full = name if name == "lm_head" else f"model.layers.{number[1] if number else 0}.{name}"
    return f"{full}.".startswith(pattern.rstrip(".") + ".") or full.endswith(pattern)


# ---- writing --------------------------------------------------------------------------------------------------------


def config_json(config: BitNetConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json of this project's own checkpoints: the fields of published ones, and the project's."""
    fields = config.as_dict()
    # transformers refuses a type that it does not know, and would leave out what these fields ask for.
    model_type = "bitnet-extended" if fields.keys() & set(WRITTEN_WHERE_SET) else "bitnet"
    out: dict[str, Any] = {"architectures": ["BitNetForCausalLM"], "model_type": model_type, **fields}
    out |= {"use_cache": True, "torch_dtype": "float32"} | _document_ends(tokenizer)
    if config.linear == "bitlinear":
        out["quantization_config"] = _quantization_json(config, "autobitlinear", "online")
    return out


def hf_json(
    config: BitNetConfig, tokenizer: Tokenizer | None, dtype: str, linear_class: str, mode: str
) -> dict[str, Any]:
    """config.json for transformers; dtype: "float32" or "bfloat16"; linear_class and mode: of ternary layers."""
    kind, model_type = (BITNET[0], "bitnet") if config.sub_norms else (LLAMA, "llama")
    out: dict[str, Any] = {"architectures": [kind], "model_type": model_type}
    out |= {name: getattr(config, name) for name in [*PUBLISHED, "initializer_range"]}
    # null where there is none: what is not said is 128000 and 128001 to transformers.
    out |= {"use_cache": True, "torch_dtype": dtype, "bos_token_id": None, "eos_token_id": None}
    out |= _document_ends(tokenizer)
    if config.linear == "bitlinear":
        out["quantization_config"] = _quantization_json(config, linear_class, mode)
        out["quantization_config"]["modules_to_not_convert"] = ["lm_head"]
    return out


def _document_ends(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _quantization_json(config: BitNetConfig, linear_class: str, mode: str) -> dict[str, Any]:
    return {
        "quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode,
        "use_rms_norm": config.use_rms_norm, "rms_norm_eps": config.rms_norm_eps,
    }  # fmt: skip

"""What defines a model, and the shapes that have names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bitnet.errors import ConfigError
from bitnet.option import option

SCALES = ("tensor", "channel")
POSITIONS_MAX = 1 << 20  # that there can be: tables of sines are made for every one (csrc/python/core_methods.c)
# Fields that are written only where they are not at their default: files of models without them stay as they are.
WRITTEN_WHERE_SET = ("hadamard", "activation_bits", "weight_scales")


@dataclass(frozen=True)
class BitNetConfig:
    """What defines a model. Names are those of published config.json files; see PRESETS for published shapes."""

    vocab_size: int = option(32000, "ids of the tokenizer")
    hidden_size: int = option(256, "channels, an even multiple of the attention heads")
    intermediate_size: int = option(688, "channels inside the feed-forward layers")
    num_hidden_layers: int = option(4, "blocks of attention and feed-forward")
    num_attention_heads: int = option(8, "query heads in a block")
    num_key_value_heads: int | None = option(None, "heads of keys and values (as many as query heads)")
    hidden_act: str = option("silu", "of the gate in the feed-forward layers: silu or relu2")
    max_position_embeddings: int = option(2048, "tokens, the longest sequence that can be read")
    rms_norm_eps: float = option(1e-5, "added to the mean square in every RMSNorm")
    rope_theta: float = option(10000.0, "base of the rotary position angles")
    tie_word_embeddings: bool = option(False, "the output head is the embedding table")
    initializer_range: float = option(0.02, "standard deviation of initial weights")
    linear: str = option("bitlinear", "layers inside the blocks: bitlinear (ternary) or linear (full precision)")
    quantize_head: bool = option(False, "the output head is a bitlinear too")
    input_norms: bool = option(True, "RMSNorm before attention and feed-forward")
    sub_norms: bool = option(True, "RMSNorm before o_proj and down_proj")
    use_rms_norm: bool = option(False, "RMSNorm without gain inside every projection, before its quantization")
    hadamard: bool = option(False, "o_proj and down_proj read the Hadamard transform of what comes before them")
    activation_bits: int = option(8, "8 or 4: what ternary layers in the blocks round their inputs to (a head keeps 8)")
    weight_scales: str = option("tensor", "tensor: one scale for a ternary matrix; channel: one for each row (output)")

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        for name in [*sizes.split(), "max_position_embeddings"]:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        if self.max_position_embeddings > POSITIONS_MAX:
            raise ConfigError(
                f"max_position_embeddings is {self.max_position_embeddings}, but rotary tables are made for at most "
                f"{POSITIONS_MAX}"
            )
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a positive number, not {value!r}")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be an even multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.kv_heads}"
            )
        choices = {"hidden_act": ("silu", "relu2"), "linear": ("bitlinear", "linear"), "weight_scales": SCALES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if not isinstance(self.activation_bits, int) or self.activation_bits not in (8, 4):
            raise ConfigError(f"activation_bits must be 8 or 4, not {self.activation_bits!r}")
        if not isinstance(self.hadamard, bool):
            raise ConfigError(f"hadamard must be true or false, not {self.hadamard!r}")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def has_channel_scales(self) -> bool:
        """Whether there are ternary matrices, with a scale for each row."""
        return self.weight_scales == "channel" and (self.linear == "bitlinear" or self.quantize_head)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as files hold them: those of WRITTEN_WHERE_SET only where they are set."""
        off = {f.name for f in fields(self) if f.name in WRITTEN_WHERE_SET and getattr(self, f.name) == f.default}
        return {name: value for name, value in asdict(self).items() if name not in off}

    @staticmethod
    def preset(name: str, **changes: Any) -> BitNetConfig:
        """A named shape with fields replaced."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; one of {', '.join(PRESETS)}")
        return PRESETS[name].replace(**changes)

    def replace(self, **changes: Any) -> BitNetConfig:
        """A copy with some fields changed; an unknown field is an error that names it."""
        known = {field.name for field in fields(self)}
        unknown = sorted(changes.keys() - known)
        if unknown:
            raise ConfigError(f"unknown config field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if "num_attention_heads" in changes and "num_key_value_heads" not in changes:
            changes["num_key_value_heads"] = None
        return replace(self, **changes)


def _paper(hidden: int, ffn: int, layers: int, heads: int) -> BitNetConfig:
    return BitNetConfig(32002, hidden, ffn, layers, heads, tie_word_embeddings=True)


PRESETS: dict[str, BitNetConfig] = {
    "char": BitNetConfig(65, 384, 1024, 2, 6, max_position_embeddings=1024, sub_norms=False),
    "nano": BitNetConfig(32000, 256, 688, 4, 8),
    "125m": BitNetConfig(32000, 768, 2048, 12, 12),
    "350m": BitNetConfig(32000, 1024, 2736, 24, 16),
    # Ma et al. 2024, arXiv 2402.17764, as published by 1bitLLM (bitnet_b1_58-large, -xl, -3B).
    "700m": _paper(1536, 4096, 24, 16),
    "1.3b": _paper(2048, 5460, 24, 32),
    "3b": _paper(3200, 8640, 26, 32),
    # microsoft/bitnet-b1.58-2B-4T.
    "2b-4t": BitNetConfig(128256, 2560, 6912, 30, 20, 5, "relu2", 4096, rope_theta=500000.0, tie_word_embeddings=True),
}

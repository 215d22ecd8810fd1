"""config.json of every published variant, and of this project's own; refusals say what is not computed."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet import BitNetConfig
from bitnet.errors import CheckpointError
from bitnet.formats.hf_config import config_json, hf_config, hf_json, read_json
from bitnet.formats.source import Reading
from bitnet.tokenizer import ByteTokenizer

PATH = Path("folder/config.json")
MICROSOFT: dict[str, Any] = {
    "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "vocab_size": 128256, "hidden_size": 2560,
    "intermediate_size": 6912, "num_hidden_layers": 30, "num_attention_heads": 20, "num_key_value_heads": 5,
    "hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "initializer_range": 0.02, "use_cache": True, "bos_token_id": 128000,
    "eos_token_id": 128001, "torch_dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig"},
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
                            "modules_to_not_convert": None},
}  # fmt: skip
PAPER: dict[str, Any] = {
    "architectures": ["BitnetForCausalLM"], "model_type": "llama", "vocab_size": 32002, "hidden_size": 1536,
    "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": True, "pad_token_id": 32000,
    "bos_token_id": 1, "eos_token_id": 2, "weight_bits": 1, "input_bits": 8, "torch_dtype": "float16",
}  # fmt: skip
FALCON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32768, "hidden_size": 2048,
    "intermediate_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 2,
    "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
    "rope_theta": 1000042, "tie_word_embeddings": False, "mlp_bias": False, "is_bitnet_config": True,
    "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip
PLAIN = {name: value for name, value in FALCON.items() if name not in ("quantization_config", "is_bitnet_config")}


def test_the_published_2b_4t_is_the_preset() -> None:
    found = hf_config(MICROSOFT, PATH)
    assert found.config == BitNetConfig.preset("2b-4t")
    assert (found.linear_class, found.is_online) == ("autobitlinear", False)
    online = MICROSOFT | {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                                  "quantization_mode": "online"}}  # fmt: skip
    assert (hf_config(online, PATH).is_online, hf_config(online, PATH).config) == (True, found.config)
    dense = {name: value for name, value in MICROSOFT.items() if name != "quantization_config"}
    assert hf_config(dense, PATH).config == found.config.replace(linear="linear"), "as transformers has it"
    assert hf_config(dense, PATH, Reading(linear="bitlinear")).config == found.config


def test_the_papers_models_are_the_presets() -> None:
    found = hf_config(PAPER, PATH)
    assert found.config == BitNetConfig.preset("700m")
    assert found.is_online
    unnamed = {name: value for name, value in PAPER.items() if name != "architectures"}
    assert hf_config(unnamed, PATH) == found


def test_ternary_llamas_divide_and_have_no_sub_norms() -> None:
    found = hf_config(FALCON, PATH)
    assert (found.linear_class, found.is_online) == ("bitlinear", False)
    c = found.config
    assert (c.sub_norms, c.linear, c.rope_theta, c.rms_norm_eps, c.kv_heads) == (False, "bitlinear", 1000042, 1e-6, 2)
    assert hf_config(PLAIN, PATH).config == c.replace(linear="linear")
    masters = hf_config(PLAIN, PATH, Reading(linear="bitlinear"))
    assert (masters.config, masters.is_online) == (c, True)


def test_what_a_file_leaves_out_is_what_transformers_takes() -> None:
    left = "architectures hidden_act rms_norm_eps rope_theta tie_word_embeddings num_key_value_heads head_dim".split()
    few = {name: value for name, value in FALCON.items() if name not in left}
    c = hf_config(few, PATH).config
    assert (c.hidden_act, c.rms_norm_eps, c.rope_theta, c.tie_word_embeddings, c.kv_heads) == (
        "silu", 1e-6, 10000.0, False, 16,
    )  # fmt: skip
    few = {name: value for name, value in MICROSOFT.items() if name not in left}
    c = hf_config(few, PATH).config
    assert (c.hidden_act, c.rms_norm_eps, c.rope_theta, c.kv_heads) == ("relu2", 1e-5, 500000.0, 5)
    assert hf_config(MICROSOFT | {"num_key_value_heads": None}, PATH).config.kv_heads == 20


def test_rotations_are_found_where_either_version_puts_them() -> None:
    bare = {name: value for name, value in MICROSOFT.items() if name != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    assert hf_config(bare | {"rope_parameters": rope}, PATH).config == BitNetConfig.preset("2b-4t")
    for key, value in {"type": "linear", "rope_type": "linear"}.items():
        assert hf_config(MICROSOFT | {"rope_scaling": {key: value, "factor": 1.0}}, PATH)


def test_this_projects_own_files_are_one_of_the_variants() -> None:
    for changes in ({}, {"linear": "linear", "use_rms_norm": True}, {"quantize_head": True, "input_norms": False},
                    {"use_rms_norm": True, "sub_norms": False}):  # fmt: skip
        config = BitNetConfig(rms_norm_eps=1e-6).replace(**changes)  # type: ignore[arg-type]
        values = json.loads(json.dumps(config_json(config, ByteTokenizer())))
        assert hf_config(values, PATH).config == config
        assert hf_config(values, PATH).is_online == (config.linear == "bitlinear")


def test_what_is_written_for_transformers_is_read_again() -> None:
    for config in (BitNetConfig.preset("2b-4t"), BitNetConfig(sub_norms=False, use_rms_norm=True, rms_norm_eps=1e-6),
                   BitNetConfig(linear="linear"), BitNetConfig(linear="linear", sub_norms=False)):  # fmt: skip
        for linear_class, mode in (("autobitlinear", "online"), ("bitlinear", "offline")):
            found = hf_config(hf_json(config, None, "float32", linear_class, mode), PATH)
            assert found.config == config
            if config.linear == "bitlinear":
                assert (found.linear_class, found.is_online) == (linear_class, mode == "online")


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    quantization = changes.pop("quantization", None)
    if quantization is not None:
        changes["quantization_config"] = values["quantization_config"] | quantization
    return values | changes


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (changed(MICROSOFT, architectures=["MistralForCausalLM"]), "of the architecture MistralForCausalLM; known are"),
    (changed(MICROSOFT, architectures=["LlamaForCausalLM", "X"]), "of the architecture"),
    (changed(MICROSOFT, architectures=None, model_type="qwen2"), "architecture model_type 'qwen2'"),
    (changed(MICROSOFT, hidden_act="gelu"), "hidden_act 'gelu'; known are silu and relu2"),
    (changed(MICROSOFT, attention_bias=True), "has attention_bias: layers with a bias"),
    (changed(FALCON, mlp_bias=True), "has mlp_bias"),
    (changed(FALCON, head_dim=64), "head_dim 64, but only hidden_size / num_attention_heads is computed here"),
    (changed(FALCON, head_dim="128"), "head_dim '128'"),
    (changed(FALCON, rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling llama3 by 8.0: only unscaled"),
    (changed(FALCON, rope_scaling={"type": "linear", "factor": 2}), "rope_scaling linear by 2"),
    (changed(FALCON, rope_parameters={"rope_type": "yarn"}), "rope_parameters yarn"),
    (changed(FALCON, rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
    (changed(FALCON, rope_scaling=3), "rope_scaling 3, which is no object"),
    (changed(FALCON, rope_theta=-1), "rope_theta must be a positive number"),
    (changed(MICROSOFT, quantization={"quant_method": "gptq"}), "quant_method 'gptq'; known is bitnet"),
    (changed(MICROSOFT, quantization_config=[]), "quant_method"),
    (changed(MICROSOFT, quantization={"linear_class": "linear"}), "linear_class 'linear'; known are autobitlinear"),
    (changed(MICROSOFT, quantization={"quantization_mode": "later"}), "quantization_mode 'later'; known are"),
    (changed(MICROSOFT, quantization={"use_rms_norm": True}), "rms_norm_eps 1e-06, but others with 1e-05"),
    (changed(MICROSOFT, quantization={"modules_to_not_convert": "lm_head"}), "which is no list of names"),
    (
        changed(FALCON, quantization={"modules_to_not_convert": ["lm_head", "mlp.down_proj"]}),
        "mlp.down_proj is not are",
    ),
    (
        changed(FALCON, quantization={"modules_to_not_convert": ["lm_head", "model.layers.0"]}),
        "self_attn.q_proj is not",
    ),
    (changed(FALCON, quantization={"modules_to_not_convert": ["lm_head", "model"]}), "self_attn.q_proj is not are not"),
    (changed(FALCON, quantization={"modules_to_not_convert": ["lm_head", ""]}), "some are ternary and"),
    (changed(FALCON, quantization={"modules_to_not_convert": ["lm_head", "(a+)+b"]}), "which is no name"),
    (changed(FALCON, quantization={"modules_to_not_convert": []}), "without lm_head, but a ternary output head"),
    (changed(PAPER, weight_bits=2), "weight_bits 2, input_bits 8; ternary weights and int8 activations are 1 and 8"),
    (changed(MICROSOFT, hidden_size=None), "language model: it has no hidden_size"),
    (changed(MICROSOFT, hidden_size=0), "must be a positive integer"),
    (changed(MICROSOFT, num_attention_heads=7), "must be an even multiple"),
    (changed(MICROSOFT, max_position_embeddings=2**40), "rotary tables are made for at most 1048576"),
    ({"architectures": ["LlamaForCausalLM"]}, "it has no vocab_size, hidden_size"),
    ({}, "of the architecture model_type None"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSALS, ids=range(len(REFUSALS)))
def test_what_is_not_computed_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        hf_config(values, PATH)


def test_names_that_spare_no_projection_are_no_exceptions() -> None:
    names = ["lm_head", "embed_tokens", "model.norm", "model.layer", "q_pro", "model.layers.0.self_attn.q_proj.weight"]
    assert hf_config(changed(FALCON, quantization={"modules_to_not_convert": names}), PATH)


def test_files_that_hold_no_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in (b"", b"[]", b"{", b"\xff", b"[" * 200_000, b'{"a": ' + b"1" * 100_000 + b"}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|holds no JSON object)"):
            read_json(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([MICROSOFT, PAPER, FALCON]), st.data())
def test_any_field_may_hold_anything(values: dict[str, Any], data: st.DataObject) -> None:
    value = data.draw(json_values)
    if "quantization_config" in values and data.draw(st.booleans()):
        keys = ["quant_method", "linear_class", "quantization_mode", "use_rms_norm", "rms_norm_eps",
                "modules_to_not_convert"]  # fmt: skip
        values = changed(values, quantization={data.draw(st.sampled_from(keys)): value})
    elif data.draw(st.booleans()):
        keys = ["rope_type", "type", "factor", "rope_theta", "partial_rotary_factor"]
        values = changed(values, rope_scaling={data.draw(st.sampled_from(keys)): value})
    else:
        more = ["head_dim", "mlp_bias", "rope_parameters", "partial_rotary_factor", "linear", "sub_norms"]
        values = changed(values, **{data.draw(st.sampled_from([*values, *more])): value})
    with suppress(CheckpointError):
        hf_config(values, PATH)

"""Models into GGUF files: what comes back is what was computed, gguf-py sees the same, what cannot be is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import CONFIGS, SHAPE, copy_of, logits, make_model

from bitnet import BitNetForCausalLM, nn
from bitnet._core import prepare_ternary
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.gguf_config import metadata_of
from bitnet.formats.gguf_export import EMBEDDINGS, FULL_PRECISION, WEIGHTS, plan_of, save_gguf
from bitnet.formats.gguf_file import GgufFile, Value
from bitnet.formats.gguf_names import gguf_name, halved, interleaved, published_name, scale_name
from bitnet.formats.gguf_source import open_gguf
from bitnet.formats.source import Reading, assemble

TOKENS = list(range(0, 96, 5))
EVERY = [(flavour, weights) for flavour, known in WEIGHTS.items() for weights in known]
ROUNDED = {"f16": 2**-11, "bf16": 2**-8}  # what the scale may lose where it has no tensor of its own


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.durable.sync", lambda path: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def models() -> dict[str, BitNetForCausalLM]:
    return {flavour: make_model(config) for flavour, config in CONFIGS.items()}


# ---- round trips ----


@pytest.mark.parametrize("order", ["x86", "arm"])
@pytest.mark.parametrize(("flavour", "weights"), EVERY)
def test_what_was_exported_comes_back(
    models: dict[str, BitNetForCausalLM], tmp_path: Path, flavour: str, weights: str, order: str
) -> None:
    if order == "arm" and weights != "i2_s":
        return
    model = models[flavour]
    (tmp_path / "again").mkdir()
    path, again = tmp_path / "x.gguf", tmp_path / "again" / "x.gguf"
    save_gguf(model, path, flavour=flavour, weights=weights, embeddings="f32", i2s_order=order)
    back = assemble(open_gguf(path, Reading(i2s_order=order)))
    assert back.config == model.config
    layers = dict(back.bitlinears())
    exact = plan_of(model.config, flavour, weights).scaled or weights in ("f32", "i2_s")
    for name, layer in model.bitlinears():
        np.testing.assert_array_equal(layers[name].codes().numpy(), layer.codes().numpy())
        assert layers[name].is_packed
        lost = 0.0 if exact else ROUNDED[weights]
        assert layers[name].weight_scale == pytest.approx(layer.weight_scale, rel=lost, abs=0)
    if exact:
        np.testing.assert_array_equal(logits(back, TOKENS), logits(model, TOKENS))
    save_gguf(back, again, flavour=flavour, weights=weights, embeddings="f32", i2s_order=order)
    assert again.read_bytes() == path.read_bytes()
    del back


@pytest.mark.parametrize("embeddings", EMBEDDINGS)
@pytest.mark.parametrize("flavour", ["llama.cpp", "llama"])
def test_embeddings_come_back(
    models: dict[str, BitNetForCausalLM], tmp_path: Path, flavour: str, embeddings: str
) -> None:
    model = models[flavour]
    (tmp_path / "again").mkdir()
    path, again = tmp_path / "x.gguf", tmp_path / "again" / "x.gguf"
    save_gguf(model, path, flavour=flavour, embeddings=embeddings)
    back = assemble(open_gguf(path))
    save_gguf(back, again, flavour=flavour, embeddings=embeddings)
    assert again.read_bytes() == path.read_bytes()
    most = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[embeddings]
    for name, weight in model.named_parameters():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            kept = dict(back.named_modules())[name.removesuffix(".weight")].weight
            assert np.abs(kept.to("f32").numpy() - weight.numpy()).max() <= most * np.abs(weight.numpy()).max()


def test_packed_models_are_exported_as_the_same_bytes(models: dict[str, BitNetForCausalLM], tmp_path: Path) -> None:
    for layout in ("2", "1.6"):
        packed = copy_of(models["bitnet.cpp"]).pack(layout)
        for name, model in (("a", models["bitnet.cpp"]), ("b", packed)):
            (tmp_path / name).mkdir(exist_ok=True)
            save_gguf(model, tmp_path / name / "x", flavour="bitnet.cpp", force=True)
        assert (tmp_path / "a" / "x").read_bytes() == (tmp_path / "b" / "x").read_bytes()


def test_matrices_of_zeros(models: dict[str, BitNetForCausalLM], tmp_path: Path) -> None:
    for flavour, weights in EVERY:
        model = copy_of(models[flavour])
        layer = model.model.layers[0].self_attn.k_proj
        layer.weight.copy_(np.zeros(layer.weight.shape, np.float32))
        save_gguf(model, tmp_path / "x", flavour=flavour, weights=weights, embeddings="f32", force=True)
        back = assemble(open_gguf(tmp_path / "x"))
        assert not dict(back.bitlinears())["model.layers.0.self_attn.k_proj"].codes().numpy().any()
        assert np.isfinite(logits(back, TOKENS)).all()


@pytest.mark.parametrize("weights", FULL_PRECISION)
def test_a_full_precision_model_is_a_llama(tmp_path: Path, weights: str) -> None:
    model = make_model(SHAPE.replace(sub_norms=False, linear="linear", hidden_size=36, num_attention_heads=6))
    save_gguf(model, tmp_path / "x", flavour="llama", weights=weights, embeddings=weights)
    back = assemble(open_gguf(tmp_path / "x"))
    assert back.config == model.config
    assert back.num_parameters() == model.num_parameters()
    for (name, weight), (_, kept) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        lost = ROUNDED.get(weights, 0.0) * (weight.ndim == 2)
        np.testing.assert_allclose(kept.numpy(), weight.numpy(), rtol=lost, atol=lost * 2**-14, err_msg=name)


# ---- what the file is ----


@pytest.mark.parametrize(("flavour", "weights"), [pair for pair in EVERY if pair[1] != "i2_s"])
def test_gguf_py_sees_the_weights(
    models: dict[str, BitNetForCausalLM], tmp_path: Path, flavour: str, weights: str
) -> None:
    gguf = pytest.importorskip("gguf")
    model = models[flavour]
    save_gguf(model, tmp_path / "x", flavour=flavour, weights=weights)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x").tensors}
    for name, module in model.named_modules():
        if isinstance(module, nn.BitLinear):
            tensor = tensors.pop(gguf_name(f"{name}.weight"))
            assert tensor.tensor_type.name == weights.upper()
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            scale = tensors.pop(scale_name(f"{name}.weight"), None)
            if scale is not None:
                assert scale.data.tolist() == [module.weight_scale]
                values = values * scale.data[0]
            wanted = module.codes().numpy() * np.float32(module.weight_scale)
            if flavour == "llama" and name.endswith(("q_proj", "k_proj")):
                d = model.config.head_dim  # new row 2j + b of a head is old row b d/2 + j
                rows = [h * d + b * d // 2 + j for h in range(len(wanted) // d) for j in range(d // 2) for b in (0, 1)]
                wanted = wanted[rows]
            np.testing.assert_allclose(values, wanted, rtol=ROUNDED.get(weights, 0))
    norms = {name: tensor for name, tensor in tensors.items() if name.endswith("norm.weight")}
    assert all(tensor.tensor_type.name == "F32" for tensor in norms.values())
    assert len(norms) == 1 + 2 * (4 if model.config.sub_norms else 2)
    assert tensors.keys() - norms.keys() == {"token_embd.weight"} | ({"output.weight"} if flavour == "llama" else set())
    assert tensors["token_embd.weight"].tensor_type.name == "F16"


@pytest.mark.parametrize(
    ("flavour", "weights", "size"), [("llama.cpp", "tq2_0", 66), ("llama.cpp", "tq1_0", 54), ("bitnet.cpp", "i2_s", 64)]
)
def test_sizes(models: dict[str, BitNetForCausalLM], tmp_path: Path, flavour: str, weights: str, size: int) -> None:
    save_gguf(models[flavour], tmp_path / "x", flavour=flavour, weights=weights)
    entry = GgufFile(tmp_path / "x").tensors["blk.1.ffn_up.weight"]
    assert entry.shape == (512, 256)
    assert entry.bytes == 512 * 256 // 256 * size + (32 if weights == "i2_s" else 0)


def test_metadata(models: dict[str, BitNetForCausalLM], tmp_path: Path) -> None:
    save_gguf(models["bitnet.cpp"], tmp_path / "small.gguf", flavour="bitnet.cpp", chat_template="{{ messages }}")
    found = GgufFile(tmp_path / "small.gguf").metadata
    assert found == {
        "general.architecture": Value("str", "bitnet-b1.58"),
        "general.name": Value("str", "small"),
        "general.file_type": Value("u32", 40),
        "general.quantization_version": Value("u32", 2),
        "bitnet-b1.58.block_count": Value("u32", 2),
        "bitnet-b1.58.context_length": Value("u32", 128),
        "bitnet-b1.58.embedding_length": Value("u32", 256),
        "bitnet-b1.58.feed_forward_length": Value("u32", 512),
        "bitnet-b1.58.attention.head_count": Value("u32", 4),
        "bitnet-b1.58.attention.head_count_kv": Value("u32", 2),
        "bitnet-b1.58.attention.layer_norm_rms_epsilon": Value("f32", float(np.float32(1e-5))),
        "bitnet-b1.58.rope.freq_base": Value("f32", 500000.0),
        "bitnet-b1.58.rope.dimension_count": Value("u32", 64),
        "bitnet-b1.58.vocab_size": Value("u32", 96),
        "bitnet-b1.58.hidden_activation": Value("str", "relu2"),
        "tokenizer.ggml.model": Value("str", "no_vocab"),
        "tokenizer.chat_template": Value("str", "{{ messages }}"),
    }


@pytest.mark.parametrize(
    ("flavour", "weights", "embeddings", "number", "quantized"),
    [
        ("llama.cpp", None, None, 37, True), ("llama.cpp", "tq1_0", None, 36, True), ("ik", None, None, 1, False),
        ("ik", "f32", "q8_0", 0, True), ("llama", "bf16", None, 32, False), ("llama", "i2_s", None, 40, True),
    ],
)  # fmt: skip
def test_file_types(models: dict[str, BitNetForCausalLM], tmp_path: Path, flavour: str, weights: str | None,
                    embeddings: str | None, number: int, quantized: bool) -> None:  # fmt: skip
    save_gguf(models[flavour], tmp_path / "x", flavour=flavour, weights=weights, embeddings=embeddings)
    found = GgufFile(tmp_path / "x").metadata
    assert found["general.file_type"].value == number
    assert ("general.quantization_version" in found) == quantized


def test_the_architecture_follows_the_activation() -> None:
    silu, relu2 = SHAPE.replace(tie_word_embeddings=True), CONFIGS["ik"]
    for flavour in ("ik", "bitnet.cpp"):
        assert plan_of(relu2, flavour).arch == "bitnet-b1.58"
        assert plan_of(silu, flavour).arch == "bitnet"
    assert plan_of(silu, "llama.cpp").arch == plan_of(relu2, "llama.cpp", force_activation=True).arch == "bitnet"
    assert metadata_of(relu2, "bitnet", "x", 0, False)["bitnet.hidden_activation"].value == "relu2"


def test_names_there_and_back() -> None:
    model = BitNetForCausalLM(SHAPE)
    names = [name for name, _ in model.named_parameters()]
    assert [published_name(gguf_name(name)) for name in names] == names
    assert gguf_name("model.layers.11.mlp.down_proj.weight") == "blk.11.ffn_down.weight"
    assert scale_name("model.layers.0.self_attn.o_proj.weight") == "blk.0.attn_output.scale"
    for unknown in ("blk.0.attn_q.bias", "blk.00.attn_q.weight", "blk.-1.attn_q.weight", "blk.0.ffn.weight", "x"):
        assert published_name(unknown) == unknown
    rows = np.arange(16)[:, None]  # two heads
    assert interleaved(rows, 8)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    np.testing.assert_array_equal(halved(interleaved(rows, 8), 8), rows)


def test_progress_and_files_that_exist(models: dict[str, BitNetForCausalLM], tmp_path: Path) -> None:
    seen: list[str] = []

    def bar(names: list[str]) -> Any:
        for name in names:
            yield name
            seen.append(name)

    save_gguf(models["ik"], tmp_path / "x", flavour="ik", progress=bar)
    assert seen == list(GgufFile(tmp_path / "x").tensors)
    with pytest.raises(CheckpointError, match="x exists already; --force replaces it"):
        save_gguf(models["ik"], tmp_path / "x", flavour="ik")


# ---- refusals ----

REFUSALS: list[tuple[dict[str, Any], str, dict[str, Any], str]] = [
    ({}, "gguf", {}, "no flavour 'gguf'; they have llama.cpp, bitnet.cpp, ik, llama"),
    ({}, "llama.cpp", {"weights": "i2_s"}, "flavour llama.cpp has no weights 'i2_s'; it has tq2_0, tq1_0, f16"),
    ({}, "ik", {"weights": "tq2_0"}, "flavour ik has no weights 'tq2_0'; it has f16, f32"),
    ({}, "ik", {"embeddings": "q6_k"}, "no embeddings 'q6_k'; it has f16, f32, bf16, q8_0"),
    ({}, "bitnet.cpp", {"i2s_order": "mips"}, "no i2s_order 'mips'; it has x86, arm"),
    ({"hidden_act": "relu2"}, "llama.cpp", {}, "hidden_act is relu2, and llama.cpp computes silu in architecture "
     "bitnet whatever the file says; flavours bitnet.cpp and ik have it"),
    ({"hidden_act": "relu2", "sub_norms": False}, "llama", {}, "llama.cpp computes silu in architecture llama"),
    ({"tie_word_embeddings": False}, "llama.cpp", {}, "tie_word_embeddings is False"),
    ({"tie_word_embeddings": False}, "ik", {}, "tie_word_embeddings is False"),
    ({"tie_word_embeddings": False}, "bitnet.cpp", {}, "no flavour with sub-norms has one of its own"),
    ({"sub_norms": False}, "llama.cpp", {}, "sub_norms is False, .* requires them; flavour llama works"),
    ({"sub_norms": False}, "bitnet.cpp", {}, "flavour llama works"),
    ({}, "llama", {}, "sub_norms is True, and architecture llama has none; flavours llama.cpp, bitnet.cpp and ik"),
    ({"quantize_head": True, "tie_word_embeddings": False}, "ik", {}, "quantize_head is True, .* no flavour works"),
    ({"use_rms_norm": True}, "llama.cpp", {}, "use_rms_norm is True, for which no architecture"),
    ({"input_norms": False}, "bitnet.cpp", {}, "input_norms is False, for which no architecture"),
    ({"linear": "linear"}, "ik", {}, "full precision .* flavour ik is for ternary ones; no flavour works"),
    ({"linear": "linear", "sub_norms": False}, "llama.cpp", {}, "full precision .*; flavour llama works"),
    ({"linear": "linear", "sub_norms": False}, "llama", {"weights": "tq2_0"}, "full-precision .* no weights 'tq2_0'"),
    ({"hidden_size": 128, "num_attention_heads": 4}, "llama.cpp", {}, "hidden_size is 128, no multiple of the 256 "
     "values that TQ2_0 takes together; weights f16 or bf16 or f32 have no blocks"),
    ({"intermediate_size": 320}, "bitnet.cpp", {}, "intermediate_size is 320, no multiple of the 128 values that I2_S"),
    ({"intermediate_size": 352}, "bitnet.cpp", {"i2s_order": "arm"}, "is 352, no multiple of the 64 values"),
    ({"hidden_size": 48, "num_attention_heads": 4}, "ik", {"embeddings": "q8_0"}, "hidden_size is 48, .*32 values"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "flavour", "options", "sentence"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(changes: dict[str, Any], flavour: str, options: dict[str, Any], sentence: str) -> None:
    config = SHAPE.replace(**{"tie_word_embeddings": True, **changes})
    with pytest.raises(ConfigError, match=sentence):
        plan_of(config, flavour, **options)


def test_a_refused_model_leaves_no_file(tmp_path: Path) -> None:
    model = make_model(CONFIGS["ik"])
    with pytest.raises(ConfigError, match=r"llama\.cpp computes silu"):
        save_gguf(model, tmp_path / "x", flavour="llama.cpp")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = prepare_ternary(layer.codes(), 1e-9, "2")
    with pytest.raises(ConfigError, match=r"up_proj.weight cannot be written: the scale 1e-09 is below what F16 holds"):
        save_gguf(model, tmp_path / "x", flavour="ik")
    model = make_model(CONFIGS["ik"])
    model.model.embed_tokens.weight.copy_(np.full(model.model.embed_tokens.weight.shape, 1e6, np.float32))
    with pytest.raises(ConfigError, match=r"x: model.embed_tokens.weight cannot be written: 1e\+06 is beyond .*; f32"):
        save_gguf(model, tmp_path / "x", flavour="ik")
    assert os.listdir(tmp_path) == []

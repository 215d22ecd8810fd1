"""Models in GGUF files that others wrote: what they are taken for, what they may leave out, and what is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import CONFIGS, logits, make_model

from bitnet import BitNetConfig, BitNetForCausalLM
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.gguf_blocks import encode, encode_codes
from bitnet.formats.gguf_config import metadata_of
from bitnet.formats.gguf_export import save_gguf
from bitnet.formats.gguf_file import GgufFile, Part, Value, write
from bitnet.formats.gguf_names import gguf_name, interleaved, is_projection, is_rotated
from bitnet.formats.gguf_source import open_gguf
from bitnet.formats.gguf_types import F16, F32, I2_S, Q6_K, Q8_0, TQ2_0
from bitnet.formats.source import Codes, Floats, Reading, assemble

TOKENS = list(range(0, 96, 7))
Metadata = dict[str, Value]
Parts = dict[str, Part]
Change = Callable[[Metadata, Parts], Any]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.durable.sync", lambda path: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def changed(source: Path, target: Path, change: Change) -> Path:
    """A copy of a file with other metadata or tensors."""
    file = GgufFile(source)
    metadata = dict(file.metadata)
    parts = {name: Part(name, e.shape, e.type, partial(bytes, file.view(e))) for name, e in file.tensors.items()}
    change(metadata, parts)
    write(target, metadata, list(parts.values()), force=True)
    return target


def masters(model: BitNetForCausalLM, path: Path, arch: str) -> Path:
    """The latent weights in F32, as a converter that knows nothing of ternary weights writes them."""
    config, parts = model.config, []
    for name, weight in model.named_parameters():
        array = weight.numpy(copy=True)
        if arch == "llama" and is_rotated(name):
            array = interleaved(array, config.head_dim)
        parts.append(Part(gguf_name(name), array.shape, F32, lambda array=array: array))  # type: ignore[misc]
    metadata = metadata_of(config, arch, "x", 0, False)
    del metadata[f"{arch}.hidden_activation"]
    write(path, metadata, parts, force=True)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for flavour, config in CONFIGS.items():
        save_gguf(make_model(config), folder / flavour, flavour=flavour)
    save_gguf(make_model(CONFIGS["llama"]), folder / "llama f16", flavour="llama", weights="f16")
    return {path.name: path for path in folder.iterdir()}


# ---- what a file is taken for ----


@pytest.mark.parametrize(
    ("arch", "activation"), [("bitnet", "silu"), ("bitnet-b1.58", "relu2"), ("bitnet-25", "relu2")]
)
def test_masters_are_trained_on(tmp_path: Path, arch: str, activation: str) -> None:
    model = make_model(CONFIGS["ik"].replace(hidden_act=activation))
    source = open_gguf(masters(model, tmp_path / "x", arch))
    assert source.is_trainable and not source.ternary
    back = assemble(source)
    assert back.config == model.config
    for name, weight in back.state_dict().items():
        np.testing.assert_array_equal(weight, model.state_dict()[name])
    np.testing.assert_array_equal(logits(back, TOKENS), logits(model, TOKENS))


def test_a_llama_in_floats_is_of_full_precision_unless_told(tmp_path: Path) -> None:
    model = make_model(CONFIGS["llama"].replace(linear="linear"))
    path = masters(model, tmp_path / "x", "llama")
    back = assemble(open_gguf(path))
    assert back.config == model.config
    np.testing.assert_array_equal(logits(back, TOKENS), logits(model, TOKENS))
    ternary = assemble(open_gguf(path, Reading(linear="bitlinear")))
    assert ternary.config == model.config.replace(linear="bitlinear")
    assert ternary.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("flavour", ["llama.cpp", "ik", "llama", "llama f16"])
def test_ternary_matrices_can_be_taken_as_floats(files: dict[str, Path], flavour: str) -> None:
    model = assemble(open_gguf(files[flavour]))
    floats = assemble(open_gguf(files[flavour], Reading(linear="linear")))
    assert floats.config == model.config.replace(linear="linear")
    for (_, layer), (name, weight) in zip(
        model.bitlinears(), [(n, w) for n, w in floats.named_parameters() if is_projection(n)], strict=True
    ):
        wanted = layer.codes().numpy() * np.float32(layer.weight_scale)
        np.testing.assert_array_equal(weight.numpy(), wanted, err_msg=name)


def test_the_activation_is_told_in_this_order(files: dict[str, Path], tmp_path: Path) -> None:
    def tell(activation: str | None) -> Path:
        key = "bitnet-b1.58.hidden_activation"
        edit: Change = lambda m, p: m.pop(key) if activation is None else m.update({key: Value("str", activation)})  # noqa: E731
        return changed(files["ik"], tmp_path / "x", edit)

    assert open_gguf(tell(None)).config.hidden_act == "relu2"
    assert open_gguf(tell("silu")).config.hidden_act == "silu"
    assert open_gguf(tell("relu_sqr")).config.hidden_act == "relu2"
    assert open_gguf(tell("silu"), Reading(hidden_act="relu2")).config.hidden_act == "relu2"
    with pytest.raises(CheckpointError, match="hidden_activation is 'gelu', not one of silu"):
        open_gguf(tell("gelu"))
    with pytest.raises(ConfigError, match="hidden_act must be one of silu, relu2, not 'gelu'"):
        open_gguf(tell(None), Reading(hidden_act="gelu"))


def test_i2_s_in_the_order_of_arm_is_read_where_it_is_told(tmp_path: Path) -> None:
    model = make_model(CONFIGS["bitnet.cpp"])
    save_gguf(model, tmp_path / "x", flavour="bitnet.cpp", i2s_order="arm")
    wrong, right = (assemble(open_gguf(tmp_path / "x", Reading(i2s_order=order))) for order in ("x86", "arm"))
    for (_, layer), (_, a), (_, b) in zip(model.bitlinears(), right.bitlinears(), wrong.bitlinears(), strict=True):
        np.testing.assert_array_equal(a.codes().numpy(), layer.codes().numpy())
        assert (b.codes().numpy() != layer.codes().numpy()).any()
    with pytest.raises(ConfigError, match="i2s_order must be one of x86, arm, not 'mips'"):
        open_gguf(tmp_path / "x", Reading(i2s_order="mips"))
    with pytest.raises(ConfigError, match="linear must be one of bitlinear, linear, not 'ternary'"):
        open_gguf(tmp_path / "x", Reading(linear="ternary"))


def test_metadata_that_may_be_missing(files: dict[str, Path], tmp_path: Path) -> None:
    def leave_out(metadata: Metadata, parts: Parts) -> None:
        for key in ("rope.freq_base", "rope.dimension_count", "vocab_size", "hidden_activation"):
            del metadata[f"llama.{key}"]
        del metadata["general.name"], metadata["tokenizer.ggml.model"]
        metadata["llama.rope.scaling.type"] = Value("str", "linear")
        metadata["llama.rope.scaling.factor"] = Value("f32", 1.0)

    model = assemble(open_gguf(changed(files["llama"], tmp_path / "x", leave_out)))
    assert model.config == CONFIGS["llama"]
    about = vars(model)
    assert about["tokenizer"] is None and about["checkpoint"] == tmp_path / "x"
    assert about["provenance"]["general.architecture"] == "llama"


# ---- numbers ----


def with_matrix(name: str, kind: Any, make: Callable[[], Any]) -> Change:
    def edit(metadata: Metadata, parts: Parts) -> None:
        parts[name] = replace(parts[name], type=kind, make=make)

    return edit


def test_blocks_with_different_scales_are_no_ternary_matrix(files: dict[str, Path], tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (256, 256)).astype(np.int8)
    data = np.concatenate([encode_codes(TQ2_0, codes[:128], 1.0, "x86"), encode_codes(TQ2_0, codes[128:], 0.5, "x86")])
    edit = with_matrix("blk.1.attn_output.weight", TQ2_0, lambda: data)
    path = changed(files["llama.cpp"], tmp_path / "x", edit)
    with pytest.raises(CheckpointError, match=r"attn_output.weight \(TQ2_0\) has blocks with different scales"):
        assemble(open_gguf(path))
    model = assemble(open_gguf(path, Reading(linear="linear")))
    factor = dict(make_model(CONFIGS["llama.cpp"]).bitlinears())["model.layers.1.self_attn.o_proj"].weight_scale
    wanted = codes * np.repeat(np.float32([1.0, 0.5]), 128)[:, None] * np.float32(factor)
    np.testing.assert_array_equal(model.model.layers[1].self_attn.o_proj.weight.numpy(), wanted)
    # In a llama, which may be of full precision and squeezed, all that is a reason to take it for that.
    llama = changed(files["llama"], tmp_path / "y", edit)
    assert open_gguf(llama).config.linear == "linear"


def test_a_block_without_a_scale_is_zeros(files: dict[str, Path], tmp_path: Path) -> None:
    codes = np.ones((256, 256), np.int8)
    data = encode_codes(TQ2_0, codes, 1.0, "x86").reshape(256, 66)
    data[3, -2:] = 0
    codes[3] = 0
    path = changed(files["llama.cpp"], tmp_path / "x", with_matrix("blk.1.attn_output.weight", TQ2_0, lambda: data))
    kept = dict(assemble(open_gguf(path)).bitlinears())["model.layers.1.self_attn.o_proj"]
    np.testing.assert_array_equal(kept.codes().numpy(), codes)


def test_a_matrix_whose_scale_is_zero_is_zeros(files: dict[str, Path], tmp_path: Path) -> None:
    def edit(metadata: Metadata, parts: Parts) -> None:
        parts["blk.0.ffn_up.scale"] = replace(parts["blk.0.ffn_up.scale"], make=lambda: np.zeros(1, np.float32))

    found = open_gguf(changed(files["llama.cpp"], tmp_path / "x", edit)).read("model.layers.0.mlp.up_proj.weight")
    assert isinstance(found, Codes) and not found.codes.any() and found.scale > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: np.float32([-s]), "has the scale -.*, which is no positive number"),
        (lambda s: np.float32([np.nan]), "has the scale nan"),
        (lambda s: np.float32([np.inf]), "has the scale inf"),
        (lambda s: np.float32([s, s]), r"ffn_up.scale \(F32\) has shape \(2,\), where one F32 is expected"),
    ],
)
def test_scales_that_are_none(files: dict[str, Path], tmp_path: Path, change: Any, sentence: str) -> None:
    def edit(metadata: Metadata, parts: Parts) -> None:
        old = parts["blk.0.ffn_up.scale"]
        made = change(np.frombuffer(old.make(), np.float32)[0])
        parts["blk.0.ffn_up.scale"] = Part(old.name, made.shape, F32, lambda: made)

    with pytest.raises(CheckpointError, match=sentence):
        assemble(open_gguf(changed(files["llama.cpp"], tmp_path / "x", edit)))


def test_one_value_that_is_no_code_is_found(files: dict[str, Path], tmp_path: Path) -> None:
    def edit(metadata: Metadata, parts: Parts) -> None:
        old = parts["blk.1.ffn_gate.weight"]
        values = np.frombuffer(old.make(), np.float16).copy()
        values[-1] = 0.125
        parts[old.name] = replace(old, make=lambda: values)

    with pytest.raises(CheckpointError, match=r"ffn_gate.weight \(F16\) has more than one size of values"):
        assemble(open_gguf(changed(files["ik"], tmp_path / "x", edit)))


def test_codes_that_mean_nothing_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    for flavour, kind in (("llama.cpp", TQ2_0), ("bitnet.cpp", I2_S)):
        data = np.full(kind.bytes_of((256, 256)), 0xFF, np.uint8)
        data[-32:] = 0  # I2_S: its scale is that of zeros; TQ2_0: 0x0000, as of every block
        path = changed(files[flavour], tmp_path / "x", with_matrix("blk.0.attn_q.weight", kind, lambda d=data: d))
        with pytest.raises(CheckpointError, match=r"attn_q.weight .* cannot be read: byte 0 of its codes is 0xff"):
            assemble(open_gguf(path))


@pytest.mark.parametrize("kind", [Q8_0, Q6_K], ids=lambda kind: kind.name)
def test_tables_in_blocks(files: dict[str, Path], tmp_path: Path, kind: Any) -> None:
    quants = pytest.importorskip("gguf.quants")
    table = np.random.default_rng(0).normal(size=(96, 256)).astype(np.float32)
    if kind is Q8_0:
        data = encode(Q8_0, table)
    else:
        data = np.random.default_rng(1).integers(0, 256, (96, 210)).astype(np.uint8)
        data[:, -1] &= 0x0B
    path = changed(files["llama.cpp"], tmp_path / "x", with_matrix("token_embd.weight", kind, lambda: data))
    found = open_gguf(path).read("model.embed_tokens.weight")
    wanted = quants.dequantize(data.reshape(96, -1), quants.GGMLQuantizationType[kind.name])
    assert isinstance(found, Floats) and found.form == "f32"
    np.testing.assert_array_equal(np.frombuffer(found.data, np.float32).reshape(wanted.shape), wanted)


def test_tables_that_are_bf16_stay_small(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And can be written in every type again, some rows at a time."""
    table = np.random.default_rng(0).integers(-127, 128, (96, 256)).astype(np.float16) / 1024
    path = changed(files["llama.cpp"], tmp_path / "x", with_matrix("token_embd.weight", F16, lambda: table))
    monkeypatch.setattr("bitnet.formats.gguf_export.ROWS", 7)
    for embeddings in ("f16", "f32", "bf16"):
        model = assemble(open_gguf(path))
        assert model.model.embed_tokens.weight.dtype == "bf16"
        np.testing.assert_array_equal(model.model.embed_tokens.weight.to("f32").numpy(), table.astype(np.float32))
        save_gguf(model, path, flavour="llama.cpp", embeddings=embeddings, force=True)


# ---- files that are wrong ----


def put(key: str, kind: str, value: Any) -> Change:
    return lambda metadata, parts: metadata.update({key: Value(kind, value)})


def drop(key: str) -> Change:
    return lambda metadata, parts: (metadata if key in metadata else parts).pop(key)


def rename(old: str, new: str) -> Change:
    return lambda metadata, parts: parts.update({old: replace(parts[old], name=new)})


WRONG: list[tuple[Change, str]] = [
    (drop("general.architecture"), "general.architecture is none; those that are read are bitnet, bitnet-b1.58"),
    (put("general.architecture", "str", "qwen2"), "general.architecture is 'qwen2'"),
    (put("general.architecture", "u32", 3), "general.architecture is '3'|general.architecture is 3"),
    (drop("llama.block_count"), "llama.block_count is missing, not one number"),
    (put("llama.block_count", "u32", 0), "define no model: num_hidden_layers must be a positive integer, not 0"),
    (put("llama.block_count", "u32", 3), "it has no model.layers.2.self_attn.q_proj.weight"),
    (put("llama.block_count", "u32", 2**32 - 1), "it has no model.layers.2"),
    (put("llama.block_count", "u32", 1), "it has model.layers.1.*, for which its config has no place"),
    (put("llama.block_count", "i32", -1), "num_hidden_layers must be a positive integer, not -1"),
    (put("llama.block_count", "str", "2"), r"llama.block_count is '2' \(str\), not one number"),
    (put("llama.feed_forward_length", "[u32]", [512, 512]), r"feed_forward_length is .* \(\[u32\]\), not one number"),
    (put("llama.feed_forward_length", "u32", 511), "has shape .*, but .* by its config"),
    (put("llama.attention.head_count", "u32", 0), "define no model: num_attention_heads"),
    (put("llama.attention.head_count", "u32", 3), "define no model|rope.dimension_count"),
    (put("llama.attention.head_count_kv", "u32", 3), "define no model: .*multiple of num_key_value_heads 3"),
    (put("llama.attention.key_length", "u32", 128), "attention.key_length is '128' .*, not 64, the width of a head"),
    (put("llama.rope.dimension_count", "u32", 32), "rope.dimension_count is '32' .*, not 64"),
    (put("llama.context_length", "u64", 2**40), "context_length is '1099511627776' .*, not 1 to"),
    (put("llama.context_length", "u32", 0), "context_length is '0'"),
    (put("llama.vocab_size", "u32", 97), "vocab_size is '97' .*, not 96, the rows of its embeddings"),
    (put("llama.attention.layer_norm_rms_epsilon", "f32", float("nan")), "rms_norm_eps must be a positive number"),
    (put("llama.attention.layer_norm_rms_epsilon", "f64", -1e300), "rms_norm_eps must be a positive number"),
    (put("llama.rope.freq_base", "f32", float("inf")), "rope_theta must be a positive number"),
    (put("llama.rope.scaling.factor", "f32", 4.0), "rope.scaling.factor is '4.0' .*, not 1"),
    (put("llama.rope.scaling.type", "str", "yarn"), "rope.scaling.type is 'yarn' .*, not none or linear"),
    (put("llama.expert_count", "u32", 8), "expert_count is '8' .*, not 0"),
    (drop("token_embd.weight"), "it has no table of embeddings token_embd.weight"),
    (drop("output_norm.weight"), "it has no model.norm.weight"),
    (drop("blk.1.ffn_down.weight"), "it has no model.layers.1.mlp.down_proj.weight"),
    (rename("blk.0.attn_v.weight", "blk.0.attn_v.bias"), "it has no model.layers.0.self_attn.v_proj.weight"),
    (rename("output_norm.weight", "model.embed_tokens.weight"), "two of its tensors are names of one weight"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=range(len(WRONG)))
def test_files_that_are_wrong(files: dict[str, Path], tmp_path: Path, change: Change, sentence: str) -> None:
    path = changed(files["llama f16"], tmp_path / "x.gguf", change)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        assemble(open_gguf(path))
    assert str(path) in str(caught.value)


def test_tensors_that_no_config_wants(files: dict[str, Path], tmp_path: Path) -> None:
    ones = np.ones(32, np.float32)
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_norm.scale", "blk.7.attn_norm.weight"):
        edit: Change = lambda m, p, name=name: p.update({name: Part(name, (32,), F32, lambda: ones)})  # type: ignore[misc]  # noqa: E731
        with pytest.raises(CheckpointError, match="for which its config has no place"):
            assemble(open_gguf(changed(files["llama.cpp"], tmp_path / "x", edit)))


def tiny(folder: Path) -> list[Path]:
    """Files of a few kilobytes, of each way to say codes."""
    config = BitNetConfig(8, 16, 16, 1, 2, 1, max_position_embeddings=8, tie_word_embeddings=True)
    paths = []
    for flavour, changes in (("ik", {}), ("llama", {"sub_norms": False, "tie_word_embeddings": False})):
        for weights in ("f16", "f32"):
            path = folder / f"{flavour} {weights}"
            save_gguf(make_model(config.replace(**changes)), path, flavour=flavour, weights=weights)
            paths.append(path)
    config = config.replace(hidden_size=256, intermediate_size=256)
    for flavour in ("llama.cpp", "bitnet.cpp"):
        save_gguf(make_model(config), folder / flavour, flavour=flavour)
        paths.append(folder / flavour)
    return paths


def test_mutations_of_valid_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of the header and many of the data, changed one at a time: a model, or a sentence."""
    outcomes = {True: 0, False: 0}
    rng = np.random.default_rng(0)
    for path in tiny(tmp_path):
        data = path.read_bytes()
        header = min(entry.offset for entry in GgufFile(path).tensors.values())
        small = len(data) < 20000
        places = [*range(0, header, 2 if small else 40), *rng.integers(header, len(data), 200 if small else 10)]
        for at in places:
            bad = bytearray(data)
            bad[at] = bad[at] ^ 1 << at % 8 if rng.integers(2) else rng.integers(256)
            monkeypatch.setattr("bitnet.formats.gguf_file.map_file", lambda *_, bad=bytes(bad): bad)
            monkeypatch.setattr(GgufFile, "release", lambda self, entry: None)
            try:
                source = open_gguf(path)
                for name in source.shapes:
                    source.read(name)
                outcomes[True] += 1
            except CheckpointError:
                outcomes[False] += 1
    assert min(outcomes.values()) > 300


def test_files_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"general.architecture": Value("str", "llama")}, [])
    with pytest.raises(CheckpointError, match="it has no table of embeddings"):
        open_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(CheckpointError, match=r"its general\.architecture is none"):
        open_gguf(path)

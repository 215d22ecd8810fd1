"""Hugging Face folders into models: every published way to store one, against transformers on the same folder."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the checkpoints are made with transformers on PyTorch")
pytest.importorskip("transformers", minversion="5", reason="BitNet with online quantization needs it")
pytest.importorskip("accelerate", reason="transformers' loader of quantized models wants it")

from reference import hugging_face  # noqa: E402
from reference.hugging_face import (  # noqa: E402
    CONFIGS,
    Case,
    assert_alike,
    assert_near,
    change_config,
    logits,
    make_case,
    opened,
    quantization,
    save_dense,
    save_packed,
)
from safetensors.numpy import load_file, save_file  # noqa: E402

from bitnet import BitNetForCausalLM  # noqa: E402
from bitnet.errors import BitnetError, CheckpointError  # noqa: E402
from bitnet.formats.hf_source import open_hf, pack_rows, unpack_rows  # noqa: E402
from bitnet.formats.source import Reading, assemble  # noqa: E402
from bitnet.formats.weights import codes_of  # noqa: E402
from bitnet.tokenizer import ByteTokenizer  # noqa: E402

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: make_case(config) for name, config in CONFIGS.items()}


def read(folder: Path, **reading: Any) -> BitNetForCausalLM:
    return assemble(open_hf(folder, Reading(**reading)))


def agree(folder: Path, case: Case, model: BitNetForCausalLM) -> None:
    theirs = opened(folder)
    assert_near(logits(model, case.tokens), logits(theirs, case.tokens))
    tokens = np.random.default_rng(1).integers(0, case.config.vocab_size, (4, 48))
    assert_alike(logits(model, tokens), logits(theirs, tokens))


# ---- every variant --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2b-4t", "llama"])
def test_masters_quantized_online(tmp_path: Path, cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    save_dense(tmp_path, case)
    quantization(tmp_path, linear_class="autobitlinear", quantization_mode="online")
    model = read(tmp_path)
    assert model.config == case.config
    assert not any(layer.is_packed for _, layer in model.bitlinears())
    for parameter, weight in model.state_dict().items():
        np.testing.assert_array_equal(weight, case.weights[parameter])
    agree(tmp_path, case, model)


PACKED: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "microsoft": ("2b-4t", False, {"linear_class": "autobitlinear", "quantization_mode": "offline"}),
    "sub-norms, divides": ("2b-4t", True, {"linear_class": "bitlinear"}),
    "falcon, hf1bitllm": ("llama", True, {"modules_to_not_convert": ["lm_head"]}),
    "llama, multiplies": ("llama", False, {"linear_class": "autobitlinear"}),
}


@pytest.mark.parametrize("variant", PACKED)
def test_packed_codes(tmp_path: Path, cases: dict[str, Case], variant: str) -> None:
    name, divides, fields = PACKED[variant]
    case = cases[name]
    save_packed(tmp_path, case, divides, **fields)
    model = read(tmp_path)
    assert model.config == case.config
    assert all(layer.is_packed for _, layer in model.bitlinears())
    for path, layer in case.model().bitlinears():
        own = codes_of(layer)
        got = codes_of(dict(model.bitlinears())[path])
        np.testing.assert_array_equal(got.codes, own.codes)
        assert abs(got.scale / own.scale - 1) < 3e-7
    agree(tmp_path, case, model)


def test_codes_that_are_stored_unpacked(tmp_path: Path, cases: dict[str, Case]) -> None:
    case = cases["2b-4t"]
    save_packed(tmp_path, case, False, **PACKED["microsoft"][2])
    want = logits(read(tmp_path), case.tokens)
    state = {n: t.numpy() for n, t in opened(tmp_path).state_dict().items() if n != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_hf(tmp_path)
    assert source.tensors.entries[Q].dtype == "F32"
    assert (source.is_trainable, len(source.ternary)) == (False, 14)
    np.testing.assert_array_equal(logits(assemble(source), case.tokens), want)
    assert_near(want, logits(opened(tmp_path), case.tokens))


def test_the_papers_models(tmp_path: Path, cases: dict[str, Case]) -> None:
    """Their code is not in transformers; what it computes is what 2B-4T computes, under other names."""
    case = cases["2b-4t"]
    save_dense(tmp_path, case)
    names = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    renamed = {}
    for name, array in load_file(tmp_path / "model.safetensors").items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = array
    for i in range(2):
        renamed[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(renamed, tmp_path / "model.safetensors")
    change_config(tmp_path, architectures=["BitnetForCausalLM"], model_type="llama", weight_bits=1, input_bits=8)
    model = read(tmp_path)
    assert model.config == case.config
    np.testing.assert_array_equal(logits(model, case.tokens), logits(case.model(), case.tokens))


@pytest.mark.parametrize("name", ["2b-4t", "llama"])
def test_full_precision_and_masters_that_look_like_it(tmp_path: Path, cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    save_dense(tmp_path, case)
    dense = read(tmp_path)
    assert dense.config == case.config.replace(linear="linear")
    assert_near(logits(dense, case.tokens), logits(opened(tmp_path), case.tokens))
    model = read(tmp_path, linear="bitlinear")
    assert model.config == case.config
    np.testing.assert_array_equal(logits(model, case.tokens), logits(case.model(), case.tokens))
    quantization(tmp_path, linear_class="autobitlinear", quantization_mode="online")
    np.testing.assert_array_equal(logits(read(tmp_path, linear="linear"), case.tokens), logits(dense, case.tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_floats_of_two_bytes(tmp_path: Path, cases: dict[str, Case], dtype: str) -> None:
    case, kind = cases["2b-4t"], getattr(torch, dtype)
    save_dense(tmp_path / "masters", case, kind)
    model = read(tmp_path / "masters", linear="bitlinear")
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(weight, torch.from_numpy(case.weights[name]).to(kind).float().numpy())
    save_packed(tmp_path / "packed", case, False, kind, **PACKED["microsoft"][2])
    packed = read(tmp_path / "packed")
    assert packed.model.embed_tokens.weight.dtype == ("bf16" if dtype == "bfloat16" else "f32")
    scale = next(packed.bitlinears())[1].weight_scale
    assert scale == float(torch.tensor(np.abs(case.weights[Q]).mean()).to(kind))


def test_norms_inside_projections(tmp_path: Path, cases: dict[str, Case]) -> None:
    case = cases["inner norms"]
    fields = {"linear_class": "autobitlinear", "use_rms_norm": True, "rms_norm_eps": case.config.rms_norm_eps}
    save_packed(tmp_path, case, False, **fields)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gains = {n.replace(".weight_scale", ".rms_norm.weight"): np.ones(tensors[n.replace("_scale", "")].shape[1], "f4")
             for n in tensors if n.endswith("_scale")}  # fmt: skip
    save_file(tensors | gains, file, {"format": "pt"})
    model = read(tmp_path)
    assert model.config == case.config
    agree(tmp_path, case, model)
    gains[Q.replace(".weight", ".rms_norm.weight")][3] = 2
    save_file(tensors | gains, file)
    with pytest.raises(CheckpointError, match=r"q_proj\.rms_norm\.weight is not 1 everywhere"):
        open_hf(tmp_path)


def test_shards_as_transformers_writes_them(tmp_path: Path, cases: dict[str, Case]) -> None:
    case = cases["llama"]
    save_dense(tmp_path, case)
    opened(tmp_path).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model = read(tmp_path / "sharded", linear="bitlinear")
    np.testing.assert_array_equal(logits(model, case.tokens), logits(case.model(), case.tokens))


def test_tied_matrices_that_are_both_there(tmp_path: Path, cases: dict[str, Case]) -> None:
    case = cases["2b-4t"]
    save_dense(tmp_path, case)
    file, table = tmp_path / "model.safetensors", "model.embed_tokens.weight"
    tensors = load_file(file)
    want = logits(read(tmp_path), case.tokens)
    save_file(tensors | {"lm_head.weight": tensors[table]}, file, {"format": "pt"})
    assert read(tmp_path).config.tie_word_embeddings
    np.testing.assert_array_equal(logits(read(tmp_path), case.tokens), want)
    save_file({n: t for n, t in tensors.items() if n != table} | {"lm_head.weight": tensors[table]}, file)
    np.testing.assert_array_equal(logits(read(tmp_path), case.tokens), want)
    save_file(tensors | {"lm_head.weight": -tensors[table]}, file, {"format": "pt"})
    model = read(tmp_path)
    assert not model.config.tie_word_embeddings
    assert_near(logits(model, case.tokens), logits(opened(tmp_path), case.tokens))


def test_what_a_model_knows_beside_its_weights(tmp_path: Path, cases: dict[str, Case]) -> None:
    folder = tmp_path / "small-llama"
    save_dense(folder, cases["llama"])
    model = read(folder)
    assert (model.tokenizer, model.checkpoint, model.step, model.trained_seq_len) == (None, folder, None, None)
    assert model.provenance == {"imported_from": "small-llama"}
    ByteTokenizer().save(folder)
    assert isinstance(read(folder).tokenizer, ByteTokenizer)
    (folder / "bitnet_tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        read(folder)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def test_the_worked_example() -> None:
    codes = np.array([[-1, 0], [1, -1], [0, 1], [1, 1], [-1, -1], [0, 0], [1, 0], [-1, 1]], np.int8)
    packed = np.array([[0x84, 0x49], [0x1A, 0x98]], np.uint8)
    np.testing.assert_array_equal(pack_rows(codes), packed)
    np.testing.assert_array_equal(unpack_rows(packed, 8), codes)
    assert unpack_rows(pack_rows(np.ones((5, 1), np.int8)), 8).ravel().tolist() == [1] * 5 + [-1] * 3


@given(st.integers(1, 19), st.integers(1, 9), st.integers(0, 99))
def test_any_codes_as_transformers_packs_them(rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, cols)).astype(np.int8)
    packed = pack_rows(codes)
    np.testing.assert_array_equal(unpack_rows(packed, rows), codes)
    theirs = hugging_face.pack_weights(torch.from_numpy(codes.copy()))
    np.testing.assert_array_equal(theirs.numpy(), packed)


def test_rows_that_are_no_multiple_of_four_are_cropped(tmp_path: Path) -> None:
    case = Case(hugging_face.SHAPE.replace(intermediate_size=30), {}, np.arange(20)[None])
    weights = {name: p.numpy(copy=True) for name, p in BitNetForCausalLM(case.config).named_parameters()}
    case = Case(case.config, weights, case.tokens)
    save_packed(tmp_path, case, False, **PACKED["microsoft"][2])
    assert open_hf(tmp_path).tensors.entries["model.layers.0.mlp.up_proj.weight"].shape == (8, 80)
    np.testing.assert_allclose(logits(read(tmp_path), case.tokens), logits(case.model(), case.tokens), atol=1e-3)


# ---- refusals -------------------------------------------------------------------------------------------------------

Tensors = dict[str, np.ndarray]
DAMAGE: list[tuple[Callable[[Tensors], Any], str]] = [
    (lambda t: t[Q].__setitem__((0, 3), 0xC0), "q_proj.weight cannot be unpacked: byte 3 of its codes is 0xc0"),
    (lambda t: t.update({Q: t[Q][1:]}), r"q_proj.weight has the packed shape \(19, 80\), but \(20, 80\)"),
    (
        lambda t: t.update({Q: np.full((80, 80), 0.5, "f4")}),
        "q_proj.weight has a weight_scale beside it, but other values",
    ),
    (lambda t: t.update({Q: t[Q].view(np.int8)}), "q_proj.weight is I8, not one of F32, F16, BF16"),
    (lambda t: t.pop(f"{Q}_scale"), "q_proj.weight is packed, but there is no weight_scale"),
    (lambda t: t.pop(Q), "q_proj.weight_scale is the scale of a weight that is not there"),
    (lambda t: (t.pop(Q), t.pop(f"{Q}_scale")), "it has no model.layers.0.self_attn.q_proj.weight, which its config"),
    (lambda t: (t.pop(f"{Q}_scale"), t.update({Q: np.ones((80, 80), "f4")})), "q_proj.weight is stored as F32, but"),
    (lambda t: t.update({f"{Q}_scale": np.ones(2, "f4")}), r"q_proj.weight_scale is F32 of shape \(2,\), not one"),
    (lambda t: t.update({f"{Q}_scale": np.zeros(1, "f4")}), "q_proj.weight_scale is 0.0, which is no scale"),
    (lambda t: t.update({f"{Q}_scale": -np.ones(1, "f4")}), "is -1.0, which is no scale"),
    (lambda t: t.update({f"{Q}_scale": np.full(1, np.nan, "f4")}), "is nan, which is no scale"),
    (lambda t: t.update({f"{Q}_scale": np.full(1, np.inf, "f4")}), "is inf, which is no scale"),
    (lambda t: t.update({"model.norm.weight": np.ones(80, np.uint8)}), "model.norm.weight is stored as ternary codes"),
    (lambda t: t.update({"model.norm.weight": np.ones(80, np.int64)}), "model.norm.weight is I64, not one of"),
    (lambda t: t.update({"model.norm.weight": np.ones(81, "f4")}), r"norm.weight has shape \(81,\), but \(80,\)"),
    (lambda t: t.update({Q.replace("weight", "bias"): np.ones(80, "f4")}), "q_proj.bias, for which its config has no"),
    (lambda t: t.update({"model.layers.0.self_attn.inner_attn_ln.weight": np.ones(80, "f4")}), "two names of one"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, Case]) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    save_packed(folder, cases["2b-4t"], False, **PACKED["microsoft"][2])
    return folder


def copy(folder: Path, target: Path) -> Tensors:
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return {name: array.copy() for name, array in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE, ids=range(len(DAMAGE)))
def test_what_does_not_fit_is_named(tmp_path: Path, whole: Path, damage: Any, sentence: str) -> None:
    tensors = copy(whole, tmp_path)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        read(tmp_path)


def test_what_no_config_explains(tmp_path: Path, whole: Path) -> None:
    save_file(copy(whole, tmp_path), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as linear=linear"):
        read(tmp_path, linear="linear")
    change_config(tmp_path, quantization_config=None)
    for reading in ({}, {"linear": "bitlinear"}):
        with pytest.raises(CheckpointError, match="has no quantization_config to say whether its weight_scale"):
            read(tmp_path, **reading)
    change_config(tmp_path, num_hidden_layers=2**60)
    with pytest.raises(CheckpointError, match="asks for 1152921504606846976 layers, but there are only"):
        read(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read(tmp_path)


def test_floats_where_codes_are_promised(tmp_path: Path, cases: dict[str, Case]) -> None:
    save_dense(tmp_path, cases["llama"])
    quantization(tmp_path)
    with pytest.raises(CheckpointError, match=r"quantization_mode offline.*linear=bitlinear asks for"):
        read(tmp_path)
    assert read(tmp_path, linear="bitlinear").config == cases["llama"].config


def test_every_damage_is_refused_or_read(tmp_path: Path) -> None:
    """Both files, bits flipped, cut and spliced: a model or a CheckpointError."""
    config = hugging_face.SHAPE.replace(vocab_size=5, hidden_size=8, intermediate_size=8, num_attention_heads=2,
                                        num_hidden_layers=1, tie_word_embeddings=True)  # fmt: skip
    weights = {name: p.numpy(copy=True) for name, p in BitNetForCausalLM(config).named_parameters()}
    save_packed(tmp_path, Case(config, weights, np.zeros((1, 1))), False, **PACKED["microsoft"][2])
    paths = [tmp_path / name for name in ("config.json", "model.safetensors")]
    values = json.loads(paths[0].read_text())
    paths[0].write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    good = [path.read_bytes() for path in paths]
    rng = random.Random(3)
    seen = 0
    for _ in range(3000):
        k = rng.randrange(2)
        data = bytearray(good[k])
        at, kind = rng.randrange(len(data)), rng.randrange(8)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = data[rng.randrange(len(data)) :][:40]
        else:
            data[at] ^= 1 << rng.randrange(8)
        paths[k].unlink()  # some file systems wait for the disk where a file is cut to nothing
        paths[k].write_bytes(data)
        try:
            assemble(open_hf(tmp_path))
            seen += 1
        except CheckpointError:
            pass
        except BitnetError as error:  # pragma: no cover
            pytest.fail(f"{type(error).__name__}: {error}")
        paths[k].unlink()
        paths[k].write_bytes(good[k])
    assert 0 < seen < 3000


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_reading_takes_little_more_memory_than_the_model(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from bitnet import BitNetConfig, BitNetForCausalLM
        from bitnet.formats.hf_export import save_hf
        from bitnet.formats.hf_source import open_hf
        from bitnet.formats.source import assemble

        def status(name):
            return next(int(s.split()[1]) for s in open("/proc/self/status") if s.startswith(name + ":")) * 1024

        folder = Path(sys.argv[1])
        if sys.argv[2] == "write":
            config = BitNetConfig(8192, 512, 1408, 8, 8, max_position_embeddings=64)
            save_hf(BitNetForCausalLM(config), folder / "masters", packed=False)
        else:
            assemble(open_hf(folder / "tiny"))  # what is loaded and set up once
            before = status("VmRSS")
            open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
            model = assemble(open_hf(folder / "masters"))
            result = 4 * model.num_parameters()
            print(result, status("VmHWM") - before)
        """
    )
    write = "from bitnet import *; from bitnet.formats.hf_export import save_hf; import sys; save_hf(BitNetForCausalLM("
    write += "BitNetConfig(9, 8, 8, 1, 2)), sys.argv[1], packed=False)"
    subprocess.run([sys.executable, "-c", write, str(tmp_path / "tiny")], check=True)
    subprocess.run([sys.executable, "-c", script, str(tmp_path), "write"], check=True)
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path), "read"], check=True, capture_output=True)
    result, peak = map(int, told.stdout.split())
    assert result > 50e6
    assert peak < 1.3 * result

"""ONNX files in ONNX Runtime with its default options: integers exactly as ours, logits as closely as floats allow."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", minversion="1.20", reason="ONNX files are made and checked by it")
pytest.importorskip("onnxruntime", reason="it runs what is exported")
pytest.importorskip("torch", reason="an independent model tells which tokens are far from a tie")

from onnx_session import OnnxModel, session  # noqa: E402
from reference import conditioning  # noqa: E402
from reference.torch_bitnet import TorchBitNet  # noqa: E402

import bitnet  # noqa: E402
from bitnet import BitNetConfig, BitNetForCausalLM, nn, ops  # noqa: E402
from bitnet.decoding import generate_ids  # noqa: E402
from bitnet.errors import CheckpointError, ConfigError  # noqa: E402
from bitnet.formats import onnx_export, onnx_graph, onnx_model  # noqa: E402
from bitnet.formats.onnx_export import save_onnx  # noqa: E402
from bitnet.formats.onnx_graph import FLOAT, Graph  # noqa: E402
from bitnet.formats.weights import codes_of  # noqa: E402
from bitnet.tokenizer import ByteTokenizer, load_tokenizer  # noqa: E402

SMALL = BitNetConfig(
    61, 48, 72, 2, 6, 2, "relu2", 40, rope_theta=500000.0, tie_word_embeddings=True, initializer_range=0.25
)
SEED = 17


def ours(model: BitNetForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with ops.no_grad():
        return model(tokens.astype(np.int32)).numpy()


def conditioned(config: BitNetConfig, batch: int = 2, time: int = 9) -> tuple[BitNetForCausalLM, np.ndarray]:
    """A model, and tokens (batch, time) whose activations stay off every tie."""
    rng = np.random.default_rng(SEED)
    oracle = TorchBitNet(config).double()
    weights = conditioning.random_weights(oracle, rng, 0.25)
    conditioning.load(oracle, weights)
    model = BitNetForCausalLM(config)
    model.load_state_dict(weights)
    if config.linear == "linear" and not config.quantize_head:
        return model, rng.integers(0, config.vocab_size, (batch, time))
    return model, np.stack([conditioning.tokens(oracle, config.vocab_size, time, rng) for _ in range(batch)])


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[BitNetForCausalLM, np.ndarray, Path]:
    model, tokens = conditioned(SMALL)
    path = tmp_path_factory.mktemp("onnx") / "x.onnx"
    save_onnx(model, path)
    return model, tokens, path


# ---- one layer ------------------------------------------------------------------------------------------------------


def one_layer(layer: nn.BitLinear, form: str, normed: bool) -> Any:
    """x -> layer(x), or layer(norm(x)) with a norm without gain, by the functions that build whole models."""
    from onnx import helper

    rows, cols = layer.out_features, layer.in_features
    g = Graph(onnx_model.OPSET_INT2)
    g.input("x", FLOAT, ["batch", "time", cols])
    x = onnx_model.rmsnorm(g, "x", 1e-5, None) if normed else "x"
    weight = onnx_model.ternary_weight("w", (rows, cols), onnx_model.TERNARY[form], lambda: codes_of(layer))
    g.add_named("y", "Identity", onnx_model.bitlinear(g, onnx_model.quantize(g, x), weight))
    g.output("y", FLOAT, ["batch", "time", rows])
    made = [helper.make_tensor(w.name, w.dtype, w.shape, w.make().tobytes(), raw=True) for w in g.weights.values()]
    graph = helper.make_graph(g.nodes, "one", g.inputs, g.outputs, [*g.constants, *made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", g.opset)], ir_version=13)
    onnx.checker.check_model(model, full_check=True)
    return session(model.SerializeToString())


@pytest.mark.parametrize("form", ["int8", "int2"])
@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (100, 256), (61, 688), (3, 17), (1, 1), (40, 2560)])
def test_a_layer_gives_the_bits_of_ours(rows: int, cols: int, form: str) -> None:
    rng = np.random.default_rng(rows)
    layer = nn.BitLinear(cols, rows, weight=nn.Parameter(rng.normal(0, 0.3, (rows, cols)).astype(np.float32)))
    run = one_layer(layer, form, normed=False)
    for batch, time in ((1, 1), (1, 2), (2, 1), (3, 11)):
        x = rng.normal(0, 1, (batch, time, cols)) * np.exp(rng.normal(0, 3, (batch, time, 1)))
        x = x.astype(np.float32)
        x[0, 0] *= rng.integers(0, 2)  # a row of zeros, or none
        x[-1, -1, : cols // 2] = np.arange(cols // 2) % 255 / 2 - 63.5  # ties, where 127 is the largest
        x[-1, -1, -1] = 127
        np.testing.assert_array_equal(run.run(None, {"x": x})[0], ours_of(layer, x))


def ours_of(layer: nn.BitLinear, x: np.ndarray) -> np.ndarray:
    with ops.no_grad():
        return layer(ops.tensor(x)).numpy()


def test_a_norm_before_it_differs_by_the_order_of_a_sum() -> None:
    rng = np.random.default_rng(5)
    layer = nn.BitLinear(128, 32)
    x = rng.normal(0, 1, (1, 64, 128)).astype(np.float32)
    got = one_layer(layer, "int8", normed=True).run(None, {"x": x})[0]
    with ops.no_grad():
        want = layer(ops.rmsnorm(ops.tensor(x), None, 1e-5)).numpy()
    rows = np.abs(got - want).max(-1) / np.abs(want).max(-1)
    assert np.median(rows) < 1e-6, "the integers are the same but in a row with a tie"


def test_int2_is_twos_complement_low_bits_first() -> None:
    codes = np.array([[1, -1, 0], [0, 1, -1]], np.int8)
    packed = onnx_model.pack_int2(codes)
    np.testing.assert_array_equal(packed, [0b00_00_11_01, 0b11_01])
    np.testing.assert_array_equal(onnx_model.unpack_int2(packed, 6), codes.reshape(-1))
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.INT2, (2, 3), packed.tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)


# ---- whole models ---------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "silu": {"hidden_act": "silu"},
    "no sub-norms": {"sub_norms": False},
    "no input norms": {"input_norms": False},
    "norms inside": {"use_rms_norm": True, "input_norms": False, "sub_norms": False},
    "untied": {"tie_word_embeddings": False},
    "ternary head": {"tie_word_embeddings": False, "quantize_head": True, "use_rms_norm": True},
    "ternary tied head": {"quantize_head": True},
    "no groups": {"num_key_value_heads": 6},
    "one group": {"num_key_value_heads": 1},
    "one layer of one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
    "twin": {"linear": "linear"},
    "twin with norms inside": {"linear": "linear", "use_rms_norm": True, "hidden_act": "silu"},
    "twin with a ternary head": {"linear": "linear", "quantize_head": True, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_config_agrees_closely_on_conditioned_tokens(changes: dict[str, Any], tmp_path: Path) -> None:
    config = SMALL.replace(**changes)
    model, tokens = conditioned(config)
    want = ours(model, tokens)
    assert want.std() > 0.5
    save_onnx(model, tmp_path / "x.onnx")
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)
    assert np.abs(OnnxModel(tmp_path / "x.onnx", config)(tokens) - want).max() < 1e-4 * want.std()
    if config.linear == "bitlinear" or config.quantize_head:
        model.pack()
        save_onnx(model, tmp_path / "packed.onnx", weights="int2")
        onnx.checker.check_model(str(tmp_path / "packed.onnx"), full_check=True)
        assert np.abs(OnnxModel(tmp_path / "packed.onnx", config)(tokens) - want).max() < 1e-4 * want.std()


def test_arbitrary_tokens_agree_statistically(setting: Any) -> None:
    model, _, path = setting
    tokens = np.random.default_rng(3).integers(0, SMALL.vocab_size, (8, 40))
    got, want = OnnxModel(path, SMALL)(tokens), ours(model, tokens)
    worst = np.abs(got - want).max(-1) / want.std()
    assert np.median(worst) < 1e-5
    assert worst.max() < 0.5
    assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.97


def test_tokens_one_at_a_time_are_the_whole_pass(setting: Any) -> None:
    _, tokens, path = setting
    run = OnnxModel(path, SMALL)
    whole = run(tokens)
    run.start(len(tokens))
    single = [run.next(tokens[:, t : t + 1]) for t in range(tokens.shape[1])]
    assert np.abs(np.concatenate(single, 1) - whole).max() < 1e-5
    run.start(len(tokens))
    pieces = [run.next(tokens[:, :5]), run.next(tokens[:, 5:6]), run.next(tokens[:, 6:])]
    assert np.abs(np.concatenate(pieces, 1) - whole).max() < 1e-5


def test_padding_on_the_left_changes_nothing(setting: Any) -> None:
    _, tokens, path = setting
    run = OnnxModel(path, SMALL)
    mask = np.ones_like(tokens)
    mask[0, :4] = 0
    padded = run(tokens, mask)
    assert np.abs(padded[:1, 4:] - run(tokens[:1, 4:])).max() < 1e-5
    assert np.abs(padded[1:] - run(tokens[1:])).max() < 1e-5
    assert np.isfinite(padded).all()


def test_without_a_cache(setting: Any, tmp_path: Path) -> None:
    model, tokens, path = setting
    save_onnx(model, tmp_path / "x.onnx", cache=False)
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)
    run = OnnxModel(tmp_path / "x.onnx", SMALL)
    assert run.names == ["input_ids", "attention_mask", "position_ids"]
    assert [value.name for value in run.session.get_outputs()] == ["logits"]
    np.testing.assert_allclose(run(tokens), OnnxModel(path, SMALL)(tokens), atol=1e-5)


def test_int2_is_smaller_and_the_same(setting: Any, tmp_path: Path) -> None:
    model, tokens, path = setting
    save_onnx(model, tmp_path / "x.onnx", weights="int2")
    ternary = model.num_ternary()
    saved = path.stat().st_size - (tmp_path / "x.onnx").stat().st_size
    assert 0.75 * ternary - 2000 < saved <= 0.75 * ternary
    assert onnx.load(str(tmp_path / "x.onnx")).opset_import[0].version == 25
    np.testing.assert_array_equal(OnnxModel(tmp_path / "x.onnx", SMALL)(tokens), OnnxModel(path, SMALL)(tokens))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], list[int]]:
    """A model's folder, a prompt, and how ours goes on. It knows one text by heart: no two tokens are nearly tied."""
    config = SMALL.replace(vocab_size=23, initializer_range=0.05, hidden_act="silu")
    model = BitNetForCausalLM(config, seed=1)
    optimizer = bitnet.optim.AdamW(model, lr=1e-2)
    order = np.random.default_rng(0).permutation(22).astype(np.int32) + 1  # 0 ends a text where GenAI knows no end
    text = np.tile(order, 3)[None]
    for _ in range(60):
        loss = model(np.ascontiguousarray(text[:, :30]), np.ascontiguousarray(text[:, 1:31]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    prompt = order[:3].tolist()
    want = list(generate_ids(model, prompt, 30, temperature=0))
    assert want[:19] == order[3:].tolist()
    folder = tmp_path_factory.mktemp("learned") / "model"
    save_onnx(model, folder)
    return folder, prompt, want


def test_greedy_continuations_are_ours(learned: tuple[Path, list[int], list[int]]) -> None:
    folder, prompt, want = learned
    run = OnnxModel(folder / "model.onnx", SMALL)
    logits, got = run(np.array([prompt])), []
    for _ in want:
        got.append(int(logits[0, -1].argmax()))
        logits = run.next(np.array([got[-1:]]))
    assert got == want


def test_onnx_runtime_genai_continues_as_ours(learned: tuple[Path, list[int], list[int]]) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="it reads the folder as it is")
    folder, prompt, want = learned
    model = genai.Model(str(folder))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + len(want))
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == prompt + want


def test_names_are_those_of_hugging_faces_exporters(setting: Any) -> None:
    _, _, path = setting
    run = OnnxModel(path, SMALL).session
    inputs = {value.name: (value.type, value.shape) for value in run.get_inputs()}
    outputs = {value.name: value.shape for value in run.get_outputs()}
    batch, time, past = "batch_size", "sequence_length", "past_sequence_length"
    total = "past_sequence_length + sequence_length"
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids"] + [
        f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")
    ]
    assert inputs["input_ids"] == inputs["position_ids"] == ("tensor(int64)", [batch, time])
    assert inputs["attention_mask"] == ("tensor(int64)", [batch, total])
    assert inputs["past_key_values.1.value"] == ("tensor(float)", [batch, 2, past, 8])
    assert list(outputs) == ["logits"] + [f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert outputs["logits"] == [batch, time, 61]
    assert outputs["present.0.key"] == [batch, 2, total, 8]


def test_a_position_beyond_the_context_is_refused(setting: Any) -> None:
    _, _, path = setting
    with pytest.raises(Exception, match=r"out of data bounds|indices element"):
        OnnxModel(path, SMALL)(np.zeros((1, 41), np.int64))


# ---- files ----------------------------------------------------------------------------------------------------------


def test_what_a_file_says_of_itself(setting: Any) -> None:
    _, _, path = setting
    model = onnx.load(str(path))
    assert (model.producer_name, model.producer_version) == ("bitnet", bitnet.__version__)
    assert (model.ir_version, model.opset_import[0].version, len(model.opset_import)) == (10, 21, 1)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["bitnet.weights"] == "int8"
    assert json.loads(told["bitnet.config"])["num_key_value_heads"] == 2
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(set(names)) == len(names)
    assert "model.layers.1.mlp.down_proj.weight" in names
    used = {name for node in model.graph.node for name in node.input}
    assert set(names) <= used
    assert {node.domain for node in model.graph.node} == {""}


def test_bf16_matrices_stay_bf16(setting: Any, tmp_path: Path) -> None:
    model, tokens = conditioned(SMALL)
    model.pack(head="bf16")
    save_onnx(model, tmp_path / "x.onnx")
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)
    (table,) = (t for t in onnx.load(str(tmp_path / "x.onnx")).graph.initializer if "embed" in t.name)
    assert table.data_type == onnx.TensorProto.BFLOAT16
    worst = np.abs(OnnxModel(tmp_path / "x.onnx", SMALL)(tokens) - ours(model, tokens)).max(-1)
    assert np.median(worst) < 1e-5, "tokens were conditioned before the embedding was rounded"


def test_a_large_model_has_its_data_beside_it(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, path = setting
    monkeypatch.setattr(onnx_export, "SINGLE_MAX", 10_000)
    monkeypatch.setattr(onnx_export, "EXTERNAL_MIN", 512)
    for form in ("int8", "int2"):
        target = tmp_path / f"{form}.onnx"
        save_onnx(model, target, weights=form)
        assert sorted(os.listdir(tmp_path)) == [f"{form}.onnx", f"{form}.onnx.data"]
        onnx.checker.check_model(str(target), full_check=True)
        initializers = onnx.load(str(target), load_external_data=False).graph.initializer
        external = [{entry.key: entry.value for entry in t.external_data} for t in initializers if t.external_data]
        assert all(int(place["offset"]) % 65536 == 0 for place in external)
        assert len(external) > 4
        np.testing.assert_array_equal(OnnxModel(target, SMALL)(tokens), OnnxModel(path, SMALL)(tokens))
        first = [(name, (tmp_path / name).read_bytes()) for name in sorted(os.listdir(tmp_path))]
        save_onnx(model, target, weights=form, force=True)
        assert first == [(name, (tmp_path / name).read_bytes()) for name in sorted(os.listdir(tmp_path))]
        for name in os.listdir(tmp_path):
            (tmp_path / name).unlink()


def test_a_folder_has_what_belongs_to_the_model(setting: Any, tmp_path: Path) -> None:
    model, _, path = setting
    save_onnx(model, tmp_path / "x", tokenizer=ByteTokenizer())
    assert (tmp_path / "x" / "model.onnx").read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "x" / "config.json").read_text())["hidden_size"] == 48
    assert isinstance(load_tokenizer(tmp_path / "x"), ByteTokenizer)
    assert json.loads((tmp_path / "x" / "genai_config.json").read_text())["model"]["decoder"]["head_size"] == 8
    save_onnx(model, tmp_path / "x", force=True, cache=False)
    assert sorted(os.listdir(tmp_path / "x")) == ["config.json", "model.onnx"]


@pytest.mark.parametrize("limit", [1000, 1 << 31])
def test_writing_is_all_or_nothing(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    model, _, _ = setting
    monkeypatch.setattr(onnx_export, "SINGLE_MAX", limit)
    monkeypatch.setattr(onnx_export, "EXTERNAL_MIN", 2048)
    target = tmp_path / "x.onnx"
    save_onnx(model, target)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(CheckpointError, match=r"x\.onnx exists already; --force replaces it"):
        save_onnx(model, target)
    made: list[int] = []

    def fail(weight: Any) -> memoryview:
        made.append(1)
        if len(made) > 5:
            raise OSError(28, "No space left on device")
        return original(weight)

    original = onnx_export._made
    monkeypatch.setattr(onnx_export, "_made", fail)
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        save_onnx(model, target, weights="int2", force=True)
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        save_onnx(model, tmp_path / "folder")
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


def test_progress_and_requests_that_cannot_be_met(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, path = setting
    seen: list[str] = []
    save_onnx(model, tmp_path / "x.onnx", progress=lambda names: (seen.append(name) or name for name in names))
    assert seen[0] == "model.embed_tokens.weight"
    assert {t.name for t in onnx.load(str(path)).graph.initializer if not t.name.startswith("constant.")} == set(seen)
    with pytest.raises(ConfigError, match="weights of an ONNX file are int8 or int2, not 'int4'"):
        save_onnx(model, tmp_path / "y.onnx", weights="int4")
    twin = BitNetForCausalLM(SMALL.replace(linear="linear"))
    with pytest.raises(ConfigError, match="a full-precision twin has no ternary weights to store as int2"):
        save_onnx(twin, tmp_path / "y.onnx", weights="int2")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"pip install 'bitnet\[onnx\]'"):
        onnx_graph.require_onnx()
    assert os.listdir(tmp_path) == ["x.onnx"]


@pytest.mark.parametrize("limit", [1000, 1 << 31])
def test_one_matrix_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(onnx_export, "SINGLE_MAX", limit)
    model = BitNetForCausalLM(BitNetConfig(40, 512, 1024, 3, 8, max_position_embeddings=8)).pack()
    largest = 512 * 1024
    save_onnx(model, tmp_path / "warm.onnx")
    tracemalloc.start()
    save_onnx(model, tmp_path / "x.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * largest + (1 << 19), "codes and the turned codes, of sixteen such matrices"

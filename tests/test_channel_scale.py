"""A scale for each row of a ternary matrix (weight_scales channel): numbers, exactness everywhere, files, refusals."""

from __future__ import annotations

import itertools
import json
import re
import struct
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import quantize
from small_runs import pack_numbers

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, ShapeError, _core, checkpoint, nn, ops
from bitnet.config import WRITTEN_WHERE_SET
from bitnet.decoding import Decoder
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.bitnet_file import BitnetFile, Content, Part, write
from bitnet.formats.hf_config import config_json
from bitnet.formats.packing import load_packed, save_packed
from bitnet.info import inspect, report
from bitnet.layer_stats import layer_record
from bitnet.layout import LAYOUTS
from bitnet.lora import fingerprint, latent_of
from bitnet.pretrained import from_pretrained
from bitnet.ramp import blended
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

Array = np.ndarray[Any, Any]
PLAIN = BitNetConfig(257, 32, 48, 2, 4, 2, max_position_embeddings=64, initializer_range=0.2)
CONFIG = PLAIN.replace(weight_scales="channel")
SHAPES = [(1, 5, 3), (8, 130, 33), (40, 300, 70), (33, 64, 150)]
U = 2.0**-24  # of one rounding in f32, relative


def layer_of(weight: Array) -> nn.BitLinear:
    return nn.BitLinear(weight.shape[1], weight.shape[0], weight=nn.Parameter(weight), weight_scales="channel")


def problem(rows: int, inner: int, outer: int) -> tuple[Array, Array, Array]:
    """x, weight, dy in f32; rows of the weight differ a hundredfold."""
    rng = np.random.default_rng([rows, inner, outer])
    x, w, dy = (rng.normal(size=shape) for shape in ((rows, inner), (outer, inner), (rows, outer)))
    w *= 10.0 ** rng.uniform(-2, 0, (outer, 1))
    return x.astype(np.float32), w.astype(np.float32), dy.astype(np.float32)


def gradients(layer: nn.BitLinear, x: Array, dy: Array, precision: str = "fp32") -> tuple[Array, Array, Array]:
    """y, dx, dW."""
    layer.zero_grad()
    tensor = bitnet.tensor(x, requires_grad=True)
    with ops.precision(precision):
        y = layer(tensor)
        value = y.numpy(copy=True)
        (y * bitnet.tensor(dy)).sum().backward()
    assert tensor.grad is not None
    assert layer.weight.grad is not None
    return value, tensor.grad.numpy(copy=True), layer.weight.grad.numpy(copy=True)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_are_those_of_the_equation(shape: tuple[int, int, int]) -> None:
    """In float64, from the engine's scales, whose mean is summed in f32 lanes (quant/ternary.h: within 1.6e-5)."""
    x, w, dy = problem(*shape)
    layer = layer_of(w)
    scales = layer.scales().numpy()
    exact = np.maximum(np.abs(w.astype(np.float64)).mean(1), 1e-5)
    assert (np.abs(scales - exact) <= 1.6e-5 * exact).all()
    codes = layer.codes().numpy()
    np.testing.assert_array_equal(codes, np.clip(np.rint(w * (np.float32(1) / scales)[:, None]), -1, 1))
    assert layer.weight_scale == pytest.approx(scales.mean(), rel=1e-6)
    assert layer.ternary_stats().plus == (codes == 1).sum()

    q, act_scale = quantize.absmax_int8(x)  # in f32, so that q is the engine's
    y, dx, dw = gradients(layer, x, dy)
    s, a, dy64 = scales.astype(np.float64), act_scale.astype(np.float64), dy.astype(np.float64)
    want = (q @ codes.T.astype(np.int64)) * (a * s)  # act_scale * scale, and the product: two roundings
    assert (np.abs(y - want) <= 2.01 * U * np.abs(want)).all()
    # dy * scale is rounded once, then each of the products that are added in order.
    size = np.abs(dy64 * s) @ np.abs(codes)
    assert (np.abs(dx - (dy64 * s) @ codes) <= (shape[2] + 2) * U * size).all()
    size = np.abs(dy64).T @ np.abs(q * a)
    assert (np.abs(dw - dy64.T @ (q * a)) <= (shape[0] + 2) * U * size).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_with_a_fake_quantizer_agrees(shape: tuple[int, int, int]) -> None:
    torch = pytest.importorskip("torch")
    x, w, dy = problem(*shape)
    layer = layer_of(w)
    tx, tw = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (x, w))
    scale = tw.abs().mean(1, keepdim=True).clamp(min=1e-5).detach()
    assert ((tw / scale).abs() - 0.5).abs().min() > 1e-5  # no code hangs on the last bits of its scale
    codes = (tw / scale).round().clamp(-1, 1).detach()
    np.testing.assert_array_equal(layer.codes().numpy(), codes.numpy())
    absmax = tx.abs().amax(1, keepdim=True).clamp(min=1e-5).detach()
    q = torch.tensor(quantize.absmax_int8(x)[0], dtype=torch.float64)
    assert ((tx * 127 / absmax).round() - q).abs().sum() <= 2  # a tie in f32 is none in float64
    through_x, through_w = tx + (q * absmax / 127 - tx).detach(), tw + (codes * scale - tw).detach()
    want = through_x @ through_w.T
    (want * torch.tensor(dy)).sum().backward()
    y, dx, dw = gradients(layer, x, dy)
    near = 1.7e-5  # of the scales, and some roundings
    np.testing.assert_allclose(y, want.detach().numpy(), rtol=near, atol=1e-12)
    size = np.abs(dy) @ (codes * scale).abs().numpy()
    assert (np.abs(dx - tx.grad.numpy()) <= (near + shape[2] * U) * size + 1e-12).all()
    size = np.abs(dy).T @ np.abs(through_x.detach().numpy())
    assert (np.abs(dw - tw.grad.numpy()) <= (4 + shape[0]) * U * size + 1e-12).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_fast_and_int8_gradients_are_within_their_roundings(shape: tuple[int, int, int], isa: str) -> None:
    """fast: dy * scale is rounded to bf16, by 2^-8 of itself at most. int8: to half a step of its row."""
    x, w, dy = problem(*shape)
    layer = layer_of(w)
    _, dx, dw = gradients(layer, x, dy)
    scaled, codes = np.abs(dy * layer.scales().numpy()), np.abs(layer.codes().numpy())
    size, weight_size = scaled @ codes, np.abs(dy).T @ np.abs(x)
    bound = {"fast": (2**-8 + (shape[2] + 4) * 2 * U) * size}
    bound["int8"] = (scaled.max(1) / 254)[:, None] * codes.sum(0) * 1.0001 + (shape[2] + 4) * U * size
    for precision, most in bound.items():
        _, other, other_w = gradients(layer, x, dy, precision)
        assert (np.abs(other - dx) <= most).all(), precision
        assert other.tobytes() != dx.tobytes()
        # q is within one step of x.
        near = (2**-8 + (shape[0] + 4) * 2 * U) * (weight_size + np.abs(dy).T @ np.full_like(x, np.abs(x).max() / 127))
        assert (np.abs(other_w - dw) <= near).all(), precision


def test_equal_scales_give_the_bits_of_one_scale(isa: str) -> None:
    """Rows whose means are the same power of two, exactly: one scale for all is the same arithmetic."""
    rng = np.random.default_rng(1)
    w = np.tile(np.array([0.75, 0.25], np.float32), (37, 48)) * rng.choice(np.float32([-1, 1]), (37, 96))
    w = rng.permuted(w, axis=1)
    x, dy = (rng.normal(size=(19, n)).astype(np.float32) for n in (96, 37))
    channel, plain = layer_of(w), nn.BitLinear(96, 37, weight=nn.Parameter(w))
    np.testing.assert_array_equal(channel.scales().numpy(), np.full(37, 0.5, np.float32))
    np.testing.assert_array_equal(plain.scales().numpy(), [np.float32(0.5)])
    for precision in ("fp32", "fast", "int8"):
        for one, other in zip(gradients(channel, x, dy, precision), gradients(plain, x, dy, precision), strict=True):
            assert one.tobytes() == other.tobytes(), precision


def test_rows_stand_alone() -> None:
    """A row of zeros has the least scale; one with a NaN spoils its own output and no other; a row is a matrix."""
    _, w, _ = problem(1, 90, 20)
    w[3], w[5, 7] = 0.0, np.nan
    layer = layer_of(w)
    x = bitnet.tensor(np.ones((2, 90), np.float32))
    y = layer(x).numpy()
    assert layer.scales().numpy()[3] == np.float32(1e-5)
    assert (layer.codes().numpy()[[3, 5]] == 0).all()
    assert np.isnan(y[:, 5]).all()
    assert np.isfinite(np.delete(y, 5, 1)).all()
    for r in (0, 3, 19):
        alone = nn.BitLinear(90, 1, weight=nn.Parameter(w[r : r + 1]))
        np.testing.assert_array_equal(alone(x).numpy()[:, 0], y[:, r])


# ---- exactness ------------------------------------------------------------------------------------------------------


def test_every_set_thread_count_and_layout_gives_the_same_bits() -> None:
    before = (bitnet.current_isa(), bitnet.get_threads())
    first: dict[Any, Array] = {}
    x, w, dy = problem(40, 330, 117)
    try:
        for isa, threads in itertools.product(bitnet.isa_names(), (1, 2, 5)):
            bitnet.use_isa(isa)
            bitnet.set_threads(threads)
            layer = layer_of(w)
            y, dx, dw = gradients(layer, x, dy)
            for name, value in {"y": y, "dx": dx, "dw": dw, "scales": layer.scales().numpy()}.items():
                assert first.setdefault(name, value).tobytes() == value.tobytes(), (name, isa, threads)
            codes, stats, residual = layer.codes().numpy(), layer.ternary_stats(), bitnet.tensor(dy)
            want = layer(bitnet.tensor(x), residual).numpy()
            for layout in LAYOUTS:
                packed = layer_of(w).pack(layout)
                assert packed.has_channel_scales and packed.is_packed
                np.testing.assert_array_equal(packed.codes().numpy(), codes)
                np.testing.assert_array_equal(packed.scales().numpy(), first["scales"])
                assert packed.ternary_stats() == stats
                with ops.no_grad():
                    np.testing.assert_array_equal(packed(bitnet.tensor(x), residual).numpy(), want)
                    for rows in (1, 2, 3, 5, 8, 9):
                        np.testing.assert_array_equal(packed(bitnet.tensor(x[:rows])).numpy(), y[:rows])
    finally:
        bitnet.use_isa(before[0])
        bitnet.set_threads(before[1])


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "relu2"}, {"quantize_head": True, "use_rms_norm": True},
     {"quantize_head": True, "tie_word_embeddings": True}],
)  # fmt: skip
def test_decoding_is_the_training_forward(changes: dict[str, Any]) -> None:
    """Cached or not, packed or not, alone or in a batch; and both differ from a model with one scale a matrix."""
    tokens = np.random.default_rng(3).integers(0, 257, (2, 12)).astype(np.int32)
    model = BitNetForCausalLM(CONFIG.replace(**changes), 1)
    with ops.no_grad():
        whole = model(tokens).numpy()
        assert (BitNetForCausalLM(PLAIN.replace(**changes), 1)(tokens).numpy() != whole).any()
        loss = model(tokens, tokens).item()
    if model.config.quantize_head:
        assert _core.has_channel_scales(model.head_weight)
    for layout in (None, *LAYOUTS):
        if layout is not None:
            model = BitNetForCausalLM(CONFIG.replace(**changes), 1).pack(layout)
        with ops.no_grad():
            np.testing.assert_array_equal(model(tokens).numpy(), whole)
            assert layout is not None or model(tokens, tokens).item() == loss
        decoder = Decoder(model, batch=2)
        rows = [decoder.prefill(tokens[:, :5].tolist())]
        rows += [decoder.step(tokens[:, n].tolist()) for n in range(5, 12)]
        np.testing.assert_array_equal(np.stack(rows, 1), whole[:, 4:])


def test_ramp_and_full_precision() -> None:
    x, w, _ = problem(8, 130, 33)
    layer, tensor = layer_of(w), bitnet.tensor(x)
    whole = layer.to_full_precision()
    np.testing.assert_array_equal(whole.weight.numpy(), layer.codes().numpy() * layer.scales().numpy()[:, None])
    want = 0.75 * ops.linear(tensor, layer.weight).numpy() + 0.25 * ops.bitlinear(tensor, layer.weight).numpy()
    layer.ternary_share = 0.25
    np.testing.assert_allclose(layer(tensor).numpy(), want, rtol=1e-5, atol=1e-6)
    model = BitNetForCausalLM(CONFIG)
    with blended(model, 0.5):
        model(np.array([[1, 2, 3]]), np.array([[2, 3, 4]])).backward()


def test_what_is_shown() -> None:
    model = BitNetForCausalLM(CONFIG)
    path, layer = next(model.bitlinears())
    record = layer_record(1, model, {})
    assert record is not None
    shown = record["layers"][path]
    assert shown["scale"] == layer.weight_scale
    assert sum(shown["histogram"]) == layer.weight.size
    in_units = layer.weight.numpy() / layer.scales().numpy()[:, None]
    assert sum(shown["histogram"][:32]) == (in_units < 0).sum()
    assert f"{layer.weight_scale:.4g}" in model._repr_html_()
    assert "32 -> 32, channel scales" in repr(layer)
    assert "channel" not in repr(BitNetForCausalLM(PLAIN))


def test_refusals_of_layers() -> None:
    weight = nn.Parameter(np.ones((3, 4), np.float32))
    ops.bitlinear(bitnet.tensor(np.ones((1, 4), np.float32)), weight)
    with pytest.raises(RuntimeError, match="multiplied with one scale cannot have channel scales any more"):
        nn.BitLinear(4, 3, weight=weight, weight_scales="channel")
    held = nn.BitLinear(4, 3).weight
    _core.hold_ternary([held])
    _core.use_held_ternary([held], False)  # its only codes are aside
    with pytest.raises(RuntimeError, match="multiplied with one scale cannot have channel scales any more"):
        _core.scale_channels(held)
    with pytest.raises(RuntimeError, match="prepared with one scale"):
        _core.scale_channels(nn.BitLinear(4, 3).pack().weight)
    with pytest.raises(ValueError, match="weight_scales of a BitLinear must be one of"):
        nn.BitLinear(4, 3, weight_scales="row")
    with pytest.raises(ConfigError, match=r"weight_scales must be one of .* not 'row'"):
        BitNetConfig(weight_scales="row")
    codes = _core.Tensor(np.ones((3, 4), np.int8))
    for scales in (np.ones(2, np.float32), np.ones((3, 1), np.float32), np.ones(3, np.int32)):
        with pytest.raises(ShapeError, match=r"the scales of 3 rows are f32 of shape \(3,\), not"):
            _core.prepare_ternary(codes, _core.Tensor(scales))
        with pytest.raises(ShapeError, match="the scales of 3 rows"):
            _core.prepare_fifths(bytes(3), 3, 4, _core.Tensor(scales))
    with pytest.raises(TypeError, match="must be real number, not str"):
        _core.prepare_ternary(codes, "1")  # type: ignore[arg-type]


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_packed(BitNetForCausalLM(CONFIG, 4), tmp_path / "x.bitnet", provenance={"note": 60 * "room "})
    return tmp_path / "x.bitnet"


@pytest.mark.parametrize("coded", [False, True])
def test_a_bitnet_file_holds_the_scales(tmp_path: Path, coded: bool) -> None:
    model = BitNetForCausalLM(CONFIG, 4)
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim == 2 and i % 2:  # rows of many zeros, which are coded
            parameter.copy_(parameter.numpy(copy=True) ** 9)
    tokens = np.arange(10)[None]
    with ops.no_grad():
        want = model(tokens).numpy()
    save_packed(model, tmp_path / "x.bitnet", coded=coded)
    file, loaded = BitnetFile(tmp_path / "x.bitnet"), load_packed(tmp_path / "x.bitnet")
    assert loaded.config == model.config
    assert loaded.config.weight_scales == "channel"
    with ops.no_grad():
        np.testing.assert_array_equal(loaded(tokens).numpy(), want)
    for (path, ours), (_, theirs) in zip(model.bitlinears(), loaded.bitlinears(), strict=True):
        np.testing.assert_array_equal(ours.scales().numpy(), theirs.scales().numpy())
        section = file.sections[f"{path}.weight"]
        assert (section.scale, section.scales) == (None, ours.out_features)
        np.testing.assert_array_equal(file.scales(section), ours.scales().numpy())
    assert any(section.form == "fifths-coded" for section in file.sections.values()) == coded
    save_packed(loaded, tmp_path / "again.bitnet", coded=coded)
    assert (tmp_path / "again.bitnet").read_bytes() == (tmp_path / "x.bitnet").read_bytes()
    found = inspect(file)
    shown = {entry["name"]: entry for entry in found["sections"]}[f"{path}.weight"]
    assert shown["scale"] == pytest.approx(ours.weight_scale)
    assert not found["damage"]
    assert "what is shown is their mean" in report(file, found)


Q = "model.layers.0.self_attn.q_proj.weight"


def lie(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Changes the header, which change() is given, and the section of Q in it; its checksum is right."""
    data = path.read_bytes()
    room = struct.unpack_from("<Q", data, 16)[0]
    header = json.loads(data[24 : 24 + room])
    change(header, next(section for section in header["sections"] if section["name"] == Q))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(room)
    assert len(text) == room
    path.write_bytes(data[:12] + struct.pack("<IQ", zlib.crc32(text), room) + text + data[24 + room :])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        *(
            (lambda _, s, n=n: s.update(scales=n), re.escape(f"has the scales {n!r}, which belong to ternary codes "
             "without a scale for all, one for each of 32 rows"))
            for n in (31, 33, 2**70, -32, True, 32.5, "32", [32])
        ),
        (lambda _, s: s.update(scale=1.0), "has the scales 32, which belong to ternary codes without a scale for all"),
        (lambda _, s: s.update(scale=None), "has the scales 32, which belong to ternary codes"),
        (lambda _, s: s.pop("scales"), r"\(fifths\) has the scale None"),
        (lambda _, s: s.update(form="f32"), r"\(f32\) has the scales 32"),
        (lambda _, s: s.update(bytes=s["bytes"] - 128), r"has 205 bytes, but 333 for its shape \[32, 32\]"),
        (lambda _, s: s.update(form="fifths-coded", bytes=128), r"has 128 bytes, but at least 129 for its shape"),
        (lambda h, _: h["config"].update(weight_scales="tensor"),
         "has a scale for each row, but weight_scales is tensor in its config"),
        (lambda h, _: h["config"].update(weight_scales="row"), "weight_scales must be one of"),
    ],
)  # fmt: skip
def test_hostile_scales_are_refused(
    file: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], sentence: str
) -> None:
    lie(file, change)
    with pytest.raises(CheckpointError, match=sentence) as refused:
        load_packed(file)
    assert str(file) in str(refused.value)


def test_values_that_are_no_scales_are_refused(file: Path, tmp_path: Path) -> None:
    section, data = BitnetFile(file).sections[Q], bytearray(file.read_bytes())
    for value in (0.0, -1.0, np.nan, np.inf):
        struct.pack_into("<f", data, section.offset + 4 * 9, value)
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{Q} has the scale {value} in row 9"):
            load_packed(file, verify=False)
        with pytest.raises(CheckpointError, match=f"{Q} is damaged"):
            load_packed(file)
    codes = _core.pack_fifths(_core.Tensor(np.zeros((4, 5), np.int8)))
    content = Content("fifths", codes.data, np.ones(3, np.float32))
    write(tmp_path / "three.bitnet", {}, {}, [Part("w", (4, 5), lambda: content)])
    with pytest.raises(CheckpointError, match=r"w \(fifths\) has the scales 3, which .* one for each of 4 rows"):
        BitnetFile(tmp_path / "three.bitnet")
    for config, where in ((CONFIG, " in row 0"), (PLAIN, "")):
        model = BitNetForCausalLM(config)
        weight = next(model.bitlinears())[1].weight
        weight.copy_(np.full(weight.shape, np.nan, np.float32))
        with pytest.raises(CheckpointError, match=f"{Q} has the scale nan{where}, which no file can hold"):
            save_packed(model, tmp_path / "nan.bitnet")
        assert not (tmp_path / "nan.bitnet").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [({}, Q), ({"linear": "linear", "quantize_head": True, "tie_word_embeddings": False}, "lm_head.weight")],
    ids=["layers", "head"],
)
def test_one_scale_in_a_file_of_channels_is_refused(tmp_path: Path, changes: dict[str, Any], name: str) -> None:
    model = BitNetForCausalLM(PLAIN.replace(**changes))
    model.config = CONFIG.replace(**changes)
    save_packed(model, tmp_path / "x.bitnet")
    sentence = f"x.bitnet: {name} has one scale, but weight_scales is channel in its config"
    with pytest.raises(CheckpointError, match=sentence):
        load_packed(tmp_path / "x.bitnet")


def test_formats_without_a_place_refuse(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from bitnet.formats.gguf_export import save_gguf
    from bitnet.formats.hf_export import save_hf
    from bitnet.formats.onnx_export import save_onnx

    model = BitNetForCausalLM(CONFIG)
    out = tmp_path / "out"
    for save, why in (
        (lambda: save_hf(model, out, packed=False), "transformers would quantize the latent weights again"),
        (lambda: save_hf(model, out, packed=True), "a packed layer of transformers has one for all"),
        (lambda: save_gguf(model, out, flavour="llama.cpp"), "a ternary matrix of GGUF has one for all"),
        (lambda: save_onnx(model, out), "a ternary matrix of the graph that is written has one for all"),
    ):
        with pytest.raises(ConfigError, match=f"weight_scales is channel, .*: {why}.*; a .bitnet file holds them"):
            save()
        assert not out.exists()
    twin = BitNetForCausalLM(CONFIG.replace(linear="linear"))
    save_hf(twin, out, packed=False)  # no ternary matrix, nothing to refuse
    assert from_pretrained(out).config.linear == "linear"


def test_files_of_before_keep_their_bytes() -> None:
    """Nothing names the field where it is the default, and what other programs read says that they cannot."""
    assert PLAIN.as_dict() == {name: value for name, value in asdict(PLAIN).items() if name not in WRITTEN_WHERE_SET}
    assert "weight_scales" not in config_json(PLAIN, None)
    told = config_json(CONFIG, None)
    assert told["weight_scales"] == "channel"
    assert fingerprint(BitNetForCausalLM(PLAIN, 1)) != fingerprint(BitNetForCausalLM(CONFIG, 1))


@pytest.mark.parametrize("field", [{"weight_scales": "channel"}, {"hadamard": True}, {"activation_bits": 4}], ids=str)
def test_transformers_refuses_what_it_would_compute_otherwise(field: dict[str, Any], tmp_path: Path) -> None:
    auto = pytest.importorskip("transformers").AutoConfig
    for config, refused in ((PLAIN, False), (PLAIN.replace(**field), True)):
        (tmp_path / "config.json").write_text(json.dumps(config_json(config, None)))
        with pytest.raises(ValueError, match="bitnet-extended") if refused else nullcontext():
            auto.from_pretrained(tmp_path)


# ---- training -------------------------------------------------------------------------------------------------------


def test_adapters_beside_a_packed_base(file: Path) -> None:
    """Latent weights with exactly its codes and scales, and the losses and gradients of the unpacked base."""
    tokens = np.random.default_rng(2).integers(0, 257, (1, 9)).astype(np.int32)
    models = [BitNetForCausalLM(CONFIG, 4), load_packed(file)]
    assert fingerprint(models[0]) == fingerprint(models[1])
    losses = [model.add_lora(2, seed=1)(tokens, tokens) for model in models]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert np.array_equal(a.grad.numpy(), b.grad.numpy()), name


@pytest.mark.parametrize("cols", [3, 32, 1000, 4100])
def test_latent_weights_of_any_codes_and_scales(cols: int) -> None:
    """Scales of real rows, among them rows below the least mean, of zeros, and with one code that is not 0."""
    rng = np.random.default_rng(cols)
    w = (rng.normal(size=(12, cols)) * 10.0 ** rng.uniform(-4, 4, (12, 1))).astype(np.float32)
    w[0], w[1], w[2, 1:] = 0.0, 0.7e-5 * np.sign(w[1]), 0.0
    layer = layer_of(w)
    codes, scales = layer.codes().numpy(), layer.scales().numpy()
    assert scales[1] == np.float32(1e-5) and (codes[1] != 0).all()
    latent = layer_of(latent_of(codes, scales))
    np.testing.assert_array_equal(latent.codes().numpy(), codes)
    np.testing.assert_array_equal(latent.scales().numpy(), scales)
    with pytest.raises(ConfigError, match="no latent weights of the layer give its codes and its scale 1 exactly"):
        latent_of(codes, np.ones(12, np.float32))


SHORT = TrainerConfig(steps=6, batch_size=2, seq_len=16, lr=5e-3, eval_every=3, save_every=2, sample_tokens=0,
                      eval_blocks=4, plots=False)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_numbers(tmp_path_factory.mktemp("text"))


def train(text: Path, out: Path, config: TrainerConfig, shape: BitNetConfig = CONFIG) -> dict[str, bytes]:
    """The files of the last checkpoint but those that tell the time; a run that is there goes on."""
    run = Trainer(BitNetForCausalLM(shape, config.seed), text, config, out=out, log=lambda line: None)
    run.fit(resume=out.exists())
    folder = checkpoint.folder_of(out, run.step)
    return {
        name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors", "optimizer.safetensors")
    }


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_resumed_run_has_the_bytes_of_a_whole_one(text: Path, tmp_path: Path, precision: str) -> None:
    config = replace(SHORT, precision=precision)
    whole = train(text, tmp_path / "whole", config)
    assert train(text, tmp_path / "run", config) == whole
    for step in (4, 6):  # as if it had been killed after step 2
        folder = checkpoint.folder_of(tmp_path / "run", step)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert train(text, tmp_path / "run", config) == whole
    assert from_pretrained(tmp_path / "run").config.weight_scales == "channel"
    weights = "model.safetensors"
    assert train(text, tmp_path / "plain", config, PLAIN)[weights] != whole[weights]
    with pytest.raises(CheckpointError, match="of another model: its weight_scales is channel, not tensor"):
        train(text, tmp_path / "run", config, PLAIN)

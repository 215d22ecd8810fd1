"""Models as Hugging Face folders: transformers computes the same logits, and reading them writes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the other side is transformers on PyTorch")
transformers = pytest.importorskip("transformers", minversion="5", reason="BitNet with online quantization needs it")
pytest.importorskip("accelerate", reason="transformers' loader of quantized models wants it")

from reference.cases import grid_weight  # noqa: E402
from reference.hugging_face import (  # noqa: E402
    CONFIGS,
    SHAPE,
    Case,
    assert_alike,
    assert_near,
    logits,
    make_case,
    opened,
)

from bitnet import BitNetConfig, BitNetForCausalLM, _core  # noqa: E402
from bitnet.errors import CheckpointError, ConfigError  # noqa: E402
from bitnet.formats import hf_export, weights  # noqa: E402
from bitnet.formats.hf_export import save_hf, stored_scale  # noqa: E402
from bitnet.formats.hf_source import open_hf  # noqa: E402
from bitnet.formats.source import assemble  # noqa: E402
from bitnet.formats.weights import bf16_bits, bf16_values, codes_of  # noqa: E402

FORMS: dict[str, dict[str, Any]] = {
    "masters": {"packed": False},
    "multiplies": {"packed": True},
    "divides": {"packed": True, "linear_class": "bitlinear"},
}
TWINS = {"twin": CONFIGS["2b-4t"].replace(linear="linear"), "plain llama": CONFIGS["llama"].replace(linear="linear")}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: make_case(config) for name, config in (CONFIGS | TWINS).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def exact_in_bf16(config: BitNetConfig) -> BitNetForCausalLM:
    """A model all of whose numbers, the scales too, are bf16: scales are powers of two."""
    model, rng = BitNetForCausalLM(config, 4), np.random.default_rng(4)
    for name, parameter in model.named_parameters():
        if "_proj." in name:
            parameter.copy_(grid_weight(rng, parameter.shape, 2.0**-3))
        else:
            parameter.copy_(bf16_values(bf16_bits(rng.normal(1, 0.3, parameter.shape).astype(np.float32))))
    return model


# ---- what transformers computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same(tmp_path: Path, cases: dict[str, Case], name: str, form: str) -> None:
    case = cases[name]
    ours = case.model()
    want = logits(ours, case.tokens)
    save_hf(ours, tmp_path / "x", **FORMS[form])
    theirs = opened(tmp_path / "x")
    assert type(theirs).__name__ == ("BitNetForCausalLM" if case.config.sub_norms else "LlamaForCausalLM")
    assert_near(logits(theirs, case.tokens), want)
    tokens = np.random.default_rng(1).integers(0, case.config.vocab_size, (4, 48))
    assert_alike(logits(theirs, tokens), logits(ours, tokens))
    np.testing.assert_array_equal(logits(ours, case.tokens), want)  # it was not changed


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_dense(tmp_path: Path, cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    save_hf(case.model(), tmp_path / "x", packed=False)
    assert "quantization_config" not in json.loads((tmp_path / "x" / "config.json").read_bytes())
    assert_near(logits(opened(tmp_path / "x"), case.tokens), logits(case.model(), case.tokens))
    assert assemble(open_hf(tmp_path / "x")).config == case.config


def test_bf16_where_it_is_exact(tmp_path: Path) -> None:
    model = exact_in_bf16(CONFIGS["2b-4t"])
    tokens = np.arange(40)[None] * 7 % 503
    for form, options in FORMS.items():
        save_hf(model, tmp_path / form, **options)
        assert json.loads((tmp_path / form / "config.json").read_bytes())["torch_dtype"] == "bfloat16"
        np.testing.assert_array_equal(logits(assemble(open_hf(tmp_path / form)), tokens), logits(model, tokens))
    for form in ("masters", "multiplies"):
        theirs = opened(tmp_path / form)
        assert theirs.dtype == torch.bfloat16
        assert_alike(logits(torch.nn.Module.float(theirs), tokens), logits(model, tokens))
    apart = np.abs(logits(opened(tmp_path / "divides"), tokens) - logits(model, tokens))
    assert apart.mean() < 0.1 * logits(model, tokens).std()  # its layers compute in bf16
    next(model.parameters()).numpy()[0, 0] = 0.1
    save_hf(model, tmp_path / "f32", packed=True)
    assert opened(tmp_path / "f32").dtype == torch.float32
    save_hf(model, tmp_path / "asked", packed=True, dtype="bf16")
    assert float(opened(tmp_path / "asked").get_input_embeddings().weight.detach()[0, 0]) == 0.10009765625


def test_a_bf16_matrix_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F80, (50, 7)).astype(np.uint16)
    monkeypatch.setattr(weights, "CHUNK", 30)
    np.testing.assert_array_equal(weights.bf16_of(_core.from_buffer(bits.data, "bf16", bits.shape)), bits)


def test_a_model_in_several_files(tmp_path: Path, cases: dict[str, Case]) -> None:
    case = cases["llama"]
    names: list[str] = []
    save_hf(case.model(), tmp_path / "x", packed=True, max_shard_size=60_000, progress=lambda n: names.extend(n) or n)
    assert len(list((tmp_path / "x").glob("model-0000?-of-0000?.safetensors"))) == 3
    assert len(names) == len(open_hf(tmp_path / "x").tensors.entries)
    assert_near(logits(opened(tmp_path / "x"), case.tokens), logits(case.model(), case.tokens))


# ---- the same bytes again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*CONFIGS, "bf16"])
def test_reading_and_writing_gives_the_same_bytes(tmp_path: Path, cases: dict[str, Case], name: str, form: str) -> None:
    model = exact_in_bf16(CONFIGS["llama"]) if name == "bf16" else cases[name].model()
    save_hf(model, tmp_path / "a", **FORMS[form])
    save_hf(assemble(open_hf(tmp_path / "a")), tmp_path / "b", **FORMS[form])
    assert files(tmp_path / "a") == files(tmp_path / "b")
    if FORMS[form]["packed"]:
        save_hf(model.pack(), tmp_path / "c", **FORMS[form])
        assert files(tmp_path / "a") == files(tmp_path / "c")


def test_scales_rounded_to_bf16_stay_so(tmp_path: Path, cases: dict[str, Case]) -> None:
    for linear_class in ("autobitlinear", "bitlinear"):
        options = {"packed": True, "linear_class": linear_class}
        save_hf(cases["2b-4t"].model(), tmp_path / f"{linear_class}-a", dtype="bf16", **options)
        save_hf(assemble(open_hf(tmp_path / f"{linear_class}-a")), tmp_path / f"{linear_class}-b", **options)
        assert files(tmp_path / f"{linear_class}-a") == files(tmp_path / f"{linear_class}-b")


def test_the_reciprocal_of_a_reciprocal() -> None:
    rng = np.random.default_rng(8)
    one = np.float32(1)
    for w in np.exp2(rng.uniform(-40, 40, 4_000)).astype(np.float32):
        scale = one / w  # as it is read
        again = stored_scale(float(scale), "bitlinear")
        assert one / again == scale
        assert stored_scale(float(one / again), "bitlinear") == again
        rounded = (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        assert stored_scale(float(one / rounded), "bitlinear") == rounded
        again = one / stored_scale(float(w), "bitlinear")  # of any scale: exact, or next to it
        assert again in (w, np.nextafter(w, np.float32(0)), np.nextafter(w, np.float32(np.inf)))
        assert stored_scale(float(w), "autobitlinear") == w


def test_codes_and_scales_are_those_of_the_run(tmp_path: Path, cases: dict[str, Case]) -> None:
    model = cases["2b-4t"].model()
    save_hf(model, tmp_path / "x", packed=True)
    for (_, a), (_, b) in zip(model.bitlinears(), assemble(open_hf(tmp_path / "x")).bitlinears(), strict=True):
        np.testing.assert_array_equal(codes_of(a).codes, codes_of(b).codes)
        assert codes_of(a).scale == codes_of(b).scale


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"quantize_head": True}, {"packed": True}, "quantize_head: transformers leaves the output head out"),
        ({"input_norms": False}, {"packed": False}, "input_norms false: transformers' blocks have norms before"),
        ({"linear": "linear"}, {"packed": True}, "has no ternary codes to pack; hf-masters writes its weights"),
        ({"linear": "linear", "use_rms_norm": True}, {"packed": False}, "use_rms_norm: transformers has norms"),
        ({"intermediate_size": 30}, {"packed": True}, "gate_proj has 30 outputs, and .* hf-masters writes its latent"),
        ({}, {"packed": True, "dtype": "f16"}, "dtype must be one of f32, bf16, not 'f16'"),
        ({}, {"packed": True, "linear_class": "x"}, "linear_class must be one of autobitlinear, bitlinear, not 'x'"),
    ],
)
def test_what_transformers_cannot_run(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        save_hf(BitNetForCausalLM(SHAPE.replace(**changes)), tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_what_its_config_says(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers are in full precision, but its config says bitlinear"):
        save_hf(BitNetForCausalLM(SHAPE).to_full_precision(), tmp_path / "x", packed=False)  # type: ignore[arg-type]


def test_a_packed_model_has_no_masters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"q_proj is packed and has no latent weights, .* hf-packed writes its codes"):
        save_hf(BitNetForCausalLM(SHAPE).pack(), tmp_path / "x", packed=False)


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BitNetForCausalLM(SHAPE)
    save_hf(model, tmp_path / "x", packed=False)
    before = files(tmp_path / "x")
    with pytest.raises(CheckpointError, match="x exists already; --force replaces it"):
        save_hf(model, tmp_path / "x", packed=True)

    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "pack_rows", fail)
    with pytest.raises(CheckpointError, match="x could not be written: No space left on device"):
        save_hf(model, tmp_path / "x", packed=True, force=True)
    assert files(tmp_path / "x") == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    monkeypatch.undo()
    save_hf(model, tmp_path / "x", packed=True, force=True)
    assert files(tmp_path / "x") != before

"""bitnet import, export and compare, from the command line: every form is written, opened again and agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, agreement, checkpoint, cli, compare
from bitnet.export import TARGETS
from bitnet.tokenizer import ByteTokenizer

SHAPE = BitNetConfig(257, 256, 512, 2, 4, 2, max_position_embeddings=128, tie_word_embeddings=True)

FORMS = [
    ("hf", []),
    ("hf", ["--dtype", "f32"]),
    ("hf-packed", []),
    ("hf-packed", ["--linear-class", "bitlinear", "--dtype", "f32"]),
    ("gguf", ["--flavour", "llama.cpp"]),
    ("gguf", ["--flavour", "llama.cpp", "--weights", "tq1_0", "--embeddings", "f32"]),
    ("gguf", ["--flavour", "ik", "--embeddings", "f32"]),
    ("onnx", []),
    ("onnx", ["--weights", "int2"]),
    ("bitnet", ["--coded"]),
]
EXACT = "difference max 0, mean 0 "


def run_of(folder: Path, seed: int = 3, **changes: Any) -> Path:
    """A run folder with one checkpoint; its weights are bf16 numbers."""
    model = BitNetForCausalLM(SHAPE.replace(**changes), seed)
    for _, parameter in model.named_parameters():
        parameter.copy_((parameter.numpy(copy=True).view(np.uint32) & 0xFFFF0000).view(np.float32))
    checkpoint.save(folder, 1, model, {}, {"step": 1}, ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("runs") / "small")


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_every_form_is_written_and_agrees(
    form: str, options: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="it runs what is verified")
    out = tmp_path / f"out{TARGETS[form].suffix}"
    words = ["export", str(run), "--to", form, "-o", str(out), *options]
    assert cli.main([*words, "--verify"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: " in printed
    assert "next: " in printed
    [line] = [line for line in printed.splitlines() if "logits over" in line]
    if form == "onnx":  # float sums in another order, an int8 step now and then
        assert line.startswith("run by onnxruntime")
        assert "same first choice 100.0 %" in line or "same first choice 9" in line
    elif form == "gguf" and ("ik" in options or "--embeddings" not in options):  # half floats
        assert "same first choice" in line
    else:
        assert EXACT in line, line
    assert cli.main(words) == 2
    assert "exists already; --force replaces it" in capsys.readouterr().err
    assert cli.main([*words, "--force"]) == 0
    model = bitnet.from_pretrained(out)
    assert isinstance(model.tokenizer, ByteTokenizer)  # type: ignore[attr-defined]


def test_a_default_name_and_flags_of_another_form(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(run), "--to", "bitnet"]) == 0
    assert (tmp_path / "small.bitnet").is_file()
    for words, sentence in [
        (["--to", "bitnet", "--flavour", "ik"], "--flavour is a choice of gguf, not of bitnet"),
        (["--to", "onnx", "--coded"], "--coded is a choice of bitnet, not of onnx"),
        (["--to", "gguf"], "--to gguf needs a --flavour"),
    ]:
        assert cli.main(["export", str(run), *words]) == 2
        assert sentence in capsys.readouterr().err


def test_import_keeps_codes_and_scales(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, back = tmp_path / "packed", tmp_path / "back.bitnet"
    cli.main(["export", str(run), "--to", "hf-packed", "-o", str(packed)])
    assert cli.main(["import", str(packed), str(back), "--verify"]) == 0
    assert EXACT in capsys.readouterr().out
    ours, theirs = bitnet.from_pretrained(run), bitnet.from_pretrained(back)
    for (name, a), (_, b) in zip(ours.bitlinears(), theirs.bitlinears(), strict=True):
        assert np.array_equal(a.codes().numpy(), b.codes().numpy()), name
        assert a.weight_scale == b.weight_scale or np.isclose(a.weight_scale, b.weight_scale, rtol=2**-8)
    assert vars(theirs)["provenance"]["imported_from"] == "packed"
    assert cli.main(["import", str(packed), str(tmp_path / "folder")]) == 2
    assert "it has no latent weights to train" in capsys.readouterr().err


def test_import_of_latent_weights_can_be_trained(run: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "masters", tmp_path / "ours"
    cli.main(["export", str(run), "--to", "hf", "-o", str(folder)])
    assert cli.main(["import", str(folder), str(out)]) == 0
    model = bitnet.from_pretrained(out)
    assert all(isinstance(layer.weight, bitnet.nn.Parameter) for _, layer in model.bitlinears())
    tokens = np.arange(16)[None]
    model(tokens, tokens).backward()


def test_a_full_precision_checkpoint_becomes_ternary_when_asked(tmp_path: Path) -> None:
    dense = run_of(tmp_path / "run", linear="linear", sub_norms=False)
    folder, out = tmp_path / "llama", tmp_path / "ternary"
    assert cli.main(["export", str(dense), "--to", "hf", "-o", str(folder)]) == 0
    assert bitnet.from_pretrained(folder).config.linear == "linear"
    assert cli.main(["import", str(folder), str(out), "--linear", "bitlinear"]) == 0
    assert bitnet.from_pretrained(out).config.linear == "bitlinear"


def test_compare_names_the_layer_where_two_models_part(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = bitnet.from_pretrained(run)
    weight = other.model.layers[1].mlp.down_proj.weight
    weight.copy_(-weight.numpy(copy=True))
    checkpoint.save(tmp_path / "other", 1, other, {}, {"step": 1}, ByteTokenizer())
    out, picture = tmp_path / "c.json", tmp_path / "c.png"
    words = ["compare", str(run), str(tmp_path / "other"), "--text", "a text", "--json", str(out)]
    assert cli.main([*words, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "logits over 6 tokens" in printed
    assert picture.stat().st_size > 1000
    layers = {entry["layer"]: entry for entry in json.loads(out.read_text())["layers"]}
    assert [layers[name]["difference"] for name in ("embedding", "layer 0")] == [0, 0]
    assert layers["layer 1"]["difference"] > 0.01
    assert layers["layer 1"]["cosine"] < 1


def test_compare_refuses_other_shapes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = run_of(tmp_path / "deep", num_hidden_layers=3)
    assert cli.main(["compare", str(run), str(deep)]) == 2
    assert "num_hidden_layers is 2 in one and 3 in the other" in capsys.readouterr().err


def test_hidden_states_end_in_the_logits(run: Path) -> None:
    model = bitnet.from_pretrained(run)
    tokens = np.arange(12, dtype=np.int32)[None]
    *_, (name, last) = compare.hidden_states(model, tokens)
    assert name == "last norm"
    logits = model.logits(bitnet.tensor(last.astype(np.float32))).numpy()
    assert np.array_equal(logits, model(tokens).numpy())


def test_agreement_against_float64() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(1, 5, 11)).astype(np.float32)
    b = (a + 0.1 * rng.normal(size=a.shape)).astype(np.float32)
    found = agreement.compare_logits(a, b)
    x, y = a.astype(np.float64), b.astype(np.float64)
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (x, y))
    assert found.tokens == 5
    assert found.max_difference == np.abs(x - y).max()
    assert np.isclose(found.mean_difference, np.abs(x - y).mean(), rtol=1e-12)
    assert np.isclose(found.divergence, (p * np.log(p / q)).sum(-1).mean(), rtol=1e-9)
    assert found.top1 == (x.argmax(-1) == y.argmax(-1)).mean()


def test_what_is_compared_without_a_text(run: Path) -> None:
    model = bitnet.from_pretrained(run)
    assert agreement.tokens_of(model, None).shape == (1, 128)
    assert agreement.tokens_of(model, ByteTokenizer()).shape == (1, 128)
    with pytest.raises(bitnet.errors.ConfigError, match="has no tokenizer"):  # type: ignore[attr-defined]
        agreement.tokens_of(model, None, "text")


def test_what_is_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        bitnet.from_pretrained(tmp_path / "nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="there is no folder nobody/nothing here, nor could it be had from the hub: "):
        bitnet.from_pretrained("nobody/nothing")
    (tmp_path / "file").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"file: it is no \.bitnet file"):
        bitnet.from_pretrained(tmp_path / "file")

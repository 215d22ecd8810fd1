"""Adapters beside frozen ternary layers: their formula, their gradients, what a run keeps of them, and decoding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitnet import BitNetConfig, BitNetForCausalLM, _core, checkpoint, cli, from_pretrained, nn, ops, tensor
from bitnet.decoder import Decoder
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.gguf_export import save_gguf
from bitnet.formats.hf_export import save_hf
from bitnet.formats.onnx_export import save_onnx
from bitnet.formats.packing import save_packed
from bitnet.lora import LoraConfig, LoRALinear, attach, fingerprint, latent_of

CONFIG = BitNetConfig(257, 32, 48, 2, 4, 2, max_position_embeddings=64)
SHAPE = (
    "--tokenizer bytes --hidden-size 32 --intermediate-size 48 --num-hidden-layers 1 --num-attention-heads 2".split()
)
SHORT = "--batch-size 2 --seq-len 16 --steps 4 --save-every 2 --sample-tokens 0 --plots false --spike 0".split()
LINES = "".join(f"{n} squared is {n * n}.\n" for n in range(200))


def adapted(config: BitNetConfig = CONFIG, packed: bool = False, seed: int = 3) -> BitNetForCausalLM:
    """A model whose adapters are not zero."""
    model = BitNetForCausalLM(config, seed)
    if packed:
        model.pack("2")
    model.add_lora(4, targets=("q_proj", "down_proj"), seed=seed)
    random = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.weight"):
            parameter.copy_(random.standard_normal(parameter.shape, np.float32) * 0.05)
    return model


def tokens_of(batch: int, time: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 257, (batch, time)).astype(np.int32)


# ---- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_forward_is_the_ternary_product_plus_the_low_rank_one(packed: bool) -> None:
    random = np.random.default_rng(0)
    base = nn.BitLinear(24, 16)
    x, residual = (random.standard_normal((2, 5, n), np.float32) for n in (24, 16))
    plain = base(tensor(x), tensor(residual)).numpy()
    layer = LoRALinear(base.pack("1.6") if packed else base, 4, 8.0, seed=1, name="it")
    with ops.no_grad():
        assert np.array_equal(layer(tensor(x), tensor(residual)).numpy(), plain)  # B is zero
        b = random.standard_normal((16, 4), np.float32)
        layer.lora_B.weight.copy_(b)
        a = layer.lora_A.weight.numpy(copy=True)
        expected = plain + 2.0 * (x.astype(np.float64) @ a.T.astype(np.float64)) @ b.T
        assert np.abs(layer(tensor(x), tensor(residual)).numpy() - expected).max() < 1e-5


def test_gradients_are_those_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    x, b, dy = (random.standard_normal(shape, np.float32) for shape in ((6, 24), (16, 4), (6, 16)))
    base = nn.BitLinear(24, 16)
    base.weight = base.weight.detach()
    layer = LoRALinear(base, 4, 8.0, seed=1, name="it")
    layer.lora_B.weight.copy_(b)
    ours = nn.Parameter(x)
    ops.sum(layer(ours) * tensor(dy)).backward()

    w = torch.tensor(base.codes().numpy().astype(np.float32) * np.float32(base.weight_scale))
    tx = torch.tensor(x, requires_grad=True)
    ta = torch.tensor(layer.lora_A.weight.numpy(copy=True), requires_grad=True)
    tb = torch.tensor(b, requires_grad=True)
    scale = tx.detach().abs().amax(-1, keepdim=True) / 127
    quantized = tx + ((tx / scale).round() * scale - tx).detach()  # straight through
    ((quantized @ w.T + 2.0 * tx @ ta.T @ tb.T) * torch.tensor(dy)).sum().backward()
    pairs = ((ours, tx), (layer.lora_A.weight, ta), (layer.lora_B.weight, tb))
    for mine, theirs in pairs:
        assert mine.grad is not None
        # Sums of at most 24 products of numbers about 1, rounded in another order.
        assert np.abs(mine.grad.numpy() - theirs.grad.numpy()).max() < 1e-4
    assert base.weight.grad is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (7, 111), (64, 96), (130, 182)])
def test_a_packed_layer_has_latent_weights_with_its_very_codes_and_scale(shape: tuple[int, int]) -> None:
    for seed in range(5):
        layer = nn.BitLinear(shape[1], shape[0], weight=nn.normal(shape, 0.3, seed, "w")).pack("2")
        latent = tensor(latent_of(layer.codes().numpy(), layer.weight_scale))
        assert _core.ternary_stats(latent)[4] == layer.weight_scale
        assert np.array_equal(_core.ternary_codes(latent).numpy(), layer.codes().numpy())
    assert not latent_of(np.zeros((2, 3), np.int8), float(np.float32(1e-5))).any()


# ---- the model ------------------------------------------------------------------------------------------------------


def test_nothing_but_adapters_is_trained() -> None:
    model = BitNetForCausalLM(CONFIG, 1)
    before = model(tokens_of(2, 9)).numpy()
    assert model.add_lora(4) is model
    assert np.array_equal(model(tokens_of(2, 9)).numpy(), before)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 2 * 7 * 2
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    assert list(model.state_dict()) == names
    model(tokens_of(2, 9), tokens_of(2, 9)).backward()
    for _, layer in model.bitlinears():
        assert layer.weight.grad is None
    assert model.model.embed_tokens.weight.grad is None
    norms = BitNetForCausalLM(CONFIG, 1).add_lora(4, norms=True)
    assert sum("norm" in name for name, _ in norms.named_parameters()) == 4 * 2 + 1


@pytest.mark.parametrize("changes", [{}, {"sub_norms": False}, {"use_rms_norm": True, "tie_word_embeddings": True}])
def test_decoding_with_the_cache_is_the_training_forward(changes: dict[str, bool]) -> None:
    model = adapted(CONFIG.replace(**changes))
    tokens = tokens_of(1, 20)
    with ops.no_grad():
        whole = model(tokens).numpy()[0]
    for packed in (False, True):
        if packed:
            model.pack("1.6")
        decoder = Decoder(model)
        rows = [decoder.resume([tokens[0, :7].tolist()])[0]]
        rows += [decoder.resume([tokens[0, : n + 1].tolist()])[0] for n in range(7, 20)]
        assert np.array_equal(np.stack(rows), whole[6:])


def test_a_packed_base_trains_as_the_latent_one_does() -> None:
    latent, packed = adapted(), adapted(packed=True)
    tokens = tokens_of(2, 9)
    losses = [model(tokens, tokens) for model in (latent, packed)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(latent.named_parameters(), packed.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert np.array_equal(a.grad.numpy(), b.grad.numpy()), name
    assert latent.lora == packed.lora


def test_the_fingerprint_is_of_what_adapters_stand_beside() -> None:
    models = [BitNetForCausalLM(CONFIG, seed) for seed in (1, 1, 2)]
    prints = [fingerprint(model) for model in models]
    assert prints[0] == prints[1] != prints[2]
    assert fingerprint(models[0].pack("2")) == prints[0]
    models[1].model.norm.weight.copy_(np.full(32, 2.0, np.float32))
    assert fingerprint(models[1]) != prints[0]


def test_full_precision_takes_the_adapters_in() -> None:
    model = adapted()
    layer = next(layer for _, layer in model.bitlinears() if isinstance(layer, LoRALinear))
    a, b = layer.lora_A.weight.numpy(copy=True), layer.lora_B.weight.numpy(copy=True)
    whole = layer.codes().numpy() * layer.weight_scale + 2.0 * b @ a
    assert np.abs(layer.to_full_precision().weight.numpy() - whole).max() < 1e-6


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="rank of an adapter must be at least 1, not 0"):
        BitNetForCausalLM(CONFIG).add_lora(0)
    with pytest.raises(ConfigError, match="alpha of an adapter must be positive"):
        BitNetForCausalLM(CONFIG).add_lora(2, -1.0)
    with pytest.raises(ConfigError, match=r"adapters go beside layers named .*: not 'w_proj'"):
        BitNetForCausalLM(CONFIG).add_lora(2, targets=["w_proj"])
    with pytest.raises(ConfigError, match="has adapters already"):
        adapted().add_lora(2)
    with pytest.raises(ConfigError, match="beside ternary layers"):
        BitNetForCausalLM(CONFIG.replace(linear="linear")).add_lora(2)
    with pytest.raises(CheckpointError, match="does not describe adapters"):
        LoraConfig.of({"rank": 1, "alpha": 2.0}, Path("adapters.json"))


# ---- a run ----------------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> int:
    return cli.main(["train", *map(str, arguments)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, base.bitnet, and lora: four steps beside the packed one."""
    root = tmp_path_factory.mktemp("lora")
    (root / "numbers.txt").write_text(LINES)
    (root / "other.txt").write_text(LINES[::-1])
    assert run("--data", root / "numbers.txt", *SHAPE, *SHORT, "--out", root / "base") == 0
    assert cli.main(["pack", str(root / "base"), "-o", str(root / "base.bitnet")]) == 0
    beside = ("--data", root / "other.txt", "--lora", "4", "--lr", "1e-2", *SHORT)
    assert run("--init", root / "base.bitnet", *beside, "--out", root / "lora") == 0
    assert run("--init", root / "base", *beside, "--out", root / "latent") == 0
    return root


def test_a_checkpoint_holds_adapters_alone(runs: Path) -> None:
    folder = checkpoint.folder_of(runs / "lora", 4)
    assert not (folder / "model.safetensors").exists()
    saved = checkpoint.load(folder, optimizer=True)
    assert saved.lora is not None
    assert (saved.lora.rank, saved.lora.alpha) == (4, 8.0)
    assert all(".lora_" in name for name in saved.weights)
    assert saved.optimizer is not None
    assert len(saved.optimizer) == 1 + 2 * len(saved.weights)
    latent = checkpoint.load(checkpoint.folder_of(runs / "latent", 4))
    assert all(np.array_equal(latent.weights[name], saved.weights[name]) for name in saved.weights)
    assert any(saved.weights[name].any() for name in saved.weights if "lora_B" in name)


def test_adapters_generate_beside_their_base(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {}
    options = ("-p", "12 squ", "--max-new-tokens", "20", "--temperature", "0")
    for name, where in {
        "base": (runs / "base",),
        "flag": (runs / "base", "--lora", runs / "lora"),
        "packed": (runs / "base.bitnet", "--lora", runs / "lora"),
        "alone": (runs / "lora",),
    }.items():
        capsys.readouterr()
        assert cli.main(["generate", *map(str, where), *options]) == 0
        text[name] = capsys.readouterr().out
    assert text["flag"] == text["packed"] == text["alone"] != text["base"]
    model = attach(from_pretrained(runs / "base"), runs / "lora")
    tokens = tokens_of(1, 12)
    with ops.no_grad():
        assert np.array_equal(model(tokens).numpy(), from_pretrained(runs / "lora")(tokens).numpy())


def test_a_run_of_adapters_resumes_to_the_same_bytes(runs: Path) -> None:
    shutil.copytree(runs / "lora", runs / "cut")
    shutil.rmtree(checkpoint.folder_of(runs / "cut", 4))
    assert run("--resume", runs / "cut", "--init", runs / "base") == 0
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        files = [checkpoint.folder_of(runs / one, 4) / name for one in ("cut", "lora")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_adapters_that_do_not_fit_their_description(runs: Path) -> None:
    saved = checkpoint.load(checkpoint.folder_of(runs / "lora", 4))
    name = next(iter(saved.weights))
    for weights, message in (
        ({key: array for key, array in saved.weights.items() if key != name}, f"has no {name}"),
        ({**saved.weights, name: saved.weights[name][:1]}, "fits nothing in the model"),
        ({**saved.weights, "model.other": saved.weights[name]}, "its model.other of shape"),
    ):
        with pytest.raises(CheckpointError, match=message):
            replace(saved, weights=weights).model()


def test_requests_that_cannot_be_met(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*command: str | Path) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in command]) == 2
        return capsys.readouterr().err

    data = ("--data", runs / "other.txt", *SHORT)
    assert "adapters cannot be packed into their model" in said("pack", runs / "lora", "-o", tmp_path / "x.bitnet")
    assert "--lora RANK trains adapters" in said(
        "train", "--init", runs / "base.bitnet", *data, "--out", tmp_path / "a"
    )
    assert "holds adapters: go on with --resume" in said(
        "train", "--init", runs / "lora", *data, "--out", tmp_path / "a"
    )
    assert "lora 4 needs init" in said("train", "--lora", "4", *data)
    assert "lora_alpha needs lora" in said("train", "--lora-alpha", "4", *data)
    assert "lora is 4" in said("train", "--resume", runs / "lora", "--lora", "2")
    assert "holds a whole model" in said("generate", runs / "base", "--lora", runs / "base", "-p", "1")
    assert run("--data", runs / "other.txt", *SHAPE, *SHORT, "--out", tmp_path / "another") == 0
    assert "made for another model" in said("generate", tmp_path / "another", "--lora", runs / "lora", "-p", "1")
    assert "has other adapters" in said("train", "--resume", runs / "lora", "--init", tmp_path / "another")
    shutil.copytree(runs / "latent", tmp_path / "latent")
    (runs / "base").rename(runs / "moved")
    try:
        assert "which is not there: open that one with" in said("generate", tmp_path / "latent", "-p", "1")
    finally:
        (runs / "moved").rename(runs / "base")


def test_no_file_of_a_whole_model_can_hold_adapters(tmp_path: Path) -> None:
    model = adapted()
    for write in (
        lambda: save_hf(model, tmp_path / "hf", packed=True),
        lambda: save_gguf(model, tmp_path / "x.gguf", flavour="llama.cpp"),
        lambda: save_onnx(model, tmp_path / "x.onnx"),
        lambda: save_packed(model, tmp_path / "x.bitnet"),
    ):
        with pytest.raises(ConfigError, match="adapters cannot be packed into their model"):
            write()
    assert not list(tmp_path.iterdir())


def test_levers_beside_adapters(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside = ("--init", runs / "base", "--data", runs / "other.txt", "--lora", "4", *SHORT, "--out")
    for flag, value in {"--ema": "0.9", "--ternary-from": "2", "--ternary-ramp": "2", "--optimizer": "muon"}.items():
        capsys.readouterr()
        assert run(*beside, tmp_path / "refused", flag, value) == 2
        assert "is for training all weights" in capsys.readouterr().err
    assert run(*beside, tmp_path / "taught", "--teacher", runs / "base") == 0


def test_adapters_beside_a_hugging_face_folder(runs: Path, tmp_path: Path) -> None:
    save_hf(from_pretrained(runs / "base"), tmp_path / "theirs", packed=False)
    beside = ("--data", runs / "other.txt", "--lora", "4", "--lr", "1e-2", *SHORT, "--out", tmp_path / "tuned")
    assert run("--init", tmp_path / "theirs", *beside) == 0
    saved, own = (checkpoint.load(checkpoint.folder_of(one, 4)) for one in (tmp_path / "tuned", runs / "latent"))
    assert all(np.array_equal(own.weights[name], saved.weights[name]) for name in own.weights)
    tokens = tokens_of(1, 12)
    with ops.no_grad():
        logits = from_pretrained(tmp_path / "tuned")(tokens).numpy()
        assert np.array_equal(attach(from_pretrained(tmp_path / "theirs"), tmp_path / "tuned")(tokens).numpy(), logits)

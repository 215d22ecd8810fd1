"""A full-precision LLaMA made ternary: what it keeps, what is inserted, and that it trains, resumes and is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from train_command import refused, run

from bitnet import BitNetConfig, BitNetForCausalLM, checkpoint, cli, from_pretrained, get_threads, set_threads, use_isa
from bitnet.convert import mean_sizes, to_ternary
from bitnet.data import DataLoader, ShardDataset
from bitnet.errors import ConfigError
from bitnet.metrics import read_metrics
from bitnet.ramp import blended
from bitnet.tokenizer import FileTokenizer

SHAPE = "--hidden-size 32 --intermediate-size 48 --num-hidden-layers 2 --num-attention-heads 2".split()
TWIN = [*"--tokenizer bytes --twin --sub-norms false".split(), *SHAPE]
BASIC = "--batch-size 4 --seq-len 32 --sample-tokens 0 --plots false --spike 0".split()
SHORT = [*BASIC, *"--steps 4 --save-every 2 --precision fp32".split()]
LINES = "".join(f"{n} squared is {n * n}.\n" for n in range(300))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(LINES)
    return path


@pytest.fixture(scope="module")
def twin(text: Path) -> Path:
    """A LLaMA of ours, trained until it knows something: sixty steps."""
    out = text.with_name("twin")
    assert run("--data", text, *TWIN, *BASIC, "--steps", "60", "--lr", "5e-3", "--out", out) == 0
    return out


@pytest.fixture
def batch(twin: Path) -> tuple[np.ndarray, np.ndarray]:
    return DataLoader(ShardDataset(twin / "data"), 4, 32, 0).batch(0)


def weights_of(folder: Path, step: int = 4) -> bytes:
    return (checkpoint.folder_of(folder, step) / "model.safetensors").read_bytes()


def gains_of(model: BitNetForCausalLM) -> list[float]:
    """Of the sub-norms, each a number that all channels share."""
    out = []
    for block in model.model.layers:
        for norm in (block.self_attn.attn_sub_norm, block.mlp.ffn_sub_norm):
            values = norm.weight.numpy(copy=True)
            assert len(set(values.tolist())) == 1
            out.append(float(values[0]))
    return out


# ---- what is kept and what is inserted ------------------------------------------------------------------------------


def test_matrices_and_norms_are_kept_and_gains_are_mean_sizes(twin: Path, batch: tuple[np.ndarray, np.ndarray]) -> None:
    torch = pytest.importorskip("torch")
    from reference.torch_bitnet import TorchBitNet

    source, (tokens, targets) = from_pretrained(twin), batch
    targets = targets.copy()
    targets[0, 5:] = targets[2, :7] = -100
    before = source.state_dict()
    model = to_ternary(from_pretrained(twin), tokens, targets)
    assert model.config == source.config.replace(linear="bitlinear", sub_norms=True)
    assert model.num_ternary() == sum(array.size for name, array in before.items() if "_proj" in name)
    after = model.state_dict()
    assert all(np.array_equal(after[name], array) for name, array in before.items())
    assert len(after) == len(before) + 4
    assert model.tokenizer is not None

    other, sizes = TorchBitNet(source.config).double(), []
    other.load_state_dict({name: torch.tensor(array) for name, array in before.items()})
    for layer in other.model.layers:
        for reader in (layer.self_attn.o_proj, layer.mlp.down_proj):
            reader.register_forward_pre_hook(
                lambda _module, x: sizes.append((x[0].pow(2).mean(-1) + source.config.rms_norm_eps).sqrt())
            )
    other(torch.tensor(tokens).long())
    expected = [float(size[torch.tensor(targets != -100)].mean().detach()) for size in sizes]
    assert np.allclose(gains_of(model), expected, rtol=1e-5)
    assert len(set(gains_of(model))) == 4


def test_gains_bring_the_model_nearer_to_what_it_was(twin: Path, text: Path, tmp_path: Path) -> None:
    """Losses on held-out text, in full precision: with the norms, and with norms of gain 1, beside none."""
    tokens, targets = DataLoader(ShardDataset(twin / "data", "validation"), 1, 32, 0).batch(0)
    source = from_pretrained(twin)
    original = source(tokens, targets).item()
    model = to_ternary(source, *DataLoader(ShardDataset(twin / "data"), 4, 32, 0).batch(0))

    def distance() -> float:
        with blended(model, 0.0):
            return abs(model(tokens, targets).item() - original)

    calibrated = distance()
    for block in model.model.layers:
        for norm in (block.self_attn.attn_sub_norm, block.mlp.ffn_sub_norm):
            norm.weight.copy_(np.ones(norm.weight.shape, np.float32))
    ones = distance()
    assert calibrated < 0.25
    assert ones > 0.5
    assert calibrated < 0.3 * ones


def test_gains_are_the_same_bits_everywhere(isa: str, twin: Path, batch: tuple[np.ndarray, np.ndarray]) -> None:
    model, before = from_pretrained(twin), get_threads()
    chosen = mean_sizes(model, *batch)
    use_isa("scalar")
    set_threads(3)
    assert mean_sizes(model, *batch) == chosen
    set_threads(before)
    assert model.model.layers[0].self_attn.attn_sub_norm is None


def test_a_model_with_sub_norms_keeps_them() -> None:
    source = BitNetForCausalLM(BitNetConfig(257, 32, 48, 1, 2, linear="linear", tie_word_embeddings=True), 3)
    norm = source.model.layers[0].mlp.ffn_sub_norm
    norm.weight.copy_(np.arange(48, dtype=np.float32))
    tokens = np.zeros((1, 4), np.int32)
    model = to_ternary(source, tokens, np.full((1, 4), -100, np.int32))
    assert np.array_equal(model.model.layers[0].mlp.ffn_sub_norm.weight.numpy(), np.arange(48))
    assert model.lm_head is None
    with pytest.raises(ConfigError, match="the model is ternary already"):
        to_ternary(model, tokens, tokens)
    bare = BitNetForCausalLM(BitNetConfig(257, 32, 48, 1, 2, linear="linear", sub_norms=False), 3)
    with pytest.raises(ConfigError, match="the first batch of 4 targets has none that takes part"):
        to_ternary(bare, tokens, np.full((1, 4), -100, np.int32))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levers", [[], "--ternary-from 2 --ema 0.9".split()])
def test_a_converted_run_resumes_to_the_same_bytes(
    twin: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    levers: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(twin, "source")
    flags = ["--init", "source", "--convert", "--data", text, *SHORT, *levers]
    assert run(*flags, "--out", "whole") == 0
    told = capsys.readouterr().out
    assert "converted: 14 matrices are ternary now, 4 sub-norms inserted with gains of " in told
    options = yaml.safe_load(Path("whole/train.yaml").read_text())
    assert (options["convert"], options["init"]) == (True, str(Path("source").resolve()))
    model = from_pretrained("whole")
    assert (model.config.linear, model.config.sub_norms) == ("bitlinear", True)
    # Stopped before its first checkpoint, it begins as it began; after one, it neither converts nor needs the source.
    shutil.copytree("whole", "early")
    shutil.rmtree("early/checkpoints")
    Path("early/metrics.jsonl").unlink()
    assert run("--resume", "early") == 0
    assert weights_of(Path("early")) == weights_of(Path("whole"))
    shutil.copytree("whole", "cut")
    shutil.rmtree(checkpoint.folder_of("cut", 4))
    shutil.rmtree("source")
    capsys.readouterr()
    assert run("--resume", "cut") == 0
    assert "converted" not in capsys.readouterr().out
    assert weights_of(Path("cut")) == weights_of(Path("whole"))
    assert [record["step"] for record in read_metrics("cut/metrics.jsonl")] == [1, 2, 3, 4]


def test_what_convert_cannot_do_is_said(
    twin: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "convert needs init" in refused(capsys, "--convert", "--data", text, *SHORT)
    flags = ["--convert", "--data", text, *SHORT]
    assert "lora 4 and convert exclude each other" in refused(capsys, "--init", twin, "--lora", "4", *flags)
    assert run("--init", twin, *flags, "--out", "ternary") == 0
    assert cli.main(["pack", "ternary", "-o", "packed.bitnet"]) == 0
    for source in ("ternary", "packed.bitnet"):
        assert f"{source} is ternary already: convert is for" in refused(capsys, "--init", source, *flags)
    long = [*flags[:3], *SHORT[4:], "--batch-size", "2", "--seq-len", "2100"]
    assert "seq_len 2100 is more than the model's max_position_embeddings 2048" in refused(
        capsys, "--init", twin, *long
    )
    assert "convert is True in" in refused(capsys, "--resume", "ternary", "--convert", "false")


def test_a_llama_of_transformers_learns_from_itself(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import tokenizers

    monkeypatch.chdir(tmp_path)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    learner = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([LINES], learner)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained("llama")
    vocabulary = FileTokenizer.load(Path("llama/tokenizer.json")).vocab_size
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True,
        initializer_range=0.1, eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(shape).eval()
    theirs.save_pretrained("llama")
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, 16)).astype(np.int32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens).long()).logits.numpy()
    teacher = from_pretrained("llama")
    assert np.abs(teacher(tokens).numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()
    flags = ["--init", "llama", "--convert", "--data", text, "--teacher", "llama", "--distill", "0.1"]
    assert run(*flags, "--distill-attention", "1", *BASIC, "--steps", "20", "--lr", "5e-3", "--out", "run") == 0
    losses = [record["train_loss"] for record in read_metrics("run/metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.3
    model = from_pretrained("run")
    assert model.num_ternary() == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert model.config.rms_norm_eps == 1e-6


def test_a_gguf_file_is_converted(twin: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "--to gguf --flavour llama --weights f16 --embeddings f16 -o llama.gguf".split()
    assert cli.main(["export", str(twin), *flags]) == 0
    kept = [*SHORT, "--lr", "1e-30", "--weight-decay", "0"]
    assert run("--init", "llama.gguf", "--convert", "--data", text, *kept, "--out", "run") == 0
    model = from_pretrained("run")
    assert model.num_ternary() > 0
    after = model.state_dict()
    for name, array in from_pretrained(twin).state_dict().items():
        halves = array.astype(np.float16).astype(np.float32) if array.ndim == 2 else array
        assert np.array_equal(after[name], halves), name

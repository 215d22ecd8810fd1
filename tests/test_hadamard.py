"""Activations in four bits and the Hadamard transform before them: the op, the layers, and models made of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from reference.hadamard import matrix
from test_levers import CONFIG, SHAPE, StopAt, numbers, trainer
from test_levers import folder as folder

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, ShapeError, Tape, nn, ops, tensor
from bitnet.batching import Batch
from bitnet.decoder import Decoder
from bitnet.decoding import generate_ids
from bitnet.drafting import MOST, NgramDrafter, Speculation
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.bitnet_file import BitnetFile
from bitnet.formats.gguf_export import save_gguf
from bitnet.formats.hf_config import config_json
from bitnet.formats.hf_export import save_hf
from bitnet.formats.onnx_export import save_onnx
from bitnet.formats.packing import save_packed
from bitnet.info import inspect, report
from bitnet.interrupts import Interrupted
from bitnet.lora import LoRALinear, fingerprint
from bitnet.optim import AdamW
from bitnet.run_config import Settings, parse
from bitnet.sampling import Sampler

F = np.float32
SMALL = BitNetConfig(97, 48, 80, 2, 4, 2, max_position_embeddings=64, initializer_range=0.3)
LEVERS = SMALL.replace(hadamard=True, activation_bits=4)
PROMPTS = ([5, 90, 3, 5, 90, 3, 5, 90], [7, 8, 9])


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    threads = bitnet.get_threads()
    yield
    bitnet.set_threads(threads)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, F)


def tokens_of(batch: int, time: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 97, (batch, time)).astype(np.int32)


def logits(model: BitNetForCausalLM, tokens: np.ndarray | None = None) -> np.ndarray:
    with ops.no_grad():
        return model(tokens_of(2, 21) if tokens is None else tokens).numpy(copy=True)


# ---- the transform --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "block"), [(1, 1), (33, 1), (12, 4), (384, 128), (6912, 256), (1024, 1024)])
def test_the_block_is_the_largest_power_of_two_that_divides_the_channels(channels: int, block: int) -> None:
    x = np.zeros((2, channels), F)
    x[1, channels - 1] = 3.0
    y = ops.hadamard(tensor(x)).numpy()
    assert not y[0].any()
    assert np.count_nonzero(y[1]) == block
    assert np.allclose(np.abs(y[1, -block:]), 3.0 / block**0.5, rtol=1e-6)  # one outlier, spread evenly
    assert np.allclose(y[1, -block:], 3.0 * matrix(channels)[-1], rtol=1e-6)


@pytest.mark.parametrize("channels", [5, 24, 272, 2048, 5460])
def test_it_is_orthonormal_and_its_own_inverse(channels: int) -> None:
    x = normal(3, channels)
    y = ops.hadamard(tensor(x))
    assert np.abs(ops.hadamard(y).numpy() - x).max() < 1e-5
    assert np.allclose(np.linalg.norm(y.numpy(), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 6, 40, 384, 1024])
def test_the_same_bits_everywhere(channels: int, isa: str) -> None:
    """Forward, and a gradient that two uses of x add up."""

    def compute() -> list[bytes]:
        x = nn.Parameter(normal(19, channels))
        y = ops.hadamard(x)
        (ops.sum(y * y) + ops.sum(ops.hadamard(x) * tensor(normal(19, channels, seed=1)))).backward()
        assert x.grad is not None
        return [y.numpy().tobytes(), x.grad.numpy().tobytes()]

    bitnet.set_threads(3)
    here = compute()
    bitnet.use_isa("scalar")
    bitnet.set_threads(1)
    assert compute() == here


def test_a_tape_plays_it_again() -> None:
    x = tensor(normal(4, 24))
    with Tape() as tape:
        y = ops.hadamard(x)
    x.copy_(normal(4, 24, seed=1))
    tape.replay()
    assert np.array_equal(y.numpy(), ops.hadamard(tensor(normal(4, 24, seed=1))).numpy())


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="hadamard: x is i32, expected f32"):
        ops.hadamard(tensor([1, 2]))
    with pytest.raises(ShapeError, match="hadamard: x is a scalar"):
        ops.hadamard(ops.sum(tensor(normal(3))))
    with pytest.raises(ShapeError, match="hadamard: x has 1048576 channels, the transform takes at most 524288"):
        ops.hadamard(ops.zeros((1, 1 << 20)))


# ---- four bits ------------------------------------------------------------------------------------------------------


def rows_in_4_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = np.maximum(np.abs(x).max(-1, keepdims=True), F(1e-5))
    return np.clip(np.rint(x * (F(7) / top)), -8, 7).astype(np.int64), top / F(7)


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 1, 1), (3, 17, 5), (9, 200, 33), (40, 70, 64)])
def test_the_product_is_that_of_its_equation(rows: int, inner: int, outer: int, isa: str) -> None:
    x, layer = normal(rows, inner), nn.BitLinear(inner, outer, activation_bits=4)
    x[0] *= F(1e-7)  # below the least absmax
    q, act_scale = rows_in_4_bits(x)
    assert q.min() >= -7  # a symmetric scale reaches no -8
    codes, weight_scale = layer.codes().numpy().astype(np.int64), F(layer.weight_scale)
    want = (q @ codes.T).astype(F) * (act_scale * weight_scale)
    assert np.array_equal(layer(tensor(x)).numpy(), want)
    for layout in ("2", "1.6"):
        layer = nn.BitLinear(inner, outer, weight=layer.weight, activation_bits=4)
        packed = nn.BitLinear(inner, outer, weight=layer.weight, activation_bits=4).pack(layout)
        with ops.no_grad():
            assert np.array_equal(packed(tensor(x)).numpy(), want)
    residual = tensor(normal(rows, outer, seed=2))
    assert np.array_equal(layer(tensor(x), residual).numpy(), want + residual.numpy())


@pytest.mark.parametrize("precision", ["fp32", "fast", "int8"])
def test_gradients_go_straight_through_as_in_pytorch(precision: str) -> None:
    torch = pytest.importorskip("torch")
    from reference.torch_bitnet import FakeQuantInput, FakeQuantWeight, hadamard

    x, w, dy = normal(6, 24), normal(16, 24, seed=1), normal(6, 16, seed=2)
    ours, weight = nn.Parameter(x), nn.Parameter(w)
    with ops.precision(precision):
        y = ops.bitlinear(ops.hadamard(ours), weight, activation_bits=4)
        ops.sum(y * tensor(dy)).backward()
    theirs, other = torch.tensor(x, requires_grad=True), torch.tensor(w, requires_grad=True)
    expected = torch.nn.functional.linear(FakeQuantInput.apply(hadamard(theirs), 7.0), FakeQuantWeight.apply(other))
    (expected * torch.tensor(dy)).sum().backward()
    assert np.abs(y.numpy() - expected.detach().numpy()).max() < 1e-4
    # Sums of 16 products of numbers about 1; rounded to bf16, dy errs by 2^-9 of itself, and to int8 by 1 / 254.
    bound = 1e-4 if precision == "fp32" else 0.05
    for mine, its in ((ours, theirs), (weight, other)):
        assert mine.grad is not None
        assert np.abs(mine.grad.numpy() - its.grad.numpy()).max() < bound


def test_a_tape_plays_four_and_eight_bits_of_one_input_again() -> None:
    w = tensor(normal(16, 40, seed=1))
    first, then = normal(5, 40, seed=2), normal(5, 40, seed=3)
    x = tensor(first)
    with Tape() as tape:
        found = [ops.bitlinear(x, w, None, bits) for bits in (8, 4, 8)]
    for values in (first, then):
        x.copy_(values)
        tape.replay()
        wanted = [ops.bitlinear(tensor(values), w, None, bits).numpy() for bits in (8, 4, 8)]
        assert all(np.array_equal(y.numpy(), want) for y, want in zip(found, wanted, strict=True))
        assert not np.array_equal(wanted[0], wanted[1])


def test_what_four_bits_refuse() -> None:
    x, w = nn.Parameter(normal(5, 40)), tensor(normal(16, 40))
    with pytest.raises(ValueError, match="bitlinear: activation_bits is 5; it is 8 or 4"):
        ops.bitlinear(x, w, None, 5)
    with pytest.raises(ValueError, match="BitLinear: activation_bits is 2; it is 8 or 4"):
        nn.BitLinear(4, 4, activation_bits=2)
    rounded = ops.rmsnorm(x, quantized=True)
    with pytest.raises(ValueError, match="bitlinear: x is q8, rounded to 8 bits already, and activation_bits is 4"):
        ops.bitlinear(rounded, w, None, 4)
    loss = ops.sum(ops.bitlinear(x, nn.Parameter(normal(16, 40)), None, 8))
    ops.bitlinear(x, w, None, 4)
    with pytest.raises(RuntimeError, match="input of a bitlinear in 8 bits was rounded to 4 after its forward pass"):
        loss.backward()
    with pytest.raises(ConfigError, match="activation_bits must be 8 or 4, not 6"):
        SMALL.replace(activation_bits=6)
    with pytest.raises(ConfigError, match="hadamard must be true or false, not 'yes'"):
        SMALL.replace(hadamard="yes")


# ---- models ---------------------------------------------------------------------------------------------------------

CONFIGS = {
    "both": LEVERS,
    "hadamard": LEVERS.replace(activation_bits=8),
    "4 bits": LEVERS.replace(hadamard=False),
    "no sub-norms": LEVERS.replace(sub_norms=False, hidden_act="relu2"),
    "norms inside": LEVERS.replace(sub_norms=False, input_norms=False, use_rms_norm=True, quantize_head=True),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request: pytest.FixtureRequest) -> BitNetForCausalLM:
    return BitNetForCausalLM(request.param, 3)


def test_packing_the_cache_batches_and_drafts_change_no_bit(model: BitNetForCausalLM, isa: str) -> None:
    tokens, plain = tokens_of(2, 21), model.config.replace(hadamard=False, activation_bits=8)
    wanted = logits(model)
    assert not np.array_equal(wanted, logits(BitNetForCausalLM(plain, 3)))
    alone = [list(generate_ids(model, prompt, 9, temperature=0, speculation=Speculation())) for prompt in PROMPTS]
    bitnet.use_isa("scalar")
    assert np.array_equal(logits(model), wanted)
    bitnet.use_isa(isa)
    for layout in ("2", "1.6"):
        packed = BitNetForCausalLM(model.config, 3).pack(layout)
        assert np.array_equal(logits(packed), wanted)
        decoder = Decoder(packed, 2, 32)
        found = [decoder.prefill(tokens[:, :9].tolist()), *(decoder.step(tokens[:, t].tolist()) for t in range(9, 14))]
        assert all(np.array_equal(row, wanted[:, t]) for t, row in enumerate(found, 8))
        assert np.array_equal(decoder.extend(tokens[:, 14:].tolist()), wanted[:, 14:])
        drafts = Speculation([NgramDrafter()], MOST)
        assert list(generate_ids(packed, PROMPTS[0], 9, temperature=0, speculation=drafts)) == alone[0]
        batch = Batch(packed, slots=2)
        ids = {batch.add(prompt, Sampler(0), 9): row for prompt, row in zip(PROMPTS, alone, strict=True)}
        written: dict[int, list[int]] = {request: [] for request in ids}
        while batch.live:
            for request, token, *_ in batch.step():
                written[request] += [] if token is None else [token]
        assert written == ids


def test_training_is_the_same_bits_everywhere(model: BitNetForCausalLM, isa: str) -> None:
    """Loss, gradients, and weights after two steps; activation checkpointing changes nothing."""
    start, tokens = model.state_dict(), tokens_of(2, 22)

    def compute() -> list[bytes]:
        model.load_state_dict(start)
        optimizer, found = AdamW(model, lr=1e-2), []
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            found += [np.float64(loss.item()).tobytes(), *(p.grad.numpy().tobytes() for p in model.parameters())]
            optimizer.step()
        return found + [array.tobytes() for array in model.state_dict().values()]

    bitnet.set_threads(3)
    here = compute()
    bitnet.use_isa("scalar")
    bitnet.set_threads(1)
    model.activation_checkpointing = True
    assert compute() == here


def test_the_twin_has_the_transform_and_no_rounding() -> None:
    twins = {name: BitNetForCausalLM(c.replace(linear="linear"), 3) for name, c in CONFIGS.items() if c.sub_norms}
    assert np.array_equal(logits(twins["both"]), logits(twins["hadamard"]))
    assert not np.array_equal(logits(twins["both"]), logits(twins["4 bits"]))
    assert np.array_equal(logits(twins["4 bits"]), logits(BitNetForCausalLM(SMALL.replace(linear="linear"), 3)))


def test_full_precision_keeps_the_transform() -> None:
    model = BitNetForCausalLM(LEVERS, 3)
    ternary = logits(model)
    floats = logits(model.to_full_precision())
    twin = BitNetForCausalLM(LEVERS.replace(linear="linear"))
    twin.load_state_dict(model.state_dict())
    assert np.array_equal(floats, logits(twin))
    assert 0.5 < np.corrcoef(ternary.ravel(), floats.ravel())[0, 1] < 0.9999


def test_layers_that_become_ternary_read_four_bits() -> None:
    layer, x = nn.BitLinear(40, 16, activation_bits=4), tensor(normal(5, 40))
    layer.ternary_share = 0.25
    want = 0.75 * ops.linear(x, layer.weight).numpy() + 0.25 * ops.bitlinear(x, layer.weight, None, 4).numpy()
    assert np.abs(layer(x).numpy() - want).max() < 1e-5
    assert repr(layer) == "BitLinear(40 -> 16, 4-bit activations)"


def test_adapters_read_what_their_layer_reads() -> None:
    model = BitNetForCausalLM(LEVERS, 3)
    plain, print_of = logits(model), fingerprint(model)
    assert print_of != fingerprint(BitNetForCausalLM(LEVERS.replace(activation_bits=8), 3))
    model.add_lora(4, targets=("o_proj",), seed=2)
    assert np.array_equal(logits(model), plain)
    packed = BitNetForCausalLM(LEVERS, 3).pack("2")
    packed.add_lora(4, targets=("o_proj",), seed=2)
    for each in (model, packed):
        for name, parameter in each.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.copy_(0.1 * normal(*parameter.shape, seed=5))
    assert not np.array_equal(logits(model), plain)
    assert np.array_equal(logits(packed), logits(model))
    layer, x = model.model.layers[0].self_attn.o_proj, normal(3, 48)
    assert isinstance(layer, LoRALinear)
    a, b = (part.weight.numpy(copy=True).astype(np.float64) for part in (layer.lora_A, layer.lora_B))
    want = ops.bitlinear(tensor(x), layer.weight, None, 4).numpy() + layer.factor * (x @ a.T) @ b.T
    assert np.abs(layer(tensor(x)).numpy() - want).max() < 1e-5


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_keeps_both(tmp_path: Path) -> None:
    model = BitNetForCausalLM(LEVERS, 3)
    save_packed(model, tmp_path / "x.bitnet")
    again = bitnet.from_pretrained(tmp_path / "x.bitnet")
    assert again.config == LEVERS
    assert np.array_equal(logits(again), logits(model))
    file = BitnetFile(tmp_path / "x.bitnet")
    assert "num_attention_heads 4, hadamard True, activation_bits 4\n" in report(file, inspect(file))


def test_what_is_off_is_in_no_file(tmp_path: Path) -> None:
    names = {"hadamard", "activation_bits"}
    assert not names & set(SMALL.as_dict()) | names & set(config_json(SMALL, None))
    assert names <= set(config_json(LEVERS, None))
    assert SMALL.as_dict() | {"hadamard": False, "activation_bits": 8, "weight_scales": "tensor"} == asdict(SMALL)
    save_packed(BitNetForCausalLM(SMALL), tmp_path / "x.bitnet")
    file = BitnetFile(tmp_path / "x.bitnet")
    assert not names & set(file.config)
    assert "num_attention_heads 4\n" in report(file, inspect(file))


def test_other_programs_are_given_neither(tmp_path: Path) -> None:
    sentences = {"hadamard": "hadamard is True, and no other program", "4 bits": "activation_bits is 4, and other"}
    for name, sentence in sentences.items():
        model = BitNetForCausalLM(CONFIGS[name].replace(tie_word_embeddings=True))
        for write in (
            lambda model=model: save_hf(model, tmp_path / "hf", packed=True),
            lambda model=model: save_gguf(model, tmp_path / "x.gguf", flavour="llama.cpp"),
            lambda model=model: save_onnx(model, tmp_path / "x.onnx"),
        ):
            with pytest.raises(ConfigError, match=sentence):
                write()
    assert not list(tmp_path.iterdir())
    twin = BitNetForCausalLM(CONFIGS["4 bits"].replace(linear="linear"))
    save_hf(twin, tmp_path / "hf", packed=False)  # nothing in it reads four bits


def test_flags_reach_the_model() -> None:
    values = {name: parse(name, text) for name, text in {"hadamard": "true", "activation_bits": "4"}.items()}
    config = Settings.of(values).model_config(300)
    assert (config.hadamard, config.activation_bits) == (True, 4)
    with pytest.raises(ConfigError, match="activation_bits must be 8 or 4, not 5"):
        Settings.of({"activation_bits": 5})


def test_a_run_resumes_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    shape, out = SHAPE.replace(hadamard=True, activation_bits=4), tmp_path / "run"
    whole, plain = trainer(folder, CONFIG, shape), trainer(folder)
    whole.fit()
    plain.fit()
    assert numbers(whole) != numbers(plain)
    assert whole.history[-1]["train_loss"] < whole.history[0]["train_loss"] - 0.3
    with pytest.raises(Interrupted):
        trainer(folder, CONFIG, shape, out=out, callbacks=[StopAt(5)]).fit()
    with pytest.raises(CheckpointError, match="is of another model: its hadamard is True, not False"):
        trainer(folder, out=out).fit(resume=True)
    again = trainer(folder, CONFIG, shape, out=out)
    again.fit(resume=True)
    assert numbers(again) == numbers(whole)
    assert bitnet.from_pretrained(out).config == again.model.config

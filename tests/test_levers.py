"""The levers of ternary pretraining: each is off by default, computes what its source says, and resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import StopAt, numbers, pack_numbers

from bitnet import BitNetConfig, BitNetForCausalLM, checkpoint, get_threads, nn, ops, set_threads, use_isa
from bitnet.callbacks import Callback
from bitnet.distill import Distillation, cut_alike
from bitnet.ema import averaged, extract, main
from bitnet.errors import CheckpointError, ConfigError
from bitnet.interrupts import Interrupted
from bitnet.muon import Muon, orthogonalize
from bitnet.pretrained import from_pretrained
from bitnet.ramp import blended, ternary_share
from bitnet.tokenizer import ByteTokenizer, CharTokenizer
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

SHAPE = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)
CONFIG = TrainerConfig(
    steps=8, batch_size=2, seq_len=16, lr=5e-3, eval_every=4, save_every=3, sample_tokens=0, eval_blocks=4, plots=False
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_numbers(tmp_path_factory.mktemp("text"))


def trainer(folder: Path, config: TrainerConfig = CONFIG, shape: BitNetConfig = SHAPE, **options: Any) -> Trainer:
    return Trainer(BitNetForCausalLM(shape, config.seed), folder, config, log=lambda line: None, **options)


def resumed(folder: Path, out: Path, config: TrainerConfig, step: int = 5) -> Trainer:
    """A run in `out` that was stopped after a step and went on in a trainer of its own."""
    with pytest.raises(Interrupted):
        trainer(folder, config, out=out, callbacks=[StopAt(step)]).fit()
    again = trainer(folder, config, out=out)
    again.fit(resume=True)
    return again


def off_and_on(folder: Path, tmp_path: Path, config: TrainerConfig) -> tuple[Trainer, Trainer]:
    """A plain run and one with a lever, which differ; the latter resumes to the same end."""
    plain, whole = trainer(folder), trainer(folder, config)
    plain.fit()
    whole.fit()
    assert numbers(plain) != numbers(whole)
    assert numbers(resumed(folder, tmp_path / "run", config)) == numbers(whole)
    return plain, whole


# ---- the schedule ---------------------------------------------------------------------------------------------------


def test_wsd_is_constant_until_its_last_share() -> None:
    config = TrainerConfig(lr=1e-3, schedule="wsd", warmup=10, decay_share=0.25).resolved(100)
    rates = [config.rates(step)[0] for step in range(101)]
    assert config.min_lr == pytest.approx(1e-4)
    assert rates[0] == pytest.approx(1e-4)
    assert set(rates[10:76]) == {1e-3}
    assert rates[80] == pytest.approx(1e-4 + 9e-4 * 0.8)
    assert np.allclose(np.diff(rates[75:]), -9e-4 / 25)
    assert rates[100] == pytest.approx(1e-4)
    assert config.rates(50)[1] == config.weight_decay
    with pytest.raises(ConfigError, match="decay_share must be above 0 and at most 1, not 0"):
        TrainerConfig(decay_share=0)


def test_wsd_resumes(folder: Path, tmp_path: Path) -> None:
    off_and_on(folder, tmp_path, replace(CONFIG, schedule="wsd"))


# ---- Muon -----------------------------------------------------------------------------------------------------------


def newton_schulz(gradient: np.ndarray) -> np.ndarray:
    """The iteration as published, in float64."""
    x = gradient.astype(np.float64)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (1, 7), (7, 1)])
def test_orthogonalize_is_the_published_iteration(shape: tuple[int, int]) -> None:
    gradient = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    got = orthogonalize(ops.tensor(gradient)).numpy()
    # Small singular values, and errors with them, grow by at most 3.4445 a step: 485 times a rounding of 6e-8, 3e-5.
    assert np.abs(got - newton_schulz(gradient)).max() < 1e-4
    singular = np.linalg.svd(got, compute_uv=False)
    assert singular.max() < 1.25
    if min(shape) < max(shape):  # far from singular
        assert singular.min() > 0.6


def test_orthogonalize_is_the_same_bits_everywhere(isa: str) -> None:
    gradient = ops.tensor(np.random.default_rng(7).standard_normal((33, 70)).astype(np.float32))
    before, chosen = get_threads(), orthogonalize(gradient).numpy().tobytes()
    use_isa("scalar")
    set_threads(3)
    assert orthogonalize(gradient).numpy().tobytes() == chosen
    set_threads(before)


def test_orthogonalize_leaves_no_gradient_alone() -> None:
    assert not orthogonalize(ops.zeros((4, 6))).numpy().any()


def test_muon_steps_are_those_of_the_equations(folder: Path) -> None:
    model = BitNetForCausalLM(SHAPE)
    optimizer = Muon(model, lr=0.02, weight_decay=0.1)
    gains = {name for name, p in model.named_parameters() if p.ndim == 1}
    assert set(optimizer.rest.parameters) == {"model.embed_tokens.weight", "lm_head.weight", *gains}
    tokens, targets = np.random.default_rng(1).integers(0, 257, (2, 2, 16)).astype(np.int32)
    wanted = {name: array.astype(np.float64) for name, array in model.state_dict().items()}
    buffers = {name: np.zeros(wanted[name].shape) for name in optimizer.matrices}
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, targets).backward()
        grads = {name: p.grad.numpy().astype(np.float64) for name, p in optimizer.parameters.items()}
        norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
        assert optimizer.clip_grad_norm(0.5) == pytest.approx(norm, rel=1e-5)
        for name, buffer in buffers.items():
            gradient = grads[name] * min(1.0, 0.5 / norm)
            buffer[:] = 0.95 * buffer + gradient
            size = 0.2 * max(buffer.shape) ** 0.5
            wanted[name] *= 1 - 0.02 * 0.1
            wanted[name] -= 0.02 * size * newton_schulz(gradient + 0.95 * buffer)
        optimizer.step()
    for name, matrix in optimizer.matrices.items():
        assert np.abs(matrix.numpy(copy=True) - wanted[name]).max() < 1e-5, name


def test_muon_resumes(folder: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="muon")
    _, run = off_and_on(folder, tmp_path, config)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] - 0.3
    with pytest.raises(ConfigError, match=r"optimizer is muon in .* and cannot become adamw on resume"):
        trainer(folder, CONFIG, out=tmp_path / "run").fit(resume=True)
    with pytest.raises(ConfigError, match="optimizer must be one of adamw, muon, not 'sgd'"):
        TrainerConfig(optimizer="sgd")


# ---- averaged weights -----------------------------------------------------------------------------------------------


class Watch(Callback):
    """The average written out in float64, from the weights after each step."""

    def __init__(self, model: BitNetForCausalLM, decay: float) -> None:
        self.decay, self.expected = decay, self.read(model)

    def read(self, model: BitNetForCausalLM) -> dict[str, Any]:
        return {name: array.astype(np.float64) for name, array in model.state_dict().items()}

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        step = record["step"] - 1
        share = min(self.decay, (1 + step) / (10 + step))
        for name, now in self.read(trainer.model).items():
            self.expected[name] = share * self.expected[name] + (1 - share) * now


def test_the_average_is_that_of_its_equation_and_changes_nothing(folder: Path) -> None:
    plain, run = trainer(folder), trainer(folder, replace(CONFIG, ema=0.4))
    watch = Watch(run.model, 0.4)
    run.callbacks.append(watch)
    plain.fit()
    run.fit()
    assert run.average is not None
    for name, array in run.average.model.state_dict().items():
        assert np.abs(array - watch.expected[name]).max() < 1e-6, name
    assert all(np.array_equal(a, run.model.state_dict()[name]) for name, a in plain.model.state_dict().items())
    assert [r["flip_share"] for r in run.history] == [r["flip_share"] for r in plain.history]
    losses = [r["val_loss_ema"] for r in run.history]
    assert [step for step, loss in enumerate(losses, 1) if loss is not None] == [4, 8]
    assert losses[-1] != run.history[-1]["val_loss"]
    assert "val_loss_ema" not in plain.history[-1]


def test_the_average_is_saved_resumed_and_opened(folder: Path, tmp_path: Path) -> None:
    _, whole = off_and_on(folder, tmp_path, replace(CONFIG, ema=0.9))
    assert whole.average is not None
    run, wanted = tmp_path / "run", whole.average.model.state_dict()
    assert main([str(run), str(tmp_path / "ema")]) == 0
    for model in (averaged(run), from_pretrained(tmp_path / "ema")):
        assert all(np.array_equal(array, wanted[name]) for name, array in model.state_dict().items())
        assert model.tokenizer is not None
    with pytest.raises(ConfigError, match="ema exists already; choose another folder"):
        extract(run, tmp_path / "ema")
    with pytest.raises(CheckpointError, match=r"has no averaged weights .* trained without --ema"):
        averaged(tmp_path / "ema")
    with open(checkpoint.folder_of(run, 8) / "ema.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is damaged"):
        checkpoint.load(checkpoint.folder_of(run, 8))
    with pytest.raises(ConfigError, match="ema must be at least 0 and below 1, not 1"):
        TrainerConfig(ema=1)


# ---- distillation ---------------------------------------------------------------------------------------------------

TWIN = SHAPE.replace(linear="linear")


@pytest.mark.parametrize(("share", "temperature"), [(0.5, 1.0), (0.8, 2.5), (1.0, 1.0)])
def test_distillation_has_the_gradients_of_pytorch(share: float, temperature: float) -> None:
    torch = pytest.importorskip("torch")
    from reference.torch_bitnet import TorchBitNet

    student, teacher = BitNetForCausalLM(TWIN, 1), BitNetForCausalLM(TWIN.replace(hidden_size=48), 2)
    tokens, targets = np.random.default_rng(3).integers(0, 257, (2, 2, 16)).astype(np.int32)
    targets[0, 3:9] = targets[1, 12:] = -100  # padding
    distilled = Distillation(student, teacher, 2, 16, share, temperature)
    distilled.mask.set(targets)
    objective, loss = distilled(ops.tensor(tokens), ops.tensor(targets))
    assert loss.item() == student(tokens, targets).item()
    student.zero_grad()
    objective.backward()

    def torched(model: BitNetForCausalLM) -> Any:
        other = TorchBitNet(model.config).double()
        other.load_state_dict({name: torch.tensor(array) for name, array in model.state_dict().items()})
        return other

    ours, theirs = torched(student), torched(teacher)
    logits = ours(torch.tensor(tokens).long()).reshape(-1, 257)
    with torch.no_grad():
        wanted = torch.softmax(theirs(torch.tensor(tokens).long()).reshape(-1, 257) / temperature, -1)
    counts = torch.tensor(targets.reshape(-1) != -100)
    cool = torch.log_softmax(logits / temperature, -1)
    kl = torch.nn.functional.kl_div(cool[counts], wanted[counts], reduction="batchmean")
    ce = torch.nn.functional.cross_entropy(logits, torch.tensor(targets).long().reshape(-1))
    ((1 - share) * ce + share * temperature**2 * kl).backward()
    for name, parameter in student.named_parameters():
        expected = dict(ours.named_parameters())[name].grad.numpy()
        assert parameter.grad is not None
        assert np.abs(parameter.grad.numpy() - expected).max() < 1e-5 * max(1e-3, np.abs(expected).max()), name


@pytest.fixture(scope="module")
def twin(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("twin") / "run"
    trainer(folder, CONFIG, TWIN, out=out).fit()
    return out


def test_a_student_resumes(folder: Path, tmp_path: Path, twin: Path) -> None:
    config = replace(CONFIG, teacher=str(twin))
    plain, run = off_and_on(folder, tmp_path, config)
    assert run.history[0]["train_loss"] == plain.history[0]["train_loss"]  # the cross entropy, as ever
    checkpointing = trainer(folder, replace(config, activation_checkpointing=True))
    checkpointing.fit()
    assert numbers(checkpointing) == numbers(run)


def test_a_student_of_separate_documents_resumes(folder: Path, tmp_path: Path, twin: Path) -> None:
    off_and_on(folder, tmp_path, replace(CONFIG, teacher=str(twin), documents="separate", grad_accum=2))


def test_a_student_with_a_ternary_head_learns(folder: Path, twin: Path) -> None:
    shape = SHAPE.replace(quantize_head=True, use_rms_norm=True)
    history = trainer(folder, replace(CONFIG, teacher=str(twin), distill=0.9), shape).fit()
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.1


def test_tokenizers_that_cut_alike() -> None:
    """Characters that are not in the sentence that is compared are no reason to refuse the same vocabulary."""
    letters, more = CharTokenizer("abc"), CharTokenizer("abcd")
    assert cut_alike(letters, CharTokenizer("abc"))
    assert not cut_alike(letters, more)
    assert cut_alike(ByteTokenizer(), ByteTokenizer())
    assert not cut_alike(ByteTokenizer(), letters)


def test_a_teacher_must_fit_and_stay(folder: Path, tmp_path: Path, twin: Path) -> None:
    config = replace(CONFIG, teacher=str(twin))
    with pytest.raises(ConfigError, match=r"has a vocabulary of 257 ids, not 300"):
        trainer(folder, config, SHAPE.replace(vocab_size=300))
    with pytest.raises(ConfigError, match=r"has 64 positions, seq_len is 65"):
        trainer(folder, replace(config, seq_len=65), SHAPE.replace(max_position_embeddings=65))
    for option in ({"distill": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(option))} must be"):
            replace(CONFIG, **option)
    run = resumed(folder, tmp_path / "run", config)
    assert run.teacher is not None
    weights = run.teacher.model.state_dict()
    again = trainer(folder, config, out=tmp_path / "run")
    assert again.teacher is not None
    again.teacher.model.load_state_dict({name: 2 * array for name, array in weights.items()})
    with pytest.raises(CheckpointError, match=r"learned from another teacher than .*run now holds"):
        again.fit(resume=True)


# ---- from full precision to ternary ---------------------------------------------------------------------------------


def test_the_share_rises_in_stages_to_one() -> None:
    assert [ternary_share(step, 0, 0) for step in (0, 1, 99)] == [1.0, 1.0, 1.0]
    assert [ternary_share(step, 3, 0) for step in (2, 3)] == [0.0, 1.0]
    assert [ternary_share(step, 3, 4) for step in range(2, 9)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    long = [ternary_share(step, 10, 100) for step in range(120)]
    assert long == sorted(long)
    assert (long[9], long[10], long[108], long[109]) == (0.0, 1 / 16, 1.0, 1.0)
    assert len(set(long)) == 17


def test_a_blend_is_a_blend_in_values_and_gradients() -> None:
    rng = np.random.default_rng(5)
    x, seed = (rng.standard_normal((3, size)).astype(np.float32) for size in (20, 12))
    layer = nn.BitLinear(20, 12, bias=True)

    def run(share: float) -> list[np.ndarray]:
        layer.ternary_share = share
        layer.zero_grad()
        given = ops.tensor(x, requires_grad=True)
        y = layer(given, ops.tensor(seed))
        ops.sum(ops.mul(y, ops.tensor(seed))).backward()
        assert given.grad is not None
        assert layer.weight.grad is not None
        return [t.numpy(copy=True) for t in (y, given.grad, layer.weight.grad)]

    plain = nn.Linear(20, 12, weight=layer.weight)
    assert np.allclose(run(0.0)[0], plain(ops.tensor(x)).numpy() + seed, atol=1e-6)
    for mixed, linear, ternary in zip(run(0.25), run(0.0), run(1.0), strict=True):
        assert np.allclose(mixed, 0.75 * linear + 0.25 * ternary, atol=1e-5)


@pytest.mark.parametrize("shape", [SHAPE, SHAPE.replace(use_rms_norm=True), SHAPE.replace(sub_norms=False)])
def test_a_model_of_share_zero_is_its_twin(shape: BitNetConfig) -> None:
    model = BitNetForCausalLM(shape)
    twin = BitNetForCausalLM(shape.replace(linear="linear"))
    twin.load_state_dict(model.state_dict())
    tokens, targets = np.random.default_rng(6).integers(0, 257, (2, 2, 16)).astype(np.int32)
    ternary = model(tokens, targets).item()
    with blended(model, 0.0):
        assert model(tokens, targets).item() == pytest.approx(twin(tokens, targets).item(), rel=1e-6)
    assert model(tokens, targets).item() == ternary


def test_a_ramp_resumes_and_ends_ternary(folder: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, ternary_from=2, ternary_ramp=5)
    plain, run = off_and_on(folder, tmp_path, config)
    assert [r["ternary_share"] for r in run.history] == [0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert "ternary_share" not in plain.history[0]
    assert run.evaluate() == run.history[-1]["val_loss"]
    everything = replace(config, teacher=str(tmp_path / "run"), ema=0.5, optimizer="muon", schedule="wsd", grad_accum=2)
    whole = trainer(folder, everything)
    whole.fit()
    assert numbers(resumed(folder, tmp_path / "all", everything, step=4)) == numbers(whole)


def test_a_switch_is_no_spike(folder: Path) -> None:
    """The loss jumps where layers become ternary: what came before is no measure of it."""
    run = trainer(folder, replace(CONFIG, ternary_from=5))
    run.fit()
    assert run.watch.count == 3


def test_a_ramp_must_end_in_time(folder: Path) -> None:
    with pytest.raises(ConfigError, match="ternary_from 4 and ternary_ramp 5 leave no ternary step of 8"):
        trainer(folder, replace(CONFIG, ternary_from=4, ternary_ramp=5)).fit()
    with pytest.raises(ConfigError, match="this is a twin"):
        trainer(folder, replace(CONFIG, ternary_from=4), TWIN)

"""Distillation of attention states: the gradients of its formula, what it resumes to, what cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import numbers, pack_numbers

from bitnet import BitNetConfig, BitNetForCausalLM, get_threads, ops, set_threads, use_isa
from bitnet.attention_distill import AttentionDistillation, layer_of_teacher, watched
from bitnet.callbacks import Callback
from bitnet.distill import Distillation
from bitnet.errors import ConfigError
from bitnet.interrupts import Interrupted
from bitnet.target_mask import TargetMask
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

TERNARY = BitNetConfig(257, 32, 48, 2, 4, 2, max_position_embeddings=64)
STUDENT = TERNARY.replace(linear="linear")
TEACHER = STUDENT.replace(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3)
CONFIG = TrainerConfig(
    steps=8, batch_size=2, seq_len=16, lr=5e-3, eval_every=4, save_every=3, sample_tokens=0, eval_blocks=4, plots=False
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_numbers(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    trainer(folder, CONFIG, TEACHER, out=out).fit()
    return out


def trainer(folder: Path, config: TrainerConfig, shape: BitNetConfig = TERNARY, **options: Any) -> Trainer:
    return Trainer(BitNetForCausalLM(shape, config.seed), folder, config, log=lambda line: None, **options)


def batch(padded: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """tokens, targets (2, 16); some targets take no part."""
    tokens, targets = np.random.default_rng(3).integers(0, 257, (2, 2, 16)).astype(np.int32)
    if padded:
        targets[0, 3:9] = targets[1, 12:] = -100
    return tokens, targets


def of_formula(student: Any, teacher: Any, tokens: Any, counts: Any, layers: tuple[int, int], heads: int) -> Any:
    """The term of two models of the PyTorch reference, written out."""
    import torch

    relations: list[list[Any]] = []
    for model, layer in zip((student, teacher), layers, strict=True):
        seen: dict[str, Any] = {}  # of this model
        attention = model.model.layers[layer].self_attn
        hooks = [
            getattr(attention, name).register_forward_hook(
                lambda _m, _x, y, name=name, seen=seen: seen.update({name: y})
            )
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        model(tokens)
        for hook in hooks:
            hook.remove()
        logs = []
        for name in ("q_proj", "k_proj", "v_proj"):
            batch, time, width = seen[name].shape
            states = seen[name].reshape(batch, time, heads, width // heads).permute(0, 2, 1, 3)
            scores = states @ states.transpose(-1, -2) / (width // heads) ** 0.5
            logs.append(torch.log_softmax(scores, -1))
        relations.append(logs)
    total = torch.zeros((), dtype=torch.float64)
    for own, other in zip(*relations, strict=True):
        kl = (other.exp() * (other - own)).sum(-1)  # (B, H, T)
        total = total + kl.permute(0, 2, 1)[counts].mean()
    return total / 3


@pytest.mark.parametrize("layer", [None, 0])
@pytest.mark.parametrize("padded", [False, True])
def test_the_gradients_are_those_of_the_formula(layer: int | None, padded: bool) -> None:
    torch = pytest.importorskip("torch")
    from reference.torch_bitnet import TorchBitNet

    student, teacher = (
        BitNetForCausalLM(shape.replace(initializer_range=0.3), seed) for seed, shape in enumerate((STUDENT, TEACHER))
    )
    tokens, targets = batch(padded)
    attention = AttentionDistillation(student, teacher, layer)
    distilled = Distillation(student, teacher, 2, 16, 0.5, 1.0, attention, 1.7)
    plain = Distillation(student, teacher, 2, 16, 0.5, 1.0)
    found = []
    for one in (distilled, plain):
        one.mask.set(targets)
        objective, loss = one(ops.tensor(tokens), ops.tensor(targets))
        assert loss.item() == student(tokens, targets).item()
        student.zero_grad()
        objective.backward()
        grads = ((name, parameter.grad) for name, parameter in student.named_parameters())
        found.append({name: grad.numpy(copy=True).astype(np.float64) for name, grad in grads if grad is not None})

    def torched(model: BitNetForCausalLM) -> Any:
        other = TorchBitNet(model.config).double()
        other.load_state_dict({name: torch.tensor(array) for name, array in model.state_dict().items()})
        return other

    ours, theirs = torched(student), torched(teacher).requires_grad_(False)
    layers = {None: (1, 2), 0: (0, 1)}[layer]
    counts = torch.tensor(targets != -100)
    (1.7 * of_formula(ours, theirs, torch.tensor(tokens).long(), counts, layers, 4)).backward()
    largest = 0.0
    for name, weight in ours.named_parameters():
        expected = np.zeros(weight.shape) if weight.grad is None else weight.grad.numpy()
        got = found[0][name] - found[1][name]
        # f32, and a difference of two gradients; most of the term's own are above a hundredth.
        scale = max(1e-2, np.abs(found[1][name]).max(), np.abs(expected).max())
        assert np.abs(got - expected).max() < 2e-5 * scale, name
        largest = max(largest, np.abs(expected).max())
    assert largest > 0.01
    above = [name for name in found[0] if name.startswith("model.layers.1.mlp") or name == "lm_head.weight"]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in above)


def test_a_teacher_like_the_student_pulls_at_nothing() -> None:
    student, teacher = BitNetForCausalLM(STUDENT, 1), BitNetForCausalLM(STUDENT, 1)
    attention = AttentionDistillation(student, teacher)
    tokens, targets = batch()
    mask = TargetMask(2, 16)
    mask.set(targets)
    with attention.watching():
        for model in (student, teacher):
            model.head_input(tokens)
        term = attention.term(mask)
    student.zero_grad()
    term.backward()
    weight = student.model.layers[1].self_attn.q_proj.weight
    assert weight.grad is not None
    assert not weight.grad.numpy().any()


def test_states_are_seen_inside_only_and_nothing_changes() -> None:
    model, (tokens, targets) = BitNetForCausalLM(TERNARY, 1), batch()
    with watched(model, 0) as seen:
        loss = model(tokens, targets).item()
    assert loss == model(tokens, targets).item()
    ((q, k, v),) = seen
    assert (q.shape, k.shape, v.shape) == ((2, 16, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8))


def test_the_teachers_layer_lies_as_deep() -> None:
    assert [layer_of_teacher(i, 4, 4) for i in range(4)] == [0, 1, 2, 3]
    assert [layer_of_teacher(i, 2, 6) for i in range(2)] == [2, 5]
    assert [layer_of_teacher(i, 6, 2) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [layer_of_teacher(i, 2, 3) for i in range(2)] == [1, 2]


def test_the_pull_is_the_same_bits_everywhere(isa: str) -> None:
    student, teacher = BitNetForCausalLM(TERNARY, 1), BitNetForCausalLM(TEACHER, 2)
    tokens, targets = batch()

    def gradients() -> bytes:
        distilled = Distillation(student, teacher, 2, 16, 0.5, 1.0, AttentionDistillation(student, teacher))
        distilled.mask.set(targets)
        student.zero_grad()
        distilled(ops.tensor(tokens), ops.tensor(targets))[0].backward()
        return b"".join(p.grad.numpy().tobytes() for p in student.parameters() if p.grad is not None)

    before, chosen = get_threads(), gradients()
    use_isa("scalar")
    set_threads(3)
    assert gradients() == chosen
    set_threads(before)


class StopAt(Callback):
    """An interrupt when a step is done."""

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("levers", [{"ternary_from": 2}, {"documents": "separate", "grad_accum": 2}])
def test_a_student_of_attention_resumes(folder: Path, tmp_path: Path, teacher: Path, levers: dict[str, Any]) -> None:
    plain = replace(CONFIG, teacher=str(teacher), **levers)
    config = replace(plain, distill_attention=2.0)
    runs = [trainer(folder, one) for one in (plain, config, replace(config, activation_checkpointing=True))]
    for run in runs:
        run.fit()
    without, whole, checkpointing = map(numbers, runs)
    assert without != whole
    assert checkpointing == whole
    assert runs[0].history[0]["train_loss"] == runs[1].history[0]["train_loss"]  # the cross entropy, as ever
    with pytest.raises(Interrupted):
        trainer(folder, config, out=tmp_path / "run", callbacks=[StopAt()]).fit()
    again = trainer(folder, config, out=tmp_path / "run")
    again.fit(resume=True)
    assert numbers(again) == whole
    for other, sentence in (
        (replace(config, distill_attention=1.0), r"distill_attention is 2.0 in .* and cannot become 1.0 on resume"),
        (replace(config, distill_layer=0), r"distill_layer is None in .* and cannot become 0 on resume"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            trainer(folder, other, out=tmp_path / "run").fit(resume=True)


def test_relations_come_nearer(folder: Path, teacher: Path) -> None:
    torch = pytest.importorskip("torch")
    from reference.torch_bitnet import TorchBitNet

    def distance(run: Trainer) -> float:
        assert run.teacher is not None
        models = []
        for model in (run.model, run.teacher.model):
            other = TorchBitNet(model.config).double()
            other.load_state_dict({name: torch.tensor(array) for name, array in model.state_dict().items()})
            models.append(other)
        tokens, targets = run.loader.batch(50)
        with torch.no_grad():
            counts = torch.tensor(targets != -100)
            return float(of_formula(*models, torch.tensor(tokens).long(), counts, (1, 2), 4))

    config = replace(CONFIG, teacher=str(teacher), steps=30, eval_every=30, save_every=30)
    found = []
    for weight in (0.0, 20.0):
        run = trainer(folder, replace(config, distill_attention=weight))
        run.fit()
        found.append(distance(run))
    assert found[1] < 0.7 * found[0]


def test_what_cannot_be_is_said(folder: Path, teacher: Path) -> None:
    with pytest.raises(ConfigError, match=r"distill_attention 1.0 needs a teacher"):
        replace(CONFIG, distill_attention=1.0)
    with pytest.raises(ConfigError, match=r"distill_layer 1 needs distill_attention"):
        replace(CONFIG, teacher=str(teacher), distill_layer=1)
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"distill_attention must be at least 0, not"):
            replace(CONFIG, teacher=str(teacher), distill_attention=value)
    config = replace(CONFIG, teacher=str(teacher), distill_attention=1.0)
    for layer in (-1, 2):
        with pytest.raises(ConfigError, match=rf"distill_layer must be 0 to 1, the student's last, not {layer}"):
            trainer(folder, replace(config, distill_layer=layer))
    shape = TERNARY.replace(hidden_size=40, num_attention_heads=10, num_key_value_heads=10)
    with pytest.raises(ConfigError, match=r"the teacher's attention states have 48 channels, .* 10 query heads"):
        trainer(folder, config, shape)

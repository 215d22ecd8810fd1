"""Ternary codes held over several steps: what steps multiply, what others see, and the same end after any kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import StopAt, numbers, pack_numbers

from bitnet import BitNetConfig, BitNetForCausalLM, _core, checkpoint, ops
from bitnet.callbacks import Callback
from bitnet.errors import CheckpointError, ConfigError
from bitnet.interrupts import Interrupted
from bitnet.metrics import read_lines
from bitnet.nn import BitLinear
from bitnet.optim import AdamW
from bitnet.pretrained import from_pretrained
from bitnet.requantize import HeldCodes
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

SHAPE = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)
CONFIG = TrainerConfig(
    steps=8, batch_size=2, seq_len=16, lr=5e-3, eval_every=4, save_every=2, sample_tokens=0, eval_blocks=4, plots=False,
    requantize_every=3, layer_stats=2,
)  # fmt: skip
ONE = ops.tensor(np.ones(1, np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_numbers(tmp_path_factory.mktemp("text"))


def trainer(folder: Path, config: TrainerConfig = CONFIG, shape: BitNetConfig = SHAPE, **options: Any) -> Trainer:
    return Trainer(BitNetForCausalLM(shape, config.seed), folder, config, log=lambda line: None, **options)


# ---- one weight -----------------------------------------------------------------------------------------------------


def codes_of(weight: np.ndarray) -> np.ndarray:
    return np.clip(np.round(weight / np.abs(weight).mean(dtype=np.float64)), -1, 1).astype(np.int8)


@pytest.mark.parametrize("shape", [(5, 7), (33, 130)])
def test_held_codes_outlive_writes(isa: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    first, second = rng.standard_normal((2, *shape)).astype(np.float32)
    layer = BitLinear(shape[1], shape[0])
    layer.weight.copy_(first)
    x = ops.tensor(rng.standard_normal((4, shape[1])).astype(np.float32))
    before = layer(x).numpy().copy()
    _core.hold_ternary([layer.weight])
    layer.weight.copy_(second)
    assert np.array_equal(layer.codes().numpy(), codes_of(first))
    assert layer(x).numpy().tobytes() == before.tobytes()
    assert layer.ternary_stats().flipped == 0
    _core.use_held_ternary([layer.weight], False)
    assert np.array_equal(layer.codes().numpy(), codes_of(second))
    assert layer(x).numpy().tobytes() != before.tobytes()
    for _ in range(2):  # to be told twice changes nothing
        _core.use_held_ternary([layer.weight], True)
        assert layer(x).numpy().tobytes() == before.tobytes()
    _core.use_held_ternary([layer.weight], False)
    _core.release_ternary([layer.weight])
    assert layer.ternary_stats().flipped == np.count_nonzero(codes_of(first) != codes_of(second))
    with pytest.raises(RuntimeError, match=f"no codes of this weight of {shape[0]} x {shape[1]} are held"):
        _core.use_held_ternary([layer.weight], True)


def test_codes_made_elsewhere_are_held_in_every_layout(isa: str) -> None:
    """Products of both passes, and the flips of the next requantization, are those of the weight they came from."""
    rng = np.random.default_rng(4)
    source, other = BitLinear(70, 20), BitLinear(70, 20)
    values = rng.standard_normal((2, 20, 70)).astype(np.float32)
    source.weight.copy_(values[0])
    other.weight.copy_(values[1])
    _core.hold_ternary_codes(other.weight, source.codes(), source.scales())
    x, dy = rng.standard_normal((3, 70)).astype(np.float32), rng.standard_normal((3, 20)).astype(np.float32)
    for precision in ("fp32", "int8"):
        results = []
        for layer in (source, other):
            layer.zero_grad()
            given = ops.tensor(x, requires_grad=True)
            with ops.precision(precision):
                y = layer(given)
                ops.sum(ops.mul(y, ops.tensor(dy))).backward()
            assert given.grad is not None
            assert layer.weight.grad is not None
            results.append([t.numpy(copy=True).tobytes() for t in (y, given.grad, layer.weight.grad)])
        assert results[0] == results[1]
    assert other.weight_scale == source.weight_scale
    _core.release_ternary([other.weight])
    assert other.ternary_stats().flipped == np.count_nonzero(codes_of(values[0]) != codes_of(values[1]))


def test_a_forward_pass_is_not_walked_back_over_other_codes() -> None:
    layer = BitLinear(8, 8)
    codes = layer.codes()
    for change in (
        lambda: _core.hold_ternary_codes(layer.weight, codes, ONE),
        lambda: _core.hold_ternary_codes(layer.weight, codes, ONE),  # in place of those held before
        lambda: _core.use_held_ternary([layer.weight], False),
    ):
        loss = ops.sum(layer(ops.tensor(np.ones((2, 8), np.float32), requires_grad=True)))
        change()
        with pytest.raises(RuntimeError, match="weight of a bitlinear was changed between its forward and its back"):
            loss.backward()


def test_what_cannot_be_held_is_refused() -> None:
    layer = BitLinear(6, 4)
    with pytest.raises(ValueError, match="code 5 of a ternary weight is 2, not -1, 0 or 1"):
        _core.hold_ternary_codes(layer.weight, ops.tensor(np.eye(4, 6, 5, np.int8) * 2), ONE)
    with pytest.raises(_core.ShapeError, match=r"the codes to hold are i8 of shape \(6, 4\), not i8 of the weight's"):
        _core.hold_ternary_codes(layer.weight, ops.tensor(np.zeros((6, 4), np.int8)), ONE)
    with pytest.raises(_core.ShapeError, match="the codes to hold have 4 scales in f32, the weight has 1 in f32"):
        _core.hold_ternary_codes(layer.weight, layer.codes(), ops.tensor(np.ones(4, np.float32)))
    with pytest.raises(RuntimeError, match="no codes of this weight of 4 x 6 are held"):  # nor were its own
        _core.use_held_ternary([layer.weight], True)
    with pytest.raises(_core.ShapeError, match=r"codes are held of an f32 matrix, not of f32 of shape \(6,\)"):
        _core.hold_ternary([ops.zeros((6,))])


# ---- a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"quantize_head": True, "tie_word_embeddings": True}], ids=["plain", "head"])
def test_six_steps_are_those_of_pytorch(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes made anew at steps 0 and 3; PyTorch in float64 holds them by hand, with straight-through gradients.

    Conditioned weights last one step: after it, each difference is a rounding that an int8 step may enlarge, so that
    weights are compared with how far held and fresh codes lead apart.
    """
    torch = pytest.importorskip("torch", reason="parity is with PyTorch")
    from reference import torch_bitnet

    made: dict[int, Any] = {}

    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Any) -> Any:
            if id(w) not in made:
                scale = w.abs().mean().clamp(min=1e-5)
                made[id(w)] = (w / scale).round().clamp(-1, 1) * scale
            return made[id(w)]

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            return dy

    monkeypatch.setattr(torch_bitnet, "FakeQuantWeight", Held)
    shape = SHAPE.replace(**changes)
    rng = np.random.default_rng(8)
    data = rng.integers(0, 257, (6, 4, 17)).astype(np.int32)

    def ours(every: int) -> tuple[dict[str, np.ndarray], list[float]]:
        model = BitNetForCausalLM(shape, 1)
        optimizer, held, losses = AdamW(model, lr=3e-3, weight_decay=0.1), HeldCodes(model, every), []
        for step, rows in enumerate(data):
            with held.in_force(step):
                loss = model(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                held.after(step)
        return model.state_dict(), losses

    start = BitNetForCausalLM(shape, 1).state_dict()
    theirs = torch_bitnet.TorchBitNet(shape).double()
    theirs.load_state_dict({name: torch.tensor(array) for name, array in start.items()})
    optimizer, expected = torch_bitnet.adamw(theirs, 3e-3), []
    for step, rows in enumerate(torch.from_numpy(data).long()):
        if step % 3 == 0:
            made.clear()
        loss = theirs(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    wanted = {name: array.detach().numpy() for name, array in theirs.state_dict().items()}

    def distance(state: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(sum(((array - wanted[name]) ** 2).sum() for name, array in state.items())))

    (weights, losses), (fresh, fresh_losses) = ours(3), ours(1)
    apart = np.abs(np.array(fresh_losses) - expected)
    assert apart[0] < 1e-5 < apart[1]  # of the same codes once
    assert np.abs(np.array(losses) - expected).max() < 0.1 * apart[1:].max()
    assert distance(weights) < 0.1 * distance(fresh)


# ---- a run ----------------------------------------------------------------------------------------------------------


class Codes(Callback):
    """After each step: the record, the codes that the model shows, and those that the next step goes on with."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray] | None]] = []

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        shown = {name: layer.codes().numpy().copy() for name, layer in trainer.model.bitlinears()}
        self.seen.append((record, shown, trainer.codes.state(trainer.step)))


def test_a_run_shows_the_present_codes_and_trains_on_held_ones(folder: Path, tmp_path: Path) -> None:
    watch = Codes()
    run = trainer(folder, out=tmp_path / "run", callbacks=[watch])
    run.fit()
    flips = [record["flip_share"] for record, _, _ in watch.seen]
    assert [flip > 0 for flip in flips] == [False, False, True, False, False, True, False, False]
    assert [held is None for _, _, held in watch.seen] == [False, False, True, False, False, True, False, False]
    name, layer = next(iter(run.model.bitlinears()))

    def unpacked(held: dict[str, np.ndarray] | None) -> np.ndarray:
        assert held is not None
        return _core.unpack_fifths(held[f"{name}.weight"], *layer.weight.shape).numpy()

    held, shown = [one[2] for one in watch.seen], [one[1][name] for one in watch.seen]
    assert np.array_equal(unpacked(held[0]), unpacked(held[1]))
    assert np.array_equal(unpacked(held[3]), shown[2])  # made at the end of step 3, which is what step 4 multiplies
    assert not np.array_equal(unpacked(held[4]), shown[4])
    count = sum(layer.weight.size for _, layer in run.model.bitlinears())
    changed = sum(np.count_nonzero(watch.seen[2][1][each] != watch.seen[5][1][each]) for each in watch.seen[2][1])
    assert flips[5] == pytest.approx(changed / count)
    records = read_lines(tmp_path / "run" / "layers.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert [record["layers"][name]["flip"] > 0 for record in records] == [False, True, True, False]
    opened = from_pretrained(tmp_path / "run")
    assert np.array_equal(dict(opened.bitlinears())[name].codes().numpy(), shown[-1])
    assert run.evaluate() == run.history[-1]["val_loss"]
    with pytest.raises(ConfigError, match=r"requantize_every is 3 in .* and cannot become 1 on resume"):
        trainer(folder, replace(CONFIG, requantize_every=1), out=tmp_path / "run").fit(resume=True)


EVERYTHING = {"ema": 0.5, "optimizer": "muon", "ternary_from": 1, "ternary_ramp": 3, "grad_accum": 2}


@pytest.mark.parametrize(
    ("changes", "shape", "stops"),
    [({}, SHAPE, (4, 6)), (EVERYTHING, SHAPE.replace(weight_scales="channel"), (5,))],
    ids=["plain", "everything"],
)
def test_a_run_killed_in_mid_interval_ends_in_the_same_bytes(
    folder: Path, tmp_path: Path, changes: dict[str, Any], shape: BitNetConfig, stops: tuple[int, ...]
) -> None:
    config = replace(CONFIG, **changes)
    whole, plain = trainer(folder, config, shape), trainer(folder, replace(config, requantize_every=1), shape)
    whole.fit()
    plain.fit()
    assert numbers(whole)[0] != numbers(plain)[0]
    for stop in stops:
        out = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            trainer(folder, config, shape, out=out, callbacks=[StopAt(stop)]).fit()
        newest = checkpoint.folder_of(out, checkpoint.steps(out)[-1])
        assert (newest / checkpoint.HELD).exists() == (stop != 6)
        again = trainer(folder, config, shape, out=out)
        again.fit(resume=True)
        assert numbers(again) == numbers(whole)
    with open(checkpoint.folder_of(out, 8) / checkpoint.HELD, "r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=r"held\.safetensors is damaged"):
        checkpoint.load(checkpoint.folder_of(out, 8))


def test_a_rollback_takes_the_held_codes_with_it(folder: Path, tmp_path: Path) -> None:
    class Break(Callback):
        """Makes a weight no number when step 6 is done, once; keeps the held codes that the rollback leads to."""

        def __init__(self) -> None:
            self.done = False
            self.back: dict[str, np.ndarray] | None = None

        def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
            if record["step"] == 6 and not self.done:
                self.done = True
                trainer.model.model.norm.weight.copy_(np.full(32, np.nan, np.float32))

        def on_event(self, trainer: Trainer, event: dict[str, Any]) -> None:
            self.back = trainer.codes.state(trainer.step)

    breaking, watch = Break(), Codes()
    run = trainer(folder, out=tmp_path / "run", callbacks=[breaking])
    run.fit()
    (event,) = run.events
    assert (event["event"], event["to"]) == ("rollback", 4)
    with pytest.raises(Interrupted):
        trainer(folder, callbacks=[watch, StopAt(4)]).fit()
    held = watch.seen[-1][2]
    assert held is not None
    assert breaking.back is not None
    assert all(np.array_equal(array, breaking.back[name]) for name, array in held.items())
    with pytest.raises(Interrupted):
        trainer(folder, out=tmp_path / "killed", callbacks=[Break(), StopAt(5)]).fit()
    again = trainer(folder, out=tmp_path / "killed", callbacks=[Break()])
    again.fit(resume=True)
    assert numbers(again) == numbers(run)


def test_who_has_no_codes_to_hold_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="requantize_every needs a model with ternary layers: this is a twin"):
        trainer(folder, shape=SHAPE.replace(linear="linear"))
    model = BitNetForCausalLM(SHAPE, 0).add_lora(2)
    with pytest.raises(ConfigError, match="requantize_every 3 is for training all weights"):
        Trainer(model, folder, CONFIG, log=lambda line: None)
    with pytest.raises(ConfigError, match="requantize_every must be at least 1, not 0"):
        replace(CONFIG, requantize_every=0)

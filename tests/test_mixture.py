"""A mixture's stream is a function of seed and row number, its shares are its weights, its caps hold."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet import BitNetConfig, BitNetForCausalLM, _core, checkpoint, nn, ops
from bitnet.callbacks import Callback
from bitnet.data import DataLoader, ShardDataset, pack
from bitnet.errors import CheckpointError, ConfigError, DataError
from bitnet.loggers import scalars
from bitnet.metrics import read_events, read_metrics
from bitnet.mixture import BLOCK, Mixture, MixtureRows, Source, is_mixture
from bitnet.report_data import read_runs
from bitnet.report_page import page
from bitnet.train import main
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

SIZES = {"a": 4000, "b": 9000, "c": 2000}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardDataset]:
    """Bytes of one letter each, so that a token tells its source."""
    folder = tmp_path_factory.mktemp("packs")
    out = {}
    for letter, size in SIZES.items():
        (folder / f"{letter}.txt").write_text(letter * size)
        options: Any = {"seq_len": 16, "val_fraction": 0.1, "log": lambda line: None}
        out[letter] = ShardDataset(pack(folder / f"{letter}.txt", folder / letter, "bytes", **options))
    return out


def mixture(packs: dict[str, ShardDataset], temperature: float = 1.0, **sources: Any) -> Mixture:
    """mixture(packs, a=0.7, b=(0.3, 2.0)): weights, or weights and epoch caps."""
    pairs = {name: value if isinstance(value, tuple) else (value, None) for name, value in sources.items()}
    return Mixture([Source(packs[name], name, *pair) for name, pair in pairs.items()], temperature)


def letters(tokens: np.ndarray[Any, Any]) -> list[str]:
    """The source of each row."""
    return [
        max(Counter(row).items(), key=lambda item: item[1])[0] for row in (map(chr, row) for row in tokens.tolist())
    ]


def test_shares_match_weights(packs: dict[str, ShardDataset]) -> None:
    weights = {"a": 0.55, "b": 0.3, "c": 0.15}
    loader = DataLoader(mixture(packs, **weights), 20, 16, seed=5)
    found = Counter(name for position in range(150) for name in letters(loader.batch(position)[0]))
    assert found.total() == 3000
    chi_square = sum((found[name] - 3000 * weight) ** 2 / (3000 * weight) for name, weight in weights.items())
    assert chi_square < 13.8  # two degrees of freedom: one in a thousand fair draws is above
    # No stretch is starved: of 50 rows, the rarest source has 7.5 on average.
    for position in range(0, 150, 5):
        names = {name for batch in range(position, position + 5) for name in letters(loader.batch(batch)[0])}
        assert names == {"a", "b", "c"}


@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=8),
    seed=st.integers(0, 2**64 - 1),
    block=st.integers(0, 5),
)
def test_blocks_hold_exact_shares_and_every_row_once(weights: list[float], seed: int, block: int) -> None:
    class Endless:
        per_epoch = 100

    rows = MixtureRows([Endless()] * len(weights), weights, [None] * len(weights), seed)  # type: ignore[list-item]
    picks = [rows.choose(number) for number in range(block * BLOCK, block * BLOCK + 400)]
    assert len(set(picks)) == 400
    assert picks[7] == rows.choose(block * BLOCK + 7)
    for source, number in picks:
        quota = weights[source] / sum(weights) * BLOCK
        assert block * (quota - 1) <= number <= (block + 1) * (quota + 1)


def test_temperature_and_default_weights(packs: dict[str, ShardDataset]) -> None:
    sizes = np.array([len(packs[name]) for name in "abc"], float)
    plain = Mixture([Source(packs[name], name) for name in "abc"])
    assert np.allclose(plain.weights, sizes / sizes.sum())
    warm = Mixture([Source(packs[name], name) for name in "abc"], temperature=2.0)
    assert np.allclose(warm.weights, np.sqrt(sizes) / np.sqrt(sizes).sum())
    hot = Mixture([Source(packs[name], name) for name in "abc"], temperature=1e9)
    assert np.allclose(hot.weights, 1 / 3)
    assert len(plain) == sizes.sum()


@pytest.mark.parametrize("caps", [(2.0, 3.0, 1.5), (0.5, 0.01, 4.0)])
def test_epoch_caps(packs: dict[str, ShardDataset], caps: tuple[float, float, float]) -> None:
    """Every source is read as often as its cap says, no row of it twice more; then there is no row left."""
    mix = mixture(packs, a=(0.8, caps[0]), b=(0.15, caps[1]), c=(0.05, caps[2]))
    loader = DataLoader(mix, 1, 16)
    rows = loader.rows
    assert isinstance(rows, MixtureRows)
    assert rows.limit is not None
    picks = [rows.choose(number) for number in range(rows.limit)]
    assert len(set(picks)) == rows.limit
    for i, cap in enumerate(caps):
        per_epoch = DataLoader(mix.sources[i].dataset, 1, 16).windows_per_epoch
        numbers = sorted(number for source, number in picks if source == i)
        assert numbers == list(range(len(numbers)))
        assert int(cap * per_epoch) - 1 <= len(numbers) <= int(cap * per_epoch)
    with pytest.raises(DataError, match=f"allow {rows.limit} rows"):
        loader.batch(rows.limit)
    # While all are there, shares are the weights.
    first = Counter(source for source, _ in picks[:100])
    assert caps[1] < 1 or 60 <= first[0] <= 95


def test_an_uncapped_source_goes_on(packs: dict[str, ShardDataset]) -> None:
    rows = DataLoader(mixture(packs, a=(0.5, 1.0), b=0.5), 1, 16).rows
    assert isinstance(rows, MixtureRows)
    assert rows.limit is None
    assert {rows.choose(number)[0] for number in range(100)} == {0, 1}
    assert {rows.choose(number)[0] for number in range(10**9, 10**9 + 100)} == {1}


@pytest.mark.parametrize("order", ["shuffled", "random"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_one_stream(packs: dict[str, ShardDataset], order: str, world: int) -> None:
    for data in (mixture(packs, a=0.6, c=0.4), packs["b"]):
        single = DataLoader(data, 3, 16, seed=9, order=order)
        for rank in range(world):
            part = DataLoader(data, 3, 16, seed=9, order=order, rank=rank, world=world)
            for position in (0, 1, 17):
                ours, theirs = part.batch(position), single.batch(position * world + rank)
                assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert part.epoch(6) == single.epoch(6 * world)
    with pytest.raises(ConfigError, match="rank must be 0 to world - 1 = 1, not 2"):
        DataLoader(packs["a"], 1, 16, rank=2, world=2)


def test_order_is_pinned(packs: dict[str, ShardDataset]) -> None:
    loader = DataLoader(mixture(packs, a=0.5, b=0.3, c=0.2), 24, 16, seed=1234)
    assert "".join(letters(loader.batch(3)[0])) == "abaaaababbbccaabbacccbba"


def test_refusals(packs: dict[str, ShardDataset], tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("other " * 300)
    other = ShardDataset(pack(text, tmp_path / "other", "chars", seq_len=16, log=lambda line: None))
    a, b = Source(packs["a"], "a", 1.0), Source(packs["b"], "b", 1.0)
    for sources, match in (
        ([], "at least one source"),
        ([a, Source(other, "other", 1.0)], "another tokenizer"),
        ([a, a], "named 'a'"),
        ([a, Source(packs["b"], "b")], "either all sources"),
        ([a, Source(packs["b"], "b", -1.0)], "weight of source 'b' must be positive, not -1"),
        ([a, Source(packs["b"], "b", 1.0, 0.0)], "epochs of source 'b'"),
    ):
        with pytest.raises(ConfigError, match=match):
            Mixture(sources)
    with pytest.raises(ConfigError, match="temperature must be positive"):
        Mixture([a, b], 0.0)
    with pytest.raises(ConfigError, match="share of 1e-09: the least is one in 65536"):
        DataLoader(mixture(packs, a=1.0, b=1e-9), 1, 16)


def test_specs(packs: dict[str, ShardDataset], tmp_path: Path) -> None:
    folder = packs["a"].folder.parent
    words = [f"{folder}/a=0.7", f"{folder}/b=0.3"]
    assert is_mixture(words)
    assert not is_mixture([str(folder)])
    assert not is_mixture([])
    assert np.allclose(Mixture.open(words).weights, [0.7, 0.3])
    with pytest.raises(ConfigError, match="is not a number"):
        Mixture.open([f"{folder}/a=much"])
    with pytest.raises(DataError, match="is not a pack"):
        Mixture.open([f"{tmp_path}=1"])
    path = folder / "mixture.yaml"
    path.write_text(
        "temperature: 1\nsources:\n- {data: a, weight: 1, epochs: 2, name: first}\n- {data: b, weight: 3}\n"
    )
    assert is_mixture([str(path)])
    mix = Mixture.open([str(path)])
    assert [(source.name, source.epochs) for source in mix.sources] == [("first", 2.0), ("b", None)]
    assert mix.weights == [0.25, 0.75]
    for text, match in (
        ("sources: 5", "no list of sources"),
        ("sources: [{weight: 1}]", "has no `data`"),
        ("sources: [{data: a, weight: x}]", "weight in .* must be a number, not 'x'"),
        ("sources: [{data: a, wieght: 1}]", "a field 'wieght'"),
        ("sources: [", "is not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=match):
            Mixture.open([str(path)])
    path.unlink()


SHAPE = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=32)


def trainer(data: Any, out: Path, steps: int = 6, **options: Any) -> Trainer:
    config = TrainerConfig(steps, batch_size=2, seq_len=16, eval_every=3, eval_blocks=4, save_every=3, plots=False)
    config = TrainerConfig(**{**config.__dict__, "sample_tokens": 0, **options})
    return Trainer(BitNetForCausalLM(SHAPE, 0), data, config, out=out, log=lambda line: None)


def test_a_mixture_trains_with_the_loss_of_each_source(packs: dict[str, ShardDataset], tmp_path: Path) -> None:
    mix = mixture(packs, a=0.75, b=0.25)
    trainer(mix, tmp_path / "run").fit()
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["val_loss"] is not None]
    assert [r["step"] for r in records] == [3, 6]
    for record in records:
        losses = record["val_loss_by_source"]
        assert list(losses) == ["a", "b"]
        assert record["val_loss"] == pytest.approx(0.75 * losses["a"] + 0.25 * losses["b"])
        assert losses["a"] != losses["b"]
    other = mixture(packs, a=0.5, b=0.5)
    with pytest.raises(CheckpointError, match="trained on other data"):
        trainer(other, tmp_path / "run").fit(resume=True)
    trainer(mix, tmp_path / "run", 8).fit(resume=True)
    with pytest.raises(ConfigError, match="50 steps read 100 rows, and the epoch caps allow"):
        trainer(mixture(packs, a=(0.5, 0.1), c=(0.5, 0.1)), tmp_path / "short", 50).fit()


@pytest.mark.parametrize("options", [{}, {"grad_accum": 2, "precision": "fp32", "documents": "separate"}])
def test_a_step_has_the_loss_of_each_source(
    packs: dict[str, ShardDataset], tmp_path: Path, options: dict[str, Any]
) -> None:
    """What the model, before the step, loses on the rows of one source; together, by targets, they are the whole."""
    mix = mixture(packs, a=0.6, b=0.25, c=0.15)
    run = trainer(mix, tmp_path / "run", eval_every=2, **options)
    micro = run.config.grad_accum
    rows: list[tuple[str, Any, Any]] = []
    for position in range(micro):
        tokens, targets = run.loader.batch(position)
        rows += zip(letters(tokens), tokens, targets, strict=True)
    with ops.no_grad():
        losses = {
            name: run.model(*(np.stack([row[part] for row in rows if row[0] == name]) for part in (1, 2))).item()
            for name in {row[0] for row in rows}
        }
    counts = {name: sum((row[2] != -100).sum() for row in rows if row[0] == name) for name in losses}
    history = run.fit()
    record = history[0]["train_loss_by_source"]
    assert record == pytest.approx(losses, rel=2e-2 if run.config.precision == "fast" else 1e-5)  # logits in bf16
    assert list(record) == sorted(record)
    whole = sum(losses[name] * counts[name] for name in losses) / sum(counts.values())
    parts = sum(record[name] * counts[name] for name in record) / sum(counts.values())
    assert history[0]["train_loss"] == pytest.approx(parts, rel=1e-6)
    assert history[0]["train_loss"] == pytest.approx(whole, rel=2e-2)
    assert {name for one in history for name in one["train_loss_by_source"]} == {"a", "b", "c"}
    kept = [one["train_loss_by_source"] for one in history]
    again = trainer(mix, tmp_path / "run", **{**options, "steps": 7, "eval_every": 2})
    again.fit(resume=True)
    assert [one["train_loss_by_source"] for one in again.history[:6]] == kept
    shown = dict(scalars(history[1], None))
    assert shown["train_loss_by_source/a"] == history[1]["train_loss_by_source"]["a"]
    assert shown["val_loss_by_source/b"] == history[1]["val_loss_by_source"]["b"]


def test_one_source_is_no_mixture_of_losses(packs: dict[str, ShardDataset], tmp_path: Path) -> None:
    assert "train_loss_by_source" not in trainer(mixture(packs, a=1.0), tmp_path, 1).fit()[0]


def test_sources_are_shown(packs: dict[str, ShardDataset], tmp_path: Path) -> None:
    run = trainer(mixture(packs, a=0.75, b=0.25), tmp_path / "run")
    lines: list[str] = []
    run.log = lines.append
    losses = run.fit()[-1]["val_loss_by_source"]
    (last,) = [line for line in lines if line.startswith("step 6/6")]
    assert re.search(rf"of a \d\.\d\d\d/{losses['a']:.3f}  of b \d\.\d\d\d/{losses['b']:.3f}", last)
    text = page(read_runs([str(tmp_path / "run")]))
    titles = [re.sub("<.*", "", part) for part in text.split("<figcaption>")[1:]]
    wanted = [f"{what} loss of {name}" for name in "ab" for what in ("Validation", "Training")]
    assert [title for title in titles if " loss of " in title] == wanted


def test_losses_of_targets_are_those_of_the_op(packs: dict[str, ShardDataset]) -> None:
    rng = np.random.default_rng(0)
    x, weight = ops.tensor(rng.standard_normal((6, 8)).astype(np.float32)), nn.Linear(8, 11).weight
    targets = np.array([3, -100, 10, 0, 5, -100], np.int32)
    logits = x.numpy() @ weight.numpy(copy=True).T
    lost = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), np.maximum(targets, 0)]
    loss = ops.cross_entropy(x, weight, targets)
    assert np.allclose(_core.row_losses(loss).numpy(copy=True), np.where(targets < 0, 0, lost), atol=1e-5)
    with pytest.raises(RuntimeError, match="this tensor was made by scale, not by a cross_entropy on a tape"):
        _core.row_losses(_core.scale(loss, 2.0))
    loss.backward()
    with pytest.raises(RuntimeError, match="made by no recorded op, not by a cross_entropy"):
        _core.row_losses(loss)
    with ops.segment():
        inner = ops.cross_entropy(x, weight, targets)
    with pytest.raises(RuntimeError, match="in a segment, which has let go of those of its rows"):
        _core.row_losses(inner)


class Break(Callback):
    """Makes a weight no number when a step is done, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            self.step = -1
            trainer.model.model.norm.weight.copy_(np.full(32, np.nan, np.float32))


@pytest.mark.parametrize("broken", [7, -1], ids=["some rows left", "none left"])
def test_a_rollback_never_leads_past_the_caps(packs: dict[str, ShardDataset], tmp_path: Path, broken: int) -> None:
    """A plan that reads every row loses a step for each batch that is skipped; the run says so and is complete."""
    mix = mixture(packs, a=(0.5, 0.2), c=(0.5, 0.2))
    rows = DataLoader(mix, 2, 16).rows
    assert isinstance(rows, MixtureRows)
    assert rows.limit is not None
    steps = rows.limit // 2
    assert steps > 12
    whole = trainer(mix, tmp_path / "whole", steps)
    whole.fit()
    assert (whole.step, whole.events) == (steps, [])
    broken %= steps
    run = trainer(mix, tmp_path / "run", steps)
    run.callbacks.append(Break(broken))
    run.fit()
    rollback, stop = run.events
    back = broken // 3 * 3 if broken % 3 else broken - 3  # a checkpoint every three steps, none of what is broken
    assert (rollback["event"], rollback["to"], rollback["skipped"]) == ("rollback", back, [back, broken + 1])
    ended = steps - (broken + 1 - back)
    assert (stop["event"], stop["step"], run.step) == ("early_stop", ended, ended)
    assert (
        stop["reason"]
        == f"step {ended}: the epoch caps leave {rows.limit % 2} of {rows.limit} rows, and a step reads 2"
    )
    assert read_events(tmp_path / "run" / "metrics.jsonl") == run.events
    assert [record["step"] for record in run.history] == list(range(1, ended + 1))
    assert run.history[-1]["val_loss"] is not None
    assert checkpoint.steps(tmp_path / "run")[-1] == ended
    again = trainer(mix, tmp_path / "run", steps)
    again.fit(resume=True)
    assert (again.step, again.position, again.events) == (ended, run.position, run.events)
    assert all(np.array_equal(array, run.model.state_dict()[name]) for name, array in again.model.state_dict().items())


def test_command_line(packs: dict[str, ShardDataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packs["a"].folder.parent
    shape = "--hidden-size 32 --intermediate-size 48 --num-hidden-layers 1 --num-attention-heads 2 --seq-len 16".split()
    flags = [*shape, *"--batch-size 2 --steps 4 --plots false --sample-tokens 0 --threads 1".split()]
    run = tmp_path / "run"
    assert main(["--data", f"{folder}/a=0.7", f"{folder}/b=0.3", "--out", str(run), *flags]) == 0, capsys.readouterr()
    assert set(read_metrics(run / "metrics.jsonl")[-1]["val_loss_by_source"]) == {"a", "b"}
    assert main(["--resume", str(run), "--steps", "6"]) == 0
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 6

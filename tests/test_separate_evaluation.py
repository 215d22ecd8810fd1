"""Evaluation of documents that stay separate: windows of one document each, whose loss no other document changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitnet import BitNetConfig, BitNetForCausalLM, ops
from bitnet.corpus import Split
from bitnet.data import ShardDataset, eval_blocks, eval_rows, pack
from bitnet.errors import DataError
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

SHAPE = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)
SEQ_LEN = 16
LINES = [f"{n} squared is {n * n}, doubled {n + n}"[n % 13 :] for n in range(400)]
SHARE = 0.1


def packed(folder: Path, lines: list[str]) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text("|".join(lines))
    options = {"seq_len": SEQ_LEN, "separator": "|", "val_fraction": SHARE}
    return pack(folder / "text.txt", folder / "pack", "bytes", **options, log=lambda line: None)  # type: ignore[arg-type]


def trainer(folder: Path, documents: str, **options: int) -> Trainer:
    config = TrainerConfig(4, batch_size=4, seq_len=SEQ_LEN, documents=documents, sample_tokens=0, **options)  # type: ignore[arg-type]
    return Trainer(BitNetForCausalLM(SHAPE, 0), folder, config, log=lambda line: None)


def alone(model: BitNetForCausalLM, line: str) -> tuple[float, int]:
    """The summed loss of one document, window by window from its start, and how many targets it has."""
    ids, total = np.array([*line.encode(), 256], np.int32), 0.0
    with ops.no_grad():
        for first in range(0, len(ids) - 1, SEQ_LEN):
            part = ids[first : first + SEQ_LEN + 1]
            total += model(part[None, :-1].copy(), part[None, 1:].copy()).item() * (len(part) - 1)
    return total, len(ids) - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("text") / "plain", LINES)


def test_the_loss_is_that_of_each_document_alone(folder: Path) -> None:
    split = Split(SHARE, by_position=False)
    run = trainer(folder, "separate")
    losses, counts = zip(*(alone(run.model, line) for line in LINES if split.holds_out(line)), strict=True)
    assert len(losses) > 20
    assert run.evaluate() == pytest.approx(sum(losses) / sum(counts), rel=1e-4)
    assert trainer(folder, "joined").evaluate() != pytest.approx(sum(losses) / sum(counts), rel=1e-6)


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_whether_a_held_out_document_changes_the_loss_of_its_neighbour(
    folder: Path, tmp_path: Path, documents: str
) -> None:
    """One held-out line in other letters, of the same length: separate, only its own rows lose something else."""
    split = Split(SHARE, by_position=False)
    place = [n for n, line in enumerate(LINES) if split.holds_out(line)][7]
    other = next(line for n in range(999) if split.holds_out(line := f"{n:X}".rjust(len(LINES[place]), "Z")))
    changed = packed(tmp_path / "changed", [*LINES[:place], other, *LINES[place + 1 :]])
    model = BitNetForCausalLM(SHAPE, 0)
    losses = []
    for one in (folder, changed):
        batches = eval_blocks(ShardDataset(one, "validation"), 1, SEQ_LEN, documents)
        with ops.no_grad():
            losses.append([(b"Z" in tokens.astype(np.uint8).tobytes(), model(tokens, targets).item())
                           for tokens, targets in batches])  # fmt: skip
    own = [number for number, (z, _) in enumerate(losses[1]) if z]
    assert own
    differ = [n for n, ((_, a), (_, b)) in enumerate(zip(*losses, strict=True)) if a != b]
    # Joined, the line's first and last windows hold text of its neighbours too.
    rows = list(eval_blocks(ShardDataset(changed, "validation"), 1, SEQ_LEN, documents))
    mixed = [n for n in own if 256 in rows[n][0]]
    assert set(differ) <= set(own)
    assert bool(mixed) == (documents == "joined")


def test_every_target_but_first_tokens_once_and_in_order(folder: Path) -> None:
    held_out = ShardDataset(folder, "validation")
    batches = list(eval_blocks(held_out, 3, SEQ_LEN, "separate"))
    assert sum(len(tokens) for tokens, _ in batches) == eval_rows(held_out, SEQ_LEN, "separate")
    targets = np.concatenate([targets[targets != -100] for _, targets in batches])
    whole, starts = held_out.read(0, len(held_out)), held_out.document_starts()
    assert np.array_equal(targets, np.delete(whole, starts[:-1]))


def test_a_limit_and_lines_too_short(folder: Path, tmp_path: Path) -> None:
    few = trainer(folder, "separate", eval_blocks=6)
    total = count = 0.0
    for tokens, targets in list(eval_blocks(ShardDataset(folder, "validation"), 1, SEQ_LEN, "separate"))[:6]:
        targeted = int((targets != -100).sum())
        total, count = total + few.model(tokens, targets).item() * targeted, count + targeted
    assert few.evaluate() == pytest.approx(total / count, rel=1e-4)
    assert few.fit()[-1]["val_loss"] is not None
    data = ShardDataset(folder, "validation")
    starts = np.arange(len(data) + 1)
    data.document_starts = lambda: starts  # type: ignore[method-assign]
    assert eval_rows(data, SEQ_LEN, "separate") == 0
    with pytest.raises(DataError, match="no document of two tokens"):
        list(eval_blocks(data, 1, SEQ_LEN, "separate"))

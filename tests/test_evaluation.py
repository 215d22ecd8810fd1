"""The loss is that of the logits, each token counted once; the numbers derived from it follow their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import bitnet
from bitnet import checkpoint
from bitnet.errors import BitnetError, ConfigError, DataError
from bitnet.evaluate import main as command
from bitnet.evaluation import evaluate
from bitnet.tokenizer import ByteTokenizer, CharTokenizer

CONFIG = bitnet.BitNetConfig(257, 48, 80, 2, 6, 3, max_position_embeddings=32, initializer_range=0.3)
DOCUMENTS = ["A short one.", "Größe – 😀", "x" * 40 + "\nand some more of it"]
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> bitnet.BitNetForCausalLM:
    return bitnet.BitNetForCausalLM(CONFIG, seed=1)


def expected_nats(model: bitnet.BitNetForCausalLM, ids: list[int], seq_len: int) -> list[float]:
    """-log softmax at each target, window by window from the logits, in float64."""
    nats = []
    for first in range(0, len(ids) - 1, seq_len):
        window = ids[first : first + seq_len + 1]
        with bitnet.no_grad():
            logits = model(np.array([window[:-1]])).numpy()[0].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nats += [-row[target] for row, target in zip(logits, window[1:], strict=True)]
    return nats


@pytest.mark.parametrize("seq_len", [1, 7, 32])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_loss(model: bitnet.BitNetForCausalLM, seq_len: int, batch_size: int | None) -> None:
    """To 1e-6: the loss of a batch is a float32, and its rows' losses are within some units in the last place."""
    ids = [token for text in DOCUMENTS for token in TOKENIZER.encode_document(text)]
    result = evaluate(model, TOKENIZER, DOCUMENTS, seq_len, batch_size)
    nats = expected_nats(model, ids, seq_len)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    assert result["loss"] == pytest.approx(np.mean(nats), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-6)
    counts = {"tokens": len(ids) - 1, "bytes": size, "documents": 3, "windows": -(-(len(ids) - 1) // seq_len)}
    assert {name: result[name] for name in counts} == counts
    assert result["seq_len"] == seq_len


def test_a_model_that_knows_nothing() -> None:
    """All logits zero: ln V nats for every token."""
    model = bitnet.BitNetForCausalLM(CONFIG)
    model.lm_head.weight.copy_(np.zeros((257, 48), np.float32))
    result = evaluate(model, TOKENIZER, ["abcdefgh" * 10])
    assert result["loss"] == pytest.approx(math.log(257), rel=1e-6)
    assert result["perplexity"] == pytest.approx(257, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)  # 80 bytes and eos: 80 predictions


def test_exact_multiple_and_shortest_text(model: bitnet.BitNetForCausalLM) -> None:
    chars = CharTokenizer("ab")
    assert evaluate(model, chars, ["ab" * 4 + "a"], seq_len=4)["windows"] == 2
    assert evaluate(model, chars, ["ab" * 5], seq_len=4)["windows"] == 3
    assert evaluate(model, chars, ["ab"])["tokens"] == 1
    for documents, count in ((["a"], 1), ([], 0)):
        with pytest.raises(DataError, match=f"{count} tokens: there is nothing to predict"):
            evaluate(model, chars, documents)


def test_default_window_and_progress(model: bitnet.BitNetForCausalLM) -> None:
    batches: list[int] = []

    def progress(seen: range) -> range:
        batches.extend(seen)
        return seen

    assert evaluate(model, TOKENIZER, DOCUMENTS, batch_size=2, progress=progress)["seq_len"] == 32
    assert batches == [0, 2]
    for trained, used in ((16, 16), (64, 32), (None, 32)):
        model.trained_seq_len = trained
        assert evaluate(model, TOKENIZER, DOCUMENTS)["seq_len"] == used
    del model.trained_seq_len


def test_paths_are_documents(model: bitnet.BitNetForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(DOCUMENTS[0])
    lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS[1:]]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    assert evaluate(model, TOKENIZER, [tmp_path]) == evaluate(model, TOKENIZER, DOCUMENTS)


def test_refusals(model: bitnet.BitNetForCausalLM) -> None:
    for seq_len in (0, 33):
        with pytest.raises(ConfigError, match=f"32 positions, not {seq_len}"):
            evaluate(model, TOKENIZER, DOCUMENTS, seq_len)
    with pytest.raises(ConfigError, match="257 ids, more than the model's 100"):
        evaluate(bitnet.BitNetForCausalLM(CONFIG.replace(vocab_size=100)), TOKENIZER, DOCUMENTS)
    with pytest.raises(DataError, match="nowhere"):
        evaluate(model, TOKENIZER, [Path("nowhere")])
    broken = bitnet.BitNetForCausalLM(CONFIG)
    broken.lm_head.weight.copy_(np.full((257, 48), np.nan, np.float32))
    with pytest.raises(BitnetError, match="not finite"):
        evaluate(broken, TOKENIZER, DOCUMENTS)


def test_command_line(model: bitnet.BitNetForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, text, out = tmp_path / "run", tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text(DOCUMENTS[2])
    checkpoint.save(run, 12, model, {}, {"step": 12, "config": {"seq_len": 16}}, TOKENIZER)
    assert command([str(run), "--data", str(text), "--json", str(out), "--threads", "1"]) == 0
    bitnet.set_threads(0)
    result = evaluate(model, TOKENIZER, DOCUMENTS[2:], 16)
    assert json.loads(out.read_text()) == result | {"run": str(run), "step": 12, "data": [str(text)]}
    printed = capsys.readouterr().out
    for line in (f"loss {result['loss']:.4f} nats per token", f"tokens {result['tokens']} in 4 windows of 16"):
        assert line in " ".join(printed.split())
    bare = tmp_path / "bare"
    checkpoint.save(bare, 1, model, {}, {"step": 1})
    for flags, message in (
        ([str(tmp_path / "nowhere"), "--data", str(text)], "nowhere"),
        ([str(run), "--data", str(tmp_path / "gone.txt")], "gone.txt"),
        ([str(run), "--data", str(text), "--seq-len", "33"], "not 33"),
        ([str(bare), "--data", str(text)], "has no tokenizer"),
        ([str(run), "--data", str(text), "--json", str(tmp_path / "no" / "such" / "folder")], "No such file"),
    ):
        assert command(flags) == 2
        err = capsys.readouterr().err
        assert message in err.splitlines()[-1]
        assert err.splitlines()[-1].startswith("error: ")

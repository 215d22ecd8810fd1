"""Published perplexity protocols, each beside a plain PyTorch loop over transformers' LLaMA with the same weights."""

from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the loops run on PyTorch")
transformers = pytest.importorskip("transformers", reason="the model beside ours is one of transformers")

import bitnet  # noqa: E402
from bitnet import checkpoint, protocols  # noqa: E402
from bitnet.errors import ConfigError, DataError  # noqa: E402
from bitnet.evaluate import main as command  # noqa: E402
from bitnet.evaluation import evaluate  # noqa: E402
from bitnet.protocols import PROTOCOLS, perplexity, pieces  # noqa: E402
from bitnet.tokenizer import ByteTokenizer, Tokenizer  # noqa: E402

CONFIG = bitnet.BitNetConfig(
    257, 48, 80, 2, 6, 3, max_position_embeddings=64, initializer_range=0.15, sub_norms=False, linear="linear"
)
# As the hub gives WikiText-2: lines with their ends, blank ones empty. One is longer than a window, one fills it.
LINES = ["", " = Lobster = \n", "", " The lobster is blue . \n", " It – or she – eats . \n", "", f" {'x' * 70} \n"]
LINES += [f"{'y' * 31}\n", "", " = Claw = \n", " Claws are two . \n"] * 3
DOCUMENTS = [f"Document {i} says:\nclaw {'z ' * (5 * i)}" for i in range(7)]


class Bos(ByteTokenizer):
    """Bytes, with an id before each text."""

    bos_id = 1


@pytest.fixture(scope="module", params=[ByteTokenizer, Bos])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


@pytest.fixture(scope="module")
def model() -> bitnet.BitNetForCausalLM:
    return bitnet.BitNetForCausalLM(CONFIG, seed=3)


@pytest.fixture(scope="module")
def llama(model: bitnet.BitNetForCausalLM) -> Any:
    """transformers' model with those weights."""
    shape = {name: getattr(CONFIG, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    )}  # fmt: skip
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    rope = {"rope_type": "default", "rope_theta": CONFIG.rope_theta}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **special, rope_parameters=rope))
    other.load_state_dict({name: torch.from_numpy(value.numpy().copy()) for name, value in model.named_parameters()})
    return other.eval()


def window_loss(llama: Any, ids: list[int], reduction: str) -> float:
    """Cross-entropy of a window's tokens but the first."""
    with torch.no_grad():
        logits = llama(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction=reduction).item()


def of_one_text(llama: Any, tokenizer: Tokenizer, text: str, seq_len: int, most: int) -> float:
    """The loop of GPTQ: a mean loss for each window, weighted by its length."""
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    count = min(len(ids) // seq_len, most)
    nlls = [window_loss(llama, ids[i * seq_len : (i + 1) * seq_len], "mean") * seq_len for i in range(count)]
    return math.exp(sum(nlls) / (count * seq_len))


def of_pieces(llama: Any, tokenizer: Tokenizer, texts: list[str], seq_len: int) -> float:
    """The loop of the reproductions: summed losses over counted tokens, in bits."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    data, window = [], [*bos]
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        if len(ids) > seq_len:
            continue
        if len(window) + len(ids) > seq_len:
            data.append(window)
            window = [*bos]
        window = window + ids
    if 1 < len(window) <= seq_len:
        data.append(window)
    total = sum(window_loss(llama, ids, "sum") for ids in data if len(ids) > 1)
    return 2 ** (total / sum(len(ids) - 1 for ids in data if len(ids) > 1) / math.log(2))


@pytest.mark.parametrize("seq_len", [32, 63])
def test_perplexity(
    model: bitnet.BitNetForCausalLM,
    llama: Any,
    tokenizer: Tokenizer,
    seq_len: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To 1e-4 of the perplexity: float32 logits of two libraries, and means over some hundred tokens."""
    monkeypatch.setattr(protocols, "C4_DOCUMENTS", 6)
    monkeypatch.setattr(protocols, "C4_WINDOWS", 4)
    lines, documents = tmp_path / "wiki.test.raw", tmp_path / "c4.jsonl"
    lines.write_text("".join(line or " \n" for line in LINES))
    documents.write_text("".join(json.dumps({"text": text, "url": "none"}) + "\n" for text in DOCUMENTS))
    expected = {
        "wikitext2": of_one_text(llama, tokenizer, "\n\n".join(LINES), seq_len, 1000),
        "c4": of_one_text(llama, tokenizer, " ".join(DOCUMENTS[:6]), seq_len, 4),
        "paper-wikitext2": of_pieces(llama, tokenizer, [x for x in "".join(LINES).split("\n") if x], seq_len),
        "paper-c4": of_pieces(llama, tokenizer, DOCUMENTS, seq_len),
    }
    assert list(expected) == list(PROTOCOLS)
    for name, value in expected.items():
        path = documents if name.endswith("c4") else lines
        for batch_size in (None, 2):
            result = perplexity(model, name, [path], tokenizer, seq_len, batch_size)
            assert result["perplexity"] == pytest.approx(value, rel=1e-4)
        assert result["protocol"] == name and result["seq_len"] == seq_len


def test_bits_per_byte(model: bitnet.BitNetForCausalLM, tmp_path: Path) -> None:
    """With a token for each byte they are the bits of a token; c4 has too little text here for its caps to matter."""
    path = tmp_path / "text.txt"
    path.write_text("A text of plain letters. " * 20)
    for name in ("wikitext2", "c4"):
        result = perplexity(model, name, [path], ByteTokenizer(), 32)
        assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2), rel=1e-2)
        assert result["windows"] == 500 // 32 and result["tokens"] == 500 // 32 * 31


def test_default_window(model: bitnet.BitNetForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 200)
    assert perplexity(model, "wikitext2", [path], ByteTokenizer())["seq_len"] == 64
    assert protocols.SEQ_LEN == 2048


def test_forms_of_one_text(tmp_path: Path) -> None:
    """A plain file, its rows as JSON lines, and both compressed are the same lines."""
    protocol = PROTOCOLS["wikitext2"]
    (tmp_path / "a.raw").write_text("".join(line or "\n" for line in LINES))
    rows = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((tmp_path / "a.raw").read_bytes()))
    for name in ("a.raw", "a.jsonl", "a.json.gz", "a.txt.gz"):
        assert list(pieces(tmp_path / name, protocol)) == LINES
    assert list(pieces(tmp_path / "a.raw", PROTOCOLS["c4"])) == [(tmp_path / "a.raw").read_text()]


def test_the_hub(model: bitnet.BitNetForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(**arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) > 1:
            raise ConnectionError("no route to the hub\nand more")
        return {"text": LINES}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    result = perplexity(model, "wikitext2", None, ByteTokenizer(), 32)
    assert asked == [{"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}]
    assert result["documents"] == len(LINES)
    with pytest.raises(DataError, match=r"c4 \(allenai/c4\) cannot be had from the hub: no route to the hub; a local"):
        perplexity(model, "c4", None, ByteTokenizer(), 32)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'bitnet\[eval\]'"):
        perplexity(model, "c4", None, ByteTokenizer(), 32)


def test_refusals(model: bitnet.BitNetForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = tmp_path / "bad.gz"
    bad.write_bytes(b"\x1f\x8bnothing")
    worse = tmp_path / "worse.gz"
    worse.write_bytes(gzip.compress(b"text " * 99)[:12] + bytes(range(40)))
    for text, file, seq_len, error, message in (
        ('{"text": "a"}', path, 65, ConfigError, "2 to the model's 64 positions, not 65"),
        ('{"text": "a"}', path, 1, ConfigError, "not 1"),
        ('{"text": "a"}', path, 32, DataError, "1 pieces does not fill one window of 32"),
        ('{"text": "a"}\n{"x": 1}', path, 32, DataError, "a.jsonl:2 is not a JSON object with a text"),
        ('{"text": 3}', path, 32, DataError, "a.jsonl:1 has a text that is int"),
        ("", bad, 32, DataError, "bad.gz is not a readable text"),
        ("", worse, 32, DataError, "worse.gz is not a readable text"),
        ("", tmp_path / "gone.txt", 32, DataError, "gone.txt"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=message):
            perplexity(model, "wikitext2", [file], ByteTokenizer(), seq_len)
    with pytest.raises(ConfigError, match="paper-c4, not 'ptb'"):
        perplexity(model, "ptb", [path], ByteTokenizer())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ternary model: its perplexity in one window is that of bitnet.evaluation on the same tokens."""
    ternary = bitnet.BitNetForCausalLM(CONFIG.replace(linear="bitlinear", sub_norms=True), seed=4)
    run, text, out = tmp_path / "run", tmp_path / "text.txt", tmp_path / "out.json"
    checkpoint.save(run, 1, ternary, {}, {"step": 1}, ByteTokenizer())
    text.write_text("Lobsters have two claws, and antennae too.")
    flags = ["--data", str(text), "--json", str(out), "--threads", "1"]
    assert command([str(run), "--protocol", "paper-wikitext2", *flags]) == 0
    bitnet.set_threads(0)
    printed = " ".join(capsys.readouterr().out.split())
    found = json.loads(out.read_text())
    expected = evaluate(ternary, ByteTokenizer(), [text])
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert found["protocol"] == "paper-wikitext2" and np.isclose(
        found["bits_per_byte"], expected["bits_per_byte"], 0.03
    )
    assert f"perplexity {found['perplexity']:.3f}" in printed and "in 1 lines" in printed
    assert command([str(run)]) == 2
    assert "--data PATH, or --protocol" in capsys.readouterr().err

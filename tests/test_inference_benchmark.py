"""benchmarks/inference.py: the model that all engines share, its file, the turns and what is made of them; no speeds.

llama.cpp is compared where LLAMA_PYTHON, or else this interpreter, has llama_cpp and gguf.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet import BitNetConfig, get_threads, set_threads

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compare
import engine_bitnet
import gguf_random
import history
import inference
import inference_check
import inference_engines
import random_weights
import turns

LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON", sys.executable)
HOLDS = {"about": "an engine", "weight_bytes": 1000.0, "cache_bytes": 10.0}
ROOF = inference.Roof(1e6, {"int8": 1e9, "bf16": 5e8})


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = get_threads()
    yield
    set_threads(before)


# ---- the model ----


def test_weights_are_functions_of_their_names() -> None:
    codes = random_weights.codes("a", 300, 1000)
    np.testing.assert_array_equal(codes, random_weights.codes("a", 300, 1000))
    np.testing.assert_array_equal(codes[:7], random_weights.codes("a", 7, 1000))
    assert codes[0, :12].tolist() == [1, 1, -1, 0, -1, -1, 1, 0, 1, 1, 1, 1]  # in any process, with any NumPy
    assert abs(np.corrcoef(codes.ravel(), random_weights.codes("b", 300, 1000).ravel())[0, 1]) < 0.01
    shares = np.bincount(codes.ravel() + 1) / codes.size
    np.testing.assert_allclose(shares, [85 / 256, 86 / 256, 85 / 256], atol=5e-3)
    table = random_weights.matrix("a", 400, 256)
    assert abs(table.mean()) < 1e-3
    assert table.std() == pytest.approx(1 / 16, rel=0.01)


@pytest.mark.parametrize("inputs", [64, 256, 1536, 2560, 6912])
def test_scale_is_a_power_of_two_that_keeps_the_size_of_activations(inputs: int) -> None:
    scale = random_weights.scale(inputs)
    assert np.frexp(scale)[0] == 0.5
    assert 2**-0.5 <= scale * (inputs * 2 / 3) ** 0.5 <= 2**0.5


def dequantized(blocks: np.ndarray) -> np.ndarray:
    """Values of Q6_K blocks (n, 210): 128 bytes of low nibbles, 64 of high bits, 16 scales, d."""
    values = np.zeros((len(blocks), 256), np.float32)
    scales, d = blocks[:, 192:208].view(np.int8), blocks[:, 208:].copy().view(np.float16).astype(np.float32)[:, 0]
    for i in range(256):
        half, rest = divmod(i, 128)
        quarter, place = divmod(rest, 32)
        low = blocks[:, 64 * half + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
        high = blocks[:, 128 + 32 * half + place] >> 2 * quarter & 3
        values[:, i] = d * scales[:, i // 16] * ((low | high << 4).astype(np.float32) - 32)
    return values


def test_q6_k_blocks() -> None:
    """Half a step of the 16 values' own scale, whose own rounding may cut off half a step of the block's."""
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(40, 512)) * np.exp(rng.normal(size=(40, 1)) * 3)).astype(np.float32)
    rows[0], rows[1] = 0, 1e-12
    got = dequantized(gguf_random.q6_k(rows).reshape(-1, 210)).reshape(rows.shape)
    most = np.abs(rows.reshape(-1, 16, 16)).max(-1)
    step = np.maximum(most, most.max(-1, keepdims=True) / 127) / 31
    bound = step / 2 + most.max(-1, keepdims=True) / 127 + 1e-6  # 1e-6: half floats end
    assert (np.abs(got - rows).reshape(-1, 16, 16) <= bound[:, :, None] * 1.01).all()
    assert np.abs(got[:2]).max() < 1e-6


def test_every_engine_can_run_the_shared_shape() -> None:
    for name in ("2b-4t", "700m", "nano"):
        preset = BitNetConfig.preset(name)
        config = inference_engines.shared(preset, 5000)
        assert (config.hidden_act, config.tie_word_embeddings, config.max_position_embeddings) == ("silu", True, 5000)
        assert config.intermediate_size % gguf_random.BLOCK == config.hidden_size % gguf_random.BLOCK == 0
        assert 0 <= config.intermediate_size - preset.intermediate_size < gguf_random.BLOCK
        assert (config.kv_heads, config.head_dim) == (preset.kv_heads, preset.head_dim)
    assert inference_engines.shared(BitNetConfig.preset("nano"), 1).intermediate_size == 768


# ---- turns ----


class Counter:
    """Logits that tell how often the engine was called."""

    about, weight_bytes, cache_bytes = "counts", 0.0, 0.0

    def __init__(self, fails: bool = False) -> None:
        self.calls, self.fails = 0, fails

    def set_threads(self, threads: int) -> None: ...

    def prefill(self, tokens: list[int]) -> np.ndarray:
        self.calls = len(tokens)
        return np.array([self.calls, np.nan if self.fails else -np.inf])

    def step(self, token: int) -> np.ndarray:
        self.calls += 1
        return np.array([self.calls, token])


def test_a_turn_is_a_prompt_and_every_token_after_it() -> None:
    engine = Counter()
    answer = turns.run(engine, [5, 6, 7], [8, 9])
    assert engine.calls == 5
    assert answer.keys() == {"prompt_seconds", "decode_seconds"}
    assert turns.run(engine, [5], [8, 9], logits=True) == {"logits": [[1, -np.inf], [2, 8], [3, 9]]}
    with pytest.raises(FloatingPointError, match="a prompt of 2 tokens is no number"):
        turns.run(Counter(fails=True), [1, 2], [3])


def test_a_worker_answers_until_it_fails() -> None:
    engine = inference_engines.engines(["f32"], ["auto"])["bitnet_f32"]
    config = inference_engines.shared(BitNetConfig(64, 48, 80, 1, 4, 2), 4)
    worker = inference_engines.start(engine, config, 4, Path(), "")
    try:
        assert worker.holds is not None
        answer = worker.ask(threads=1, prompt=[1, 2], following=[3])
        assert answer is not None
        assert 1e6 < answer["peak_memory_bytes"] < 1e9
        assert worker.ask(threads=1, prompt=[1, 2, 3, 4], following=[5]) is None
        assert worker.error is not None
        assert worker.error.endswith("1 more tokens do not fit: 4 of 4 positions are taken")
        assert worker.ask(threads=1, prompt=[1], following=[2]) is None
    finally:
        worker.close()


# ---- what is made of them ----


def answers(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"prompt_seconds": p, "decode_seconds": d, "peak_memory_bytes": 7} for p, d in pairs]


def test_a_report_by_hand() -> None:
    """Speeds are medians; a token reads the weights and the cache as long as it is halfway."""
    engine = inference_engines.Engine("engine_bitnet.py", {})
    config = BitNetConfig(64, 48, 80, 3, 4, 2)
    turn = {"prompt": [0] * 10, "following": [0] * 5}
    found = inference.report(engine, config, HOLDS, turn, answers((1, 0.5), (2, 0.25), (5, 0.1)), ROOF)
    assert (found["prompt_tokens_per_second"], found["decode_tokens_per_second"]) == (5, 4)
    assert found["bytes_per_token"] == 1000 + 13 * 10
    assert found["decode_bandwidth_share"] == pytest.approx(4 * 1130 / 1e6)
    macs = 3 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 80)
    assert found["prompt_peak_share"] == pytest.approx(5 * macs / 1e9)
    torch = inference.report(
        engine._replace(script=inference_engines.TORCH), config, HOLDS, turn, answers((2, 1)), ROOF
    )
    assert torch["prompt_peak_share"] == pytest.approx(5 * macs / 5e8)


def test_the_table_sets_speeds_beside_llama_cpp() -> None:
    engine, turn = inference_engines.Engine("", {}), {"prompt": [0] * 10, "following": [0]}
    config = BitNetConfig(64, 48, 80, 3, 4, 2)
    make = [inference.report(engine, config, HOLDS, turn, answers(pair), ROOF) for pair in ((1, 0.1), (2, 0.5))]
    lines = inference.table({"bitnet_f32": make[0], "llama_tq2_0": make[1], "x": {"error": "a\nb"}}).splitlines()
    assert lines[1].split()[-4:] == ["2.00", "x", "5.00", "x"]
    assert lines[2].split()[-4:] == ["1.00", "x", "1.00", "x"]
    assert lines[3].split(maxsplit=1) == ["x", "cannot run: b"]
    assert inference.table({"bitnet_f32": make[0]}).splitlines()[1].split()[-2:] == ["-", "-"]


def test_engines_by_name() -> None:
    known = inference_engines.engines(["f32", "int6"], ["auto"])
    assert list(known) == ["bitnet_f32", "bitnet_int6", "llama_tq2_0", "llama_tq1_0", "transformers_bf16"]
    assert [known[name].settings["pack"] for name in ("bitnet_f32", "bitnet_int6")] == [
        {"head": head, "layout": "auto"} for head in ("f32", "int6")
    ]
    assert "bitnet_f32_1.6" in inference_engines.engines(["f32"], ["auto", "1.6"])
    assert [name for name in known if inference_engines.wanted(name, ["llama", "bitnet_int6"])] == list(known)[1:4]


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With an engine that cannot run, in a history that compare.py reads."""
    file = tmp_path / "speed.json"
    options = ["--engines", "bitnet", "--head", "f32", "nonsense", "--history", str(tmp_path / "history")]
    assert inference.main(["--quick", *options, "--json", str(file), "--work", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "bitnet_nonsense      cannot run: " in printed
    [run] = history.read(file)
    assert run["settings"] == {"preset": "nano", "threads": 1, "prompt": 32, "gen": 8, "torch_gen": 4, "rounds": 1}
    assert list(compare.entries(run)) == ["bitnet_f32 prompt", "bitnet_f32 decode", "bitnet_f32 memory"]
    assert json.loads(file.read_text())["bitnet_f32"]["about"].startswith("bitnet ")


# ---- do the engines agree? ----


def test_transformers_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the comparison runs transformers on PyTorch")
    pytest.importorskip("transformers", minversion="5", reason="BitNet with offline quantization needs it")
    import engine_torch
    import torch

    monkeypatch.setattr(engine_torch.shutil, "which", lambda name: None)  # its rounding is not compiled
    config = inference_engines.shared(inference_check.TINY, 40)
    shape = {name: getattr(config, name) for name in [*engine_torch.FIELDS, "rope_theta"]}
    tokens = inference_engines.Tokens.draw(config, 20, 20, 20)
    threads = torch.get_num_threads()
    found = []
    for engine in (engine_torch.Torch({"shape": shape}), engine_bitnet.Bitnet({"shape": shape, "capacity": 40})):
        engine.set_threads(1)
        found.append(np.array(turns.run(engine, tokens.prompt, tokens.following, logits=True)["logits"]))
    torch.set_num_threads(threads)
    good, words = inference_check.compare(*found, *inference_check.CHECKS["transformers_bf16"][1:])
    assert good, words
    assert not inference_check.compare(found[0][::-1], *found[1:], 0.99, 1.0)[0]


def test_llama_cpp_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    if subprocess.run([LLAMA_PYTHON, "-c", "import llama_cpp, gguf"], capture_output=True, check=False).returncode:
        pytest.skip(f"{LLAMA_PYTHON} has no llama_cpp and gguf; LLAMA_PYTHON names an interpreter that does")
    status = inference_check.main(["--engines", "bitnet", "llama", "--llama-python", LLAMA_PYTHON])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.count(" agrees with ") == 3

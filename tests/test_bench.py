"""bitnet bench: what it counts, what it refuses, that its figures agree with each other; never how fast anything is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitnet import BitNetConfig, BitNetForCausalLM, _core, checkpoint, get_threads, set_threads
from bitnet.bench import RandomFactory, main, step_bytes
from bitnet.decoding import Decoder

SMALL = BitNetConfig(100, 64, 128, 2, 4, 2, max_position_embeddings=64)


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = get_threads()
    yield
    set_threads(before)


def test_bandwidth_is_a_number() -> None:
    assert 1e8 < _core.read_bandwidth(1 << 24) < 1e13
    for size in (0, (1 << 36) + 1):
        with pytest.raises(ValueError, match=f"bytes, not {size}"):
            _core.read_bandwidth(size)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_by_hand(tied: bool) -> None:
    model = BitNetForCausalLM(SMALL.replace(tie_word_embeddings=tied), factory=RandomFactory)
    ternary = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)  # layers; q, k, v, o and three of the feed-forward layer
    norms = 2 * (64 + 64 + 64 + 128) + 64
    cache = 3 * 10 * 2 * 2 * 2 * 16 * 4  # sequences, tokens, layers, keys and values, heads, channels, f32
    assert step_bytes(model, 3, 10) == ternary / 4 + 4 * (norms + 100 * 64) + cache


@pytest.mark.parametrize(
    ("head", "bits", "row"), [("bf16", 16, 0), ("int8", 8, 4), ("int6", 6, 4), ("screened", 8, 16)]
)
def test_bytes_of_other_forms(head: str, bits: int, row: int) -> None:
    model = BitNetForCausalLM(SMALL, factory=RandomFactory)
    before = step_bytes(model, 1, 10)
    ternary = sum(layer.in_features * layer.out_features for _, layer in model.bitlinears())
    model.pack("1.6", head)
    assert before - step_bytes(model, 1, 10) == pytest.approx(ternary * 0.4 / 8 + 100 * (64 * (32 - bits) / 8 - row))


def test_random_weights_are_packed_and_finite() -> None:
    model = BitNetForCausalLM(SMALL, factory=RandomFactory)
    assert all(layer.is_packed for _, layer in model.bitlinears())
    assert math.isfinite(float(Decoder(model).prefill([[1, 2, 3]]).sum()))


def test_figures_of_a_run_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = checkpoint.save(tmp_path, 1, BitNetForCausalLM(SMALL), {}, {"step": 1})
    options = ["--prompt", "9", "--gen", "5", "--batch", "2", "--rounds", "1", "--threads", "1", "--layout", "1.6",
               "--head", "screened"]  # fmt: skip
    assert main([str(run), *options, "--json", str(tmp_path / "speed.json")]) == 0
    printed = capsys.readouterr().out
    assert "prompt: " in printed
    assert "GB/s that memory gives" in printed
    found = json.loads((tmp_path / "speed.json").read_text())
    steps = found["decode_tokens_per_second"] / 2
    share = found["bytes_per_token"] * 2 * steps / found["read_bandwidth"]
    assert found["decode_bandwidth_share"] == pytest.approx(share)
    assert (found["settings"]["batch"], found["settings"]["layout"]) == (2, "1.6")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--preset nano",
        "somewhere --preset nano --random",
        "--random",
        "nowhere/at/all",
        "--preset nano --random --gen 0",
    ],
)
def test_requests_that_cannot_be_met(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr().err.startswith("error: ")

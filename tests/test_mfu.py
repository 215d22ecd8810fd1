"""Multiply-adds of a training step: by hand, from the model's own parameters, and by the paper's formula."""

from __future__ import annotations

import pytest

from bitnet import BitNetConfig, BitNetForCausalLM
from bitnet.mfu import PRECISIONS, Peak, describe, measure_peaks, mfu, training_macs

SMALL = BitNetConfig(50, 24, 40, 3, 6, 2, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("preset", "batch_size", "seq_len", "by_hand"),
    [
        # A layer: 4 x 384 x 384 + 3 x 384 x 1024 = 1,769,472. Tokens 4096. Pairs of a row 256 x 257 / 2 = 32,896.
        # Projections 2 x 1,769,472 x 4096 = 14,495,514,624; head 65 x 384 x 4096 = 102,236,160;
        # one attention product 16 x 2 x 384 x 32,896 = 404,226,048.
        ("char", 16, 256, {"int8": 14_495_514_624, "bf16": 30_914_641_920, "f32": 808_452_096}),
        # A layer: 4 x 256 x 256 + 3 x 256 x 688 = 790,528. Tokens 2048. Pairs of a row 512 x 513 / 2 = 131,328.
        # Projections 4 x 790,528 x 2048 = 6,476,005,376; head 32,000 x 256 x 2048 = 16,777,216,000;
        # one attention product 4 x 4 x 256 x 131,328 = 537,919,488.
        ("nano", 4, 512, {"int8": 6_476_005_376, "bf16": 65_435_336_704, "f32": 1_075_838_976}),
    ],
)
def test_by_hand(preset: str, batch_size: int, seq_len: int, by_hand: dict[str, int]) -> None:
    assert training_macs(BitNetConfig.preset(preset), batch_size, seq_len) == by_hand


@pytest.mark.parametrize("linear", ["bitlinear", "linear"])
@pytest.mark.parametrize("quantize_head", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_from_the_parameters_of_a_model(linear: str, quantize_head: bool, precision: str) -> None:
    config = SMALL.replace(linear=linear, quantize_head=quantize_head)
    matrices = {n: p.size for n, p in BitNetForCausalLM(config).named_parameters() if len(p.shape) == 2}
    assert matrices.pop("model.embed_tokens.weight") == 50 * 24  # looked up, not multiplied
    head = matrices.pop("lm_head.weight")
    rows, length = 3, 7
    pairs = sum(1 for query in range(length) for key in range(length) if key <= query)
    attention = rows * 3 * 6 * 4 * pairs  # layers, heads, channels of a head
    forward = {"head": head * rows * length, "projections": sum(matrices.values()) * rows * length}
    low = "f32" if precision == "fp32" else "bf16"
    ternary_dx = "int8" if precision == "int8" else low
    expected = {"int8": 0, "bf16": 0, "f32": 2 * attention}
    expected["int8" if linear == "bitlinear" else "f32"] += forward["projections"]
    expected["int8" if quantize_head else low] += forward["head"]
    expected[ternary_dx if linear == "bitlinear" else low] += forward["projections"]
    expected[ternary_dx if quantize_head else low] += forward["head"]
    expected[low] += sum(forward.values()) + 4 * attention
    assert training_macs(config, rows, length, precision) == expected


def test_flops_are_those_of_the_paper() -> None:
    """6 N + 12 L H Q T a token; a causal row of T tokens has (T + 1) / 2 keys for a query in the mean."""
    config = BitNetConfig.preset("2b-4t")
    layer = 2 * 2560 * 2560 + 2 * 2560 * 640 + 3 * 2560 * 6912
    weights = 30 * layer + 128256 * 2560
    flops_per_token = 6 * weights + 12 * 30 * 20 * 128 * (4095 + 1) // 2
    assert 2 * sum(training_macs(config, 2, 4095).values()) == flops_per_token * 2 * 4095


def test_share_of_the_peak() -> None:
    peaks = {"int8": Peak(4e12, "a"), "bf16": Peak(2e12, "b"), "f32": Peak(1e11, "c")}
    macs = {"int8": 8 * 10**9, "bf16": 6 * 10**9, "f32": 10**8}  # 2 ms, 3 ms and 1 ms at their peaks
    assert mfu(macs, peaks, 0.012) == pytest.approx(0.5)
    assert describe(peaks) == "int8 4 TMAC/s (a), bf16 2 TMAC/s (b), f32 0.1 TMAC/s (c)"
    assert measure_peaks().keys() == peaks.keys()

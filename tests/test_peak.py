"""The measured peak and the timed product: what they say of themselves, never how fast they are."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from bitnet import _core

KINDS = ("int8", "bf16", "f32")
FEATURES = "fma avx2 avxvnni avx512f avx512bw avx512dq avx512vl avx512vnni avx512vbmi avx512bf16 amx_int8 amx_bf16 "
FEATURES += "neon dotprod i8mm bf16"
PROGRAM = f"import json; from bitnet import _core; print(json.dumps({{k: _core.peak(k) for k in {KINDS}}}))"


def peaks_without(features: str) -> dict[str, list]:
    environment = os.environ | {"BITNET_DISABLE_CPU_FEATURES": features.replace(" ", ",")}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.usefixtures("threads")
def test_peaks_are_numbers_in_order() -> None:
    peaks = {kind: _core.peak(kind) for kind in KINDS}
    assert all(math.isfinite(macs) and macs > 0 and name for macs, name in peaks.values())
    # Bytes are never slower than floats; half, because another program may have the CPU meanwhile.
    assert peaks["int8"][0] > 0.5 * peaks["f32"][0]


def test_features_switched_off_are_not_measured() -> None:
    without_tiles = peaks_without("amx_int8 amx_bf16")
    assert not any(name.startswith("amx") for _, name in without_tiles.values())
    without_any = peaks_without(FEATURES)
    assert {name for _, name in without_any.values()} <= {"plain", "neon"}
    assert all(macs > 0 for macs, _ in without_any.values())


def test_peaks_from_several_threads_at_once() -> None:
    """One of them has the pool, the others run alone: none waits for ever."""
    with ThreadPoolExecutor(3) as pool:
        assert all(macs > 0 for macs, _ in pool.map(_core.peak, KINDS))


def test_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="f32, bf16 and int8, not 'int4'"):
        _core.peak("int4")


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("product", ["y", "dx", "dw"])
def test_timed_products(product: str, ternary: bool) -> None:
    in_use = _core.memory_stats()["in_use"]
    seconds = _core.time_product(product, ternary, 3, 70, 33, 4)
    assert len(seconds) == 4
    assert all(0 < s < 60 for s in seconds)
    assert _core.memory_stats()["in_use"] == in_use


@pytest.mark.parametrize("arguments", [("z", True, 1, 1, 1, 1), ("y", True, 0, 1, 1, 1), ("y", True, 1, 1, 1, 0)])
def test_products_that_cannot_be_timed(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="time_product: a product y, dx or dw"):
        _core.time_product(*arguments)

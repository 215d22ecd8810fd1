"""Devices: where tensors are made, and the one of sizes without values, whose memory cannot be touched."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import bitnet
from bitnet import _core, ops
from bitnet.decoder import Decoder


def test_a_thread_makes_tensors_where_it_says() -> None:
    seen: list[str] = []
    with ops.device("meta"):
        thread = threading.Thread(target=lambda: seen.append(bitnet.zeros((1,)).device))
        thread.start()
        thread.join()
        assert (bitnet.zeros((2,)).device, bitnet.tensor([1, 2]).device) == ("meta", "meta")
        assert bitnet.zeros((2,), device="cpu").device == "cpu"
        with ops.device("cpu"):
            assert bitnet.zeros((2,)).device == "cpu"
        with pytest.raises(MemoryError), ops.device("cpu"):
            bitnet.zeros((1 << 56,))
        assert _core.get_device() == "meta"
    assert seen == ["cpu"]
    assert bitnet.zeros((2,)).device == "cpu"
    with pytest.raises(ValueError, match="unknown device 'gpu'; one of 'cpu', 'cuda', 'meta'"), ops.device("gpu"):
        pass
    with pytest.raises(TypeError):
        _core.set_device(3)


def test_what_has_no_values_reads_as_none() -> None:
    with ops.device("meta"):
        x, i = bitnet.tensor(np.ones((2, 3))), bitnet.tensor([7])
        y = x + x
        assert y.shape == (2, 3)
        assert np.isnan(y.numpy()).all()
        assert np.isnan(ops.sum(x).item())
        assert i.item() == -1
        assert "nan" in repr(x)
    x.copy_(np.zeros((2, 3)))
    host = bitnet.zeros((2, 3))
    host.copy_(x)
    assert np.isnan(host.numpy()).all()


def test_memory_elsewhere_is_lent_to_nobody() -> None:
    x = bitnet.zeros((2,), device="meta")
    with pytest.raises(BufferError, match="this tensor lies on meta"):
        memoryview(x)
    with pytest.raises(BufferError, match="this tensor lies on meta"):
        x.__dlpack__()


def test_devices_do_not_mix() -> None:
    with pytest.raises(ValueError, match="one tensor is on meta, the other on cpu"):
        ops.add(bitnet.zeros((2,), device="meta"), bitnet.zeros((2,)))


def test_a_block_is_counted_and_given_back() -> None:
    before = _core.memory_stats("meta")
    x = bitnet.zeros((1 << 40,), device="meta")
    assert _core.memory_stats("meta")["in_use"] == before["in_use"] + (1 << 42)
    _core.memory_restart_peak("meta")
    del x
    assert _core.memory_stats("meta")["in_use"] == before["in_use"]
    assert _core.memory_stats("meta")["high_water"] == before["in_use"] + (1 << 42)
    _core.memory_trim("meta")
    _core.memory_restart_peak("meta")
    after = _core.memory_stats("meta")
    assert (after["cached"], after["high_water"]) == (0, before["in_use"])
    with pytest.raises(MemoryError):
        bitnet.zeros((1 << 52,), device="meta")


@pytest.mark.parametrize("preset", ["char", "700m", "2b-4t"])
@pytest.mark.parametrize("precision", ["fp32", "fast", "int8"])
def test_nothing_but_kernels_reads_an_element(preset: str, precision: str) -> None:
    """Its addresses cannot be touched: an op that read an element itself would end this process."""
    config = bitnet.BitNetConfig.preset(preset)
    with ops.device("meta"):
        model = bitnet.BitNetForCausalLM(config)
        optimizer = bitnet.optim.AdamW(model)
        tokens = np.zeros((2, 64), np.int32)
        with ops.precision(precision):
            for model.activation_checkpointing in (False, True):
                model(tokens, tokens).backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        decoder = Decoder(model, 2, 80)
        assert decoder.prefill([[0] * 70] * 2).shape == (2, config.vocab_size)
        assert np.isnan(decoder.step([0, 0])).all()
        decoder.step([0, 0])

"""Devices: where tensors are made, and the one of sizes without values, whose memory cannot be touched."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

import bitnet
from bitnet import _core, layout, ops
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
        assert repr(bitnet.zeros((1,))) == "Tensor([nan], shape=(1,), dtype='f32', device='meta')"
    x.copy_(np.zeros((2, 3)))
    host = bitnet.zeros((2, 3))
    host.copy_(x)
    assert np.isnan(host.numpy()).all()


def test_a_model_without_values_has_none_to_give() -> None:
    with ops.device("meta"):
        model = bitnet.BitNetForCausalLM(bitnet.BitNetConfig(257, 32, 48, 1, 2))
    with pytest.raises(TypeError, match=r"state_dict: model\.embed_tokens\.weight lies on meta and has no values"):
        model.state_dict()


def test_what_is_on_the_cpu_is_made_there_wherever_tensors_are_made() -> None:
    """The moments of an optimizer that is restored, and the trial of the layouts."""
    model = bitnet.BitNetForCausalLM(bitnet.BitNetConfig(257, 32, 48, 1, 2))
    optimizer = bitnet.optim.AdamW(model, moments="bf16")
    state = {name: np.ones_like(values) for name, values in optimizer.state_dict().items()}
    with ops.device("meta"):
        optimizer.load_state_dict(state)
    assert all((values == 1).all() for name, values in optimizer.state_dict().items() if name != "steps")
    _core.memory_restart_peak("meta")
    before = _core.memory_stats("meta")["high_water"]
    with ops.device("meta"):
        assert layout.measured_layout.__wrapped__("", 0) in layout.LAYOUTS
    assert _core.memory_stats("meta")["high_water"] == before


def test_memory_elsewhere_is_lent_to_nobody() -> None:
    x = bitnet.zeros((2,), device="meta")
    with pytest.raises(BufferError, match="this tensor lies on meta"):
        memoryview(x)
    with pytest.raises(BufferError, match="this tensor lies on meta"):
        x.__dlpack__()


def test_devices_do_not_mix() -> None:
    def there(*shape: int, dtype: str = "f32") -> bitnet.Tensor:
        return bitnet.zeros(shape, dtype, "meta")

    x, here = there(1, 4, 2, 8), bitnet.zeros
    cases: list[Callable[[], object]] = [
        lambda: ops.add(there(2), here((2,))),
        lambda: ops.mul(here((2,)), there(2)),
        lambda: ops.matmul(there(2, 2), here((2, 2))),
        lambda: ops.linear(there(2, 2), here((2, 2))),
        lambda: ops.bitlinear(here((2, 2)), there(2, 2)),
        lambda: ops.linear(here((2, 2)), here((2, 2)), there(2, 2)),
        lambda: ops.embedding(there(2, dtype="i32"), here((4, 4))),
        lambda: ops.embedding(here((2,), "i32"), there(4, 4)),
        lambda: ops.rmsnorm(there(2, 8), here((8,))),
        lambda: ops.swiglu(there(2, 8), here((2, 8))),
        lambda: ops.rope(x, here((9, 4)), here((9, 4))),
        lambda: ops.rope(here((1, 4, 2, 8)), here((9, 4)), here((9, 4)), there(1, dtype="i32")),
        lambda: ops.attention(x, here((1, 4, 2, 8)), here((1, 4, 2, 8))),
        lambda: ops.attention(here((1, 4, 2, 8)), here((2, 9, 2, 8)), here((2, 9, 2, 8)), there(1, dtype="i32")),
        lambda: ops.cache_append(x, here((2, 9, 2, 8)), here((1,), "i32")),
        lambda: ops.cross_entropy(here((2, 8)), here((5, 8)), there(2, dtype="i32")),
        lambda: ops.cross_entropy(there(2, 8), here((5, 8)), here((2,), "i32")),
        lambda: _core.flatten([here((2, 2)), there(2, 2)]),
        lambda: _core.prepare_ternary(there(2, 2, dtype="i8"), here((2,))),
        lambda: _core.prepare_ternary(here((2, 2), "i8"), there(2)),
        lambda: _core.hold_ternary_codes(here((2, 2)), there(2, 2, dtype="i8"), here((1,))),
        lambda: _core.hold_ternary_codes(here((2, 2)), here((2, 2), "i8"), there(1)),
        lambda: _core.pack_fifths(there(5, dtype="i8")),
        lambda: _core.pack_ternary(there(4, dtype="i8")),
        lambda: there(2).__dlpack_device__(),
    ]
    for case in cases:
        with bitnet.no_grad(), pytest.raises(ValueError, match="on (meta|cpu).* on (meta|cpu)"):  # noqa: RUF043
            case()
    model = bitnet.BitNetForCausalLM(bitnet.BitNetConfig.preset("char"))
    with ops.device("meta"), pytest.raises(ValueError, match="embedding: one tensor is on cpu, another on meta"):
        model(np.zeros((1, 4), np.int32))


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

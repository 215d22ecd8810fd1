"""Tensors over memory of someone else: shared, held while used, never written to where that is not allowed."""

from __future__ import annotations

import gc
import mmap
import weakref
from pathlib import Path

import numpy as np
import pytest

import bitnet
from bitnet import _core


def test_a_tensor_shares_a_buffer_and_holds_it(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32)
    shared = _core.from_buffer(values, "f32", (3, 4))
    values[5] = 50
    assert shared.numpy()[1, 1] == 50
    assert not np.shares_memory(shared.numpy(copy=True), values)
    held = weakref.ref(values)
    del values
    gc.collect()
    assert held() is not None
    del shared
    gc.collect()
    assert held() is None
    (tmp_path / "file").write_bytes(bytes(range(8)))
    with open(tmp_path / "file", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensor = _core.from_buffer(memoryview(mapped)[2:], "i8", (6,))
    with pytest.raises(BufferError):
        mapped.close()
    assert tensor.numpy().tolist() == [2, 3, 4, 5, 6, 7]


def test_bf16_and_empty_shapes() -> None:
    halves = (np.array([1.5, -2.0, 0.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert _core.from_buffer(halves, "bf16", (3,)).to("f32").numpy().tolist() == [1.5, -2.0, 0.0]
    assert _core.from_buffer(b"", "f32", (0, 7)).shape == (0, 7)


def test_read_only_memory_is_not_written_to() -> None:
    source = np.ones((2, 3), np.float32).tobytes()
    tensor = _core.from_buffer(source, "f32", (2, 3))
    with pytest.raises(RuntimeError, match=r"copy: a f32 tensor of shape \(2, 3\) lies in read-only memory"):
        tensor.copy_(np.zeros((2, 3), np.float32))
    with pytest.raises(RuntimeError, match="random values: "):
        _core.fill_normal(tensor, 0, 0, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="random values: "):
        _core.fill_uniform(tensor.detach(), 0, 0, 0.0, 1.0)
    with pytest.raises(BufferError, match="read-only"):
        tensor.__dlpack__()
    with pytest.raises(ValueError, match="read-only"):
        tensor.numpy()[0, 0] = 2
    one = _core.from_buffer(b"\0" * 4, "f32", (1,))
    with pytest.raises(RuntimeError, match="clip_grad_norm: "):
        _core.clip_grad_norm(_core.Tensor([1.0]), 1.0, one, _core.Tensor([1.0]))
    options = {"step": 1, "decay_end": 0, "lr": 1.0, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    for i in (0, 2, 3):
        parts = [_core.Tensor([1.0]) for _ in range(5)]
        parts[i] = one
        with pytest.raises(RuntimeError, match="adamw: "):
            _core.adamw(*parts, **options)
    cache, start = _core.from_buffer(b"\0" * 32, "f32", (1, 2, 1, 4)), _core.Tensor([0])
    with bitnet.no_grad(), pytest.raises(RuntimeError, match="cache_append: "):
        _core.cache_append(_core.Tensor(np.ones((1, 1, 1, 4), np.float32)), cache, start)
    assert source == np.ones((2, 3), np.float32).tobytes()


def test_a_weight_in_a_read_only_buffer_is_quantized_once_and_trains_after_flattening() -> None:
    values = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    weight = bitnet.nn.Parameter(_core.from_buffer(values.tobytes(), "f32", (8, 16)))
    layer = bitnet.nn.BitLinear(16, 8, weight=weight)
    plain = bitnet.nn.BitLinear(16, 8, weight=bitnet.nn.Parameter(values))
    x = bitnet.tensor(np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32))
    np.testing.assert_array_equal(layer(x).numpy(), plain(x).numpy())
    optimizer = bitnet.optim.AdamW(layer, lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    assert not np.array_equal(layer.weight.numpy(), values)


def test_what_a_tensor_over_a_buffer_refuses() -> None:
    data = bytearray(33)
    with pytest.raises(bitnet.ShapeError, match="the buffer has 33 bytes, which are not 9 elements of f32"):
        _core.from_buffer(data, "f32", (3, 3))
    with pytest.raises(bitnet.ShapeError, match="33 bytes"):
        _core.from_buffer(data, "f32", (2, 4))
    with pytest.raises(ValueError, match="f32 lie at multiples of 4 bytes"):
        _core.from_buffer(memoryview(data)[1:], "f32", (8,))
    for shape in [(2**62, 2**62), (-1, -32), (2**61,)]:
        with pytest.raises(bitnet.ShapeError, match=r"overflows or is negative|33 bytes"):
            _core.from_buffer(data, "f32", shape)
    with pytest.raises(TypeError, match="unknown dtype"):
        _core.from_buffer(data, "f64", (4,))
    with pytest.raises(TypeError):
        _core.from_buffer("text", "i8", (4,))
    data.append(0)  # no view was left behind

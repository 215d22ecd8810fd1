"""bitnet.Tensor at the Python edge: what goes in, what comes out, who shares memory with whom, and what is refused."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bitnet
from bitnet import ShapeError, Tensor, _core, ops
from bitnet.nn import BitLinear, Parameter


def leaf(*shape: int, grad: bool = False) -> Tensor:
    """0, 1, 2 ... in the given shape."""
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return bitnet.tensor(values, requires_grad=grad)


# ---- values in ----


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        ([1.0, 2.0], "f32", (2,)),
        ([[1, 2, 3], [4, 5, 6]], "i32", (2, 3)),
        (3, "i32", ()),
        (3.5, "f32", ()),
        ([], "f32", (0,)),
        (np.ones((2, 0, 3)), "f32", (2, 0, 3)),
        (np.ones(3, np.float64), "f32", (3,)),
        (np.ones(3, np.float16), "f32", (3,)),
        (np.ones(3, ">f4"), "f32", (3,)),
        (np.ones(3, np.int64), "i32", (3,)),
        (np.ones(3, np.uint8), "i32", (3,)),
        (np.ones(3, ">i2"), "i32", (3,)),
        (np.ones(3, np.int8), "i8", (3,)),
        (np.ones((1,) * 8, np.float32), "f32", (1,) * 8),
    ],
)
def test_dtype_and_shape_follow_the_data(data: Any, dtype: str, shape: tuple[int, ...]) -> None:
    t = bitnet.tensor(data)
    assert (t.dtype, t.shape, t.ndim, t.size) == (dtype, shape, len(shape), np.prod(shape, dtype=int))
    assert t.nbytes == t.size * {"f32": 4, "i32": 4, "i8": 1}[dtype]
    assert t.is_leaf
    assert t.device == "cpu"
    assert np.array_equal(t.numpy(), np.asarray(data))


def test_a_dtype_can_be_asked_for() -> None:
    assert bitnet.tensor([1, 2], "f32").numpy().tolist() == [1.0, 2.0]
    assert bitnet.tensor([1, 2], "i8").dtype == "i8"
    assert bitnet.tensor(np.array([-128, 127]), "i8").numpy().tolist() == [-128, 127]


@pytest.mark.parametrize(
    "view",
    [lambda a: a[::2], lambda a: a[:, ::-1], lambda a: a.T, lambda a: np.asfortranarray(a), lambda a: a[1:, 1:]],
    ids=["rows", "reversed", "transposed", "fortran", "corner"],
)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.int8])
def test_arrays_of_any_layout_are_copied_in_order(view: Callable[[Any], Any], kind: type) -> None:
    array = view(np.arange(20).reshape(4, 5).astype(kind))
    assert np.array_equal(bitnet.tensor(array).numpy(), array)


def test_float64_is_rounded_to_nearest() -> None:
    values = np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24, 0.1])
    assert np.array_equal(bitnet.tensor(values).numpy(), values.astype(np.float32))


@pytest.mark.parametrize(
    ("data", "dtype", "error", "words"),
    [
        ([2**31], None, ValueError, "2147483648 do not fit a tensor of i32"),
        ([-(2**31) - 1, 5], None, ValueError, "-2147483649 to 5 do not fit"),
        (np.array([2**63], np.uint64), None, ValueError, "9223372036854775808 do not fit a tensor of i32"),
        ([128], "i8", ValueError, "128 do not fit a tensor of i8"),
        ([1.5], "i32", TypeError, "float64.*cannot become a tensor of i32"),
        ([True], None, TypeError, "bool.*cannot become a tensor"),
        ([1j], None, TypeError, "complex128.*cannot become a tensor"),
        ("text", None, TypeError, "cannot become a tensor"),
        ([object()], None, TypeError, "cannot become a tensor"),
        ([[1], [2, 3]], None, ValueError, "inhomogeneous"),
        ([1.0], "f64", TypeError, "unknown dtype 'f64'; one of 'f32', 'bf16', 'i8', 'i32', 'ternary2'"),
        ([1], "bf16", TypeError, "NumPy has no bf16; make an f32 tensor and convert it"),
        (np.zeros((1,) * 9), None, ShapeError, "at most 8 dimensions, not 9"),
    ],
)
def test_data_that_does_not_fit_is_refused(data: Any, dtype: str | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bitnet.tensor(data, dtype)


def test_only_f32_leaves_require_gradients() -> None:
    with pytest.raises(TypeError, match="only an f32 leaf can require a gradient, not a leaf of i32"):
        bitnet.tensor([1], requires_grad=True)
    y = leaf(2, grad=True) * 2.0
    with pytest.raises(RuntimeError, match="leaves only; detach"):
        y.requires_grad = False
    with pytest.raises(RuntimeError, match="leaves only"):
        bitnet.tensor([1]).requires_grad = True


# ---- values out, and shared memory ----


def test_a_leaf_shares_its_memory_both_ways() -> None:
    t = leaf(2, 3)
    view = t.numpy()
    view[1, 2] = 50.0
    assert t.numpy()[1, 2] == 50.0
    t.copy_(np.zeros((2, 3)))
    assert view[1, 2] == 0.0
    assert np.shares_memory(np.asarray(t), view)
    assert not np.shares_memory(t.numpy(copy=True), view)


def test_the_result_of_an_op_is_copied() -> None:
    y = leaf(3, grad=True) * 2.0
    values = y.numpy()
    values[:] = -1.0
    assert y.numpy().tolist() == [0.0, 2.0, 4.0]
    assert memoryview(y).readonly
    with pytest.raises(TypeError, match="read-write"):
        io.BytesIO(bytes(12)).readinto(y)  # type: ignore[arg-type]


def test_a_view_keeps_the_memory_after_the_tensor_is_gone() -> None:
    gc.collect()
    before = bitnet.memory_stats()["in_use"]
    t = leaf(1000)
    view = t.numpy()
    del t
    other = leaf(1000) * 0.0  # would be handed the block if it had been given back
    assert view.tolist() == list(range(1000))
    del view, other
    gc.collect()
    assert bitnet.memory_stats()["in_use"] == before


def test_detach_and_reshape_share_memory() -> None:
    t = leaf(2, 3, grad=True)
    flat = t.detach()
    flat.numpy()[0, 0] = 7.0
    assert t.numpy()[0, 0] == 7.0
    assert not flat.requires_grad
    assert flat.is_leaf
    with bitnet.no_grad():
        other = t.reshape(6)
    t.copy_(np.ones((2, 3)))
    assert other.numpy().tolist() == [1.0] * 6


def test_a_tensor_of_a_tensor_is_the_same_tensor() -> None:
    t = leaf(3)
    p = Parameter(t)
    assert p.requires_grad
    assert t.requires_grad
    p.copy_([5.0, 6.0, 7.0])
    assert t.numpy().tolist() == [5.0, 6.0, 7.0]
    with pytest.raises(TypeError, match=r"the tensor is f32; convert it with .to\('i32'\)"):
        Tensor(t, "i32")


def test_item() -> None:
    assert bitnet.tensor([[2.5]]).item() == 2.5
    assert isinstance(bitnet.tensor(3).item(), int)
    assert bitnet.tensor([-3], "i8").item() == -3
    assert float(bitnet.tensor(3)) == 3.0
    with pytest.raises(ValueError, match=r"item: needs one element, the shape is \(2,\)"):
        leaf(2).item()
    with pytest.raises(TypeError, match="convert bf16 to f32 first"):
        bitnet.tensor([1.0]).to("bf16").item()


def test_copy_names_both_shapes_and_keeps_the_dtype() -> None:
    t = leaf(2, 3)
    with pytest.raises(ShapeError, match=r"copy_: shape \(3, 2\) into \(2, 3\)"):
        t.copy_(np.zeros((3, 2)))
    tokens = bitnet.tensor([1, 2])
    assert tokens.copy_(np.array([3, 4], np.int64)) is tokens
    assert tokens.numpy().tolist() == [3, 4]
    with pytest.raises(ValueError, match="do not fit"):
        tokens.copy_([0, 2**40])
    with pytest.raises(TypeError, match="cannot become a tensor of i32"):
        tokens.copy_([0.5, 1.0])
    assert tokens.numpy().tolist() == [3, 4]


def test_conversions() -> None:
    t = bitnet.tensor([1.0, -2.5, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    assert t.to("f32") is t
    half = t.to("bf16")
    assert (half.dtype, half.nbytes) == ("bf16", 8)
    assert half.to("f32").numpy().tolist() == [1.0, -2.5, 1.0, 1 + 2.0**-6]  # ties go to even
    with pytest.raises(TypeError, match="NumPy has no bf16"):
        half.numpy()
    with pytest.raises(BufferError, match="no bf16"):
        memoryview(half)
    codes = bitnet.tensor([-1, 0, 1, 1, -1], "i8")
    packed = bitnet.pack_ternary(codes)
    assert (packed.dtype, packed.nbytes, packed.shape) == ("ternary2", 2, (5,))
    assert packed.to("i8").numpy().tolist() == packed.to("f32").numpy().tolist() == [-1, 0, 1, 1, -1]
    with pytest.raises(ValueError, match="2"):
        bitnet.pack_ternary(bitnet.tensor([0, 2], "i8"))


# ---- DLPack ----


def test_dlpack_to_and_from_numpy() -> None:
    t = leaf(2, 3)
    there = np.from_dlpack(t)
    t.copy_(np.full((2, 3), 4.0))
    assert there.tolist() == [[4.0] * 3] * 2
    del t
    gc.collect()
    assert there.tolist() == [[4.0] * 3] * 2

    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    here = bitnet.from_dlpack(array)
    assert (here.dtype, here.shape) == ("i32", (2, 3))
    array[0, 0] = 9
    assert here.numpy()[0, 0] == 9
    here.numpy()[1, 1] = 8
    assert array[1, 1] == 8
    del array
    gc.collect()
    assert here.numpy().tolist() == [[9, 1, 2], [3, 8, 5]]


def test_dlpack_to_and_from_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[test]'")
    t = leaf(2, 3)
    there = torch.from_dlpack(t)
    there[0, 1] = 5.0
    assert t.numpy()[0, 1] == 5.0
    half = torch.from_dlpack(t.to("bf16"))
    assert half.dtype == torch.bfloat16
    assert half[0, 1].item() == 5.0
    source = torch.ones(4, dtype=torch.bfloat16)
    here = bitnet.from_dlpack(source)
    source[2] = 3.0
    assert here.dtype == "bf16"
    assert here.to("f32").numpy().tolist() == [1.0, 1.0, 3.0, 1.0]


def test_dlpack_refusals() -> None:
    with pytest.raises(BufferError, match=r"requires a gradient.*detach"):
        leaf(2, grad=True).__dlpack__()
    with pytest.raises(BufferError, match="no ternary2"):
        bitnet.pack_ternary(bitnet.tensor([1], "i8")).__dlpack__()
    with pytest.raises(ShapeError, match=r"dense row-major.*contiguous copy"):
        bitnet.from_dlpack(np.zeros((4, 4), np.float32)[:, ::2])
    with pytest.raises(TypeError, match=r"code 2, 64 bits.*is not f32, bf16, i8 or i32"):
        bitnet.from_dlpack(np.zeros(3))
    with pytest.raises(AttributeError):
        bitnet.from_dlpack([1.0])  # type: ignore[arg-type]


def test_a_capsule_nobody_takes_gives_the_memory_back() -> None:
    gc.collect()
    before = bitnet.memory_stats()["in_use"]
    capsule = leaf(1000).__dlpack__()
    assert bitnet.memory_stats()["in_use"] > before
    del capsule
    assert bitnet.memory_stats()["in_use"] == before


# ---- operators ----


def test_operators_compute_what_they_say() -> None:
    a, b = leaf(2, 3), bitnet.tensor([[1.0, 0.5, -1.0], [2.0, 0.0, 4.0]])
    x, y = a.numpy(), b.numpy()
    row = bitnet.tensor([10.0, 20.0, 30.0])
    cases = [
        (a + b, x + y), (a - b, x - y), (a * b, x * y), (a * 2, x * 2), (0.5 * a, 0.5 * x), (a / 4, x / 4), (-a, -x),
        (a + row, x + row.numpy()), (row + a, x + row.numpy()),
        (a @ b.transpose(), x @ y.T), (a.sum(), x.sum()), (a.mean(), x.mean()),
        (a.reshape(3, -1), x.reshape(3, 2)), (a.transpose(), x.T),
        (b.softmax(), np.exp(y) / np.exp(y).sum(-1, keepdims=True)),
    ]  # fmt: skip
    for result, expected in cases:
        assert result.shape == np.shape(expected)
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)


def test_numpy_operands_never_turn_a_tensor_into_an_array() -> None:
    """NumPy would take the tensor for an array by its buffer, and the gradient would be lost without a word."""
    t = leaf(2, grad=True)
    for two in (np.float32(2), np.float64(2), np.int64(2)):
        for product in (t * two, two * t):
            assert isinstance(product, Tensor)
            assert product.requires_grad
            assert product.numpy().tolist() == [0.0, 2.0]
    array = np.ones(2, np.float32)
    for operation in (lambda: t + array, lambda: array + t, lambda: t * array, lambda: array * t, lambda: t @ array):
        with pytest.raises(TypeError):
            operation()


@pytest.mark.parametrize(
    ("operation", "error", "words"),
    [
        (lambda t: t + 1, TypeError, "unsupported operand"),
        (lambda t: 1 / t, TypeError, "unsupported operand"),
        (lambda t: t * "2", TypeError, "unsupported operand|can't multiply"),
        (lambda t: t / 0, ZeroDivisionError, "tensor divided by zero"),
        (lambda t: t + leaf(3, 2), ShapeError, r"add.*\(2, 3\).*\(3, 2\)"),
        (lambda t: t * leaf(3), ShapeError, r"mul: shapes \(2, 3\) and \(3,\) differ"),
        (lambda t: t @ t, ShapeError, "matmul"),
        (lambda t: t @ leaf(2, 3, 2), ShapeError, r"matmul: shapes \(2, 3\) and \(2, 3, 2\) do not fit"),
        (lambda t: leaf(2, 4, 3) @ leaf(3, 3, 2), ShapeError, r"\(2, 4, 3\) and \(3, 3, 2\) do not fit"),
        (lambda t: t.reshape(4), ShapeError, "reshape.*6 elements"),
        (lambda t: t.reshape(4, 3), ShapeError, "reshape.*6 elements"),
        (lambda t: t.reshape(-1, 4), ShapeError, "reshape: 6 elements do not divide by the given 4"),
        (lambda t: t.reshape(-1, -1), ShapeError, "dimension 1 cannot be -1"),
        (lambda t: t.reshape("ab"), TypeError, "integer"),
        (lambda t: t[0], TypeError, r"no indexed views; use .numpy\(\)\[...\]"),
        (lambda t: t[0:1], TypeError, "no indexed views"),
        (lambda t: list(t), TypeError, "not iterable|no indexed views"),
        (lambda t: bool(t), TypeError, r"a tensor of shape \(2, 3\) has no truth value"),
        (lambda t: len(t.sum()), TypeError, "a scalar tensor has no length"),
        (lambda t: t.to("f64"), TypeError, "unknown dtype 'f64'"),
        (lambda t: ops.linear(t, t.numpy()), TypeError, "weight must be a bitnet.Tensor, not numpy.ndarray"),
        (lambda t: ops.linear(t, leaf(2, 4)), ShapeError, "linear: x has 3 channels, weight expects 4"),
        (lambda t: ops.linear(bitnet.tensor([[1, 2, 3]]), t), TypeError, "linear: x is i32, expected f32"),
        (lambda t: ops.zeros((2, -1)), ShapeError, "dimension 1 of a tensor is negative: -1"),
        (lambda t: ops.zeros((2**40, 2**40)), ShapeError, "overflow"),
        (lambda t: ops.zeros((2,), device="tpu"), ValueError, "unknown device 'tpu'; one of 'cpu', 'cuda'"),
    ],
)
def test_refusals_say_what_is_wrong(operation: Callable[[Tensor], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        operation(leaf(2, 3))


def test_more_memory_than_there_is() -> None:
    with pytest.raises(MemoryError, match=r"no memory for \d+ bytes"):
        ops.zeros((2**55,))
    assert leaf(2).sum().item() == 1.0


def test_repr_shows_values_shape_and_dtype() -> None:
    assert repr(bitnet.tensor([[1, 2]])) == "Tensor([[1, 2]], shape=(1, 2), dtype='i32')"
    assert repr(leaf(2, grad=True)) == "Tensor([0., 1.], shape=(2,), dtype='f32', requires_grad=True)"
    assert repr(bitnet.tensor([0.5]).to("bf16")) == "Tensor([0.5], shape=(1,), dtype='bf16')"
    assert "ternary2" in repr(bitnet.pack_ternary(bitnet.tensor([1, -1], "i8")))
    assert repr(bitnet.tensor(2.0)) == "Tensor(2., shape=(), dtype='f32')"
    assert len(repr(ops.zeros((1000, 1000)))) < 1000
    with bitnet.Tape() as tape:
        repr(bitnet.tensor([0.5]).to("bf16"))
    assert tape.ops == ["convert"]  # the conversion that was asked for, not the one that printing made


# ---- codes follow the weight ----


def ternary(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The layer's output in float64, from quant/ternary.h."""
    scale = max(float(np.abs(weight.astype(np.float64)).mean()), 1e-5)
    codes = np.clip(np.rint(weight / scale), -1, 1)
    absmax = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    return np.clip(np.rint(x * 127 / absmax), -128, 127) * (absmax / 127) @ codes.T * scale


def test_writes_through_a_view_are_never_missed() -> None:
    """A quantized copy of a weight may not outlive the values it was made from, whoever writes them and when."""
    rng = np.random.default_rng(0)
    layer = BitLinear(32, 8)
    x = rng.standard_normal((4, 32)).astype(np.float32)

    def check() -> None:
        with bitnet.no_grad():
            y = layer(bitnet.tensor(x)).numpy()
        np.testing.assert_allclose(y, ternary(layer.weight.numpy(copy=True), x), rtol=1e-5, atol=1e-5)

    check()
    view = layer.weight.numpy()
    for _ in range(3):  # the view stays alive: nobody tells when it is written
        view[:] = rng.standard_normal(view.shape)
        check()
    view[:] = rng.standard_normal(view.shape)
    del view  # the last write came before the view went
    check()
    layer.weight.numpy()[0] *= -3.0
    check()
    layer.weight.copy_(rng.standard_normal((8, 32)))
    check()
    memoryview(layer.weight).cast("B")[:4] = b"\0\0\0\0"
    check()
    alias = layer.weight.detach()
    alias.copy_(rng.standard_normal((8, 32)))
    check()
    foreign = np.from_dlpack(alias)
    alias.numpy()[:] = 1.0
    check()
    del foreign


def test_writes_to_an_activation_are_never_missed() -> None:
    rng = np.random.default_rng(1)
    layer = BitLinear(32, 8)
    x = bitnet.tensor(rng.standard_normal((4, 32)))
    weight = layer.weight.numpy(copy=True)
    with bitnet.no_grad():
        for write in (lambda v: x.copy_(v), lambda v: x.numpy().__setitem__(slice(None), v)):
            values = rng.standard_normal((4, 32)).astype(np.float32)
            write(values)
            np.testing.assert_allclose(layer(x).numpy(), ternary(weight, values), rtol=1e-5, atol=1e-5)


def test_a_parameter_with_views_cannot_move_into_a_flat_buffer() -> None:
    layer = BitLinear(4, 4)
    view = layer.weight.numpy()
    with pytest.raises(RuntimeError, match="parameter 0 has NumPy views alive"):
        bitnet.optim.AdamW(layer)
    del view
    values = layer.weight.numpy(copy=True)
    optimizer = bitnet.optim.AdamW(layer)
    assert np.array_equal(layer.weight.numpy(), values)
    layer.weight.numpy()[:] = 2.0  # the flat buffer and the parameter are one memory
    assert optimizer.flat.numpy().tolist() == [2.0] * 16
    with pytest.raises(ValueError, match="no parameters"):
        _core.flatten([])

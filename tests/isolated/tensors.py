"""Tensors of every kind made, shared, converted, printed and dropped."""

import growth
import numpy as np

import bitnet
from bitnet.nn import BitLinear, Parameter

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)


def step() -> None:
    t = bitnet.tensor(ARRAY, requires_grad=True)
    for data in ([1, 2], 3.5, ARRAY.T, ARRAY.astype(np.float64), np.int8([1, -1])):
        made = bitnet.tensor(data)
        _ = made.shape, made.dtype, made.size, made.nbytes, made.device, made.grad, made.is_leaf, repr(made)
    views = [t.numpy(), t.numpy(copy=True), np.asarray(t), memoryview(t), np.from_dlpack(t.detach())]
    alias = bitnet.from_dlpack(ARRAY)
    packed = bitnet.pack_ternary(bitnet.tensor([1, 0, -1], "i8"))
    _ = packed.to("f32"), packed.to("i8"), t.detach().to("bf16").to("f32"), repr(packed), t.__dlpack_device__()
    del views
    capsule = alias.__dlpack__()
    del capsule
    parameter = Parameter(t)
    parameter.note = [parameter]  # type: ignore[attr-defined]  # a cycle through an instance of a subclass
    parameter.copy_(ARRAY)
    _ = Parameter(parameter), t.sum().item(), float(t.mean())
    layer = BitLinear(4, 3, bias=True)
    _ = layer.ternary_stats(), layer.codes(), layer.weight_scale, layer(t.detach())


def types() -> None:
    """Heap types of the extension as bases of classes that come and go."""

    class Mine(bitnet.Tensor):
        extra = ARRAY

    mine = Mine(ARRAY)
    assert type(mine + mine) is bitnet.Tensor
    assert mine.numpy() is not None


growth.assert_none(step)
growth.assert_none(types)

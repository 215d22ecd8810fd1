"""A builder of ONNX graphs: nodes named by where they stand, constants once each, weights that are made when written.

g = Graph(opset=21)
with g.at("model"), g.at("norm"):
    y = g.add("Mul", x, g.floats(2.0))        # a node /model/norm/Mul, its result of the same name
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet.errors import ConfigError

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto, ValueInfoProto

Array = np.ndarray[Any, Any]

# Numbers of TensorProto.DataType, and how many bits an element has in raw data.
FLOAT, INT8, INT64, BOOL, BFLOAT16, INT2 = 1, 3, 7, 9, 16, 26
BITS = {FLOAT: 32, INT8: 8, INT64: 64, BOOL: 8, BFLOAT16: 16, INT2: 2}
CONSTANT = "constant."  # what the names of initializers begin with that are no weights


def require_onnx() -> None:
    """ConfigError if the package that makes nodes is not installed."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise ConfigError("ONNX files are made by the package onnx: pip install 'bitnet[onnx]'") from None


@dataclass(frozen=True)
class Weight:
    """An initializer to be: make() gives its raw data, little-endian and row by row, when its turn has come."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @property
    def bytes(self) -> int:
        """Bytes of the raw data."""
        return -(-math.prod(self.shape) * BITS[self.dtype] // 8)


class Graph:
    """Nodes, constants and weights in the order in which they were added; values are named by text."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.weights: dict[str, Weight] = {}
        self.constants: list[TensorProto] = []
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._places: list[str] = []
        self._names: dict[str, int] = {}

    @contextmanager
    def at(self, *places: str) -> Iterator[None]:
        """Nodes added inside are named below this place."""
        self._places += places
        yield
        del self._places[-len(places) :]

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node with one result; returns the result's name."""
        return self.add_named(self._name(op), op, *inputs, **attributes)

    def add_named(self, output: str, op: str, *inputs: str, **attributes: Any) -> str:
        """The same, with a result of this name."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], name="/" + output.removeprefix("/"), **attributes))
        return output

    def split(self, x: str, parts: int) -> list[str]:
        """x in equal parts along its last dimension."""
        from onnx import helper

        name = self._name("Split")
        outputs = [f"{name}:{i}" for i in range(parts)]
        self.nodes.append(helper.make_node("Split", [x], outputs, name=name, axis=-1, num_outputs=parts))
        return outputs

    def floats(self, values: Any) -> str:
        """A constant in f32."""
        return self._constant(np.asarray(values, np.float32))

    def ints(self, *values: int) -> str:
        """A constant list of int64."""
        return self._constant(np.asarray(values, np.int64))

    def scalar(self, value: int) -> str:
        """A constant int64 without dimensions."""
        return self._constant(np.asarray(value, np.int64))

    def weight(self, weight: Weight) -> str:
        """Adds a weight, once however often it is asked for."""
        self.weights.setdefault(weight.name, weight)
        return weight.name

    def input(self, name: str, dtype: int, shape: Sequence[str | int]) -> str:
        """An input of the graph; a size that is text may be any."""
        from onnx import helper

        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[str | int]) -> None:
        """Makes a value that exists an output of the graph."""
        from onnx import helper

        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def _constant(self, values: Array) -> str:
        from onnx import numpy_helper

        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._known:
            self._known[key] = f"{CONSTANT}{len(self._known)}"
            self.constants.append(numpy_helper.from_array(values, self._known[key]))
        return self._known[key]

    def _name(self, op: str) -> str:
        name = "/".join(["", *self._places, op])
        count = self._names[name] = self._names.get(name, -1) + 1
        return f"{name}_{count}" if count else name

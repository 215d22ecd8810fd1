"""Modules: parameters by name, layers by composition. Small on purpose; PyTorch users will find nothing new.

A Module finds the Parameters and Modules assigned to its attributes and names them by path, which gives the names of
published checkpoints (`model.layers.0.self_attn.q_proj.weight`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet import _core, ops
from bitnet._core import ShapeError, Tensor
from bitnet.config import SCALES
from bitnet.formats.safetensors_file import TensorPart
from bitnet.layout import choose_layout

Histogram = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


class Parameter(Tensor):
    """A leaf tensor (f32) that a Module owns and an optimizer trains."""

    def __new__(cls, data: Any) -> Parameter:
        return super().__new__(cls, data, None, True)


_seed = 0
_made = 0


def manual_seed(seed: int) -> None:
    """Restarts the sequence of initial values of layers made from now on."""
    global _seed, _made
    _seed, _made = seed, 0


def normal(shape: tuple[int, ...], std: float, seed: int | None = None, name: str | None = None) -> Parameter:
    """A parameter drawn from N(0, std^2): a function of (seed, name), or of the order of making without a name."""
    global _made
    parameter = Parameter(ops.zeros(shape))
    if name is None:
        _made += 1
        stream = _made
    else:
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    _core.fill_normal(parameter, _seed if seed is None else seed, stream, 0.0, std)
    return parameter


class Module:
    """Base of all layers: assign Parameters and Modules to attributes, define forward()."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def children(self) -> Iterator[tuple[str, Module]]:
        """Direct submodules by attribute name."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it by dotted path."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters by dotted path, each once: a shared one under its first name."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def parameters(self) -> Iterator[Parameter]:
        """All parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.size for parameter in self.parameters())

    def zero_grad(self) -> None:
        """Makes every gradient zero."""
        _core.zero_grad(list(self.parameters()))

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Copies of all parameters as f32 arrays by name. TypeError for a packed layer, and on meta."""
        return {part.name: np.array(part.make()) for part in self.parts()}

    def parts(self) -> list[TensorPart]:
        """What state_dict() gives, for a file: each tensor is a view of the parameter, taken when its turn has come."""
        for path, module in self.named_modules():
            weight = vars(module).get("weight")
            if isinstance(weight, Tensor) and weight.dtype != "f32":
                raise TypeError(f"state_dict: {path or 'this layer'} is packed and has no latent weights to give")
        for name, parameter in self.named_parameters():
            if parameter.device == "meta":
                raise TypeError(f"state_dict: {name} lies on meta and has no values to give")
        return [TensorPart(name, "F32", weight.shape, weight.numpy) for name, weight in self.named_parameters()]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets all parameters. Every name must match and every shape; nothing is changed otherwise."""
        own = dict(self.named_parameters())
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise KeyError(
                f"load_state_dict: missing {missing[:5]} ({len(missing)}), unknown {unknown[:5]} ({len(unknown)})"
            )
        for name, parameter in own.items():
            shape = tuple(np.shape(state[name]))
            if shape != parameter.shape:
                raise ShapeError(f"load_state_dict: {name} has shape {parameter.shape}, the state has {shape}")
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def bitlinears(self) -> Iterator[tuple[str, BitLinear]]:
        """All ternary layers by dotted path."""
        return ((path, module) for path, module in self.named_modules() if isinstance(module, BitLinear))

    def num_ternary(self) -> int:
        """How many weights are ternary."""
        return sum(layer.in_features * layer.out_features for _, layer in self.bitlinears())

    def ternary_stats(self) -> TernaryStats:
        """Code counts of all ternary layers together (for one layer: BitLinear.ternary_stats)."""
        return TernaryStats.total(layer.ternary_stats() for _, layer in self.bitlinears())

    def weight_histograms(self, bins: int = 100) -> dict[str, Histogram]:
        """(counts, edges) of the latent weights of every ternary layer, by dotted path."""
        return {path: layer.weight_histogram(bins) for path, layer in self.bitlinears()}

    def to_full_precision(self) -> Module:
        """Replaces, in place, every BitLinear below by a Linear with the weights that it multiplied; returns self.

        The result computes with float activations: it differs from the ternary model by their quantization only.
        """
        for _, module in list(self.named_modules()):
            for name, child in list(module.children()):
                if isinstance(child, BitLinear):
                    setattr(module, name, child.to_full_precision())
        return self

    def pack(self, layout: str = "auto") -> Module:
        """Packs every BitLinear below, in place, for inference alone (BitLinear.pack); returns self.

        layout: "2" or "1.6" bits a weight, or "auto", which tries both on this machine if the model is large.
        """
        chosen = choose_layout(self.num_ternary(), layout)
        for _, layer in self.bitlinears():
            layer.pack(chosen)
        return self

    def extra_repr(self) -> str:
        """What the layer's own line says in repr()."""
        return ""

    def __repr__(self) -> str:
        lines = [f"  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.children()]
        head = f"{type(self).__name__}({self.extra_repr()}"
        return head + ("\n" + "\n".join(lines) + "\n)" if lines else ")")

    def _repr_html_(self) -> str:
        from bitnet.display import module_html

        return module_html(self)


class ModuleList(Module):
    """Modules by number."""

    def __init__(self, modules: Iterable[Module]) -> None:
        for i, module in enumerate(modules):
            setattr(self, str(i), module)

    def __iter__(self) -> Iterator[Module]:
        return (module for _, module in self.children())

    def __getitem__(self, index: int) -> Module:
        return list(self)[index]

    def __len__(self) -> int:
        return sum(1 for _ in self.children())


@dataclass(frozen=True)
class TernaryStats:
    """How many codes are -1, 0, +1, and how many the last requantization changed (0 for a fresh layer)."""

    minus: int
    zero: int
    plus: int
    flipped: int

    @property
    def count(self) -> int:
        """Codes in all."""
        return self.minus + self.zero + self.plus

    @property
    def zero_share(self) -> float:
        """Share of codes that are 0."""
        return self.zero / max(self.count, 1)

    @property
    def flip_share(self) -> float:
        """Share of codes that the last requantization changed."""
        return self.flipped / max(self.count, 1)

    @property
    def entropy(self) -> float:
        """Bits per weight of the code distribution: at most log2(3) = 1.585."""
        shares = [n / self.count for n in (self.minus, self.zero, self.plus) if n]
        return abs(sum(share * math.log2(share) for share in shares))

    def _repr_html_(self) -> str:
        from bitnet.display import stats_html

        return stats_html(self)

    @staticmethod
    def total(parts: Iterable[TernaryStats]) -> TernaryStats:
        """Sum of counts."""
        sums = [0, 0, 0, 0]
        for part in parts:
            for i, n in enumerate((part.minus, part.zero, part.plus, part.flipped)):
                sums[i] += n
        return TernaryStats(*sums)


class Linear(Module):
    """y = x W^T (+ bias), W (out_features, in_features) f32; initial values N(0, 1 / in_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, weight: Tensor | None = None) -> None:
        if min(in_features, out_features) < 1:
            raise ShapeError(
                f"{type(self).__name__}: {in_features} inputs and {out_features} outputs; both are at least 1"
            )
        self.in_features, self.out_features = in_features, out_features
        self.weight: Tensor = normal((out_features, in_features), in_features**-0.5) if weight is None else weight
        self.bias = Parameter(ops.zeros((out_features,))) if bias else None

    def _map(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, residual)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., in_features) -> (..., out_features), plus residual."""
        y = self._map(x, residual)
        return y if self.bias is None else ops.add(y, self.bias)

    @property
    def reads_int8(self) -> bool:
        """Whether all it needs of x is the int8 form (q8)."""
        return False

    def weight_histogram(self, bins: int = 100) -> Histogram:
        """(counts, edges) of the weight's values, as numpy.histogram."""
        return np.histogram(self.weight.numpy(copy=True), bins)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}" + (", bias" if self.bias is not None else "")


class BitLinear(Linear):
    """A Linear with ternary weights and int8 activations: a drop-in that trains by straight-through gradients.

    `weight` is the latent f32 matrix; its codes are clamp(round(weight / mean|weight|), -1, 1). activation_bits 4: each
    row of x is rounded to [-8, 7] instead of int8; ValueError for anything but 8 and 4. weight_scales "channel" takes
    the mean of each row (output) instead of one for all; a packed weight has what it was made with.
    Source: Ma et al. 2024, arXiv 2402.17764, eq. 1-3.
    """

    ternary_share = 1.0  # below 1, the result is a blend with that of a Linear with the latent weight: bitnet/ramp.py

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, weight: Tensor | None = None,
        activation_bits: int = 8, weight_scales: str = "tensor",
    ) -> None:  # fmt: skip
        if activation_bits not in (8, 4):
            raise ValueError(f"{type(self).__name__}: activation_bits is {activation_bits}; it is 8 or 4")
        if weight_scales not in SCALES:
            raise ValueError(f"weight_scales of a BitLinear must be one of {SCALES}, not {weight_scales!r}")
        super().__init__(in_features, out_features, bias, weight)
        self.activation_bits = activation_bits
        if weight_scales == "channel" and self.weight.dtype == "f32":
            _core.scale_channels(self.weight)

    def _map(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.bitlinear(x, self.weight, residual, self.activation_bits)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., in_features) -> (..., out_features), plus residual."""
        share = self.ternary_share
        if share == 1.0:
            return super().forward(x, residual)
        y = ops.linear(x, self.weight)
        if share > 0.0:
            y = _core.add(y, self._map(x), 1.0 - share, share)
        y = y if self.bias is None else ops.add(y, self.bias)
        return y if residual is None else ops.add(y, residual)

    @property
    def reads_int8(self) -> bool:
        """Whether all it needs of x is the int8 form (q8), which norms and gates make in 8 bits."""
        return self.ternary_share == 1.0 and self.activation_bits == 8

    def ternary_stats(self) -> TernaryStats:
        """Counts of the present codes."""
        return TernaryStats(*_core.ternary_stats(self.weight)[:4])

    @property
    def weight_scale(self) -> float:
        """mean|weight|: weight is about code * weight_scale. Of channel scales, their mean."""
        return _core.ternary_stats(self.weight)[4]

    @property
    def has_channel_scales(self) -> bool:
        """Whether each row of the weight has a scale of its own."""
        return _core.has_channel_scales(self.weight)

    def scales(self) -> Tensor:
        """What rows of codes are multiplied by, f32: (1,) for all, or (out_features,) with channel scales."""
        return _core.ternary_scales(self.weight)

    def codes(self) -> Tensor:
        """The ternary codes, i8 (out_features, in_features)."""
        return _core.ternary_codes(self.weight)

    @property
    def is_packed(self) -> bool:
        """Whether pack() was called."""
        return _core.ternary_layout(self.weight) is not None

    def pack(self, layout: str = "2") -> BitLinear:
        """Keeps, of the weight, the codes in 2 or 1.6 bits each and the scale or scales: the same results.

        The layer cannot be trained any more, and its weight is no Parameter: state_dict() refuses. Returns self.
        """
        if _core.ternary_layout(self.weight) != layout:
            scale = self.scales() if self.has_channel_scales else self.weight_scale
            self.weight = _core.prepare_ternary(self.codes(), scale, layout)
        return self

    def to_full_precision(self) -> Linear:
        """A Linear with the weights this layer multiplies, code * its scale (not the latent ones)."""
        weight = Parameter(self.codes().numpy() * self.scales().numpy()[:, None])
        linear = Linear(self.in_features, self.out_features, weight=weight)
        linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        text = super().extra_repr() + (", 4-bit activations" if self.activation_bits == 4 else "")
        return text + (", channel scales" if self.has_channel_scales else "")


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        self.eps = eps
        self.weight = Parameter(np.ones(hidden_size, np.float32))

    def forward(self, x: Tensor, quantized: bool = False) -> Tensor:
        """x (..., hidden_size), same shape back; quantized: as q8, for BitLinears alone to read."""
        return ops.rmsnorm(x, self.weight, self.eps, quantized)

    def extra_repr(self) -> str:
        return f"{self.weight.size}, eps={self.eps:g}"


class Embedding(Module):
    """Rows of a table (num_embeddings, embedding_dim); initial values N(0, 1)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, weight: Tensor | None = None) -> None:
        self.weight: Tensor = normal((num_embeddings, embedding_dim), 1.0) if weight is None else weight

    def forward(self, tokens: ops.Integers) -> Tensor:
        """tokens (...) integers -> (..., embedding_dim)."""
        return ops.embedding(tokens, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"

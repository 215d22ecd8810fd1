"""The same ops in PyTorch, one line each, for autograd to check the references and the project's ops against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_bitnet import FakeQuantInput, FakeQuantWeight, hadamard


def rope(x: Tensor, cos: Tensor, sin: Tensor, start: Tensor | None = None) -> Tensor:
    first = torch.zeros(x.shape[0], dtype=torch.long) if start is None else start.long()
    position = first[:, None] + torch.arange(x.shape[1])
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.complex(cos, sin)[position][:, :, None]
    return torch.cat((turned.real, turned.imag), -1)


def attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None) -> Tensor:
    first = torch.zeros(q.shape[0], dtype=torch.long) if start is None else start.long()
    seen = torch.arange(k.shape[1]) <= (first[:, None] + torch.arange(q.shape[1]))[..., None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True).transpose(1, 2)


def rmsnorm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).flatten(0, -2), targets.flatten().long())


OPS = {
    "embedding": lambda tokens, weight: F.embedding(tokens.long(), weight),
    "linear": F.linear,
    "bitlinear": lambda x, weight: F.linear(FakeQuantInput.apply(x), FakeQuantWeight.apply(weight)),
    "matmul": torch.matmul,
    "rmsnorm": rmsnorm,
    "hadamard": hadamard,
    "rope": rope,
    "softmax": lambda x: torch.softmax(x, -1),
    "attention": attention,
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "relu2": lambda gate, up: F.relu(gate).square() * up,
    "add": torch.add,
    "mul": torch.mul,
    "sum": torch.sum,
    "mean": torch.mean,
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x: x.mT,
    "cross_entropy": cross_entropy,
}

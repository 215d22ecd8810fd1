"""An independent BitNet b1.58 in PyTorch: the second opinion of the tests and the opponent of the benchmarks.

Written from the published equations: online fake quantization with straight-through gradients, RMSNorm, half-split
RoPE, grouped-query attention, SwiGLU or squared ReLU, each norm optional, tied or untied head. Parameter names are
those of transformers' BitNetForCausalLM. `config` is anything with BitNetConfig's fields. Runs in float32 or float64;
nothing is slower than PyTorch makes it (fused attention and cross entropy, rotation tables computed once), so that it
can also be timed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FakeQuantWeight(torch.autograd.Function):
    """w -> code * scale in eq. 1-2 of arXiv 2402.17764; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        s = 1.0 / w.abs().mean().clamp(min=1e-5)
        return (w * s).round().clamp(-1, 1) / s

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class FakeQuantInput(torch.autograd.Function):
    """x -> q / a per row, a = most / absmax, most 127 or 7; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float = 127.0) -> Tensor:
        a = most / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return (x * a).round().clamp(-most - 1, most) / a

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class BitLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, bits: int = 8) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.most = 2.0 ** (bits - 1) - 1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(FakeQuantInput.apply(x, self.most), FakeQuantWeight.apply(self.weight))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def norm(config: Any, wanted: bool, size: int) -> nn.Module:
    return RMSNorm(size, config.rms_norm_eps) if wanted else nn.Identity()


def inner_norm(config: Any, x: Tensor) -> Tensor:
    """use_rms_norm: a norm without gain inside every projection; those that share an input share it."""
    return F.rms_norm(x, x.shape[-1:], None, config.rms_norm_eps) if config.use_rms_norm else x


def projection(config: Any, inputs: int, outputs: int) -> nn.Linear:
    if config.linear == "bitlinear":
        return BitLinear(inputs, outputs, config.activation_bits)
    return nn.Linear(inputs, outputs, bias=False)


def hadamard(x: Tensor) -> Tensor:
    """Blocks of the largest power of two that divides the channels, each times H = [[1, 1], [1, -1]]^(k) / sqrt(n)."""
    n = x.shape[-1] & -x.shape[-1]
    h = torch.ones(1, 1, dtype=x.dtype)
    while h.shape[0] < n:
        h = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=x.dtype), h)
    return (x.unflatten(-1, (-1, n)) @ h / n**0.5).flatten(-2)


def before_last(config: Any, x: Tensor) -> Tensor:
    """What o_proj and down_proj read of x."""
    x = inner_norm(config, x)
    return hadamard(x) if config.hadamard else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, H, T, D); cos, sin: (T, D)."""
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, x1), -1) * sin


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.dim = width // config.num_attention_heads
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.q_proj = projection(config, width, width)
        self.k_proj = projection(config, width, config.num_key_value_heads * self.dim)
        self.v_proj = projection(config, width, config.num_key_value_heads * self.dim)
        self.o_proj = projection(config, width, width)
        self.attn_sub_norm = norm(config, config.sub_norms, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = inner_norm(self.config, x)
        q, k, v = (p(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        o = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=self.grouped
        )
        return self.o_proj(before_last(self.config, self.attn_sub_norm(o.transpose(1, 2).flatten(2))))


class FeedForward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width, inner = config, config.hidden_size, config.intermediate_size
        self.gate_proj = projection(config, width, inner)
        self.up_proj = projection(config, width, inner)
        self.down_proj = projection(config, inner, width)
        self.ffn_sub_norm = norm(config, config.sub_norms, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = inner_norm(self.config, x)
        gate = self.gate_proj(x)
        activated = F.relu(gate).square() if self.config.hidden_act == "relu2" else F.silu(gate)
        return self.down_proj(before_last(self.config, self.ffn_sub_norm(activated * self.up_proj(x))))


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = norm(config, config.input_norms, config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm(config, config.input_norms, config.hidden_size)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dim = config.hidden_size // config.num_attention_heads
        frequency = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float64), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angle.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class TorchBitNet(nn.Module):
    """tokens (B, T) -> logits (B, T, V), or with targets (B, T) the mean loss over those that are not -100."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = Decoder(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.config = config
        for name, p in self.named_parameters():
            if not name.endswith("norm.weight"):
                nn.init.normal_(p, std=config.initializer_range)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.model(tokens)
        head = (self.lm_head or self.model.embed_tokens).weight
        if self.config.quantize_head:
            x, head = FakeQuantInput.apply(inner_norm(self.config, x)), FakeQuantWeight.apply(head)
        logits = F.linear(x, head)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.1, **options: Any) -> torch.optim.AdamW:
    """AdamW as BitNet models are trained: decay on matrices only, betas (0.9, 0.95)."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, **options)

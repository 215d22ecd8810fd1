"""The model, top to bottom: what a block computes, in its order, with the names of published checkpoints.

    x = x + o_proj(sub_norm(attention(rope(q_proj(h)), rope(k_proj(h)), v_proj(h))))     h = input_layernorm(x)
    x = x + down_proj(sub_norm(act(gate_proj(h)) * up_proj(h)))                          h = post_attention_layernorm(x)

Every *_proj is a BitLinear, or a Linear in the full-precision twin. With config.hadamard, o_proj and down_proj read the
Hadamard transform of what stands here (Wang et al. 2025, BitNet v2, arXiv 2504.18415). Shapes: B batch, T time, C
hidden_size, H heads, KV key/value heads, D head size, F intermediate_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet import _core, nn, ops
from bitnet._core import ShapeError, Tensor
from bitnet.cache import CacheStep
from bitnet.config import BitNetConfig
from bitnet.head import Head

if TYPE_CHECKING:
    from bitnet.lora import LoraConfig


class Factory:
    """Makes the parts of one model: each parameter's initial values are a function of (seed, its name)."""

    def __init__(self, config: BitNetConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def matrix(self, name: str, rows: int, cols: int) -> Tensor:
        """N(0, initializer_range^2)."""
        return nn.normal((rows, cols), self.config.initializer_range, self.seed, f"{name}.weight")

    def projection(self, name: str, in_features: int, out_features: int) -> nn.Linear:
        """A ternary layer, or a plain one in the twin."""
        weight = self.matrix(name, out_features, in_features)
        c = self.config
        if c.linear == "linear":
            return nn.Linear(in_features, out_features, weight=weight)
        return nn.BitLinear(
            in_features, out_features, weight=weight, activation_bits=c.activation_bits, weight_scales=c.weight_scales
        )

    def norm(self, wanted: bool, size: int) -> nn.RMSNorm | None:
        """A norm where the config places one."""
        return nn.RMSNorm(size, self.config.rms_norm_eps) if wanted else None


class Rope:
    """Rotary tables for max_position_embeddings positions."""

    def __init__(self, config: BitNetConfig) -> None:
        self.cos, self.sin = ops.rope_tables(config.max_position_embeddings, config.head_dim, config.rope_theta)

    def __call__(self, x: Tensor, start: Tensor | None) -> Tensor:
        return ops.rope(x, self.cos, self.sin, start)


def projection_input(
    config: BitNetConfig, norm: nn.RMSNorm | None, x: Tensor, *readers: nn.Linear, hadamard: bool = False
) -> Tensor:
    """x as the projections that share it read it: after `norm`, the norm without gain inside them (use_rms_norm), and
    with `hadamard` the transform.

    The last norm before ternary projections goes straight to int8 if nothing else reads its result.
    """
    quantized = not hadamard and all(layer.reads_int8 for layer in readers)
    if norm is not None:
        x = norm(x, quantized=quantized and not config.use_rms_norm)
    if config.use_rms_norm:
        x = ops.rmsnorm(x, None, config.rms_norm_eps, quantized)
    return ops.hadamard(x) if hadamard else x


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    watcher: Callable[[Tensor, Tensor, Tensor], None] | None = None  # gets q, k, v at each pass, before rope

    def __init__(self, make: Factory, name: str) -> None:
        c = make.config
        self.config = c
        kv = c.kv_heads * c.head_dim
        self.q_proj = make.projection(f"{name}.q_proj", c.hidden_size, c.hidden_size)
        self.k_proj = make.projection(f"{name}.k_proj", c.hidden_size, kv)
        self.v_proj = make.projection(f"{name}.v_proj", c.hidden_size, kv)
        self.o_proj = make.projection(f"{name}.o_proj", c.hidden_size, c.hidden_size)
        self.attn_sub_norm = make.norm(c.sub_norms, c.hidden_size)

    def forward(self, x: Tensor, residual: Tensor, rope: Rope, cache: CacheStep | None, layer: int) -> Tensor:
        """x, residual (B, T, C) -> residual plus attention over x."""
        batch, time, _ = x.shape
        c, d = self.config, self.config.head_dim
        q = self.q_proj(x).reshape(batch, time, -1, d)
        k = self.k_proj(x).reshape(batch, time, -1, d)
        v = self.v_proj(x).reshape(batch, time, -1, d)
        if self.watcher is not None:
            self.watcher(q, k, v)
        start = None if cache is None else cache.start
        q, k = rope(q, start), rope(k, start)
        out = ops.attention(q, k, v) if cache is None else cache.attention(layer, q, k, v)
        out = out.reshape(batch, time, -1)
        out = projection_input(c, self.attn_sub_norm, out, self.o_proj, hadamard=c.hadamard)
        return self.o_proj(out, residual)


class FeedForward(nn.Module):
    """down_proj(sub_norm(act(gate_proj(x)) * up_proj(x)))."""

    def __init__(self, make: Factory, name: str) -> None:
        c = make.config
        self.config = c
        self.gate_proj = make.projection(f"{name}.gate_proj", c.hidden_size, c.intermediate_size)
        self.up_proj = make.projection(f"{name}.up_proj", c.hidden_size, c.intermediate_size)
        self.down_proj = make.projection(f"{name}.down_proj", c.intermediate_size, c.hidden_size)
        self.ffn_sub_norm = make.norm(c.sub_norms, c.intermediate_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual (B, T, C) -> residual plus the feed-forward layer of x."""
        c = self.config
        gate = ops.relu2 if c.hidden_act == "relu2" else ops.swiglu
        last = self.ffn_sub_norm is None and not c.use_rms_norm and not c.hadamard  # before down_proj
        hidden = gate(self.gate_proj(x), self.up_proj(x), quantized=last and self.down_proj.reads_int8)
        hidden = projection_input(c, self.ffn_sub_norm, hidden, self.down_proj, hadamard=c.hadamard)
        return self.down_proj(hidden, residual)


class Block(nn.Module):
    """Attention and feed-forward, each around a residual."""

    def __init__(self, make: Factory, name: str) -> None:
        c = make.config
        self.config = c
        self.input_layernorm = make.norm(c.input_norms, c.hidden_size)
        self.self_attn = Attention(make, f"{name}.self_attn")
        self.post_attention_layernorm = make.norm(c.input_norms, c.hidden_size)
        self.mlp = FeedForward(make, f"{name}.mlp")

    def forward(self, x: Tensor, rope: Rope, cache: CacheStep | None, layer: int) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        c, attention, mlp = self.config, self.self_attn, self.mlp
        h = projection_input(c, self.input_layernorm, x, attention.q_proj, attention.k_proj, attention.v_proj)
        x = attention(h, x, rope, cache, layer)
        h = projection_input(c, self.post_attention_layernorm, x, mlp.gate_proj, mlp.up_proj)
        return mlp(h, x)


class BitNetModel(nn.Module):
    """Embedding, blocks, final norm: tokens (B, T) -> hidden states (B, T, C)."""

    activation_checkpointing = False  # keep each block's input only, and make the rest again for the backward pass

    def __init__(self, make: Factory) -> None:
        c = make.config
        table = make.matrix("model.embed_tokens", c.vocab_size, c.hidden_size)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, table)
        self.layers = nn.ModuleList(Block(make, f"model.layers.{i}") for i in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.rope = Rope(c)

    def forward(self, tokens: ops.Integers, cache: CacheStep | None = None) -> Tensor:
        """tokens (B, T) -> (B, T, C)."""
        x: Tensor = self.embed_tokens(tokens)
        if len(x.shape) != 3:
            raise ShapeError(f"tokens must have shape (B, T), not {x.shape[:-1]}")
        dropping = self.activation_checkpointing and cache is None
        for i, block in enumerate(self.layers):
            with ops.segment() if dropping else nullcontext():
                x = block(x, self.rope, cache, i)
        return self.norm(x)


class BitNetForCausalLM(nn.Module):
    """A language model: model(tokens) gives logits (B, T, V), model(tokens, targets) the mean loss in nats.

    tokens, targets: integers (B, T), targets already shifted by one, -100 where no loss is wanted. Initial weights are
    a function of (config, seed), and of the factory that makes the parts.
    """

    def __init__(
        self, config: BitNetConfig, seed: int = 0, factory: Callable[[BitNetConfig, int], Factory] = Factory
    ) -> None:
        self.config = config
        make = factory(config, seed)
        self.model = BitNetModel(make)
        self.lora: LoraConfig | None = None  # of the adapters, after add_lora()
        self.head: Head | None = None  # another form of the output matrix, after pack()
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            weight = make.matrix("lm_head", config.vocab_size, config.hidden_size)
            layer = nn.BitLinear if config.quantize_head else nn.Linear
            self.lm_head = layer(config.hidden_size, config.vocab_size, weight=weight)
        # A packed one has what it was made with.
        if config.quantize_head and config.weight_scales == "channel" and self.head_weight.dtype == "f32":
            _core.scale_channels(self.head_weight)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether backward() makes each block's results again instead of keeping them: less memory, the same bits.

        The model does not depend on it, so it can be set at any time and is in no checkpoint.
        """
        return self.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, wanted: bool) -> None:
        self.model.activation_checkpointing = wanted

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, C): lm_head's, or the embedding's where they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def pack(self, layout: str = "auto", head: str | None = None) -> BitNetForCausalLM:
        """Packs the ternary layers (Module.pack) and gives the output head a form of bitnet.head; returns self.

        None keeps the head as it is: f32, with the logits of training, bit for bit, or bf16 in a file that has it so.
        In every form but f32 the matrix is rounded to bf16 first, with the embedding where they are tied. ValueError
        for a form that the head cannot have.
        """
        super().pack(layout)
        if self.config.quantize_head:
            if head is not None:
                raise ValueError(f"this model's head is ternary: it has no form {head}")
        else:
            self.head = Head(self.head_weight, head or self.head_weight.dtype)
            owner = self.model.embed_tokens if self.lm_head is None else self.lm_head
            owner.weight = self.head.exact
        _core.memory_trim()  # the latent weights' memory has no further use
        return self

    def add_lora(
        self, rank: int = 8, alpha: float | None = None, targets: Sequence[str] | None = None, *,
        norms: bool = False, seed: int = 0,
    ) -> BitNetForCausalLM:  # fmt: skip
        """Freezes the model and puts trainable low-rank adapters beside its ternary layers (bitnet.lora); returns self.

        alpha: twice the rank by default; targets: last names of layers, by default every projection; norms: train their
        gains too. ConfigError for what cannot be.
        """
        from bitnet import lora

        path = getattr(self, "checkpoint", None)
        base = None if path is None else str(Path(path).resolve())
        lora.add_lora(self, lora.LoraConfig.chosen(rank, alpha, targets, norms, base), seed)
        return self

    def head_input(self, tokens: ops.Integers, cache: CacheStep | None = None) -> Tensor:
        """What the output head reads: hidden states after the final norm, (B, T, C)."""
        hidden: Tensor = self.model(tokens, cache)
        c = self.config
        inner = c.quantize_head and c.use_rms_norm
        return ops.rmsnorm(hidden, None, c.rms_norm_eps) if inner else hidden

    def logits(self, hidden: Tensor, top: int | None = None) -> Tensor:
        """hidden (..., C) -> (..., V). top: a screened head may give -infinity but for each row's `top` largest."""
        if self.head is not None:
            return self.head.logits(hidden, top)
        head = ops.bitlinear if self.config.quantize_head else ops.linear
        return head(hidden, self.head_weight)

    def forward(
        self, tokens: ops.Integers, targets: ops.Integers | None = None, cache: CacheStep | None = None
    ) -> Tensor:
        """Logits (B, T, V), or with targets the mean loss, a scalar in nats."""
        hidden = self.head_input(tokens, cache)
        if targets is None:
            return self.logits(hidden)
        return ops.cross_entropy(hidden, self.head_weight, targets, self.config.quantize_head)

    def generate(self, prompt: str | Sequence[int], max_new_tokens: int = 200, **options: Any) -> str:
        """The text that continues a prompt; options and defaults are those of bitnet.decoding.generate."""
        from bitnet.decoding import generate

        return generate(self, prompt, max_new_tokens, **options)

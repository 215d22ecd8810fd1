"""A model as an ONNX graph: what bitnet/model.py computes, in the operators of ONNX and in the same order of roundings.

A ternary layer is exact integers through MatMulInteger. Given the same x it yields the very bits of ours: every
operator between x and y is one IEEE operation, or a maximum, in the order that csrc/kernels/kernels.h states. What
may differ in the last bits lies outside: the order of the sums in RMSNorm, attention and float products, exp and
sigmoid, and a fused multiply-add in rope.

A ternary weight is int8 or INT2, turned to (in, out) as MatMulInteger reads it, with its scale beside it; a float one
is (out, in) as published, bf16 where that loses nothing. Every initializer that is a weight has its published name.

Shapes: B batch, T time, P positions in the past, S = P + T, C, H, KV, D, F, V as in model.py, G = H / KV.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bitnet import nn, ops
from bitnet._core import Tensor
from bitnet.formats.onnx_graph import BFLOAT16, BOOL, FLOAT, INT2, INT8, INT64, Graph, Weight
from bitnet.formats.source import Codes
from bitnet.formats.weights import bf16_bits, codes_of, floats_of, is_bf16
from bitnet.model import Attention, BitNetForCausalLM, Block, FeedForward

Array = np.ndarray[Any, Any]
TERNARY = {"int8": INT8, "int2": INT2}
SCALE = "_scale"  # follows the name of a ternary weight in that of its scale
OPSET, OPSET_INT2 = 21, 25  # INT2 came with 25
EPS = 1e-5  # BN_QUANT_EPS: the least absmax
# The four numbers of each byte of INT2, as bytes of one word: shifted to the top of an int8, and down with its sign.
_SIGNED = (np.arange(256, dtype=np.uint8)[:, None] << np.array([6, 4, 2, 0], np.uint8)).view(np.int8) >> 6
FOUR_OF_A_BYTE = np.ascontiguousarray(_SIGNED).view(np.uint32).reshape(-1)
BAND = 1 << 20  # elements of a bf16 matrix that are f32 at a time


# ---- weights --------------------------------------------------------------------------------------------------------


def pack_int2(codes: Array) -> Array:
    """Codes -1, 0, 1 of any shape -> four to a byte in two's complement, the first lowest, zeros at the end."""
    flat = codes.reshape(-1)
    if flat.size % 4:
        flat = np.pad(flat, (0, -flat.size % 4))
    words = flat.view("<u4") & np.uint32(0x03030303)
    words |= words >> 6
    words |= words >> 12
    return words.astype(np.uint8)


def unpack_int2(packed: Array, count: int) -> Array:
    """The first `count` numbers -2..1 of pack_int2's bytes, int8."""
    four: Array = FOUR_OF_A_BYTE[packed].view(np.int8)
    return four[:count]


def turned(codes: Array) -> Array:
    """Columns as rows, a copy: in bands of 64, a cache line of the result, which takes a tenth of the time."""
    rows, cols = codes.shape
    out = np.empty((cols, rows), codes.dtype)
    for band in range(0, rows, 64):
        out[:, band : band + 64] = codes[band : band + 64].T
    return out


def ternary_weight(name: str, shape: tuple[int, int], dtype: int, read: Callable[[], Codes]) -> list[Weight]:
    """The initializers of a ternary matrix (out, in): codes (in, out), then the scale, which read() gives with them."""
    scales: list[float] = []

    def codes() -> Array:
        found = read()
        scales[:] = [float(found.scale)]
        return pack_int2(turned(found.codes)) if dtype == INT2 else turned(found.codes)

    def scale() -> Array:
        return np.array(scales.pop() if scales else read().scale, np.float32)

    return [Weight(name, dtype, shape[::-1], codes), Weight(name + SCALE, FLOAT, (), scale)]


def float_weight(name: str, weight: Tensor) -> Weight:
    """The initializer of a float tensor: a matrix in bf16 where that loses nothing, else f32."""
    if len(weight.shape) == 2 and (weight.dtype == "bf16" or is_bf16(floats_of(weight))):
        return Weight(name, BFLOAT16, weight.shape, lambda: _bf16(weight))
    return Weight(name, FLOAT, weight.shape, lambda: floats_of(weight))


def _bf16(weight: Tensor) -> Array:
    """The bits of a matrix of bf16 numbers, whose f32 form is never there as a whole."""
    rows, cols = weight.shape
    out = np.empty((rows, cols), np.uint16)
    band = max(1, BAND // cols)
    with ops.no_grad():
        for first in range(0, rows, band):
            few = np.arange(first, min(first + band, rows), dtype=np.int32)
            out[first : first + band] = bf16_bits(ops.embedding(few, weight).numpy())
    return out


# ---- layers ---------------------------------------------------------------------------------------------------------


def quantize(g: Graph, x: str) -> tuple[str, str]:
    """x (..., K) -> int8 of the same shape, and its scale (...): quantize_rows of csrc/kernels/kernels.h."""
    absmax = g.add("ReduceMax", g.add("Abs", x), g.ints(-1), keepdims=0)
    absmax = g.add("Max", absmax, g.floats(EPS))
    scaled = g.add("Mul", x, g.add("Unsqueeze", g.add("Div", g.floats(127), absmax), g.ints(-1)))
    q = g.add("Clip", g.add("Round", scaled), g.floats(-128), g.floats(127))
    return g.add("Cast", q, to=INT8), g.add("Div", absmax, g.floats(127))


def bitlinear(g: Graph, quantized: tuple[str, str], weight: list[Weight]) -> str:
    """What quantize() gave of (..., K), times ternary_weight() (N, K) -> (..., N): bitlinear_forward of kernels.h.

    The product of the scales must not meet the sums as a Mul: ONNX Runtime would make one node of the three, which
    multiplies by one scale after the other where there is more than one row, and so rounds otherwise.
    """
    (q, act_scale), (codes, scale) = quantized, (g.weight(part) for part in weight)
    if weight[0].dtype != INT8:
        codes = g.add("Cast", codes, to=INT8)
    sums = g.add("Cast", g.add("MatMulInteger", q, codes), to=FLOAT)
    return g.add("Mul", sums, g.add("Unsqueeze", g.add("Mul", act_scale, scale), g.ints(-1)))


def table(g: Graph, weight: Weight, rows: str | None = None) -> str:
    """A float matrix in f32, or those of its rows."""
    name = g.weight(weight)
    if rows is not None:
        name = g.add("Gather", name, rows)
    return g.add("Cast", name, to=FLOAT) if weight.dtype == BFLOAT16 else name


def rmsnorm(g: Graph, x: str, eps: float, gain: str | None) -> str:
    """x (..., C) -> (x * rstd) * gain."""
    mean = g.add("ReduceMean", g.add("Mul", x, x), g.ints(-1), keepdims=1)
    rstd = g.add("Div", g.floats(1), g.add("Sqrt", g.add("Add", mean, g.floats(eps))))
    y = g.add("Mul", x, rstd)
    return y if gain is None else g.add("Mul", y, gain)


# ---- the model ------------------------------------------------------------------------------------------------------


class ModelGraph(Graph):
    """The graph of a model. Inputs, whose names are those that Hugging Face's exporters use:

      input_ids       int64 (B, T)
      attention_mask  int64 (B, S)   0 where a position holds padding, else 1
      position_ids    int64 (B, T)   below max_position_embeddings: what rope turns by
      past_key_values.N.key, past_key_values.N.value   f32 (B, KV, P, D), with `cache`; P is 0 for a prompt

    and outputs: logits f32 (B, T, V), and present.N.key, present.N.value f32 (B, KV, S, D). Token t sees positions up
    to P + t that are not padding.
    """

    def __init__(self, model: BitNetForCausalLM, weights: str, cache: bool) -> None:
        c = model.config
        any_ternary = c.linear == "bitlinear" or c.quantize_head
        super().__init__(OPSET_INT2 if weights == "int2" and any_ternary else OPSET)
        self.config, self.ternary, self.cache = c, TERNARY[weights], cache
        total = "past_sequence_length + sequence_length" if cache else "sequence_length"
        self.input("input_ids", INT64, ["batch_size", "sequence_length"])
        self.input("attention_mask", INT64, ["batch_size", total])
        self.input("position_ids", INT64, ["batch_size", "sequence_length"])
        for name in self.cache_names("past_key_values"):
            self.input(name, FLOAT, ["batch_size", c.kv_heads, "past_sequence_length", c.head_dim])
        with self.at("model"):
            self._prepare(model)
            embedding = float_weight("model.embed_tokens.weight", model.model.embed_tokens.weight)
            with self.at("embed_tokens"):
                x = table(self, embedding, "input_ids")
            for i, block in enumerate(model.model.layers):
                assert isinstance(block, Block)
                with self.at(f"layers.{i}"):
                    x = self._block(f"model.layers.{i}", i, block, x)
            x = self._norm("model.norm", model.model.norm, x)
        with self.at("lm_head"):
            self._head(model, embedding, x)
        self.output("logits", FLOAT, ["batch_size", "sequence_length", c.vocab_size])
        for name in self.cache_names("present"):
            self.output(name, FLOAT, ["batch_size", c.kv_heads, total, c.head_dim])

    def cache_names(self, prefix: str) -> list[str]:
        """Names of the cache's inputs or outputs, in order; none without a cache."""
        layers = range(self.config.num_hidden_layers if self.cache else 0)
        return [f"{prefix}.{i}.{kind}" for i in layers for kind in ("key", "value")]

    def _prepare(self, model: BitNetForCausalLM) -> None:
        """What all layers share: sizes, the mask and the angles of rope."""
        c = self.config
        self.sizes = self.add("Shape", "input_ids")  # [B, T]
        batch, time = (self.add("Gather", self.sizes, self.ints(i)) for i in (0, 1))
        past = self.ints(0)
        if self.cache:
            past = self.add("Shape", "past_key_values.0.key", start=2, end=3)
        total = self.add("Add", past, time)
        groups = c.num_attention_heads // c.kv_heads
        self.grouped = self.add("Concat", batch, self.ints(c.kv_heads, groups), time, total, axis=0)
        flat = self.add("Mul", time, self.ints(groups))
        self.stacked = self.add("Concat", batch, self.ints(c.kv_heads), flat, total, axis=0)
        self.joined = self.add("Concat", batch, self.ints(c.num_attention_heads), time, self.ints(c.head_dim), axis=0)
        with self.at("mask"):
            none, one = self.scalar(0), self.scalar(1)
            first, count = self.add("Squeeze", past), self.add("Squeeze", total)
            keys = self.add("Range", none, count, one)  # (S)
            queries = self.add("Unsqueeze", self.add("Range", first, count, one), self.ints(1))  # (T, 1)
            causal = self.add("LessOrEqual", keys, queries)
            real = self.add("Unsqueeze", self.add("Cast", "attention_mask", to=BOOL), self.ints(1, 2, 3))
            self.seen = self.add("And", causal, real)  # (B, 1, 1, T, S)
        with self.at("rope"):
            rope = model.model.rope
            tables = (self.floats(table.numpy()) for table in (rope.cos, rope.sin))
            self.cos, self.sin = (  # (B, 1, T, D/2)
                self.add("Unsqueeze", self.add("Gather", values, "position_ids"), self.ints(1)) for values in tables
            )

    def _block(self, name: str, i: int, block: Block, x: str) -> str:
        """x (B, T, C) -> (B, T, C)."""
        h = self._norm(f"{name}.input_layernorm", block.input_layernorm, x)
        with self.at("self_attn"):
            x = self._attention(f"{name}.self_attn", i, block.self_attn, h, x)
        h = self._norm(f"{name}.post_attention_layernorm", block.post_attention_layernorm, x)
        with self.at("mlp"):
            return self._feed_forward(f"{name}.mlp", block.mlp, h, x)

    def _attention(self, name: str, i: int, layer: Attention, h: str, residual: str) -> str:
        c = self.config
        projections = {f"{name}.{kind}": getattr(layer, kind) for kind in ("q_proj", "k_proj", "v_proj")}
        q, k, v = (self._heads(y) for y in self._project(projections, h))
        q, k = self._rope(q), self._rope(k)
        if self.cache:
            k, v = (
                self.add_named(f"present.{i}.{kind}", "Concat", f"past_key_values.{i}.{kind}", new, axis=2)
                for kind, new in (("key", k), ("value", v))
            )
        # A group's queries stand below one another, (B, KV, G T, D), so that its keys are multiplied where they lie.
        q = self.add("Reshape", q, self.ints(0, c.kv_heads, -1, c.head_dim))
        scores = self.add("MatMul", q, self.add("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.add("Mul", scores, self.floats(np.float32(1 / np.sqrt(c.head_dim))))
        scores = self.add("Reshape", scores, self.grouped)
        # The least number instead of -infinity: a row of padding alone stays finite.
        scores = self.add("Where", self.seen, scores, self.floats(np.finfo(np.float32).min))
        shares = self.add("Reshape", self.add("Softmax", scores, axis=-1), self.stacked)
        out = self.add("MatMul", shares, v)
        out = self.add("Transpose", self.add("Reshape", out, self.joined), perm=[0, 2, 1, 3])
        out = self.add("Reshape", out, self.ints(0, 0, c.hidden_size))
        out = self._norm(f"{name}.attn_sub_norm", layer.attn_sub_norm, out)
        return self.add("Add", residual, self._project({f"{name}.o_proj": layer.o_proj}, out)[0])

    def _feed_forward(self, name: str, layer: FeedForward, h: str, residual: str) -> str:
        projections = {f"{name}.gate_proj": layer.gate_proj, f"{name}.up_proj": layer.up_proj}
        gate, up = self._project(projections, h)
        if self.config.hidden_act == "relu2":
            rectified = self.add("Relu", gate)
            gate = self.add("Mul", rectified, rectified)
        else:
            gate = self.add("Mul", gate, self.add("Sigmoid", gate))
        hidden = self._norm(f"{name}.ffn_sub_norm", layer.ffn_sub_norm, self.add("Mul", gate, up))
        return self.add("Add", residual, self._project({f"{name}.down_proj": layer.down_proj}, hidden)[0])

    def _head(self, model: BitNetForCausalLM, embedding: Weight, x: str) -> None:
        c = self.config
        if c.quantize_head:
            if c.use_rms_norm:
                x = rmsnorm(self, x, c.rms_norm_eps, None)
            layer = model.lm_head
            if layer is None:  # the codes are those of the embedding
                layer = nn.BitLinear(c.hidden_size, c.vocab_size, weight=model.head_weight)
            assert isinstance(layer, nn.BitLinear)
            y = bitlinear(self, quantize(self, x), self._ternary("lm_head.weight", layer))
        else:
            weight = embedding if model.lm_head is None else float_weight("lm_head.weight", model.lm_head.weight)
            y = self._linear(weight, x)
        self.add_named("logits", "Identity", y)

    def _project(self, layers: dict[str, nn.Linear], x: str) -> list[str]:
        """x (B, T, K) by each of the layers, which quantize it once."""
        c = self.config
        if c.use_rms_norm:
            x = rmsnorm(self, x, c.rms_norm_eps, None)
        quantized = quantize(self, x) if c.linear == "bitlinear" else None
        found = []
        for name, layer in layers.items():
            with self.at(name.rpartition(".")[2]):
                if quantized is not None:
                    assert isinstance(layer, nn.BitLinear)
                    found.append(bitlinear(self, quantized, self._ternary(f"{name}.weight", layer)))
                else:
                    found.append(self._linear(float_weight(f"{name}.weight", layer.weight), x))
        return found

    def _ternary(self, name: str, layer: nn.BitLinear) -> list[Weight]:
        return ternary_weight(name, (layer.out_features, layer.in_features), self.ternary, partial(codes_of, layer))

    def _linear(self, weight: Weight, x: str) -> str:
        """x (B, T, K) by a float matrix (N, K) as it lies: Gemm, which reads two dimensions, keeps no turned copy."""
        rows, cols = weight.shape
        flat = self.add("Reshape", x, self.ints(-1, cols))
        y = self.add("Gemm", flat, table(self, weight), transB=1)
        return self.add("Reshape", y, self.add("Concat", self.sizes, self.ints(rows), axis=0))

    def _norm(self, name: str, norm: nn.RMSNorm | None, x: str) -> str:
        if norm is None:
            return x
        with self.at(name.rpartition(".")[2]):
            return rmsnorm(self, x, norm.eps, self.weight(float_weight(f"{name}.weight", norm.weight)))

    def _heads(self, x: str) -> str:
        """(B, T, heads D) -> (B, heads, T, D)."""
        apart = self.add("Reshape", x, self.ints(0, 0, -1, self.config.head_dim))
        return self.add("Transpose", apart, perm=[0, 2, 1, 3])

    def _rope(self, x: str) -> str:
        """Turns the pairs (j, j + D/2) of every head of (B, heads, T, D)."""
        a, b = self.split(x, 2)
        turned = (
            self.add("Sub", self.add("Mul", a, self.cos), self.add("Mul", b, self.sin)),
            self.add("Add", self.add("Mul", b, self.cos), self.add("Mul", a, self.sin)),
        )
        return self.add("Concat", *turned, axis=-1)

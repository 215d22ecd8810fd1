"""The keys and values of past tokens, in slots that sequences take and leave.

A KVCache is memory: `slots` rows of `capacity` positions in every layer. A CacheStep is what the model reads and writes
in one pass: which slot each sequence of the batch has, and at which position its new tokens go. Both are tensors that
the ops read when they run, so a recorded step can be replayed for other sequences at other positions.

    cache = KVCache(config, slots=8, capacity=2048, dtype="bf16")
    one, three = cache.step(1), cache.step(3)
    one.slot.copy_([5]); one.start.copy_([0]); model(prompt, cache=one)              # a sequence joins: (1, T) tokens
    three.slot.copy_([0, 5, 2]); three.start.copy_(lengths); model(last, cache=three)  # the next token of three: (3, 1)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitnet import _core, ops
from bitnet._core import Tensor
from bitnet.config import BitNetConfig
from bitnet.errors import ConfigError

# How a cache keeps numbers, and the dtype of its tensors. int8 has one scale for each head of each position.
DTYPES = {"f32": "f32", "bf16": "bf16", "int8": "i8"}


@dataclass(frozen=True)
class LayerCache:
    """One layer's part: keys and values (slots, capacity, KV, D), and the scales (slots, capacity, KV) of int8 ones."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [t for t in (self.keys, self.values, self.key_scale, self.value_scale) if t is not None]


class KVCache:
    """Memory for the keys and values of `slots` sequences of at most `capacity` tokens.

    dtype: "f32"; "bf16", rounded to nearest even; or "int8", rounded by heads to 127 steps of their largest value. New
    tokens, too, are seen as the cache holds them, so that logits do not depend on how a sequence was cut into passes;
    with f32 they are those without a cache. ConfigError for another dtype, or for sizes below 1.
    """

    def __init__(self, config: BitNetConfig, slots: int, capacity: int, dtype: str = "f32") -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"a cache holds {', '.join(DTYPES)}, not {dtype!r}")
        if slots < 1 or capacity < 1:
            raise ConfigError(f"a cache needs at least 1 slot and 1 position, not {slots} and {capacity}")
        self.slots, self.capacity, self.dtype = slots, capacity, dtype
        shape = (slots, capacity, config.kv_heads, config.head_dim)
        scales = (shape[:3],) * 2 if dtype == "int8" else ()
        self.layers = [
            LayerCache(*[ops.zeros(shape, DTYPES[dtype]) for _ in range(2)], *[ops.zeros(scale) for scale in scales])
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def bytes_per_position(self) -> int:
        """Bytes that a token of one sequence takes in all layers: what a step reads for each token of the past."""
        total = sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)
        return total // (self.slots * self.capacity)

    def step(self, batch: int) -> CacheStep:
        """What the model is given for passes of `batch` sequences: at first those of slots 0, 1, ... at position 0."""
        if not 1 <= batch <= self.slots:
            raise ConfigError(f"a step has 1 to {self.slots} sequences, as many as there are slots, not {batch}")
        return CacheStep(self, batch)

    def copy(self, source: int, destination: int, length: int) -> None:
        """The first `length` positions of one slot to another, so that two sequences can share a beginning.

        IndexError for a slot or length outside the cache.
        """
        for layer in self.layers:
            for tensor in layer.tensors:
                _core.cache_copy(tensor, source, destination, length)


class CacheStep:
    """The places of a batch in a KVCache: write `start` and `slot`, both i32 (batch,), then run the model.

    start: the position of each sequence's first new token, which is the number of tokens before it. slot: its row of
    the cache, each at most once.
    """

    def __init__(self, cache: KVCache, batch: int) -> None:
        self.cache, self.batch, self.layers = cache, batch, cache.layers
        self.start = ops.zeros((batch,), "i32")
        self.slot = ops.tensor(np.arange(batch), "i32")

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k and v (batch, T, KV, D) to a layer; attention of q (batch, T, H, D) over all that is there."""
        here = self.layers[layer]
        keys = ops.cache_append(k, here.keys, self.start, self.slot, here.key_scale)
        values = ops.cache_append(v, here.values, self.start, self.slot, here.value_scale)
        return ops.attention(q, keys, values, self.start, self.slot, here.key_scale, here.value_scale)

"""The types of numbers that a GGUF file can hold, as far as they are read here: how many values in how many bytes.

Blocks never cross rows, so a row holds a multiple of a block. I2_S, which bitnet.cpp and ik_llama.cpp have and
llama.cpp gave up, is flat, and has one f32 scale after all codes of the tensor and 28 unused bytes after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TensorType:
    """`block` values take `bytes` bytes; `tail` bytes follow the last block of a tensor."""

    name: str
    id: int
    block: int
    bytes: int
    tail: int = 0

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor whose rows (the last of shape) are whole blocks."""
        return prod(shape) // self.block * self.bytes + self.tail


F32 = TensorType("F32", 0, 1, 4)
F16 = TensorType("F16", 1, 1, 2)
Q8_0 = TensorType("Q8_0", 8, 32, 34)
Q4_K = TensorType("Q4_K", 12, 256, 144)
Q6_K = TensorType("Q6_K", 14, 256, 210)
BF16 = TensorType("BF16", 30, 1, 2)
TQ1_0 = TensorType("TQ1_0", 34, 256, 54)
TQ2_0 = TensorType("TQ2_0", 35, 256, 66)
I2_S = TensorType("I2_S", 36, 64, 16, tail=32)

TYPES = {known.id: known for known in (F32, F16, Q8_0, Q4_K, Q6_K, BF16, TQ1_0, TQ2_0, I2_S)}
TERNARY = (TQ1_0, TQ2_0, I2_S)

# Types that are not read, for sentences that refuse them.
OTHERS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 37: "I8_S", 38: "TL1", 39: "TL2 or MXFP4",
    40: "NVFP4", 41: "Q1_0", 42: "Q2_0", 134: "IQ1_BN", 135: "IQ2_BN",
}  # fmt: skip

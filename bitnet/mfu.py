"""How much of the machine a training step uses: its multiply-adds against the measured peak of each kind.

What counts is the work that the model asks for (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B), not what is
done again to save memory. For B sequences of T tokens, in multiply-adds (half of FLOPs), with P the elements of all
projections of all L layers, V x C the output head, and T (T + 1) / 2 pairs of query and earlier key:

    projections   forward B T P      backward 2 B T P (dx and dW)
    head          forward B T V C    backward 2 B T V C
    attention     forward 2 L B C T (T + 1) / 2 (q k and p v)    backward 4 L B C T (T + 1) / 2

which is the paper's 6 N + 12 L H Q T FLOPs a token with N the weights that a token is multiplied by (no embedding, no
norms) and, because a causal model needs no more, half of its attention. A product counts as the kind that it is
multiplied in: forward, ternary products int8, full-precision projections and attention f32; the head and all that is
backward bf16, or f32 if precision is fp32; with precision int8, dx of ternary products int8.
"""

from __future__ import annotations

from typing import NamedTuple

from bitnet import _core
from bitnet.config import BitNetConfig

KINDS = ("int8", "bf16", "f32")
PRECISIONS = ("fast", "int8", "fp32")


class Peak(NamedTuple):
    """The most of one kind that all threads do together."""

    macs_per_second: float
    name: str  # of the instructions


def measure_peaks() -> dict[str, Peak]:
    """The peak of each kind, with the present number of threads: some 35 ms."""
    return {kind: Peak(*_core.peak(kind)) for kind in KINDS}


def describe(peaks: dict[str, Peak]) -> str:
    """One line for people: "int8 7.07 TMAC/s (amx-int8), bf16 ..."; 10^12 multiply-adds a second."""
    return ", ".join(f"{kind} {peak.macs_per_second / 1e12:.3g} TMAC/s ({peak.name})" for kind, peak in peaks.items())


def training_macs(
    config: BitNetConfig, batch_size: int, seq_len: int, precision: str = "fast", frozen: bool = False
) -> dict[str, int]:
    """Multiply-adds by kind of one forward and backward pass over batch_size rows of seq_len tokens.

    precision: of the backward pass, one of PRECISIONS. frozen: no matrix is trained, so dW is not made; the adapters'
    own products, some percent, do not count.
    """
    c, tokens = config, batch_size * seq_len
    kv = c.kv_heads * c.head_dim
    layer = 2 * c.hidden_size * (c.hidden_size + kv) + 3 * c.hidden_size * c.intermediate_size
    projections = tokens * c.num_hidden_layers * layer
    head = tokens * c.vocab_size * c.hidden_size
    attention = batch_size * c.num_hidden_layers * c.hidden_size * (seq_len * (seq_len + 1) // 2)  # one product
    rest = "f32" if precision == "fp32" else "bf16"
    dx = "int8" if precision == "int8" else rest  # of a ternary product
    macs = dict.fromkeys(KINDS, 0)
    macs["int8" if c.linear == "bitlinear" else "f32"] += projections
    macs["int8" if c.quantize_head else rest] += head
    macs["f32"] += 2 * attention
    macs[dx if c.linear == "bitlinear" else rest] += projections
    macs[dx if c.quantize_head else rest] += head
    macs[rest] += (0 if frozen else projections + head) + 4 * attention
    return macs


def mfu(macs: dict[str, int], peaks: dict[str, Peak], seconds: float) -> float:
    """The time that the multiply-adds take at the peak of each kind over the time they took: 1.0 is the roof."""
    return sum(count / peaks[kind].macs_per_second for kind, count in macs.items()) / seconds

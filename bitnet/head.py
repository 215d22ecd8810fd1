"""The output head in inference: which form its matrix has, and the logits by it.

  f32       the matrix as trained: the logits of training, bit for bit
  bf16      rounded to bf16, the embedding too where they are tied: half the bytes, the logits of the rounded matrix
  int8      that in 8 bits a weight and a scale for each row, hidden states in sixteen bits: a quarter
  int6      in 6 bits: less than a fifth
  screened  int8 first, and bf16 where that cannot tell: greedy and top-k choices are provably those of bf16

With a vocabulary of 128256 the head in f32 is more bytes than all ternary weights of a 2B model.
"""

from __future__ import annotations

from typing import Literal, get_args

from bitnet import _core, ops
from bitnet._core import Tensor

HeadForm = Literal["f32", "bf16", "int8", "int6", "screened"]
HEADS: tuple[str, ...] = get_args(HeadForm)


class Head:
    """The matrix (V, C) of an output head in one of the forms above; `exact` is it in f32 or bf16."""

    def __init__(self, exact: Tensor, form: str) -> None:
        if form not in HEADS:
            raise ValueError(f"a head is one of {', '.join(HEADS)}, not {form!r}")
        if form == "f32" and exact.dtype != "f32":
            raise ValueError("this head was rounded to bf16 before: its f32 form is gone")
        self.form = form
        if form != "f32":
            with ops.no_grad():
                exact = ops.convert(exact, "bf16")
        self.exact = exact
        self.matrix = (
            exact if form in ("f32", "bf16") else _core.compact(exact, 6 if form == "int6" else 8, form == "screened")
        )

    def logits(self, hidden: Tensor, top: int | None = None) -> Tensor:
        """hidden (..., C) -> (..., V). top: what is needed is the `top` largest, the rest may be -infinity."""
        if self.form == "screened":
            return ops.compact_linear(hidden, self.matrix, top) if top else ops.linear(hidden, self.exact)
        return (ops.linear if self.matrix is self.exact else ops.compact_linear)(hidden, self.matrix)

    def bytes_read(self) -> float:
        """Bytes of a step, but for the few rows that a screen does not decide."""
        vocabulary, hidden = self.exact.shape
        bits = {"f32": 32, "bf16": 16, "int8": 8, "int6": 6, "screened": 8}[self.form]
        norms = {"int8": 4, "int6": 4, "screened": 16}.get(self.form, 0)  # scales, and norms read twice
        return vocabulary * (hidden * bits / 8 + norms)

"""Distillation of attention: a student relates the positions of a text to each other as its teacher does.

    term = mean over A in {Q, K, V}, relation heads, positions i of  KL(R_teacher[i] || R_student[i])
    R = softmax(A A^T / sqrt(d))                         (T, T), a row for each position, over all positions

at one layer of each model, A the states (T, d) of one relation head as the projection gives them, before the rotary
turn. The states of a model, all its heads side by side (grouped ones once), are cut again into as many relation heads
as the student has query heads, so neither the number of heads nor their width has to agree: d is the width of a model's
states divided by that number, for Q, K and V and each model on its own.

The gradient is known in closed form. With Z = A A^T / sqrt(d), that of a KL is E = R_student - R_teacher for each of Z,
and so (E + E^T) A / sqrt(d) for A: what is differentiated is the sum of A times that, held constant, whose value means
nothing. Positions whose target is -100 have no row, as in the other terms; what is left of them is what others relate
to. While a relation is worked on, five matrices of B * H * T^2 floats exist; of those before it, none.

Source: Wu et al. 2025, arXiv 2510.13998, after Wang et al. 2021, arXiv 2012.15828 (MiniLMv2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bitnet import _core, ops
from bitnet._core import Tensor
from bitnet.errors import ConfigError
from bitnet.model import BitNetForCausalLM, Block
from bitnet.target_mask import TargetMask

States = tuple[Tensor, Tensor, Tensor]  # q, k, v of one layer, (B, T, heads, D) each


@contextmanager
def watched(model: BitNetForCausalLM, layer: int) -> Iterator[list[States]]:
    """The list gets q, k, v of a layer, counted from 0, at each forward pass inside."""
    block = model.model.layers[layer]
    assert isinstance(block, Block)
    attention = block.self_attn
    seen: list[States] = []
    attention.watcher = lambda *states: seen.append(states)
    try:
        yield seen
    finally:
        attention.watcher = None


def layer_of_teacher(layer: int, layers: int, teacher_layers: int) -> int:
    """The teacher's layer that lies as deep as the student's, counted from 0: the last beside the last."""
    return -(-(layer + 1) * teacher_layers // layers) - 1


class AttentionDistillation:
    """The term of the file's head, made of ops that a tape can replay.

    layer: the student's, counted from 0; None: its last. ConfigError for a layer that there is not, and for states of
    which the width is no multiple of the student's query heads.
    """

    def __init__(
        self,
        student: BitNetForCausalLM,
        teacher: BitNetForCausalLM,
        layer: int | None = None,
    ) -> None:
        layers, self.heads = student.config.num_hidden_layers, student.config.num_attention_heads
        layer = layers - 1 if layer is None else layer
        if not 0 <= layer < layers:
            raise ConfigError(f"distill_layer must be 0 to {layers - 1}, the student's last, not {layer}")
        for who, shape in (("student", student.config), ("teacher", teacher.config)):
            for width in (shape.hidden_size, shape.kv_heads * shape.head_dim):
                if width % self.heads:
                    raise ConfigError(
                        f"the {who}'s attention states have {width} channels, no multiple of the student's "
                        f"{self.heads} query heads: distill_attention cannot cut them"
                    )
        self.student, self.teacher, self.layer = student, teacher, layer
        self.teacher_layer = layer_of_teacher(layer, layers, teacher.config.num_hidden_layers)
        self._seen: tuple[list[States], list[States]] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the forward passes of both models, and term()."""
        with watched(self.student, self.layer) as own, watched(self.teacher, self.teacher_layer) as others:
            self._seen = own, others
            try:
                yield
            finally:
                self._seen = None

    def term(self, mask: TargetMask) -> Tensor:
        """What to differentiate, a scalar, of the last forward pass of each model inside watching().

        mask: the positions that have a row.
        """
        assert self._seen is not None
        pulls = [self._pull(*pair, mask) for pair in zip(self._seen[0][-1], self._seen[1][-1], strict=True)]
        of_all = ops.mul(ops.add(ops.add(pulls[0], pulls[1]), pulls[2]), mask.each)
        return _core.scale(of_all, 1.0 / (3 * self.heads))

    def _pull(self, own: Tensor, other: Tensor, mask: TargetMask) -> Tensor:
        """Sum of the student's states times the gradient that they want; states (B, T, heads, D)."""
        batch, time = own.shape[:2]
        own = own.reshape(batch, time, -1)
        with ops.no_grad(), ops.segment():
            wanted = self._wanted(own, other.reshape(batch, time, -1), mask)
        return ops.sum(ops.mul(own, wanted))

    def _wanted(self, own: Tensor, other: Tensor, mask: TargetMask) -> Tensor:
        """(E + E^T) A / sqrt(d), without the rows of E that do not count, in the student's layout: (B, T, C)."""
        batch, time, width = own.shape
        turned = self._turned(own)
        excess = _core.add(self._relation(turned), self._relation(self._turned(other)), 1.0, -1.0)
        rows = self._turned(mask.wide(width))
        of_rows = ops.mul(ops.matmul(excess, turned.transpose()).transpose(), rows)  # (E A)^T, (B * H, d, T)
        of_columns = ops.matmul(ops.mul(turned, rows), excess)  # (E^T A)^T
        pulls = _core.scale(ops.add(of_rows, of_columns), turned.shape[1] ** -0.5)
        return pulls.reshape(batch, width, time).transpose()

    def _turned(self, states: Tensor) -> Tensor:
        """(B, T, H * d) -> (B * H, d, T): A^T of each relation head."""
        batch, time, width = states.shape
        return states.transpose().reshape(batch * self.heads, width // self.heads, time)

    def _relation(self, turned: Tensor) -> Tensor:
        """A^T (B * H, d, T) -> R (B * H, T, T)."""
        return ops.softmax(ops.matmul(_core.scale(turned, turned.shape[1] ** -0.5).transpose(), turned))

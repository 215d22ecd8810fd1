"""Every way out of the extension that is an exception."""

from collections.abc import Callable

import growth
import numpy as np

import bitnet
from bitnet import Tape, _core, ops

X = bitnet.tensor(np.ones((2, 3)), requires_grad=True)
TOKENS = bitnet.tensor([0, 1])


class Foreign:
    """Says it speaks DLPack, and does not."""

    def __dlpack__(self) -> object:
        return 5


def backward_of_consumed() -> None:
    loss = (X * X).sum()
    loss.backward()
    loss.backward()


def second_loss() -> None:
    shared = X * 2.0
    first, second = shared.sum(), (shared * shared).sum()
    first.backward()
    second.backward()


def changed_weight() -> None:
    weight = bitnet.tensor(np.ones((4, 3)), requires_grad=True)
    loss = ops.linear(X, weight).sum()
    weight.copy_(np.zeros((4, 3)))
    loss.backward()


def bad_replay() -> None:
    tokens = bitnet.tensor([0, 1])
    with Tape() as tape:
        ops.embedding(tokens, X).sum()
    tokens.copy_([0, 7])
    tape.replay()


def changed_segment() -> None:
    with ops.segment():
        loss = ops.softmax(ops.softmax(X)).sum()
    X.copy_(X.numpy())
    loss.backward()


def nested_segments() -> None:
    with ops.segment():
        _ = X * 2.0
        with ops.segment():
            pass


def mixed_tapes() -> None:
    with Tape():
        y = X * 2.0
        with Tape():
            _ = y + X


CALLS: list[Callable[[], object]] = [
    lambda: bitnet.tensor([[1], [2, 3]]),
    lambda: bitnet.tensor([2**40]),
    lambda: bitnet.tensor("text"),
    lambda: bitnet.tensor([1.0], "f64"),
    lambda: bitnet.tensor([1], requires_grad=True),
    lambda: bitnet.Tensor(X, "i32"),
    lambda: bitnet.Tensor(),  # type: ignore[call-arg]
    lambda: Tape(1),  # type: ignore[call-arg]
    lambda: X.copy_(np.zeros(5)),
    lambda: X.item(),
    lambda: X.reshape(7),
    lambda: X.reshape(object()),  # type: ignore[call-overload]
    lambda: X.to("f64"),
    lambda: X.backward(),
    lambda: X[0],
    lambda: bool(X),
    lambda: X + 1,  # type: ignore[operator]
    lambda: X / 0,
    lambda: X @ X,
    lambda: X + ops.zeros((3, 3)),
    lambda: X * X.numpy(),
    lambda: X.__dlpack__(),
    lambda: bitnet.from_dlpack(np.zeros((4, 4), np.float32)[::2]),
    lambda: bitnet.from_dlpack(Foreign()),  # type: ignore[arg-type]
    lambda: setattr(X, "grad", X),
    lambda: setattr(X, "shape", (6,)),
    lambda: ops.zeros((2**62, 8)),
    lambda: ops.zeros((2**50,)),
    lambda: ops.zeros((2, -1)),
    lambda: ops.zeros((2,), "q"),
    lambda: ops.zeros((2,), device="tpu"),
    lambda: ops.embedding([5], X),
    lambda: ops.linear(X, None),  # type: ignore[arg-type]
    lambda: ops.linear(X, ops.zeros((4, 4))),
    lambda: ops.bitlinear(X, ops.zeros((4, 4))),
    lambda: ops.rmsnorm(X, ops.zeros((4,))),
    lambda: ops.rope_tables(0, 4, 1e4),
    lambda: ops.attention(X, X, X),
    lambda: ops.cross_entropy(X, ops.zeros((5, 3)), [0, 9]),
    lambda: ops.cross_entropy(X, ops.zeros((5, 3)), [0]),
    lambda: bitnet.pack_ternary(bitnet.tensor([2], "i8")),
    lambda: _core.ternary_stats(TOKENS),
    lambda: _core.flatten([X, TOKENS]),
    lambda: _core.flatten([X, 5]),  # type: ignore[list-item]
    lambda: _core.fill_normal(TOKENS, 0, 0, 0.0, 1.0),
    lambda: bitnet.use_isa("abacus"),
    lambda: bitnet.set_threads(-1),
    backward_of_consumed,
    second_loss,
    changed_weight,
    bad_replay,
    changed_segment,
    nested_segments,
    mixed_tapes,
]


def step() -> None:
    for call in CALLS:
        try:
            call()
        except Exception:
            continue
        raise SystemExit(f"call {CALLS.index(call)} was not refused")


growth.assert_none(step)

"""The fused loss in the fast precision: within the bound of its roundings, the same bits for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from reference import cross_entropy

import bitnet
from bitnet import Tape, Tensor, ops

F = np.float32
U16, U32 = 2.0**-8, 2.0**-24  # unit roundoff of bf16 and of f32

# rows, channels, vocabulary: one element; odd tails; more than one block each way; more than one cell each way
SHAPES = [(1, 1, 1), (5, 3, 2), (37, 70, 65), (130, 40, 401), (300, 33, 1000)]
CELLS = (2100, 8, 2300)


class Problem:
    """Inputs, and the float64 loss and gradients beside what rounding may add to each of their elements.

    x and W are rounded to bf16, so a logit is off by at most e = (2 U16 + U16^2 + (C + 1) U32) |x| |W|^T. A row's loss
    then moves by 2 max(e), its probabilities by a factor within exp(+-2 max(e)); the exponential and the f32 around it
    add 2^-15 to each. d is rounded once, as are W and x when it is multiplied with them; a sum of n terms in f32 adds
    n + 1 roundings of its terms' sizes.
    """

    def __init__(self, rows: int, channels: int, vocab: int, seed: int = 0, dloss: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(rows, channels)).astype(F)
        self.w = (rng.normal(size=(vocab, channels)) / np.sqrt(channels)).astype(F)
        self.targets = rng.integers(0, vocab, rows).astype(np.int32)
        self.targets[1::3] = cross_entropy.IGNORE
        x, w = self.x.astype(float), self.w.astype(float)
        counted, wanted = cross_entropy.counted(self.targets)
        self.loss = float(cross_entropy.forward(x, w, self.targets))
        self.dx, self.dw = cross_entropy.backward(np.asarray(dloss), x, w, self.targets)

        logits, sizes = x @ w.T, abs(x) @ abs(w).T
        weight = abs(dloss) / max(1, len(counted))
        most = ((2 * U16 + U16**2 + (channels + 1) * U32) * sizes).max(-1, keepdims=True)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        d, off = np.zeros_like(p), np.zeros_like(p)
        d[counted] = weight * p[counted]
        off[counted] = d[counted] * (np.expm1(2 * most) + 2.0**-15)[counted]
        d[counted, wanted] -= weight
        d = abs(d)
        off += U16 * (d + off)
        self.loss_bound = 2 * float(most.max()) + 2.0**-15 + 4 * U32 * self.loss
        self.dx_bound = self.product_bound(d, off, abs(w))
        self.dw_bound = self.product_bound(d.T, off.T, abs(x))

    @staticmethod
    def product_bound(d: np.ndarray, off: np.ndarray, factor: np.ndarray) -> np.ndarray:
        n = d.shape[1]
        return off @ factor + (U16 + (n + 1) * U32) * ((d + off) @ factor) * (1 + U16)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            bitnet.tensor(self.x, requires_grad=True),
            bitnet.tensor(self.w, requires_grad=True),
            bitnet.tensor(self.targets),
        )


def fast_loss(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    with ops.precision("fast"):
        return ops.cross_entropy(x, w, targets)


def close(got: Tensor, want: np.ndarray, bound: np.ndarray) -> None:
    assert (abs(got.numpy() - want) <= bound).all(), float((abs(got.numpy() - want) - bound).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dloss", [1.0, -0.125])
def test_against_float64(isa: str, shape: tuple[int, int, int], dloss: float) -> None:
    problem = Problem(*shape, dloss=dloss)
    x, w, targets = problem.tensors()
    loss = fast_loss(x, w, targets)
    (loss * dloss).backward()
    assert abs(loss.item() - problem.loss) <= problem.loss_bound
    close(x.grad, problem.dx, problem.dx_bound)
    close(w.grad, problem.dw, problem.dw_bound)
    ignored = problem.targets == cross_entropy.IGNORE
    assert (x.grad.numpy()[ignored] == 0).all()


def test_several_cells() -> None:
    problem = Problem(*CELLS)
    x, w, targets = problem.tensors()
    loss = fast_loss(x, w, targets)
    loss.backward()
    assert abs(loss.item() - problem.loss) <= problem.loss_bound
    close(x.grad, problem.dx, problem.dx_bound)
    close(w.grad, problem.dw, problem.dw_bound)


def test_threads_change_no_bit(isa: str) -> None:
    problem = Problem(300, 40, 900)
    before = bitnet.get_threads()
    results = []
    for count in (1, 2, 5):
        bitnet.set_threads(count)
        x, w, targets = problem.tensors()
        loss = fast_loss(x, w, targets)
        loss.backward()
        results.append((loss.numpy(copy=True), x.grad.numpy(copy=True), w.grad.numpy(copy=True)))
    bitnet.set_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert np.array_equal(got, want)


@pytest.mark.parametrize("wanted", ["x", "w"])
def test_one_gradient_alone(wanted: str) -> None:
    problem = Problem(40, 20, 70)
    x, w, targets = problem.tensors()
    fast_loss(x, w, targets).backward()
    both = x.grad.numpy(copy=True) if wanted == "x" else w.grad.numpy(copy=True)
    x, w = (bitnet.tensor(a, requires_grad=name == wanted) for a, name in ((problem.x, "x"), (problem.w, "w")))
    fast_loss(x, w, targets).backward()
    assert np.array_equal((x if wanted == "x" else w).grad.numpy(), both)
    assert (w if wanted == "x" else x).grad is None


def test_without_gradients_the_loss_is_exact() -> None:
    problem = Problem(40, 20, 70)
    x, w, targets = problem.tensors()
    exact = ops.cross_entropy(x, w, targets).item()
    with bitnet.no_grad():
        assert fast_loss(x, w, targets).item() == exact


def test_gradients_accumulate() -> None:
    """Twice the same problem into the same gradients: each element is one chain of sums, so up to the f32 roundings."""
    problem = Problem(300, 33, 1000)
    x, w, targets = problem.tensors()
    for _ in range(2):
        fast_loss(x, w, targets).backward()
    close(x.grad, 2 * problem.dx, 2 * problem.dx_bound + 2 * problem.w.shape[0] * U32 * abs(problem.dx))
    close(w.grad, 2 * problem.dw, 2 * problem.dw_bound + 2 * problem.x.shape[0] * U32 * abs(problem.dw))


def test_tied_with_the_embedding() -> None:
    """W is the table the rows were taken from as well: its gradient is dW and, at the tokens, dx."""
    problem = Problem(40, 20, 70)
    tokens = np.random.default_rng(1).integers(0, 70, 40).astype(np.int32)
    problem.x = problem.w[tokens]
    x, w, targets = problem.tensors()
    fast_loss(x, w, targets).backward()
    want = w.grad.numpy().astype(float)
    np.add.at(want, tokens, x.grad.numpy())
    tied = bitnet.tensor(problem.w, requires_grad=True)
    fast_loss(ops.embedding(bitnet.tensor(tokens), tied), tied, targets).backward()
    np.testing.assert_allclose(tied.grad.numpy(), want, rtol=0, atol=40 * U32 * abs(want).max())


def test_x_is_the_weight_itself() -> None:
    """More rows than a cell has, where writing either gradient first would lose the other's."""
    problem = Problem(2300, 4, 2300)
    x, w, targets = bitnet.tensor(problem.w, requires_grad=True), *problem.tensors()[1:]
    fast_loss(x, w, targets).backward()
    want, size = x.grad.numpy() + w.grad.numpy(), abs(x.grad.numpy()) + abs(w.grad.numpy())
    both = bitnet.tensor(problem.w, requires_grad=True)
    fast_loss(both, both, targets).backward()
    np.testing.assert_allclose(both.grad.numpy(), want, rtol=0, atol=2 * 2300 * U32 * size.max())


def test_replay() -> None:
    problem, other = Problem(40, 20, 70), Problem(40, 20, 70, seed=1)
    x, w, targets = problem.tensors()
    fast_loss(x, w, targets).backward()
    want = [x.grad.numpy(copy=True), w.grad.numpy(copy=True)]
    leaves = [bitnet.tensor(other.x, requires_grad=True), bitnet.tensor(other.w, requires_grad=True)]
    targets = bitnet.tensor(other.targets)
    tape = Tape()
    with tape:
        loss = fast_loss(leaves[0] * 1.0, leaves[1] * 1.0, targets)
    loss.backward()
    first = [leaf.grad.numpy(copy=True) for leaf in leaves]
    for values, expected in ((problem, want), (other, first)):
        leaves[0].copy_(values.x)
        leaves[1].copy_(values.w)
        targets.copy_(values.targets)
        tape.replay()
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        for leaf, gradient in zip(leaves, expected, strict=True):
            assert np.array_equal(leaf.grad.numpy(), gradient)


@pytest.mark.parametrize("changed", ["input", "weight", "targets"])
def test_what_was_changed_in_between_is_refused(changed: str) -> None:
    problem = Problem(10, 5, 7)
    x, w, targets = problem.tensors()
    loss = fast_loss(x, w, targets)
    tensor, value = {"input": (x, problem.x), "weight": (w, problem.w), "targets": (targets, problem.targets)}[changed]
    tensor.copy_(value)
    with pytest.raises(RuntimeError, match=rf"backward: the {changed} of a cross_entropy (was|were) changed"):
        loss.backward()


def test_no_target_at_all(isa: str) -> None:
    x, w = (bitnet.tensor(np.ones((n, 3), F), requires_grad=True) for n in (2, 4))
    loss = fast_loss(x, w, bitnet.tensor(np.full(2, cross_entropy.IGNORE, np.int32)))
    loss.backward()
    assert loss.item() == 0.0
    assert (x.grad.numpy() == 0).all()
    assert (w.grad.numpy() == 0).all()


def test_logits_far_apart_and_not_finite(isa: str) -> None:
    """exp of no logit overflows; a row with a NaN is NaN and leaves the others alone."""
    x = np.array([[300.0, -300.0], [-300.0, 300.0], [np.nan, 1.0], [0.0, 0.0]], F)
    t = bitnet.tensor(x, requires_grad=True)
    w = bitnet.tensor(np.eye(2, dtype=F))
    for row, want in enumerate((0.0, 600.0, np.nan, np.log(2.0))):
        targets = np.full(4, cross_entropy.IGNORE, np.int32)
        targets[row] = 0
        t.grad = None
        loss = fast_loss(t, w, bitnet.tensor(targets))
        loss.backward()
        # The shift by lse is rounded by 2^-23 |lse| (head.inc), for |lse| = 300 less than 2^-14.
        np.testing.assert_allclose(loss.item(), want, atol=2.0**-14)
        assert np.isnan(t.grad.numpy()[row]).all() == np.isnan(want)
        assert (np.delete(t.grad.numpy(), row, 0) == 0).all()

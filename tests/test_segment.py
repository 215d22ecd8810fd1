"""Activation checkpointing: the same bits with less memory, and nothing that Python can reach is ever away."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, Tape, Tensor, ops
from bitnet.optim import AdamW

TINY = BitNetConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=32)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "ternary": {},
    "twin": {"linear": "linear"},
    "tied": {"tie_word_embeddings": True, "quantize_head": True},
    "norms_inside": {"input_norms": False, "sub_norms": False, "use_rms_norm": True},
    "no_norms": {"input_norms": False, "sub_norms": False, "hidden_act": "relu2"},
}


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    return tuple(rng.integers(0, TINY.vocab_size, (2, 2, 16)).astype(np.int32))  # type: ignore[return-value]


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return bitnet.tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


def in_use() -> int:
    gc.collect()
    return bitnet.memory_stats()["in_use"]


def train(checkpointing: bool, replayed: bool, changes: dict[str, Any]) -> tuple[list[float], list[bytes]]:
    """Losses, norms, last gradients and final weights of three steps of two micro-batches."""
    model = BitNetForCausalLM(TINY.replace(**changes), seed=3)
    model.activation_checkpointing = checkpointing
    optimizer = AdamW(model)
    tokens, targets = (ops.zeros((2, 16), "i32") for _ in range(2))
    if replayed:
        with Tape() as tape:
            recorded = model(tokens, targets)
    numbers = []
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(2):
            for tensor, values in zip((tokens, targets), batch(10 * step + micro), strict=True):
                tensor.copy_(values)
            if replayed:
                tape.replay()
            loss = recorded if replayed else model(tokens, targets)
            loss.backward(0.5)
            numbers.append(loss.item())
        numbers.append(optimizer.clip_grad_norm(0.5))
        optimizer.step(1e-2 / (step + 1))
    return numbers, [optimizer.flat_grad.numpy().tobytes(), optimizer.flat.numpy().tobytes()]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fast", "int8"])
def test_the_same_bits(name: str, replayed: bool, precision: str) -> None:
    before = bitnet.get_threads()
    try:
        with ops.precision(precision):
            plain = train(False, replayed, VARIANTS[name])
            for threads in (1, 2):
                bitnet.set_threads(threads)
                assert train(True, replayed, VARIANTS[name]) == plain
    finally:
        bitnet.set_threads(before)


@pytest.mark.parametrize("linear", ["bitlinear", "linear"])
def test_a_block_keeps_its_output_only(linear: str) -> None:
    """Every intermediate of a block is given back: known sizes, in whole blocks of the arena."""
    sizes = {}
    B, T, C, F, L = 2, 32, 64, 192, 6  # all tensors below are sizes that the arena has
    for checkpointing in (False, True):
        config = BitNetConfig(50, C, F, L, 4, max_position_embeddings=T, linear=linear)
        model = BitNetForCausalLM(config)
        model.activation_checkpointing = checkpointing
        tokens = ops.zeros((B, T), "i32")
        model(tokens, tokens).backward()  # gradients and ternary weights are there
        before = in_use()
        with Tape() as tape:
            loss = model(tokens, tokens)
        sizes[checkpointing] = in_use() - before
        tape.replay()
        loss.backward()
        assert in_use() - before == sizes[checkpointing]
        del tape, loss
    rows = B * T
    small = 4 * rows + 2 * 4 * rows  # rstd of four norms, stats of four heads
    if linear == "linear":
        # input norm, q, k, v, both rotated, attention, its norm, its projection, norm; gate, up, product, its norm
        kept = 4 * (rows * (10 * C + 4 * F) + small)
    else:
        # four norms go to int8: a byte a channel, eight more a row, and an empty storage of one arena block
        kept = 4 * (rows * (7 * C + 3 * F) + small) + rows * (3 * C + F + 4 * 8) + 4 * 64
    assert sizes[False] - sizes[True] == L * kept


PEAK = """
import sys, bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, Tape, ops
B, T, C, F, L = 4, 64, 64, 256, 12
model = BitNetForCausalLM(BitNetConfig(50, C, F, L, 4, max_position_embeddings=T))
model.activation_checkpointing = sys.argv[1] == "True"
tokens = ops.zeros((B, T), "i32")
if sys.argv[2] == "replay":
    with Tape() as tape:
        loss = model(tokens, tokens)
    calls = []
    for step in range(5):
        tape.replay()
        loss.backward()
        calls.append(bitnet.memory_stats()["system_calls"])
else:
    calls = []
    for step in range(5):
        loss = model(tokens, tokens)
        loss.backward()
        del loss
        calls.append(bitnet.memory_stats()["system_calls"])
assert len(set(calls[1:])) == 1, calls
print(bitnet.memory_stats()["high_water"])
"""


@pytest.mark.parametrize("how", ["replay", "eager"])
def test_the_peak_is_lower_and_steady(how: str) -> None:
    """Without: what L blocks keep (A each) lies there when backward begins. With: at most what one block keeps, and its
    gradients, which are no more than A again. So the peaks are (L - 2) A apart. And no step after the second takes
    memory from the system."""

    def peak(checkpointing: bool) -> int:
        environment = os.environ | {"PYTHONPATH": str(Path(bitnet.__file__).parents[1])}
        command = [sys.executable, "-c", PEAK, str(checkpointing), how]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    B, T, C, F, L = 4, 64, 64, 256, 12
    kept = 4 * B * T * (7 * C + 3 * F)
    assert peak(False) - peak(True) >= (L - 2) * kept


def test_what_python_holds_is_never_away() -> None:
    """Results that a name, a view or a memoryview holds keep their values, before and after backward."""
    x, w = leaf(4, 6), leaf(6, 6, seed=1)
    held: dict[str, Any] = {}

    def work(keep: bool) -> Tensor:
        a = ops.linear(x, w)
        b = ops.rmsnorm(a)
        c = ops.mul(b, a)
        d = ops.softmax(ops.bitlinear(c, w))
        e = d.reshape(24).reshape(4, 6)
        if keep:
            held.update(a=a, view=b.reshape(24), detached=c.detach(), memory=memoryview(d))
        return ops.matmul(e, w).sum()

    linear = x.numpy() @ w.numpy().T
    plain = work(False)
    plain.backward()
    assert w.grad is not None
    expected, value = w.grad.numpy(copy=True), plain.item()
    arrays: dict[str, np.ndarray] = {}
    for explicit in (False, True):
        held.clear()
        with Tape() if explicit else nullcontext() as tape:
            with ops.segment():
                loss = work(True)
            after = ops.bitlinear(held["a"], w).sum()  # a node outside reads one of them
        for _ in range(3 if explicit else 1):
            if tape is not None:
                tape.replay()
            w.grad = None
            loss.backward()
            assert w.grad is not None
            assert np.array_equal(w.grad.numpy(), expected)
            assert loss.item() == value
            now = {name: np.array(t.numpy() if isinstance(t, Tensor) else t) for name, t in held.items()}
            arrays = arrays or now
            assert all(np.array_equal(arrays[name], now[name]) for name in now)
        if tape is not None:
            with pytest.raises(RuntimeError, match="input 0 of bitlinear was changed"):
                after.backward()  # NumPy had `detached` and could have written to it
            tape.replay()
            after.backward()
        np.testing.assert_allclose(arrays["a"], linear, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(arrays["memory"].sum(-1), 1, rtol=1e-5)
        del loss, after, tape


def test_a_held_activation_keeps_its_int8_form() -> None:
    """Another ternary layer may read it after the segment, without quantizing it again."""
    x, w = leaf(4, 64), leaf(64, 64, seed=1)
    with ops.segment():
        h = x * 0.5
        y = ops.bitlinear(h, w)
    z = ops.bitlinear(h, w)
    assert np.array_equal(y.numpy(), z.numpy())
    (y * y + z * z).sum().backward()
    assert x.grad is not None
    got = x.grad.numpy(copy=True)
    x.grad = w.grad = None
    h = x * 0.5
    y, z = ops.bitlinear(h, w), ops.bitlinear(h, w)
    (y * y + z * z).sum().backward()
    assert np.array_equal(x.grad.numpy(), got)


def test_without_gradients_a_recorded_segment_still_gives_back() -> None:
    model = BitNetForCausalLM(TINY)
    tokens = ops.zeros((2, 16), "i32")
    sizes, outputs = [], []
    with bitnet.no_grad():
        model(tokens)
        for checkpointing in (False, True):
            model.activation_checkpointing = checkpointing
            before = in_use()
            with Tape() as tape:
                logits = model(tokens)
            sizes.append(in_use() - before)
            tokens.copy_(batch(1)[0])
            tape.replay()
            outputs.append(logits.numpy())
            before_eager = in_use()
            model(tokens)  # nothing is recorded, nothing stays
            assert in_use() == before_eager
            del tape, logits
            tokens.copy_(np.zeros((2, 16), np.int32))
    assert np.array_equal(outputs[0], outputs[1])
    assert sizes[1] < sizes[0] / 2


def test_segments_stand_between_ordinary_nodes() -> None:
    """Two results of one segment, one read by the next; a branch that no loss reads; an empty one."""
    x, w = leaf(5, 8), leaf(8, 8, seed=1)

    def chain(inside: Callable[[], Any]) -> Tensor:
        start = ops.linear(x, w)
        with inside():
            a, b = ops.rmsnorm(start), start * 3.0
            c = ops.mul(ops.softmax(a), b)
            _ = ops.bitlinear(c, w)
        middle = c + a
        with inside():
            pass
        with inside():
            d = ops.matmul(ops.swiglu(middle, b), w)
        return (d * d).sum()

    gradients = []
    chain(nullcontext)  # makes the weight's ternary form, which stays
    for inside in (nullcontext, ops.segment):
        x.grad = w.grad = None
        before = in_use()
        loss = chain(inside)
        loss.backward()
        assert x.grad is not None
        assert w.grad is not None
        gradients.append((x.grad.numpy(copy=True), w.grad.numpy(copy=True), loss.item()))
        x.grad = w.grad = None
        del loss
        assert in_use() <= before
    assert all(np.array_equal(one, other) for one, other in zip(*gradients, strict=True))


def test_backward_from_inside_a_closed_segment() -> None:
    x = leaf(6)
    y = np.exp(2 * x.numpy().astype(np.float64))
    y /= y.sum()
    for explicit in (False, True):
        x.grad = None
        with Tape() if explicit else nullcontext() as tape, ops.segment():
            loss = ops.softmax(x * 2.0).reshape(2, 3)
            loss = (loss * loss).sum()
            later = loss * 5.0
        loss.backward()
        assert x.grad is not None
        np.testing.assert_allclose(x.grad.numpy(), 4 * y * (y - (y * y).sum()), rtol=1e-4, atol=1e-6)
        if tape is not None:
            later.backward()
        else:
            with pytest.raises(RuntimeError, match="already consumed"):  # one backward consumes the whole segment
                later.backward()


# ---- what is refused ----


def test_misuse_says_why() -> None:
    x = leaf(3)
    with ops.segment():
        with pytest.raises(RuntimeError, match="already recording one, and segments do not nest"), ops.segment():
            pass
        loss = (x * x).sum()
        with pytest.raises(RuntimeError, match=r"backward: a segment is still being recorded; leave it first"):
            loss.backward()
        with Tape() as inner, ops.segment():  # another tape, its own segments
            _ = x.detach() * 2.0
    loss.backward()
    inner.replay()
    with pytest.raises(RuntimeError, match="none is being recorded"):
        bitnet._core.close_segment()
    with Tape() as tape, ops.segment():
        y = x * 2.0
        with pytest.raises(RuntimeError, match="replay: a segment is still being recorded"):
            tape.replay()
    tape.replay()
    assert np.array_equal(y.numpy(), 2 * x.numpy())
    with Tape() as left:  # a segment that its tape does not outlive is none
        bitnet._core.open_segment()
        z = (x * x).sum()
    z.backward()
    left.replay()
    with ops.segment():
        pass


def test_an_exception_inside_ends_the_segment() -> None:
    x = leaf(2, 3)
    kept = []

    def fails() -> None:
        with ops.segment():
            kept.append(ops.softmax(x) * 2.0)
            ops.linear(kept[0], leaf(2, 4))

    with pytest.raises(ValueError, match="x has 3 channels"):
        fails()
    y = kept[0]
    with ops.segment():
        loss = (y * y).sum()
    loss.backward()
    assert x.grad is not None


@pytest.mark.parametrize("op", [ops.linear, ops.bitlinear])
@pytest.mark.parametrize("what", ["weight", "input"])
def test_what_was_changed_cannot_be_made_again(op: Callable[[Tensor, Tensor], Tensor], what: str) -> None:
    x, w = leaf(4, 64), leaf(64, 64, seed=1)

    def record() -> Tensor:
        with ops.segment():
            return ops.softmax(op(ops.softmax(op(x, w)), w)).sum()

    loss = record()
    changed = w if what == "weight" else x
    changed.copy_(changed.numpy(copy=True) * 2)
    place = int(what == "weight")
    with pytest.raises(RuntimeError, match=rf"backward: input {place} of {op.__name__} was changed between"):
        loss.backward()
    x.grad = w.grad = None
    before = in_use()
    record().backward()  # the refusal left nothing behind
    x.grad = w.grad = None
    assert in_use() <= before


def test_a_failed_replay_can_be_repeated() -> None:
    table, tokens = leaf(5, 8), ops.zeros((4,), "i32")
    with Tape() as tape:
        with ops.segment():
            y = ops.softmax(ops.rmsnorm(ops.embedding(tokens, table)))
        loss = (y * y).sum()
    before = in_use()
    tokens.copy_([1, 2, 3, 9])
    with pytest.raises(IndexError, match="token 9 at place 3"):
        tape.replay()
    assert in_use() == before
    with pytest.raises(RuntimeError, match="was changed between"):
        loss.backward()
    tokens.copy_([1, 2, 3, 4])
    tape.replay()
    loss.backward()
    assert table.grad is not None
    again = table.grad.numpy(copy=True)
    table.grad = None
    y = ops.softmax(ops.rmsnorm(ops.embedding(tokens, table)))
    (y * y).sum().backward()
    assert table.grad is not None
    assert np.array_equal(table.grad.numpy(), again)

"""The tape: what a graph keeps alive and how long, what backward() refuses, and that replay is the same step again."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, Tape, Tensor, ops
from bitnet.nn import BitLinear, Linear, Module
from bitnet.optim import AdamW

TINY = BitNetConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=32)  # fmt: skip


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return bitnet.tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


def batch(step: int, rows: int = 2, time: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    return tuple(rng.integers(0, TINY.vocab_size, (2, rows, time)).astype(np.int32))  # type: ignore[return-value]


def in_use() -> int:
    gc.collect()
    return bitnet.memory_stats()["in_use"]


# ---- how long a graph lives ----


def test_dropping_the_loss_frees_the_graph() -> None:
    model = BitNetForCausalLM(TINY)
    with bitnet.no_grad():
        model(*batch(0)).item()  # the ternary weights are made once and stay
    before = in_use()
    loss = model(*batch(0))
    assert in_use() > before
    del loss
    assert in_use() == before

    loss = model(*batch(0))
    middle = loss * 2.0
    del loss
    held = in_use()
    assert held > before  # `middle` needs it
    del middle
    assert in_use() == before


def test_backward_frees_the_graph_and_leaves_gradients() -> None:
    model = BitNetForCausalLM(TINY)
    loss = model(*batch(0))
    loss.backward()
    after_first = in_use()
    for step in range(3):
        loss = model(*batch(step))
        loss.backward()
        assert in_use() == after_first
    assert all(p.grad is not None for p in model.parameters())


def test_a_no_grad_block_keeps_nothing() -> None:
    model = BitNetForCausalLM(TINY)
    with bitnet.no_grad():
        y = model(batch(0)[0])
        before = in_use()
        for _ in range(3):
            y = model(batch(0)[0])
            assert not y.requires_grad
            assert in_use() == before
    with pytest.raises(RuntimeError, match=r"requires no gradient; it was made under no_grad"):
        y.sum().backward()


def test_no_grad_nests_and_survives_exceptions() -> None:
    x = leaf(2)
    with bitnet.no_grad():
        with pytest.raises(ZeroDivisionError), bitnet.no_grad():
            _ = x / 0
        assert not (x * 2.0).requires_grad
    assert (x * 2.0).requires_grad


def test_an_explicit_tape_keeps_its_tensors_until_it_goes() -> None:
    model = BitNetForCausalLM(TINY)
    model(*batch(0)).backward()
    before = in_use()
    with Tape() as tape:
        loss = model(*batch(0))
    recorded = in_use()
    assert recorded > before
    value = loss.item()
    loss.backward()
    del loss
    assert in_use() >= recorded
    del tape
    assert in_use() == before
    assert value > 0


def test_tensors_kept_after_backward_stay_valid() -> None:
    x = leaf(300)
    kept = []
    for step in range(4):
        y = x * float(step)
        loss = (y * y).sum()
        kept.append((loss, y))
        loss.backward()
    values = x.numpy()
    for step, (loss, y) in enumerate(kept):
        assert np.array_equal(y.numpy(), values * np.float32(step))
        assert loss.item() == pytest.approx(float((values.astype(np.float64) ** 2).sum()) * step**2, rel=1e-5)
        assert y.is_leaf
    assert kept[1][1].numpy() is not kept[2][1].numpy()


def test_tensors_outlive_the_tape_that_made_them() -> None:
    x = leaf(4)
    with Tape() as tape:
        y = x * 3.0
    expected = x.numpy(copy=True) * 3
    del tape
    gc.collect()
    assert np.array_equal(y.numpy(), expected)
    with pytest.raises(RuntimeError, match="backward"):
        y.sum().backward()


# ---- gradients ----


def test_gradients_accumulate_until_zeroed() -> None:
    x = leaf(5)
    (x * x).sum().backward()
    assert x.grad is not None
    once = x.grad.numpy(copy=True)
    np.testing.assert_array_equal(once, 2 * x.numpy())
    (x * x).sum().backward(factor=0.5)
    np.testing.assert_allclose(x.grad.numpy(), 1.5 * once, rtol=1e-6)
    x.grad = None
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), once)
    layer = Linear(3, 3)
    for _ in range(2):
        layer.zero_grad()
        layer(bitnet.tensor(np.eye(3))).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.numpy().tolist() == [[1.0] * 3] * 3
    layer.zero_grad()
    assert layer.weight.grad.numpy().tolist() == [[0.0] * 3] * 3


def test_a_tensor_used_several_times_sums_its_gradients() -> None:
    x = leaf(4)
    y = x * 2.0
    (y + y + y * y + y.reshape(2, 2).reshape(4)).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), 2 * (3 + 2 * y.numpy()), rtol=1e-6)


def test_a_reshape_of_an_input_changes_nothing_for_those_who_read_it_before() -> None:
    """A reshape shares memory with its input without writing to it."""
    for layer in (Linear(6, 3), BitLinear(6, 3)):
        x = leaf(4, 6)
        h = x * 2.0
        y = layer(h)
        (y.sum() + h.reshape(24).sum() + layer(h).sum()).backward()
        assert x.grad is not None


def test_detach_stops_the_gradient() -> None:
    x = leaf(3)
    y = x * x
    (y * y.detach()).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), 2 * x.numpy() ** 3, rtol=1e-6)


def test_two_losses_of_a_shared_input() -> None:
    x, w = leaf(4, 6), leaf(3, 6, seed=1)
    first, second = ops.linear(x, w).sum(), (ops.linear(x, w) * ops.linear(x, w)).sum()
    first.backward()
    second.backward()
    assert w.grad is not None
    y = x.numpy() @ w.numpy().T
    np.testing.assert_allclose(w.grad.numpy(), (1 + 2 * y).T @ x.numpy(), rtol=1e-4, atol=1e-5)


def test_the_first_of_two_losses_that_share_a_node_consumes_it() -> None:
    x = leaf(3)
    shared = x * 2.0
    first, second = shared.sum(), (shared * shared).sum()
    first.backward()
    words = r"input 0 of mul belongs to a graph that an earlier backward\(\) consumed.*once on the sum of the losses"
    with pytest.raises(RuntimeError, match=words):
        second.backward()
    (shared.detach() * x).sum().backward()  # as the sentence advises


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda x: x, RuntimeError, "backward: this tensor is a leaf"),
        (lambda x: x.detach().sum(), RuntimeError, "requires no gradient"),
        (lambda x: x * 2.0, ValueError, r"needs a scalar, not a tensor of shape \(3,\); take its sum\(\) or mean\(\)"),
    ],
)
def test_what_has_no_gradient_says_why(make: Callable[[Tensor], Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(leaf(3)).backward()


def test_backward_twice() -> None:
    x = leaf(3)
    loss = (x * x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="its graph was already consumed"):
        loss.backward()
    with pytest.raises(TypeError, match=r"grad can only be set to None; change its values with grad.copy_"):
        x.grad = leaf(3)  # type: ignore[assignment]


def test_a_tape_walks_back_as_often_as_asked() -> None:
    x = leaf(3)
    with Tape():
        loss = (x * x).sum()
        loss.backward()
        loss.backward()
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), 4 * x.numpy())


def test_a_weight_changed_between_forward_and_backward_is_refused() -> None:
    layer, x = Linear(4, 3), leaf(2, 4)
    loss = layer(x).sum()
    layer.weight.copy_(np.zeros((3, 4)))
    with pytest.raises(RuntimeError, match="the weight of a linear was changed between its forward and its backward"):
        loss.backward()
    loss = layer(x).sum()
    x.copy_(np.zeros((2, 4)))
    with pytest.raises(RuntimeError, match="the input of a linear was changed"):
        loss.backward()
    loss = layer(x).sum()  # the refusals left nothing behind
    layer.zero_grad()
    loss.backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.numpy().any()


def test_a_ternary_weight_requantized_between_forward_and_backward_is_refused() -> None:
    layer, x = BitLinear(32, 8), leaf(2, 32)
    codes = layer.codes().numpy() * np.float32(layer.weight_scale)
    loss = layer(x).sum()
    layer.weight.copy_(-layer.weight.numpy(copy=True))
    loss.backward()  # the codes that the forward pass used are still there
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), np.tile(codes.sum(0), (2, 1)), rtol=1e-5, atol=1e-6)
    loss = layer(x).sum()
    layer.weight.copy_(-layer.weight.numpy(copy=True))
    again = layer(x).sum()  # makes them anew
    with pytest.raises(RuntimeError, match="the weight of a bitlinear was changed"):
        loss.backward()
    again.backward()


def test_an_optimizer_step_between_forward_and_backward_is_refused() -> None:
    model = BitNetForCausalLM(TINY)
    optimizer = AdamW(model)
    model(*batch(0)).backward()
    early = model(*batch(1))
    optimizer.step()
    model(*batch(2)).backward()
    with pytest.raises(RuntimeError, match="was changed between its forward and its backward pass"):
        early.backward()


# ---- replay ----


def eager_step(model: Module, optimizer: AdamW, step: int, accumulate: int = 2) -> list[float]:
    losses = []
    optimizer.zero_grad()
    for micro in range(accumulate):
        loss = model(*batch(10 * step + micro))
        loss.backward(1 / accumulate)
        losses.append(loss.item())
    norm = optimizer.clip_grad_norm(0.5)
    optimizer.step(1e-2 / (step + 1))
    return [*losses, norm]


class Replayed:
    """The same step from a tape recorded once."""

    def __init__(self, model: Module, optimizer: AdamW) -> None:
        self.optimizer = optimizer
        self.tokens, self.targets = (ops.zeros((2, 16), "i32") for _ in range(2))
        with Tape() as self.tape:
            self.loss = model(self.tokens, self.targets)

    def step(self, step: int, accumulate: int = 2) -> list[float]:
        losses = []
        self.optimizer.zero_grad()
        for micro in range(accumulate):
            tokens, targets = batch(10 * step + micro)
            self.tokens.copy_(tokens)
            self.targets.copy_(targets)
            self.tape.replay()
            self.loss.backward(1 / accumulate)
            losses.append(self.loss.item())
        norm = self.optimizer.clip_grad_norm(0.5)
        self.optimizer.step(1e-2 / (step + 1))
        return [*losses, norm]


@pytest.mark.parametrize("changes", [{}, {"linear": "linear"}, {"tie_word_embeddings": True, "quantize_head": True}])
def test_replay_equals_running_the_python_again(changes: dict[str, object]) -> None:
    config = TINY.replace(**changes)
    eager, replayed = BitNetForCausalLM(config, seed=3), BitNetForCausalLM(config, seed=3)
    optimizers = AdamW(eager), AdamW(replayed)
    tape = Replayed(replayed, optimizers[1])
    for step in range(3):
        assert eager_step(eager, optimizers[0], step) == tape.step(step)
        for name, values in eager.state_dict().items():
            assert np.array_equal(values, replayed.state_dict()[name]), name
    for name, values in optimizers[0].state_dict().items():
        assert np.array_equal(values, optimizers[1].state_dict()[name]), name


def test_replay_takes_no_memory() -> None:
    model = BitNetForCausalLM(TINY)
    tape = Replayed(model, AdamW(model))
    tape.step(0)
    before = bitnet.memory_stats()
    for step in range(1, 4):
        tape.step(step)
    assert bitnet.memory_stats() == before


def test_replay_reads_new_tokens_and_refuses_bad_ones() -> None:
    model = BitNetForCausalLM(TINY)
    tokens = ops.zeros((1, 8), "i32")
    with Tape() as tape, bitnet.no_grad():
        logits = model(tokens)
    for step in range(3):
        values = batch(step, 1, 8)[0]
        tokens.copy_(values)
        tape.replay()
        with bitnet.no_grad():
            assert np.array_equal(logits.numpy(), model(values).numpy())
    good = logits.numpy(copy=True)
    tokens.copy_([[1, 2, 3, TINY.vocab_size + 7, 4, 5, 6, 7]])
    with pytest.raises(IndexError, match=r"embedding: token 57 at place 3 is outside \[0, 50\)"):
        tape.replay()
    tokens.copy_([[1, 2, 3, -1, 4, 5, 6, 7]])
    with pytest.raises(IndexError, match="token -1 at place 3"):
        tape.replay()
    tokens.copy_(values)
    tape.replay()
    assert np.array_equal(logits.numpy(), good)


def test_bad_targets_are_refused_on_replay() -> None:
    model = BitNetForCausalLM(TINY)
    tape = Replayed(model, AdamW(model))
    tape.targets.copy_(np.full((2, 16), -100))
    tape.tape.replay()
    assert tape.loss.item() == 0.0
    tape.targets.copy_(np.full((2, 16), 50))
    with pytest.raises(IndexError, match=r"cross_entropy: target 50 at place 0 is outside \[0, 50\)"):
        tape.tape.replay()


def test_tapes_nest_and_refuse_to_mix() -> None:
    x = leaf(3)
    with Tape() as outer:
        y = x * 2.0
        with Tape() as inner:
            _ = x * 3.0
            with pytest.raises(RuntimeError, match=r"add: input 0 was recorded on another tape or thread; detach\(\)"):
                _ = y + x
            _ = y.detach() + x
        _ = y + x
    assert (outer.ops, inner.ops) == (["scale", "add"], ["scale", "add"])
    assert (len(outer), len(inner)) == (2, 2)
    with outer, pytest.raises(RuntimeError, match="already recording"):
        outer.__enter__()
    assert (x * 1.0).requires_grad  # and this thread records as before
    assert len(outer) == 2


def test_an_op_that_fails_leaves_no_node() -> None:
    x = leaf(2, 3)
    with Tape() as tape:
        with pytest.raises(ValueError):
            ops.linear(x, leaf(2, 4))
        with pytest.raises(IndexError):
            ops.embedding([5], x)
        y = x.sum()
    assert tape.ops == ["sum"]
    y.backward()


# ---- threads and signals ----


def test_two_threads_train_as_one_does() -> None:
    def train(seed: int) -> list[float]:
        model = BitNetForCausalLM(TINY, seed)
        optimizer = AdamW(model)
        return [value for step in range(6) for value in eager_step(model, optimizer, step)]

    alone = [train(seed) for seed in (1, 2, 3)]
    together: dict[int, list[float]] = {}
    threads = [threading.Thread(target=lambda s=seed: together.update({s: train(s)})) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in (1, 2, 3)] == alone


def test_a_tensor_may_outlive_the_thread_that_made_it() -> None:
    x = leaf(100)
    kept: list[Tensor] = []
    started, dropped = threading.Event(), threading.Event()

    def make() -> None:
        kept.append((x * 2.0) * 1.0)

    def use() -> None:
        loss = (x * x).sum()
        started.set()
        dropped.wait(10)
        loss.backward()  # on a tape of its own, though its thread may have the memory of one that ended

    for _ in range(10):
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    assert all(np.array_equal(y.numpy(), 2 * x.numpy()) for y in kept)
    with pytest.raises(RuntimeError, match=r"recorded on another tape or thread; detach\(\) it"):
        _ = kept[0] + x
    with bitnet.no_grad():
        assert np.array_equal((kept[0] + x).numpy(), 3 * x.numpy())
    thread = threading.Thread(target=use)
    thread.start()
    started.wait(10)
    kept.clear()
    dropped.set()
    thread.join()
    assert x.grad is not None
    assert np.array_equal(x.grad.numpy(), 2 * x.numpy())


def test_a_tape_that_goes_while_it_records_is_left() -> None:
    x = leaf(2)
    Tape().__enter__()
    gc.collect()
    (x * x).sum().backward()
    with Tape() as tape:
        Tape().__exit__(None, None, None)  # never entered: nothing to leave
        _ = x * 2.0
    assert tape.ops == ["scale"]


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Sends this process SIGINT after so many seconds, from the outside as Ctrl-C does."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    signal.signal(signal.SIGINT, handler)


def chain(x: Tensor, length: int) -> tuple[Tape, Tensor]:
    """x to the power `length`, summed."""
    with Tape() as tape:
        y = x
        for _ in range(length):
            y = ops.matmul(y, x)
        return tape, y.sum()


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@pytest.mark.parametrize("part", ["replay", "backward"])
def test_ctrl_c_ends_a_long_pass_within_a_second(part: str, alarm: Callable[[float], None]) -> None:
    x = bitnet.tensor(np.roll(np.eye(128), 1, 0), requires_grad=True)  # a permutation: no power of it overflows
    tape, loss = chain(x, 20)
    once = min(seconds(tape.replay) for _ in range(3)) / 20
    tape, loss = chain(x, min(20000, int(0.2 / once)))
    run = tape.replay if part == "replay" else loss.backward
    pending = 0.3 * seconds(run)
    started = time.perf_counter()
    alarm(pending)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert time.perf_counter() - started < pending + 1
    x.grad = None
    tape.replay()  # nothing is broken: the next step computes what a first one does
    loss.backward()
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), np.full((128, 128), (len(tape) - 1) + 1.0))

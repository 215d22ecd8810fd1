"""One order of floats: every instruction set and thread count gives the same bits, forward, backward and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import bitlinear, linear

import bitnet

Result = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def defaults_restored() -> Iterator[None]:
    isa, threads = bitnet.current_isa(), bitnet.get_threads()
    yield
    bitnet.use_isa(isa)
    bitnet.set_threads(threads)


def everywhere(compute: Callable[[], Result]) -> None:
    """Runs `compute` on every instruction set with 1, 2 and 5 threads and demands equal bits, NaN and -0 included."""
    first: Result = {}
    for isa in bitnet.isa_names():
        for threads in (1, 2, 5):
            bitnet.use_isa(isa)
            bitnet.set_threads(threads)
            result = compute()
            first = first or result
            assert result.keys() == first.keys()
            for name, value in result.items():
                assert value.tobytes() == first[name].tobytes(), f"{name} differs on {isa} with {threads} threads"


def test_the_weakest_set_is_always_there() -> None:
    assert bitnet.isa_names()[0] == "scalar"
    assert bitnet.current_isa() in bitnet.isa_names()
    with pytest.raises(ValueError, match="scalar"):
        bitnet.use_isa("abacus")


@pytest.mark.parametrize("act", ["silu", "relu2"])
@pytest.mark.parametrize("linear", ["bitlinear", "linear"])
def test_model_and_training(act: str, linear: str) -> None:
    """Logits, loss, every gradient, and every parameter after two steps. T = 70 crosses a block of attention keys."""
    config = bitnet.BitNetConfig(
        vocab_size=301,
        hidden_size=72,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_act=act,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=80,
        tie_word_embeddings=act == "silu",
        sub_norms=True,
        linear=linear,
        quantize_head=False,
        initializer_range=0.3,
    )
    rng = np.random.default_rng(13)
    tokens = rng.integers(0, 301, (2, 70)).astype(np.int32)
    targets = rng.integers(0, 301, (2, 70)).astype(np.int32)

    def compute() -> Result:
        model = bitnet.BitNetForCausalLM(config, seed=5)
        optimizer = bitnet.optim.AdamW(model, lr=1e-2)
        result = {"logits": model(tokens).numpy().copy()}
        for step in range(2):
            optimizer.zero_grad()
            loss = model(tokens, targets)
            result[f"loss {step}"] = np.float64(loss.item())
            loss.backward()
            result |= {f"gradient {step} {name}": p.grad.numpy().copy() for name, p in model.named_parameters()}
            result[f"norm {step}"] = np.float64(optimizer.clip_grad_norm(1.0))
            optimizer.step()
        return result | {name: p.numpy().copy() for name, p in model.named_parameters()}

    everywhere(compute)


lengths, few = st.integers(1, 150), st.integers(1, 3)
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(lengths, lengths, lengths, st.sampled_from(["linear", "bitlinear"]), st.integers(0, 2**32 - 1))
def test_products(rows: int, inner: int, outer: int, op: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(rows, inner)).astype(np.float32), rng.normal(size=(outer, inner)).astype(np.float32)
    same_everywhere(getattr(bitnet.ops, op), x, w)


@pytest.mark.parametrize("op", ["linear", "bitlinear"])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(150, 70, 97), (17, 300, 33), (1, 5, 3)])
def test_fast_gradients(op: str, rows: int, inner: int, outer: int, isa: str) -> None:
    """In fast precision: the forward pass of fp32; gradients of their own, but the same for every number of threads,
    and as near to those of fp32 as their roundings allow.

    A factor rounded to bf16 errs by at most 2^-8 of itself; int8 and ternary codes do not. Each of the two sums of k
    products errs by at most k + 4 half ulps of the sum of their sizes, scales included; ARM rounds by an ulp, but half
    as often.
    """
    rng = np.random.default_rng(rows)
    x, w = rng.normal(size=(rows, inner)).astype(np.float32), rng.normal(size=(outer, inner)).astype(np.float32)

    def gradients(precision: str, threads: int) -> tuple[np.ndarray, ...]:
        bitnet.set_threads(threads)
        a, b = bitnet.tensor(x, requires_grad=True), bitnet.tensor(w, requires_grad=True)
        with bitnet.ops.precision(precision):
            y = getattr(bitnet.ops, op)(a, b)
            value = y.numpy().copy()
            (y * y).sum().backward()
        return value, a.grad.numpy().copy(), b.grad.numpy().copy()

    y, *exact = gradients("fp32", 1)
    first = gradients("fast", 1)
    assert first[0].tobytes() == y.tobytes()
    for threads in (2, 5):
        for one, other in zip(first, gradients("fast", threads), strict=True):
            assert one.tobytes() == other.tobytes()
    operands = (x, w) if op == "linear" else bitlinear.dequantized(x.astype(np.float64), w.astype(np.float64))
    sizes = linear.backward(np.abs(2 * y.astype(np.float64)), *map(np.abs, operands))
    rounded = 2 if op == "linear" else 1
    for fast, fp32, size, k in zip(first[1:], exact, sizes, (outer, rows), strict=True):
        bound = ((1 + 2**-8) ** rounded - 1 + (k + 4) * 2.0**-23) * size
        assert np.all(np.abs(fast.astype(np.float64) - fp32) <= bound)
        assert fast.tobytes() != fp32.tobytes()


@quick
@given(st.integers(1, 2), st.integers(1, 140), st.integers(1, 2), few, st.integers(1, 20), st.integers(0, 99))
def test_attention(batch: int, time: int, kv: int, group: int, half: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(batch, time, h, 2 * half)).astype(np.float32) for h in (kv * group, kv, kv))
    same_everywhere(bitnet.ops.attention, q, k, v)


@quick
@given(lengths, lengths, st.sampled_from(["swiglu", "relu2", "mul", "add", "rmsnorm", "softmax"]), st.integers(0, 99))
def test_elements_and_rows(rows: int, width: int, op: str, seed: int) -> None:
    """Magnitudes from 1e-30 to 1e30: overflow, underflow and what comes of them must agree as well."""
    rng = np.random.default_rng(seed)
    wild = (rng.normal(size=(2, rows, width)) * 10.0 ** rng.integers(-30, 31, (2, rows, 1))).astype(np.float32)
    inputs = {"rmsnorm": (wild[0], wild[1, 0]), "softmax": (wild[0],)}.get(op, (wild[0], wild[1]))
    same_everywhere(getattr(bitnet.ops, op), *inputs)


@quick
@given(lengths, lengths, lengths, st.integers(0, 99))
def test_cross_entropy(rows: int, inner: int, vocab: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = bitnet.tensor(rng.integers(0, vocab, rows).astype(np.int32))
    x, w = rng.normal(size=(rows, inner)).astype(np.float32), rng.normal(size=(vocab, inner)).astype(np.float32)
    same_everywhere(lambda a, b: bitnet.ops.cross_entropy(a, b, targets), x, w)


def same_everywhere(op: Callable[..., bitnet.Tensor], *inputs: np.ndarray) -> None:
    """The op's result and the gradient of its sum with each input."""

    def compute() -> Result:
        tensors = [bitnet.tensor(x, requires_grad=True) for x in inputs]
        y = op(*tensors)
        value = y.numpy().copy()
        (y * y).sum().backward()
        return {"y": value} | {f"gradient {i}": t.grad.numpy().copy() for i, t in enumerate(tensors)}

    everywhere(compute)

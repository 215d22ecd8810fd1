"""Modules: names, state, statistics, conversion, and the sentences of their refusals."""

from __future__ import annotations

import numpy as np
import pytest

import bitnet
from bitnet import nn, ops

CONFIG = bitnet.BitNetConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)
TOKENS = np.arange(24).reshape(2, 12) % 30


class Tiny(nn.Module):
    def __init__(self) -> None:
        self.first = nn.BitLinear(6, 5, bias=True)
        self.rest = nn.ModuleList([nn.Linear(5, 4), nn.RMSNorm(4)])
        self.shared = self.first.weight

    def forward(self, x: bitnet.Tensor) -> bitnet.Tensor:
        return self.rest[1](self.rest[0](self.first(x)))


def test_names_are_paths_and_shared_parameters_stand_once() -> None:
    model = Tiny()
    names = [name for name, _ in model.named_parameters()]
    assert names == ["shared", "first.bias", "rest.0.weight", "rest.1.weight"]
    assert model.num_parameters() == 30 + 5 + 20 + 4
    assert len(model.rest) == 2
    assert "(first): BitLinear(6 -> 5, bias)" in repr(model)


def test_published_names() -> None:
    names = {name for name, _ in bitnet.BitNetForCausalLM(CONFIG).named_parameters()}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert "model.layers.1.self_attn.attn_sub_norm.weight" in names
    assert "model.layers.0.mlp.ffn_sub_norm.weight" in names
    tied = bitnet.BitNetForCausalLM(CONFIG.replace(tie_word_embeddings=True))
    assert "lm_head.weight" not in dict(tied.named_parameters())


def test_state_round_trip_and_refusals() -> None:
    source, target = bitnet.BitNetForCausalLM(CONFIG, seed=1), bitnet.BitNetForCausalLM(CONFIG, seed=2)
    state = source.state_dict()
    before = target(TOKENS).numpy(copy=True)
    for change, error, words in (
        ({"model.norm.weight": None}, KeyError, "missing"),
        ({"extra": np.zeros(1)}, KeyError, "unknown"),
        ({"model.norm.weight": np.zeros(3, np.float32)}, bitnet.ShapeError, "model.norm.weight"),
    ):
        damaged = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(error, match=words):
            target.load_state_dict(damaged)
        assert np.array_equal(target(TOKENS).numpy(), before), "nothing changes on a refusal"
    target.load_state_dict(state)
    assert np.array_equal(target(TOKENS).numpy(), source(TOKENS).numpy())
    state["model.norm.weight"][:] = 7  # a copy: the model does not follow
    assert np.array_equal(target(TOKENS).numpy(), source(TOKENS).numpy())


def test_initial_weights_are_functions_of_seed_and_name() -> None:
    one, same, other = (bitnet.BitNetForCausalLM(CONFIG, seed=seed).state_dict() for seed in (3, 3, 4))
    deeper = bitnet.BitNetForCausalLM(CONFIG.replace(num_hidden_layers=3), seed=3).state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(one[name], same[name])
    assert np.array_equal(one[name], deeper[name])
    assert not np.array_equal(one[name], other[name])
    assert not np.array_equal(one[name], one["model.layers.0.mlp.up_proj.weight"])
    # 24 * 16 draws: a mean within 5 of its standard errors, a deviation within a fifth.
    assert abs(one[name].mean()) < 5 * 0.02 / np.sqrt(384)
    assert 0.8 < one[name].std() / 0.02 < 1.2
    nn.manual_seed(5)
    first = nn.Linear(4, 4).weight.numpy(copy=True)
    assert not np.array_equal(first, nn.Linear(4, 4).weight.numpy())
    nn.manual_seed(5)
    assert np.array_equal(first, nn.Linear(4, 4).weight.numpy())


def test_full_precision_keeps_the_weights_that_were_multiplied() -> None:
    model = bitnet.BitNetForCausalLM(CONFIG, seed=0)
    layer = model.model.layers[0].mlp.gate_proj
    codes, scale = layer.codes().numpy(), np.float32(layer.weight_scale)
    count = model.ternary_stats().count
    assert count == sum(weight.size for _, weight in model.named_parameters() if weight.ndim == 2) - 2 * 30 * 16
    assert model.to_full_precision() is model
    plain = model.model.layers[0].mlp.gate_proj
    assert type(plain) is nn.Linear
    assert np.array_equal(plain.weight.numpy(), codes * scale)
    assert not list(model.bitlinears())
    assert model.ternary_stats().count == 0


def test_histograms_count_every_weight() -> None:
    model = bitnet.BitNetForCausalLM(CONFIG)
    histograms = model.weight_histograms(bins=10)
    assert list(histograms) == [path for path, _ in model.bitlinears()]
    for path, layer in model.bitlinears():
        counts, edges = histograms[path]
        assert counts.sum() == layer.weight.size
        assert len(edges) == 11
    counts, _ = nn.Linear(3, 4).weight_histogram(5)
    assert counts.sum() == 12


def test_bias_is_added_and_trained() -> None:
    layer = nn.BitLinear(6, 5, bias=True)
    x = bitnet.tensor(np.ones((3, 6), np.float32))
    without = ops.bitlinear(x, layer.weight).numpy()
    assert layer.bias is not None
    layer.bias.copy_(np.arange(5))
    assert np.array_equal(layer(x).numpy(), without + np.arange(5, dtype=np.float32))
    layer(x).sum().backward()
    assert layer.bias.grad is not None
    assert layer.bias.grad.numpy().tolist() == [3.0] * 5


def test_refusals_name_the_values() -> None:
    with pytest.raises(bitnet.ShapeError, match="0 inputs"):
        nn.BitLinear(0, 4)
    with pytest.raises(bitnet.ShapeError, match=r"7 channels.*expects 6"):
        nn.BitLinear(6, 4)(bitnet.zeros((2, 7)))
    with pytest.raises(TypeError, match="forward"):
        nn.Module()()
    with pytest.raises(bitnet.ShapeError, match=r"\(B, T\)"):
        bitnet.BitNetForCausalLM(CONFIG)([1, 2, 3])
    with pytest.raises(IndexError, match="30"):
        bitnet.BitNetForCausalLM(CONFIG)([[1, 30]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 3}, "multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"linear": "fp8"}, "fp8"),
        ({"hiden_size": 3}, "hiden_size"),
    ],
)
def test_impossible_configs(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CONFIG.replace(**changes)


def test_presets_have_published_shapes() -> None:
    preset = bitnet.BitNetConfig.preset

    def count(c: bitnet.BitNetConfig) -> int:
        kv = c.kv_heads * c.head_dim
        block = 2 * c.hidden_size**2 + 2 * kv * c.hidden_size + 3 * c.hidden_size * c.intermediate_size
        norms = 2 * c.hidden_size + (c.hidden_size + c.intermediate_size if c.sub_norms else 0)
        tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        return tables + c.num_hidden_layers * (block + norms) + c.hidden_size

    assert count(preset("2b-4t")) == 2_412_820_480  # microsoft/bitnet-b1.58-2B-4T
    assert count(preset("char")) == 3_590_784
    char = bitnet.BitNetForCausalLM(preset("char"))
    assert char.num_parameters() == count(preset("char"))
    with pytest.raises(ValueError, match="nono"):
        preset("nono")

"""Text by a screened head is the text by the bf16 head, wherever the sampler looks at the largest logits only."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from bitnet import BitNetConfig, BitNetForCausalLM
from bitnet.decoding import Decoder, generate_ids
from bitnet.errors import BitnetError
from bitnet.optim import AdamW
from bitnet.sampling import Sampler

CONFIG = BitNetConfig(700, 64, 96, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)


@functools.cache
def trained() -> dict[str, Any]:
    """Weights after thirty steps on sequences with a rule: some rows of the head were seen, others never."""
    model = BitNetForCausalLM(CONFIG, seed=3)
    optimizer = AdamW(model, lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(30):
        tokens = (rng.integers(0, 200, (8, 1)) + 7 * np.arange(33)) % 200
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    return model.state_dict()


def model(head: str, is_trained: bool = False) -> BitNetForCausalLM:
    made = BitNetForCausalLM(CONFIG, seed=3)
    if is_trained:
        made.load_state_dict(trained())
    return made.pack(head=head)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 5}, {"top_k": 40, "top_p": 0.9}, {}, {"repetition_penalty": 1.3}]
)
def test_the_same_tokens(options: dict[str, float], is_trained: bool) -> None:
    got, want = ([*generate_ids(model(head, is_trained), [1, 2, 3], 40, **options)] for head in ("screened", "bf16"))
    assert got == want


def test_what_a_sampler_needs() -> None:
    assert Sampler(temperature=0).largest_needed == 1
    assert Sampler(top_k=7).largest_needed == 7
    assert Sampler(top_p=0.5).largest_needed is None
    assert Sampler(temperature=0, repetition_penalty=1.1).largest_needed is None


def test_a_decoder_makes_no_more_than_it_is_asked_for() -> None:
    decoder = Decoder(model("screened"))
    full = decoder.prefill([[5, 6]])
    assert np.isfinite(full).all()
    decoder.reset()
    decoder.top = 2
    few = decoder.prefill([[5, 6]])
    assert 2 <= np.isfinite(few).sum() < full.size
    step = decoder.step([7])
    decoder.rewind(2)
    decoder.top = None
    assert step.argmax() == decoder.step([7]).argmax()


def test_logits_that_are_no_numbers_are_refused() -> None:
    for bad in (np.array([1.0, np.nan]), np.array([1.0, np.inf]), np.full(2, -np.inf)):
        with pytest.raises(BitnetError, match="not finite"):
            Sampler(temperature=0)(bad, 0)

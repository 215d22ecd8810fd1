"""Text by a screened head is the text by the bf16 head, wherever the sampler looks at the largest logits only."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet import BitNetConfig, BitNetForCausalLM
from bitnet.decoding import Decoder, generate_ids
from bitnet.errors import BitnetError
from bitnet.sampling import Sampler

CONFIG = BitNetConfig(700, 64, 96, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)


def model(head: str) -> BitNetForCausalLM:
    return BitNetForCausalLM(CONFIG, seed=3).pack(head=head)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 5}, {"top_k": 40, "top_p": 0.9}, {}, {"repetition_penalty": 1.3}]
)
def test_the_same_tokens(options: dict[str, float]) -> None:
    got, want = ([*generate_ids(model(head), [1, 2, 3], 40, **options)] for head in ("screened", "bf16"))
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

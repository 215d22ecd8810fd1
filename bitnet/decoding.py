"""Generation in one call; and the names of its parts, which are modules of their own.

Decoder (bitnet.decoder) makes logits, TokenStream (bitnet.token_stream) draws ids from them, with drafts verified
several at once (bitnet.drafting), TextStream (bitnet.text_stream) turns ids into text; bitnet.batching does it for many
prompts together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bitnet.batching import Batch, generate_batch
from bitnet.decoder import ContextFullError, Decoder, Logits
from bitnet.drafting import ModelDrafter, NgramDrafter, Speculation
from bitnet.model import BitNetForCausalLM
from bitnet.sampling import Sampler
from bitnet.text_stream import StopFilter, Stops, TextStream, prompt_ids
from bitnet.token_stream import TokenStream
from bitnet.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "ContextFullError",
    "Decoder",
    "Logits",
    "ModelDrafter",
    "NgramDrafter",
    "Speculation",
    "StopFilter",
    "Stops",
    "TextStream",
    "TokenStream",
    "generate",
    "generate_batch",
    "generate_ids",
    "prompt_ids",
]


def generate(
    model: BitNetForCausalLM,
    prompt: str | Sequence[int],
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Stops = (),
    stream: Callable[[str], Any] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> str:
    """The text that continues a prompt, without the prompt; `stream` is called with each piece as it comes.

    See Sampler for the choice of tokens, TextStream for where it begins and ends, and TokenStream for the other
    options: context="slide", for a text longer than the model's context, is the one most often wanted.
    """
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed)
    pieces = []
    for piece in TextStream(model, prompt, sampler, max_new_tokens, stop, tokenizer, **options):
        pieces.append(piece)
        if stream is not None:
            stream(piece)
    return "".join(pieces)


def generate_ids(
    model: BitNetForCausalLM,
    prompt: Sequence[int],
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    end_id: int | None = None,
    **options: Any,
) -> TokenStream:
    """The ids that continue a prompt of ids, as an iterator; options are those of TokenStream."""
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed)
    return TokenStream(model, prompt, sampler, max_new_tokens, end_id, **options)

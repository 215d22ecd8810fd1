"""Tokenizers of the published kinds, trained small: LLaMA-3's byte-level BPE, and texts that are hard to get right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from bitnet.tokenizer import FileTokenizer

# As published with LLaMA-3; written here again, so that the tests do not ask the package what is right.
LLAMA_3_WORDS = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
# The order of ids 128000..128255.
SPECIAL = [BOS, EOS, *RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>", RESERVED[4], EOT, *RESERVED[5:]]

NASTY = [
    "",
    " ",
    "a",
    " a",
    "  a  b ",
    "\n",
    "\r\n\r\n x",
    "def f(x):\n\tif x:\r\n        return 12345678  \n\n\n",
    " " * 41 + "x" + " " * 16,
    "=" * 37,
    "it's WE'LL don'T 'tis 'S",
    "1 12 123 1234 3.14159 1,000,000",
    "\u00e9 e\u0301 \u0e01\u0e33 \u65e5\u672c\u8a9e \U0001f600\U0001f468\u200d\U0001f469",
    "\u0416\u0434\u0438 \u0660\u0661\u0662",
    "\u00a0x\u3000y\u2028z\ufeff",
    "a\0b",
    "<s></s><unk><pad></line><0x41><0xFF>",
    BOS + EOS + " " + EOT + "<|reserved_special_token_7|>[PAD300]",
    "(a)[b]{c};#!/bin/sh && x|y> $HOME ~`^",
]


def llama3_tokenizer(text: str, folder: Path | None = None, chat_template: str | None = None) -> FileTokenizer:
    """Its pre-split pattern, ignore_merges, special tokens behind all others, bos put first; loaded from a folder."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    backend: Any = Backend(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text, "1234 1999 " * 50], trainer)
    # Words no merges lead to: only ignore_merges gives them.
    fields = json.loads(backend.to_str())
    for word in ("\u0120qzx", "wqjk"):
        fields["model"]["vocab"][word] = len(fields["model"]["vocab"])
    backend = Backend.from_str(json.dumps(fields))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    if folder is None:
        return FileTokenizer(backend.to_str(), BOS, EOS, chat_template=chat_template)
    FileTokenizer(backend.to_str(), BOS, EOS, chat_template=chat_template).save(folder)
    return FileTokenizer.load(folder / "tokenizer.json")


def nasty_texts(count: int = 150) -> list[str]:
    """NASTY, and pieces of it put together at random."""
    rng = random.Random(5)
    bits = [*NASTY, *"aes\u00e9\u65e5\U0001f600 \t\n0159<|>_'", " the", " qzx", "wqjk", "  ", "self", "token", "</s"]
    return NASTY + ["".join(rng.choices(bits, k=rng.randint(1, 12))) for _ in range(count)]

"""Graphs walked back, dropped halfway, replayed, nested, and left behind by threads that have ended."""

import threading

import growth
import numpy as np

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, Tape

CONFIG = BitNetConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                      max_position_embeddings=8)  # fmt: skip
MODEL = BitNetForCausalLM(CONFIG)
TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8)


def walked() -> None:
    loss = MODEL(TOKENS, TOKENS)
    loss.backward()
    MODEL.zero_grad()


def dropped() -> None:
    loss = MODEL(TOKENS, TOKENS)
    _ = loss * 2.0
    with bitnet.no_grad():
        MODEL(TOKENS)


def replayed() -> None:
    tokens = bitnet.tensor(TOKENS)
    with Tape() as tape:
        loss = MODEL(tokens, TOKENS)
        with Tape() as inner:
            _ = loss.detach() * 2.0
    for _ in range(2):
        tokens.copy_(TOKENS)
        tape.replay()
        loss.backward()
    inner.replay()
    assert tape.ops


def checkpointed() -> None:
    MODEL.activation_checkpointing = True
    walked()
    dropped()
    replayed()
    MODEL.activation_checkpointing = False


def outlived() -> None:
    kept: list[bitnet.Tensor] = []
    thread = threading.Thread(target=lambda: kept.append(MODEL(TOKENS, TOKENS)))
    thread.start()
    thread.join()


growth.assert_none(walked)
growth.assert_none(dropped)
growth.assert_none(replayed)
growth.assert_none(checkpointed)
growth.assert_none(outlived)

"""Models and optimizers made, trained for a step, saved, restored and dropped."""

import growth
import numpy as np

from bitnet import BitNetConfig, BitNetForCausalLM, Tape, ops
from bitnet.cache import KVCache
from bitnet.ops import no_grad
from bitnet.optim import AdamW

CONFIG = BitNetConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                      max_position_embeddings=8)  # fmt: skip
TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8)


def step() -> None:
    model = BitNetForCausalLM(CONFIG)
    optimizer = AdamW(model)
    tokens = ops.zeros((2, 8), "i32")
    with Tape() as tape:
        loss = model(tokens, TOKENS)
    for _ in range(2):
        optimizer.zero_grad()
        tokens.copy_(TOKENS)
        tape.replay()
        loss.backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    model.load_state_dict(model.state_dict())
    assert model.ternary_stats().count
    with no_grad():
        cache = KVCache(CONFIG, 2, 8).step(2)
        model(TOKENS[:, :4], cache=cache)
        cache.start.copy_([4, 4])
    model.to_full_precision()
    repr(model)


growth.assert_none(step)

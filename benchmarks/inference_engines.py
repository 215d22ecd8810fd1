"""The engines of inference.py by name, and the model and the tokens that all of them are given."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import turns
from train_speed import KEEP_MEMORY

from bitnet import BitNetConfig

TORCH = "engine_torch.py"


class Engine(NamedTuple):
    """A line of the table: which script runs it, and with which settings beside shape and capacity."""

    script: str
    settings: dict[str, Any]


def engines(heads: Sequence[str], layouts: Sequence[str]) -> dict[str, Engine]:
    """All by name. bitnet has one for each output head and each layout of its codes."""
    found = {}
    for head in heads:
        for layout in layouts:
            name = "_".join(["bitnet", head, *([layout] if len(layouts) > 1 else [])])
            found[name] = Engine("engine_bitnet.py", {"pack": {"head": head, "layout": layout}})
    found |= {f"llama_{kind.lower()}": Engine("engine_llama.py", {"type": kind}) for kind in ("TQ2_0", "TQ1_0")}
    return found | {"transformers_bf16": Engine(TORCH, {})}


def shared(config: BitNetConfig, capacity: int) -> BitNetConfig:
    """The model of this shape that every engine can run."""
    return config.replace(
        hidden_act="silu",
        tie_word_embeddings=True,
        num_key_value_heads=config.kv_heads,
        intermediate_size=-(-config.intermediate_size // 256) * 256,
        max_position_embeddings=max(config.max_position_embeddings, capacity),
    )


def start(engine: Engine, config: BitNetConfig, capacity: int, work: Path, llama_python: str) -> turns.Worker:
    """A worker with its model loaded, or with an error."""
    shape = dataclasses.asdict(config)
    settings = {"shape": shape, "capacity": capacity, **engine.settings}
    if "type" not in settings:
        return turns.Worker(engine.script, settings, environment=KEEP_MEMORY if engine.script == TORCH else {})
    made_of = [Path(__file__).with_name(name).read_bytes() for name in ("gguf_random.py", "random_weights.py")]
    digest = hashlib.sha256(b"".join([json.dumps(shape, sort_keys=True).encode(), *made_of])).hexdigest()[:8]
    name = f"{config.num_hidden_layers}x{config.hidden_size}-{settings['type'].lower()}-{digest}.gguf"
    return turns.Worker(engine.script, {**settings, "file": str(work / name)}, llama_python)


class Tokens(NamedTuple):
    """What every engine reads in a turn: the prompt and the tokens that follow, of which slow engines take fewer."""

    prompt: list[int]
    following: list[int]
    torch_gen: int

    @staticmethod
    def draw(config: BitNetConfig, prompt: int, gen: int, torch_gen: int) -> Tokens:
        """The same in every run."""
        ids = np.random.default_rng(0).integers(0, config.vocab_size, prompt + gen).tolist()
        return Tokens(ids[:prompt], ids[prompt:], torch_gen)

    def turn(self, engine: Engine) -> dict[str, list[int]]:
        few = engine.script == TORCH
        return {"prompt": self.prompt, "following": self.following[: self.torch_gen] if few else self.following}


def wanted(name: str, prefixes: Sequence[str]) -> bool:
    """Whether --engines asks for it: by its name or by the beginning of it."""
    return any(name == prefix or name.startswith(f"{prefix}_") for prefix in prefixes)

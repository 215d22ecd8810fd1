"""BitNet b1.58: ternary language models, trained and run in integer arithmetic.

The names most people need; `bitnet.nn`, `bitnet.optim`, `bitnet.ops` and the command line (`bitnet --help`) hold the
rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bitnet import nn, ops, optim
from bitnet._core import (
    ShapeError,
    Tape,
    Tensor,
    current_isa,
    from_dlpack,
    get_threads,
    isa_names,
    memory_stats,
    memory_trim,
    pack_ternary,
    set_threads,
    use_isa,
)
from bitnet.config import BitNetConfig
from bitnet.model import BitNetForCausalLM
from bitnet.ops import no_grad, tensor, zeros

__version__ = "0.1.0"

# Loaded when first used, so that `import bitnet` stays light.
_LAZY = {
    "Trainer": "bitnet.trainer",
    "TrainerConfig": "bitnet.trainer_config",
    "from_pretrained": "bitnet.pretrained",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bitnet' has no attribute {name!r}")


__all__ = [
    "BitNetConfig",
    "BitNetForCausalLM",
    "ShapeError",
    "Tape",
    "Tensor",
    "Trainer",
    "TrainerConfig",
    "current_isa",
    "from_dlpack",
    "from_pretrained",
    "get_threads",
    "isa_names",
    "memory_stats",
    "memory_trim",
    "nn",
    "no_grad",
    "ops",
    "optim",
    "pack_ternary",
    "set_threads",
    "tensor",
    "use_isa",
    "zeros",
]

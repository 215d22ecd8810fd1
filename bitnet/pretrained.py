"""from_pretrained: a model from whatever holds one, found out by looking at it."""

from __future__ import annotations

from pathlib import Path

from bitnet.checkpoint import open_checkpoint
from bitnet.model import BitNetForCausalLM


def from_pretrained(path: str | Path) -> BitNetForCausalLM:
    """Opens a run folder (its newest complete checkpoint), a checkpoint folder, or a packed `.bitnet` file.

    The model's attribute `tokenizer` is the one it was trained with. CheckpointError names what is missing or damaged.
    """
    folder = Path(path)
    if folder.is_file():
        from bitnet.formats.packing import load_packed

        return load_packed(folder)
    return open_checkpoint(folder).model()

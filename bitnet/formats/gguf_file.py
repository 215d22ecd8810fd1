"""The GGUF container: metadata with types, and tensors of ggml's types, in one file that is mapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Value:
    """A typed value of the metadata.

    type_name: u8 i8 u16 i16 u32 i32 u64 i64 (value: int), f32 f64 (float), bool, str; an array is the name of its
    elements' type in brackets, "[str]" or "[i32]", and its value a list of them; arrays nest: "[[u8]]".
    """

    type_name: str
    value: Any

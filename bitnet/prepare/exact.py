"""Exact duplicates: texts that differ in nothing but case, white space and how Unicode spells a character."""

from __future__ import annotations

import hashlib
import unicodedata


def normalized(text: str) -> str:
    """The text as duplicates are compared: one spelling of each character, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(text: str) -> bytes:
    """16 bytes that two texts share exactly when they are duplicates: among 10^12 texts, two collide by chance once in
    10^14 corpora."""
    return hashlib.blake2b(normalized(text).encode(), digest_size=16).digest()

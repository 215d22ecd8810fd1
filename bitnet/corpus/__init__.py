"""Documents: where text comes from, in which order, and on which side of the held-out split it falls.

A corpus is read as a stream, as often as wanted, always in the same order: nothing larger than one document is held.
Text is passed on exactly as stored; only what is not UTF-8 text is left out, and counted.
"""

from bitnet.corpus.document import Document
from bitnet.corpus.files import TEXT_SUFFIXES, Corpus, documents
from bitnet.corpus.split import FEW, Counter, Split, Survey
from bitnet.corpus.stdlib import stdlib, stdlib_name

RECIPES = ("stdlib",)

__all__ = [
    "FEW",
    "RECIPES",
    "TEXT_SUFFIXES",
    "Corpus",
    "Counter",
    "Document",
    "Split",
    "Survey",
    "documents",
    "stdlib",
    "stdlib_name",
]

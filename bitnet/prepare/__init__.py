"""What happens to documents before they are packed: filters, duplicates, the held-out split, shards.

screening.py   a pass that decides which documents stay: filters.py, exact.py, near.py
held_out.py    what all parts of a mixture hold out, for the screening of each
pipeline.py    screening, then the tokenizer, then shards.py, then the manifest
workers.py     the same results in the same order from any number of processes
folder.py      the folder that comes of it
chat.py        conversations instead of documents, with marks on their answers
unfinished.py  what a pack that was killed goes on from
"""

from bitnet.prepare.chat import pack_chat
from bitnet.prepare.filters import Filters
from bitnet.prepare.folder import SPLITS
from bitnet.prepare.held_out import HeldOut
from bitnet.prepare.pipeline import SHARD_TOKENS, open_corpus, pack
from bitnet.prepare.screening import DEDUP, Preparation

__all__ = ["DEDUP", "SHARD_TOKENS", "SPLITS", "Filters", "HeldOut", "Preparation", "open_corpus", "pack", "pack_chat"]

"""Published results of BitNet b1.58 and of full-precision models trained beside it, and the tasks they are of.

Rows "reported" are table 2 of Ma et al. 2024 (arXiv 2402.17764): zero-shot accuracy in percent, models trained on 100
billion tokens of RedPajama. Rows "reproduced" are those of the model cards of 1bitLLM/bitnet_b1_58-large, -xl and -3B,
which repeat the reported ones and say that the evaluation is the authors'. Perplexity is the mean of WikiText-2's and
C4's. The row of 2B-4T is table 1 of Ma et al. 2025 (arXiv 2504.12285), whose model had 4 trillion tokens, fine-tuning
and other settings: it is no zero-shot accuracy beside the others.
"""

from __future__ import annotations

from typing import NamedTuple

# The harness's names, by the columns of the paper's table; the paper has no StoryCloze, which that of BitNet (arXiv
# 2310.11453) has.
COLUMNS = {
    "ARCe": "arc_easy",
    "ARCc": "arc_challenge",
    "HS": "hellaswag",
    "BQ": "boolq",
    "OQ": "openbookqa",
    "PQ": "piqa",
    "WGe": "winogrande",
}
PAPER_TASKS = [*COLUMNS.values(), "storycloze_2016"]


class Published(NamedTuple):
    """accuracy: percent, in the order of COLUMNS; average: as printed; perplexity: where there is one."""

    name: str
    source: str
    accuracy: tuple[float, ...]
    average: float | None
    perplexity: float | None


PAPER, CARD, REPORT = "arXiv 2402.17764, table 2", "model cards of 1bitLLM", "arXiv 2504.12285, table 1"

ROWS = [
    Published("FP16 LLaMA 700M", PAPER, (54.7, 23.0, 37.0, 60.0, 20.2, 68.9, 54.8), 45.5, 12.33),
    Published("BitNet b1.58 700M", PAPER, (51.8, 21.4, 35.1, 58.2, 20.0, 68.1, 55.2), 44.3, 12.87),
    Published("BitNet b1.58 700M, reproduced", CARD, (51.4, 21.8, 35.0, 59.6, 20.6, 67.5, 55.4), 44.5, 12.78),
    Published("FP16 LLaMA 1.3B", PAPER, (56.9, 23.5, 38.5, 59.1, 21.6, 70.0, 53.9), 46.2, 11.25),
    Published("BitNet b1.58 1.3B", PAPER, (54.9, 24.2, 37.7, 56.7, 19.6, 68.8, 55.8), 45.4, 11.29),
    Published("BitNet b1.58 1.3B, reproduced", CARD, (55.8, 23.7, 37.6, 59.0, 20.2, 69.2, 56.0), 45.9, 11.19),
    Published("FP16 LLaMA 3B", PAPER, (62.1, 25.6, 43.3, 61.8, 24.6, 72.1, 58.2), 49.7, 10.04),
    Published("BitNet b1.58 3B", PAPER, (61.4, 28.3, 42.9, 61.5, 26.6, 71.5, 59.3), 50.2, 9.91),
    Published("BitNet b1.58 3B, reproduced", CARD, (60.9, 28.0, 42.3, 58.3, 26.0, 71.4, 60.3), 49.6, 9.88),
    Published("BitNet b1.58 2B-4T", REPORT, (74.79, 49.91, 68.44, 80.18, 41.60, 77.09, 71.90), None, None),
]

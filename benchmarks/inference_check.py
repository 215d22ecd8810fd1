"""Do the engines of inference.py compute the same? Logits of a small model, compared after a prompt and every token.

    python benchmarks/inference_check.py --llama-python PATH

In floats, without quantized activations, bitnet's graph must be llama.cpp's to rounding. What the engines measured
compute can only be alike: llama.cpp quantizes activations 256 at a time and its table of embeddings to six bits, and
transformers rounds everything between two products to bf16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from inference_engines import Engine, Tokens, engines, shared, start, wanted

from bitnet import BitNetConfig

TINY = BitNetConfig(512, 256, 512, 2, 4, 2)
PROMPT, FOLLOWING = 24, 40
# Engine: whom its logits are compared with, their least correlation, their largest difference in standard deviations.
CHECKS = {
    "bitnet_float": ("llama_f32", 0.999999, 1e-4),
    "llama_tq2_0": ("bitnet", 0.99, 1.0),
    "llama_tq1_0": ("bitnet", 0.99, 1.0),
    "transformers_bf16": ("bitnet", 0.99, 1.0),
}


def compare(got: np.ndarray, want: np.ndarray, correlation: float, most: float) -> tuple[bool, str]:
    """Whether logits (N, V) agree, and how well, in words."""
    found = np.corrcoef(got.ravel(), want.ravel())[0, 1]
    apart = np.abs(got - want).max() / want.std()
    same = (got.argmax(-1) == want.argmax(-1)).mean()
    words = f"correlation {found:.6f}, largest difference {apart:.2g} standard deviations, same first choice {same:.0%}"
    return bool(found >= correlation and apart <= most), words


def logits(engine: Engine, work: Path, llama_python: str) -> tuple[np.ndarray | None, str | None]:
    """Of the prompt and of each token after it, (1 + FOLLOWING, V); or why there are none."""
    config = shared(TINY, PROMPT + FOLLOWING)
    tokens = Tokens.draw(config, PROMPT, FOLLOWING, FOLLOWING)
    with closing(start(engine, config, PROMPT + FOLLOWING, work, llama_python)) as worker:
        answer = worker.ask(threads=1, logits=True, **tokens.turn(engine))
        return None if answer is None else np.array(answer["logits"]), worker.error


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where engines disagree or one cannot run."""
    parser = argparse.ArgumentParser(description="Compares the logits of the engines of inference.py.")
    parser.add_argument("--engines", nargs="+", default=["bitnet", "llama", "transformers"], metavar="E",
                        help="names or their beginnings (default: bitnet llama transformers)")  # fmt: skip
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH",
                        help="an interpreter with llama_cpp and gguf (default: this one)")  # fmt: skip
    args = parser.parse_args(argv)
    known = engines(["f32"], ["auto"])
    known["bitnet"] = known.pop("bitnet_f32")
    known["bitnet_float"] = Engine("engine_bitnet.py", {"float": True})
    known["llama_f32"] = Engine("engine_llama.py", {"type": "F32", "exact": True})
    with tempfile.TemporaryDirectory() as folder:
        found = {name: logits(engine, Path(folder), args.llama_python)
                 for name, engine in known.items() if wanted(name, args.engines)}  # fmt: skip
    failures = 0
    for name, (other, correlation, most) in CHECKS.items():
        if name not in found or other not in found:
            continue
        (got, error), (want, other_error) = found[name], found[other]
        if got is None or want is None:
            good, words = False, f"cannot run: {error or other_error}"
        else:
            good, words = compare(got, want, correlation, most)
        failures += not good
        print(f"{name} {'agrees' if good else 'DOES NOT AGREE'} with {other}: {words}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

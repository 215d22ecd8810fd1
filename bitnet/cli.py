"""Console script `bitnet`: one word chooses the command, which is imported only then."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "data": ("bitnet.data_cli", "turn text into packed tokens"),
    "train": ("bitnet.train", "train a model; with no flags, a complete small run"),
    "plan": ("bitnet.plan_cli", "what training or generation takes in memory, beforehand"),
    "generate": ("bitnet.generate", "continue a prompt with a trained model"),
    "chat": ("bitnet.chat", "talk with a trained model"),
    "serve": ("bitnet.serve", "answer over HTTP, as OpenAI's API, and on a page"),
    "evaluate": ("bitnet.evaluate", "loss, perplexity and bits per byte on a text"),
    "lm-eval": ("bitnet.harness", "tasks of the lm-evaluation-harness, beside published results"),
    "report": ("bitnet.report", "one HTML page on runs: curves, gaps, layers, samples"),
    "ema": ("bitnet.ema", "make the averaged weights of a run a run of their own"),
    "pack": ("bitnet.pack", "put a trained model into one .bitnet file"),
    "info": ("bitnet.info", "what a .bitnet file holds, its checksums verified"),
    "import": ("bitnet.import_cli", "take in a checkpoint of Hugging Face, a GGUF or an ONNX file"),
    "export": ("bitnet.export", "write for transformers, llama.cpp, bitnet.cpp, onnxruntime"),
    "compare": ("bitnet.compare", "where two models, or two forms of one, begin to differ"),
    "bench": ("bitnet.bench", "speed of generation, beside what memory and processor allow"),
}

HELP = """\
usage: bitnet COMMAND ...

BitNet b1.58: ternary language models, trained and run on CPUs in integer arithmetic.

commands:
{commands}

start here:
  bitnet train                                        trains on Python's own sources, a few minutes
  bitnet generate runs/nano-stdlib-001 -p "def "      lets the model write
  bitnet serve runs/nano-stdlib-001                   the same on a page, and for programs
  bitnet evaluate runs/nano-stdlib-001 --data FILE    measures it on a text
  bitnet train --resume runs/nano-stdlib-001          goes on with a run that was stopped
  bitnet pack runs/nano-stdlib-001 -o nano.bitnet     one file that generate, evaluate and bench open too

`bitnet COMMAND --help` explains a command; `python -m bitnet.cli COMMAND` is the same."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items())))
        return 0
    if words[0] == "--version":
        from bitnet import __version__

        print(f"bitnet {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"error: {words[0]!r} is no command; one of {', '.join(COMMANDS)} (bitnet --help)", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[words[0]][0])
    status: int = module.main(words[1:])
    return status


if __name__ == "__main__":
    raise SystemExit(main())

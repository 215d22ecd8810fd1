"""A model of full size through every format: how long it takes, how much memory, and whether the logits survive.

A random checkpoint in the published form (hf-packed, bf16) is made once per activation and kept in --work. Then it is
imported and exported by `bitnet import` and `bitnet export`, each in a process of its own, with --verify; and what
llama.cpp can load it loads, and continues a prompt.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import history
import machine
import numpy as np
import random_weights

from bitnet import BitNetConfig, BitNetForCausalLM
from bitnet.formats.source import Codes, Floats, Stored, assemble
from bitnet.formats.weights import bf16_bits

# What is written from the checkpoint: name, arguments of `bitnet export`, the activation that it needs (None: any).
EXPORTS = [
    ("hf-packed", ["--to", "hf-packed"], None),
    ("bitnet, coded", ["--to", "bitnet", "--coded"], None),
    ("gguf bitnet.cpp i2_s", ["--to", "gguf", "--flavour", "bitnet.cpp"], "relu2"),
    ("gguf ik f16", ["--to", "gguf", "--flavour", "ik"], "relu2"),
    ("gguf llama.cpp tq2_0", ["--to", "gguf", "--flavour", "llama.cpp"], "silu"),
    ("gguf llama.cpp tq1_0", ["--to", "gguf", "--flavour", "llama.cpp", "--weights", "tq1_0"], "silu"),
    ("onnx int8", ["--to", "onnx"], None),
    ("onnx int2", ["--to", "onnx", "--weights", "int2"], None),
]
SUFFIX = {"gguf": ".gguf", "onnx": ".onnx", "bitnet": ".bitnet", "hf-packed": "-hf-packed"}


class RandomSource:
    """A random packed model, a weight at a time: codes and embeddings of random_weights.py, norms near 1."""

    is_trainable = False

    def __init__(self, config: BitNetConfig) -> None:
        self.config, self.path = config, Path("random")
        latent = BitNetForCausalLM(config.replace(num_hidden_layers=1, vocab_size=8))
        names: dict[str, tuple[int, ...]] = {}
        for name, parameter in latent.named_parameters():
            shape = (config.vocab_size, *parameter.shape[1:]) if parameter.shape[0] == 8 else parameter.shape
            layers = range(config.num_hidden_layers) if ".layers.0." in name else [0]
            names |= {name.replace(".layers.0.", f".layers.{i}."): shape for i in layers}
        self.shapes = names
        self.ternary = [name for name in names if "_proj" in name]

    def about(self) -> dict[str, Any]:
        """No tokenizer."""
        return {"tokenizer": None}

    def read(self, name: str) -> Stored:
        """See Source."""
        shape = self.shapes[name]
        if name in self.ternary:
            return Codes(random_weights.codes(name, *shape), random_weights.scale(shape[1]))
        if len(shape) == 1:
            return Floats(np.ones(shape, np.float32))
        return Floats(bf16_bits(random_weights.matrix(name, *shape)), "bf16")

    def release(self, name: str) -> None:
        """See Source."""


def arguments() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="2b-4t", help="shape of the model (2b-4t)")
    parser.add_argument("--work", type=Path, default=Path("interchange"), help="where the files are written")
    parser.add_argument("--activations", nargs="+", choices=("relu2", "silu"), default=["relu2", "silu"])
    parser.add_argument("--llama-python", default=sys.executable, help="an interpreter with llama_cpp")
    parser.add_argument("--keep", action="store_true", help="leave the exported files there")
    parser.add_argument("--make", choices=("relu2", "silu"), help="only write the checkpoint with this activation")
    history.add_arguments(parser)
    return parser


def run(command: list[str]) -> tuple[dict[str, Any], str]:
    """A command in a process of its own: seconds, peak memory, and what it printed."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        printed, complaint = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    found = {"seconds": time.perf_counter() - start, "peak_memory_bytes": usage.ru_maxrss * 1024}
    if process.returncode:
        found["error"] = (complaint.strip().splitlines() or ["no word"])[-1]
    return found, printed


def bitnet_command(*words: str | Path) -> list[str]:
    """`bitnet WORDS`."""
    return [sys.executable, "-m", "bitnet.cli", *map(str, words)]


def make(preset: str, activation: str, folder: Path) -> None:
    """Writes the checkpoint."""
    from bitnet.formats.hf_export import save_hf

    config = BitNetConfig.preset(preset, hidden_act=activation, tie_word_embeddings=True)
    save_hf(assemble(RandomSource(config), "2"), folder, packed=True, dtype="bf16")


def made(work: Path, preset: str, activation: str) -> Path:
    """The checkpoint, written unless it is there; in another process, whose memory no child of this one inherits."""
    folder = work / f"{preset}-{activation}"
    if not folder.exists():
        words = ["--make", activation, "--preset", preset, "--work", str(work)]
        subprocess.run([sys.executable, __file__, *words], check=True)
    return folder


def steps(args: argparse.Namespace, source: Path, activation: str) -> Iterator[tuple[str, list[str], Path]]:
    """(name, command, result) of every way from the checkpoint."""
    imported = source.with_suffix(".bitnet")
    yield "import to .bitnet", bitnet_command("import", source, imported, "--verify", "--force"), imported
    for name, options, needs in EXPORTS:
        if needs in (None, activation):
            out = source.with_name(f"{source.name}-{name.replace(' ', '-').replace(',', '')}{SUFFIX[options[1]]}")
            yield name, bitnet_command("export", imported, *options, "-o", out, "--verify", "--force"), out


# The file is loaded and continues a prompt greedily; prints seconds and tokens.
LLAMA = """
import json, sys, time
import llama_cpp
start = time.perf_counter()
model = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=2, verbose=False)
seconds = time.perf_counter() - start
tokens = [token for token, _ in zip(model.generate([1, 2, 3, 4], temp=0.0), range(4))]
print(json.dumps({"load_seconds": seconds, "tokens": tokens}))
"""


def measure(args: argparse.Namespace, activation: str) -> Iterator[dict[str, Any]]:
    """One result for every step, printed as it comes."""
    source = made(args.work, args.preset, activation)
    for name, command, out in steps(args, source, activation):
        found, printed = run(command)
        own = re.search(r"([\d,]+) bytes, ([\d.]+) s, peak memory ([\d.]+) GB", printed)
        agreement = re.search(r"(read back|run by onnxruntime): (.*)", printed)
        result = {"activation": activation, "what": name, **found}
        if own:
            result |= {"bytes": int(own[1].replace(",", "")), "write_seconds": float(own[2]), "write_gb": float(own[3])}
        if agreement:
            result["agreement"] = agreement[2]
        yield result
        if "llama.cpp" in name and "error" not in found:
            found, printed = run([args.llama_python, "-c", LLAMA, str(out)])
            yield {"activation": activation, "what": f"llama.cpp loads {name}", **found, "agreement": printed.strip()}
        if not args.keep and out != source.with_suffix(".bitnet"):
            remove(out)


def remove(path: Path) -> None:
    """A file and what lies beside it, or a folder."""
    import shutil

    for found in path.parent.glob(path.name + "*"):
        shutil.rmtree(found) if found.is_dir() else found.unlink()


def line(result: dict[str, Any]) -> str:
    """A result as a row of the table."""
    if "error" in result:
        return f"{result['activation']:<6} {result['what']:<36} {result['error']}"
    size = f"{result['bytes'] / 1e6:,.0f} MB" if "bytes" in result else ""
    own = f"{result['write_seconds']:.1f} s, {result['write_gb']:.2f} GB" if "write_seconds" in result else ""
    return (
        f"{result['activation']:<6} {result['what']:<36} {size:>9}  {own:>16}  "
        f"{result['seconds']:>6.1f} s, {result['peak_memory_bytes'] / 1e9:.2f} GB  {result.get('agreement', '')}"
    )


def main() -> int:
    """Prints a table, and adds it to the history."""
    args = arguments().parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.make:
        make(args.preset, args.make, args.work / f"{args.preset}-{args.make}")
        return 0
    here = machine.fingerprint()
    print(machine.one_line(here))
    print("\nsize; time and peak memory to read and write; the same with verification; logits beside the source's")
    results = []
    for result in (r for activation in args.activations for r in measure(args, activation)):
        print(line(result), flush=True)
        name = f"{result['activation']} {result['what']}"
        results.append(history.entry(name, [result["seconds"]], "s", False, **result))
    history.keep(args, [history.run("interchange", {"preset": args.preset}, here, results)])
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    raise SystemExit(main())

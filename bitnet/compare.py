"""Command line `bitnet compare`: where two models, or two forms of one, begin to differ on a text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet import ops
from bitnet.agreement import Agreement, compare_logits, tokens_of
from bitnet.command import RUN, add_reading, exit_status, reading_of
from bitnet.errors import ConfigError
from bitnet.formats.source import Reading
from bitnet.model import BitNetForCausalLM
from bitnet.pretrained import open_model
from bitnet.threads import use_threads

Array = np.ndarray[Any, Any]

MEANING = """\
Hidden states (T, C) after the embedding, each block and the last norm. norm: mean length of a token's state. cosine:
mean over tokens, 1 for the same direction. difference: mean length of the difference by the first model's norm."""


@dataclass(frozen=True)
class LayerDifference:
    """One line of the table."""

    layer: str
    norm_a: float
    norm_b: float
    cosine: float
    difference: float


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="bitnet compare",
        description="Run two models on the same tokens and compare hidden states layer by layer, then logits. A and B "
        "are anything that generate opens, of one depth and width: a run and its export, packed and not, ours and "
        "another's.",
        epilog="example: bitnet compare runs/nano-stdlib-001 nano.gguf --text 'def main():'",
    )
    parser.add_argument("a", metavar="A", help=RUN)
    parser.add_argument("b", metavar="B", help="another")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", help="what both read (default: a paragraph of prose, code and other scripts)")
    what.add_argument("--data", type=Path, metavar="FILE", help="the beginning of this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the differences by layer (.png, .svg)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core; never changes a number")
    add_reading(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a request that cannot be met, 130 after Ctrl-C."""
    args = arguments().parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    a, b = (_open(name, reading_of(args)) for name in (args.a, args.b))
    text = args.text if args.data is None else args.data.read_text(encoding="utf-8")
    tokens = tokens_of(a, getattr(a, "tokenizer", None) or getattr(b, "tokenizer", None), text)
    layers, agreement = compare(a, b, tokens)
    print(table(layers), str(agreement), MEANING, sep="\n\n")
    if args.json is not None:
        found = {"a": args.a, "b": args.b, "layers": [asdict(layer) for layer in layers]} | agreement.as_dict()
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(layers, args.plot, (args.a, args.b))
        print(f"drawn: {args.plot}")
    return 0


def _open(name: str, reading: Reading) -> BitNetForCausalLM:
    """Options of reading are for the one of the two that does not say what it is."""
    try:
        return open_model(name, reading)
    except ConfigError:
        if reading == Reading():
            raise
        return open_model(name, Reading())


def compare(a: BitNetForCausalLM, b: BitNetForCausalLM, tokens: Array) -> tuple[list[LayerDifference], Agreement]:
    """Hidden states and logits of two models for the same tokens (1, T). ConfigError for models of other shapes."""
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        x, y = getattr(a.config, name), getattr(b.config, name)
        if x != y:
            raise ConfigError(f"the models cannot be compared: {name} is {x} in one and {y} in the other")
    layers = []
    with ops.no_grad():
        for (name, x), (_, y) in zip(hidden_states(a, tokens), hidden_states(b, tokens), strict=True):
            layers.append(_difference(name, x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])))
        return layers, compare_logits(a(tokens).numpy(), b(tokens).numpy())


def hidden_states(model: BitNetForCausalLM, tokens: Array) -> Iterator[tuple[str, Array]]:
    """(name, (1, T, C) in f64) after the embedding, each block and the last norm."""
    inner = model.model
    x = inner.embed_tokens(tokens)
    yield "embedding", x.numpy().astype(np.float64)
    for i, block in enumerate(inner.layers):
        x = block(x, inner.rope, None, i)
        yield f"layer {i}", x.numpy().astype(np.float64)
    yield "last norm", inner.norm(x).numpy().astype(np.float64)


def _difference(name: str, x: Array, y: Array) -> LayerDifference:
    norm_x, norm_y = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    tiny = np.finfo(np.float64).tiny
    cosine = (x * y).sum(-1) / np.maximum(norm_x * norm_y, tiny)
    away = np.linalg.norm(x - y, axis=-1) / np.maximum(norm_x, tiny)
    return LayerDifference(name, float(norm_x.mean()), float(norm_y.mean()), float(cosine.mean()), float(away.mean()))


def table(layers: Sequence[LayerDifference]) -> str:
    """The layers, a line each."""
    lines = [f"{'':<10}  {'norm A':>10}  {'norm B':>10}  {'cosine':>10}  {'difference':>10}"]
    for d in layers:
        lines.append(f"{d.layer:<10}  {d.norm_a:>10.4g}  {d.norm_b:>10.4g}  {d.cosine:>10.7f}  {d.difference:>10.3g}")
    return "\n".join(lines)


def draw(layers: Sequence[LayerDifference], path: Path, names: tuple[str, str]) -> None:
    """Norms of both models, and how far apart they are, by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    norms, apart = figure.subplots(2, 1, sharex=True)
    places = range(len(layers))
    norms.plot(places, [d.norm_a for d in layers], label=names[0])
    norms.plot(places, [d.norm_b for d in layers], "--", label=names[1])
    norms.set_ylabel("norm of a state")
    norms.legend()
    apart.semilogy(places, [max(d.difference, 1e-9) for d in layers], color="tab:red")
    apart.set_ylabel("difference / norm")
    apart.set_xticks(places, [d.layer for d in layers], rotation=90, fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())

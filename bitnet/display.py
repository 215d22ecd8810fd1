"""How modules, codes and tensors show themselves in a notebook cell: HTML with no style but its own.

A bar is three spans in the colours of the codes, -1, 0, +1; where styles are not shown, the numbers beside it remain.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from bitnet._core import Tensor
    from bitnet.nn import Module, TernaryStats

COLOURS = ("#2a6fbb", "#c9ccd1", "#d9822b")
BAR = 96  # pixels
BINS, TALL = 48, 40  # of a histogram: columns, and pixels
MOST = 1 << 20  # values that are looked at
READABLE = ("f32", "bf16", "i8", "i32", "ternary2")  # dtypes whose values can be read


def module_html(module: Module) -> str:
    """A table: of each layer with parameters its shape and their number, of each ternary one its codes and scale."""
    rows = list(_rows(module))
    ternary = module.num_ternary()
    total = sum(size for *_, size, _, _ in rows)
    about = f"{type(module).__name__}: {total:,} parameters"
    if ternary:
        about += f", {ternary / max(total, 1):.0%} of them ternary"
    if not rows:
        return f"<div>{about}</div>"
    body = "".join(
        _row([name or type(module).__name__, kind, shape, f"{size:,}", codes, scale])
        for name, kind, shape, size, codes, scale in rows
    )
    head = _row(
        ["layer", "kind", "shape", "parameters", "codes −1, 0, +1" if ternary else "", "scale" * bool(ternary)], "th"
    )
    if ternary and len(rows) > 1:
        body += _row(["all ternary layers", "", "", f"{ternary:,}", stats_bar(module.ternary_stats()), ""])
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f'<div><b>{about}</b><div style="max-height:420px;overflow:auto">{table}</div></div>'


def stats_html(stats: TernaryStats) -> str:
    """A table of counts and shares, flips and entropy."""
    counts = {"−1": stats.minus, "0": stats.zero, "+1": stats.plus, "changed last": stats.flipped}
    rows = "".join(_row([code, f"{count:,}", f"{count / max(stats.count, 1):.2%}"]) for code, count in counts.items())
    entropy = f"{stats.entropy:.4f} bits a weight" if stats.count else "no codes"
    head = _row([f"{stats.count:,} codes", entropy, stats_bar(stats, words=False)], "th")
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def stats_bar(stats: TernaryStats, words: bool = True) -> str:
    """The shares of -1, 0, +1 as a bar, and in words."""
    shares = [count / max(stats.count, 1) for count in (stats.minus, stats.zero, stats.plus)]
    style = "display:inline-block;height:10px;"
    spans = "".join(
        f'<span style="{style}width:{BAR * share:.1f}px;background:{colour}"></span>'
        for share, colour in zip(shares, COLOURS, strict=True)
    )
    text = " ".join(f"{share:.1%}" for share in shares) if words else ""
    return f'<span style="white-space:nowrap">{spans}</span> {text}'


def tensor_html(tensor: Tensor) -> str:
    """Shape and dtype, range, mean and deviation, a histogram, and the values themselves, shortened.

    Of more than a million values every n-th is looked at, which is said.
    """
    shape = " × ".join(map(str, tensor.shape)) or "scalar"
    about = f"<b>Tensor {shape}</b>, {tensor.dtype}" + ", requires grad" * tensor.requires_grad
    if tensor.dtype not in READABLE or tensor.size == 0:
        return f"<div>{about}</div>"
    array = tensor.detach().to("f32").numpy()
    step = -(-tensor.size // MOST)
    values = array.reshape(-1)[::step].astype(np.float64)
    finite = values[np.isfinite(values)]
    facts = [f"one value in {step}" if step > 1 else ""]
    if len(finite):
        facts += [
            f"{finite.min():.4g} to {finite.max():.4g}",
            f"mean {finite.mean():.4g}, deviation {finite.std():.4g}",
        ]
    facts += [
        f"{(values == 0).mean():.1%} zeros",
        f"{len(values) - len(finite)} not finite" * (len(finite) < len(values)),
    ]
    about += "; " + "; ".join(filter(None, facts))
    shown = escape(np.array2string(array, precision=4, threshold=40, edgeitems=3))
    return f'<div>{about}{_histogram(finite)}<pre style="margin:4px 0">{shown}</pre></div>'


def _histogram(values: npt.NDArray[Any]) -> str:
    """Columns of how often values occur between the least and the greatest, as one SVG path."""
    if len(values) < 2 or values.min() == values.max():
        return ""
    counts, _ = np.histogram(values, BINS)
    wide = 2 * BAR / BINS
    heights = TALL * counts / counts.max()
    path = "".join(f"M{wide * i:.1f} {TALL}v{-tall:.1f}h{wide:.1f}V{TALL}z" for i, tall in enumerate(heights) if tall)
    size = f'width="{2 * BAR}" height="{TALL}" viewBox="0 0 {2 * BAR} {TALL}"'
    return (
        f'<div><svg {size} role="img" aria-label="histogram"><path d="{path}" fill="{COLOURS[0]}"></path></svg></div>'
    )


def _rows(module: Module) -> Iterator[tuple[str, str, str, int, str, str]]:
    """(path, kind, shape, parameters, codes, scale) of each layer that holds numbers of its own; shared ones once."""
    from bitnet._core import Tensor
    from bitnet.nn import BitLinear

    seen: set[int] = set()
    for path, layer in module.named_modules():
        own = [value for value in vars(layer).values() if isinstance(value, Tensor) and id(value) not in seen]
        seen.update(id(value) for value in own)
        if not own:
            continue
        if isinstance(layer, BitLinear):
            size = layer.in_features * layer.out_features + (0 if layer.bias is None else layer.bias.size)
            shape = f"{layer.out_features} × {layer.in_features}"
            yield escape(path), "BitLinear", shape, size, stats_bar(layer.ternary_stats()), f"{layer.weight_scale:.4g}"
        else:
            shape = ", ".join(" × ".join(map(str, value.shape)) for value in own)
            yield escape(path), type(layer).__name__, shape, sum(value.size for value in own), "", ""


def _row(cells: list[str], tag: str = "td") -> str:
    """cells: HTML; numbers, in the last two of three columns and the third and fourth of six, stand to the right."""
    numbers = (1, 2) if len(cells) == 3 else (2, 3)
    inside = (
        f'<{tag} style="text-align:{"right" if place in numbers else "left"};white-space:nowrap">{cell}</{tag}>'
        for place, cell in enumerate(cells)
    )
    return f"<tr>{''.join(inside)}</tr>"

"""How modules and their codes show themselves in a notebook cell: tables of HTML, with no style but their own.

A bar is three spans in the colours of the codes, -1, 0, +1; where styles are not shown, the numbers beside it remain.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitnet.nn import Module, TernaryStats

COLOURS = ("#2a6fbb", "#c9ccd1", "#d9822b")
BAR = 96  # pixels


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

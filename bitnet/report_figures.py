"""The figures of a report: curves of all runs in common axes, and of each run the maps of its layers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet.report_chart import Curve, line_chart, profile
from bitnet.report_data import BINS, Layers, Run, gaps
from bitnet.report_heat import BLUE, GREEN, GREY, ORANGE, VIOLET, heat_map, scale_legend
from bitnet.report_text import escape, percent

MOST_EXTRA = 12  # curves that this version has no words for
MOST_SOURCES = 12  # of a mixture, two curves each
MOST_EVENT_LINES = 200
MOST_FAINT = 6  # runs whose single steps are drawn behind the smoothed curves

Spec = tuple[str, str, str, dict[str, Any]]  # curve, title, what it is, options of line_chart
LOSSES: tuple[Spec, ...] = (
    ("val_loss", "Validation loss", "nats per token, held out", {"label_ends": True}),
    ("train_loss", "Training loss", "nats per token, smoothed", {}),
)
OTHERS: tuple[Spec, ...] = (
    ("val_loss_ema", "Validation loss of averaged weights", "nats per token", {"label_ends": True}),
    ("lr", "Learning rate", "", {"zero": True}),
    ("grad_norm", "Gradient norm", "before clipping", {"log": True}),
    ("zero_share", "Zeros", "share of all codes", {"form": percent}),
    ("flip_share", "Flips", "codes changed by a step", {"form": percent, "zero": True}),
    ("tokens_per_second", "Tokens per second", "of a training step", {"zero": True}),
    ("mfu", "MFU", "share of the machine's measured peak", {"form": percent, "zero": True}),
)
HELD_OUT = ("val_loss", "val_loss_ema")
BY_SOURCE = {"val_loss_by_source.": "Validation loss of", "train_loss_by_source.": "Training loss of"}
KNOWN = {spec[0] for spec in (*LOSSES, *OTHERS)}
KNOWN |= {"step", "tokens", "perplexity", "perplexity_ema", "seconds", "memory"}
AXES = {"step": "steps", "tokens": "tokens"}


@dataclass(frozen=True)
class Shown:
    """A run on the page: its number, its colour, and its twin among the runs."""

    run: Run
    number: int
    hue: int
    twin: Run | None

    @property
    def css(self) -> str:
        """Classes of what belongs to the run: a check box hides one, the others colour and dash it."""
        return f"run-{self.number} hue-{self.hue}" + " twin" * self.run.is_twin

    def gap(self) -> tuple[float, int]:
        """(validation loss minus the twin's in nats, the last step where both have one), (NaN, 0) without."""
        if self.twin is not None:
            places, values = gaps(self.run, self.twin)
            if len(values):
                return float(values[-1]), int(self.run.curves["step"][places[-1]])
        return math.nan, 0


def curves(shown: Sequence[Shown]) -> str:
    """The section of curves."""
    names = dict.fromkeys(name for one in shown for name in one.run.curves)
    sources = dict.fromkeys(name.partition(".")[2] for name in names if name.startswith(tuple(BY_SOURCE)))
    parts: list[Spec] = [
        (prefix + source, f"{title} {source}", "nats per token", {})
        for source in list(sources)[:MOST_SOURCES]
        for prefix, title in BY_SOURCE.items()
    ]
    extra = dict.fromkeys(name for name in names if name not in KNOWN and not name.startswith(tuple(BY_SOURCE)))
    more: list[Spec] = [(name, name.replace("_", " "), "", {}) for name in list(extra)[:MOST_EXTRA]]
    large = [_curve_figure(shown, spec) for spec in LOSSES]
    small = [_curve_figure(shown, spec) for spec in (*parts, *OTHERS, *more)]
    gap = _gap_figure(shown)
    if gap:  # three of one size make the first row
        large, small = [], [large[0], gap, large[1], *small]
    if not any([*large, *small]):
        about = "There is nothing to draw: no run has a step in its metrics.jsonl."
        return f'<section><h2>Curves</h2><p class="note">{about}</p></section>'
    about = "Scales leave out the highest two per cent, so a spike may leave its picture."
    if any(one.run.events for one in shown):
        about += " Upright dotted lines: events, listed below."
    return (
        f"<section><h2>Curves</h2><p>{about}</p>{_controls(shown)}"
        f'<div class="charts large">{"".join(large)}</div><div class="charts">{"".join(small)}</div></section>'
    )


def _controls(shown: Sequence[Shown]) -> str:
    """What the curves stand over, and which runs are shown: form controls that style rules alone obey."""
    axes = "".join(
        f'<label><input type="radio" name="x" id="by-{unit}"{" checked" * (place == 0)}>over {unit}</label>'
        for place, unit in enumerate(AXES.values())
    )
    boxes = [
        f'<label class="key {one.css}"><input type="checkbox" id="show-{one.number}" checked>'
        f"{escape(one.run.name)}</label>"
        for one in shown
    ]
    return f"<nav><fieldset>{axes}</fieldset>{''.join(boxes) if len(boxes) > 1 else ''}</nav>"


def _curve_figure(shown: Sequence[Shown], spec: Spec) -> str:
    name, title, about, options = spec
    held_out = name in HELD_OUT or name.startswith("val_loss_by_source.")
    charts = []
    for axis, unit in AXES.items():
        drawn = [
            Curve(
                one.run.curves[axis], one.run.curve(name), one.css, one.run.name,
                raw=name != "lr" and not held_out, faint=len(shown) <= MOST_FAINT, dots=held_out,
            )
            for one in shown
        ]  # fmt: skip
        charts.append(line_chart(title, drawn, unit, events=_event_lines(shown, axis), **options))
    return _over_axes(title, about, charts)


def _gap_figure(shown: Sequence[Shown]) -> str:
    charts = []
    for axis, unit in AXES.items():
        drawn = []
        for one in shown:
            if one.twin is not None:
                places, values = gaps(one.run, one.twin)
                drawn.append(Curve(one.run.curves[axis][places], values, one.css, one.run.name, dots=True))
        charts.append(line_chart("Gap to the twin", drawn, unit, zero=True, label_ends=True))
    return _over_axes("Gap to the twin", "validation loss, nats", charts)


def _over_axes(title: str, about: str, charts: list[str]) -> str:
    """A figure of the same curves over each of the axes, of which one is shown."""
    if not any(charts):
        return ""
    missing = '<p class="note">no numbers over this axis</p>'
    inside = "".join(
        f'<div class="by-{unit}">{chart or missing}</div>' for unit, chart in zip(AXES.values(), charts, strict=True)
    )
    return _figure(escape(title), escape(about), inside)


def _figure(title: str, about: str, inside: str) -> str:
    return f'<figure class="card"><figcaption>{title}<small>{about}</small></figcaption>{inside}</figure>'


def _event_lines(shown: Sequence[Shown], axis: str) -> list[tuple[float, str, str]]:
    lines = []
    for one in shown:
        steps, places = one.run.curves["step"], one.run.curves[axis]
        for event in one.run.events[:MOST_EVENT_LINES] if len(steps) else ():
            x = float(places[min(int(np.searchsorted(steps, event["step"])), len(steps) - 1)])
            if math.isfinite(x):
                lines.append((x, one.css, f"{one.run.name}, step {event['step']}: {event['event']}"))
    return lines


def layers(shown: Sequence[Shown], most_open: int) -> str:
    """The section of what is inside the layers; runs after the first most_open are folded up. "" without any."""
    mapped = [(one, one.run.layers) for one in shown if one.run.layers is not None]
    parts = []
    for place, (one, known) in enumerate(mapped):
        figures = f'<div class="charts four">{"".join(_maps(known))}</div>'
        parts.append(headed(one, figures, len(mapped) > 1, place < most_open))
    if not parts:
        return ""
    about = (
        "Latent weights of all ternary layers in units of their scale over the steps, tinted by the code that they "
        "round to; dashed: the thresholds. Zeros and flips: one row a layer, the first block below, the last on top."
    )
    return f"<section><h2>Inside the layers</h2><p>{about}</p>{''.join(parts)}</section>"


def headed(one: Shown, inside: str, named: bool, is_open: bool) -> str:
    """A run's part of a section, under its name where there are several, folded up unless is_open."""
    if not is_open:
        return f"<details><summary>{escape(one.run.name)}</summary>{inside}</details>"
    return (f'<p class="run-head key {one.css}">{escape(one.run.name)}</p>' if named else "") + inside


def _maps(known: Layers) -> list[str]:
    """Figures of one run: histogram over the steps, its first and last, zeros and flips."""
    counts = known.counts.sum(0)  # (BINS, S)
    figures = _histogram_figures(known, counts / np.maximum(counts.sum(0, keepdims=True), 1)) if counts.any() else []
    names = [re.sub(r"^model\.layers\.(\d+)\.(?:\w+\.)?(\w+)$", r"\1 \2", name) for name in known.names][::-1]
    for title, values, colour in (("Zeros by layer", known.zero, VIOLET), ("Flips by layer", known.flip, GREEN)):
        numbers = values[np.isfinite(values)]
        if len(numbers):
            low = float(np.quantile(numbers, 0.01)) if values is known.zero else 0.0
            high = max(float(np.quantile(numbers, 0.99)), low + 1e-9)
            chart = heat_map(
                f"{title} over the steps", values[::-1], known.steps, [colour],
                low=low, high=high, rows=names, marks=_block_marks(names),
            )  # fmt: skip
            figures.append(_figure(title, scale_legend(low, high, colour), chart))
    return figures


def _histogram_figures(known: Layers, density: np.ndarray[Any, Any]) -> list[str]:
    """density (BINS, S): of each step, the share of weights in each bin."""
    edges = np.linspace(-3, 3, BINS + 1)
    codes = (("−1", "minus", BLUE, -3.0, -0.5), ("0", "zero", GREY, -0.5, 0.5), ("+1", "plus", ORANGE, 0.5, 3.0))
    colours = [
        colour for middle in (edges[1:] + edges[:-1]) / 2 for *_, colour, low, high in codes if low <= middle < high
    ]
    rows = [f"{low:+.2f} to {high:+.2f} scales" for low, high in itertools.pairwise(edges)]
    at = {value: BINS * (3 - value) / 6 for value in (-2, -0.5, 0.5, 2)}
    chart = heat_map(
        "Latent weights over the steps", density[::-1], known.steps, colours[::-1],
        low=0.0, high=float(density.max()), gamma=0.6, rows=rows[::-1],
        marks=[(place, f"{value:+g}") for value, place in at.items()], lines=[at[-0.5], at[0.5]],
    )  # fmt: skip
    key = " ".join(f'<span style="color:rgb{colour}">{code}</span>' for code, _, colour, *_ in codes)
    parts = [(low, high, css) for _, css, _, low, high in codes]
    ends = profile("Latent weights at the end and at the beginning", edges, density[:, 0], density[:, -1], parts)
    return [
        _figure("Latent weights", f"codes {key}", chart),
        _figure("At the end", f"line: at step {known.steps[0]:.0f}", ends),
    ]


def _block_marks(names: list[str]) -> list[tuple[float, str]]:
    """The numbers of blocks beside their middle, at most some ten of them; layers outside of blocks by name."""
    blocks: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        block = name.split(" ")[0] if name[:1].isdigit() else name.rpartition(".")[2][:7]
        blocks.setdefault(block, []).append(row)
    every = -(-len(blocks) // 10)
    return [(float(np.mean(rows)) + 0.5, block) for block, rows in list(blocks.items())[::every]]

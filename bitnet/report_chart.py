"""Line charts as SVG: several runs in common axes, thinned to what a screen can show, readable without a script.

Colours, fonts and strokes are classes of report.css, so one drawing serves light and dark. Each chart carries its
scales in data attributes, from which report.js reads values back for the pointer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet.report_text import escape, number, percent

Array = np.ndarray[Any, Any]

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 26
LABELS = 40  # what the values at the ends of curves take of the width
POINTS = 3000  # of all curves of a chart together
MOST_POINTS = 360  # of one curve
MOST_DOTS, MOST_LABELS = 40, 5
SMOOTHING = 0.9


@dataclass(frozen=True)
class Curve:
    """x and y (N,) of one run; css: its classes; raw: noisy, so smoothed, and faint as it is behind that."""

    x: Array
    y: Array
    css: str
    name: str
    raw: bool = False
    faint: bool = True
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """A scale: data to picture and the marks on it."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """0 at low, 1 at high."""
        if self.log:
            value, low, high = math.log10(max(value, 1e-300)), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return (value - low) / (high - low)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers inside the scale."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            if len(powers) >= 2:
                return [10.0**power for power in powers][:: -(-len(powers) // most)]
        step = nice((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def line_chart(
    label: str,
    curves: Sequence[Curve],
    x_label: str,
    *,
    form: Callable[[float], str] = number,
    log: bool = False,
    zero: bool = False,
    label_ends: bool = False,
    events: Sequence[tuple[float, str, str]] = (),
) -> str:
    """An SVG of curves in common axes; "" if none has a number.

    form: how a tick is written. log: where all is positive. zero: the scale begins at 0. label_ends: beside each curve
    stands its last value, if they are few. events: (x, classes, text), upright lines.
    """
    budget = min(MOST_POINTS, max(24, POINTS // max(len(curves), 1)))
    drawn = [(curve, thin(curve, budget)) for curve in curves]
    drawn = [(curve, parts) for curve, parts in drawn if len(parts.x)]
    if not drawn:
        return ""
    x_axis = Axis(0.0, max(float(parts.x.max()) for _, parts in drawn) or 1.0)
    y_axis = _y_axis([parts for _, parts in drawn], log, zero)
    clip = f"clip-{zlib.crc32(label.encode() + x_label.encode()):08x}"
    labelled = label_ends and len(drawn) <= MOST_LABELS
    right = LABELS if labelled else RIGHT
    inner = WIDTH - LEFT - right, HEIGHT - TOP - BOTTOM
    px, py = _Scale(x_axis, LEFT, inner[0]), _Scale(y_axis, TOP + inner[1], -inner[1])
    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} over {x_label}" '
        f'data-x="{x_axis.low!r},{x_axis.high!r}" data-y="{y_axis.low!r},{y_axis.high!r}" '
        f'data-log="{int(y_axis.log)}" data-form="{"percent" if form is percent else "number"}" '
        f'data-box="{LEFT},{TOP},{inner[0]},{inner[1]}" data-unit="{escape(x_label)}">',
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 4}" width="{inner[0] + 6}" height="{inner[1] + 8}"/>'
        "</clipPath>",
    ]
    for tick in y_axis.ticks(6):
        y = py(tick)
        out.append(f'<path class="grid" d="M{LEFT} {y}h{inner[0]}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y}" dy=".35em" text-anchor="end">{form(tick)}</text>')
    for tick in x_axis.ticks(4):
        anchor = "end" if x_axis.share(tick) > 0.97 else "middle"
        x = px(tick)
        out.append(f'<text class="tick" x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{number(tick)}</text>')
    out.append(f'<g clip-path="url(#{clip})">')
    for x_value, css, text in events:
        out.append(
            f'<path class="event {css}" d="M{px(x_value)} {TOP}v{inner[1]}"><title>{escape(text)}</title></path>'
        )
    for curve, parts in drawn:
        if curve.raw and curve.faint:
            out.append(f'<path class="raw {curve.css}" d="{_area(parts, px, py)}"/>')
    for curve, parts in drawn:
        path = _line(parts.x, parts.y, px, py)
        title = f"<title>{escape(curve.name)}</title>"
        out.append(f'<path class="line {curve.css}" d="{path}">{title}</path>')
        if curve.dots and len(parts.x) <= MOST_DOTS:
            dots = "M".join(f"{px(x)} {py(y)}h0" for x, y in zip(parts.x, parts.y, strict=True))
            out.append(f'<path class="dots {curve.css}" d="M{dots}"/>')
    out.append("</g>")
    if labelled:
        out.append(_end_labels(drawn, py))
    out.append("</svg>")
    return "".join(out)


@dataclass(frozen=True)
class Thinned:
    """Of each of n stretches of a curve: where, what to draw, and how far it ranged."""

    x: Array
    y: Array
    low: Array
    high: Array


def thin(curve: Curve, most: int) -> Thinned:
    """A curve in at most `most` points: a raw one averaged and smoothed, of others the last point of each stretch."""
    known = (curve.x >= 0) & np.isfinite(curve.x) & np.isfinite(curve.y)
    x, y = curve.x[known], curve.y[known]
    if not len(x):
        return Thinned(x, y, y, y)
    starts = np.unique(np.linspace(0, len(x), min(most, len(x)), endpoint=False).astype(int))
    ends = np.append(starts[1:], len(x)) - 1
    low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    if not curve.raw:
        if len(x) > most:
            starts[0], ends[0] = 0, 0  # the first point stays too
        return Thinned(x[ends], y[ends], low, high)
    mean = np.add.reduceat(y, starts) / np.diff(np.append(starts, len(x)))
    return Thinned(x[ends], smooth(mean), low, high)


def smooth(values: Array) -> Array:
    """Exponential averages from both sides, so that the curve does not lag; (N,) to (N,)."""
    passes = []
    for way in (values, values[::-1]):
        out, state = np.empty(len(way)), 0.0
        for place, value in enumerate(way.tolist()):
            state = value if place == 0 else SMOOTHING * state + (1 - SMOOTHING) * value
            out[place] = state
        passes.append(out)
    return (passes[0] + passes[1][::-1]) / 2


def _y_axis(parts: list[Thinned], log: bool, zero: bool) -> Axis:
    """The scale that shows the curves; what a few points have far above the rest is cut off."""
    smooth_values = np.concatenate([part.y for part in parts])
    ranges = np.concatenate([np.concatenate([part.low, part.high]) for part in parts])
    low = min(float(np.quantile(ranges, 0.01)), float(smooth_values.min()))
    few = len(ranges) < 100  # points that each count
    high = float(ranges.max() if few else np.quantile(np.concatenate([smooth_values, ranges]), 0.98))
    if log and low > 0:
        low, high = low / 1.1, max(high, low * 1.05) * 1.15
        return Axis(low, high, high / low > 8)
    if zero and low >= 0:
        return Axis(0.0, 1.08 * high if high > 0 else 1.0)
    room = max(high - low, 1e-3 * max(abs(high), abs(low)), 1e-12)
    return Axis(low - 0.06 * room, high + 0.06 * room)


@dataclass(frozen=True)
class _Scale:
    """Data to picture along one axis, as short text."""

    axis: Axis
    start: float
    length: float

    def at(self, value: float) -> float:
        share = min(max(self.axis.share(value), -1.0), 3.0)  # a spike leaves the picture, but its number stays short
        return self.start + self.length * share

    def __call__(self, value: float) -> str:
        return _short(self.at(value))


def _end_labels(drawn: list[tuple[Curve, Thinned]], py: _Scale) -> str:
    """The last value of each curve to the right of the picture, moved apart where they would overlap."""
    ends = sorted((py.at(float(parts.y[-1])), place) for place, (_, parts) in enumerate(drawn))
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + 12) if places else y)
    surplus = max(0.0, places[-1] - (HEIGHT - BOTTOM))
    out = []
    for (_, number_of), y in zip(ends, places, strict=True):
        curve, parts = drawn[number_of]
        x = WIDTH - LABELS + 6
        value = f"{parts.y[-1]:.3f}"
        out.append(f'<text class="end {curve.css}" x="{x}" y="{_short(y - surplus)}" dy=".35em">{value}</text>')
    return "".join(out)


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _line(x: Array, y: Array, px: _Scale, py: _Scale) -> str:
    points = [f"{px(a)} {py(b)}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    return "M" + "L".join(points) if len(points) > 1 else f"M{points[0]}h.01"


def _area(parts: Thinned, px: _Scale, py: _Scale) -> str:
    """Up and down between the least and the greatest of each stretch; one step a stretch: the curve itself."""
    if np.array_equal(parts.low, parts.high):
        return _line(parts.x, parts.low, px, py)
    ranges = zip(parts.x.tolist(), parts.low.tolist(), parts.high.tolist(), strict=True)
    return "M" + "L".join(f"{px(x)} {py(low)}L{px(x)} {py(high)}" for x, low, high in ranges)


def profile(label: str, edges: Array, first: Array, last: Array, parts: Sequence[tuple[float, float, str]]) -> str:
    """An SVG of two densities over edges (N + 1,): first (N,) a line, last (N,) filled; parts: (from, to, classes)."""
    x_axis = Axis(float(edges[0]), float(edges[-1]))
    y_axis = Axis(0.0, 1.1 * max(float(first.max()), float(last.max()), 1e-12))
    inner = WIDTH - 2 * RIGHT, HEIGHT - TOP - BOTTOM
    px, py = _Scale(x_axis, RIGHT, inner[0]), _Scale(y_axis, TOP + inner[1], -inner[1])
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for low, high, css in parts:
        bars = [
            f"M{px(a)} {py(0)}V{py(value)}H{px(b)}V{py(0)}z"
            for a, b, value in zip(edges[:-1], edges[1:], last.tolist(), strict=True)
            if low <= (a + b) / 2 < high
        ]
        out.append(f'<path class="fill {css}" d="{"".join(bars)}"/>')
    steps = "".join(f"V{py(value)}H{px(edge)}" for value, edge in zip(first.tolist(), edges[1:], strict=True))
    out.append(f'<path class="outline" d="M{px(float(edges[0]))} {py(0)}{steps}"/>')
    for tick in x_axis.ticks(6):
        out.append(f'<text class="tick" x="{px(tick)}" y="{HEIGHT - 8}" text-anchor="middle">{tick:g}</text>')
    return "".join([*out, "</svg>"])

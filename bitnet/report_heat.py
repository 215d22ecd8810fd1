"""Heat maps as tiny PNGs inside SVG: one pixel a cell, its value in the pixel's opacity.

The colour of a cell lies over the page's own background, so one picture serves light and dark, and report.js reads a
value back from the pixel it points at: value = low + (high - low) (alpha / 255)^(1 / gamma).
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet.report_text import escape, number

Array = np.ndarray[Any, Any]
Colour = tuple[int, int, int]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 420, 44, 12, 10, 26
BLUE, GREY, ORANGE, GREEN, VIOLET = (58, 128, 209), (138, 143, 152), (226, 135, 46), (47, 163, 96), (134, 96, 207)


def png(pixels: Array) -> bytes:
    """A PNG file of pixels (H, W, 4) u8, RGBA."""
    height, width = pixels.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, width * 4)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def heat_map(
    label: str,
    values: Array,
    steps: Array,
    colours: Sequence[Colour],
    *,
    low: float,
    high: float,
    gamma: float = 1.0,
    height: int = 200,
    rows: Sequence[str],
    marks: Sequence[tuple[float, str]],
    lines: Sequence[float] = (),
    form: str = "percent",
) -> str:
    """An SVG of values (R, S), the first row on top, NaN invisible; colours: one, or one for each row.

    rows: what each row is called. marks: (row boundary from the top, text) at the left edge. lines: row boundaries to
    draw across. low and high: the values of no and full colour.
    """
    count, columns = values.shape
    with np.errstate(invalid="ignore"):
        share = np.clip((values - low) / ((high - low) or 1.0), 0, 1) ** gamma
    pixels = np.zeros((count, columns, 4), np.uint8)
    pixels[..., :3] = np.array(colours, np.uint8)[:, None, :]  # (1 or R, 1, 3)
    pixels[..., 3] = np.where(np.isfinite(share), np.rint(255 * np.nan_to_num(share)), 0)
    data = base64.b64encode(png(pixels)).decode()
    inner = WIDTH - LEFT - RIGHT
    total = height + TOP + BOTTOM
    names = escape("\n".join(rows))
    out = [
        f'<svg class="heat" viewBox="0 0 {WIDTH} {total}" role="img" aria-label="{escape(label)}" '
        f'data-box="{LEFT},{TOP},{inner},{height}" data-range="{low!r},{high!r},{gamma!r}" data-form="{form}" '
        f'data-steps="{",".join(f"{step:.0f}" for step in steps)}" data-rows="{names}">',
        f'<rect class="ground" x="{LEFT}" y="{TOP}" width="{inner}" height="{height}"/>',
        f'<image x="{LEFT}" y="{TOP}" width="{inner}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>',
    ]
    for place in lines:
        out.append(f'<path class="threshold" d="M{LEFT} {TOP + height * place / count:.1f}h{inner}"/>')
    for place, text in marks:
        y = TOP + height * place / count
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y:.1f}" dy=".35em" text-anchor="end">{escape(text)}</text>')
    for column, anchor in {0: "start", columns // 2: "middle", columns - 1: "end"}.items():
        x = LEFT + inner * (column / (columns - 1) if columns > 1 else 0)
        text = number(float(steps[column]))
        out.append(f'<text class="tick" x="{x:.1f}" y="{total - 8}" text-anchor="{anchor}">{text}</text>')
    out.append("</svg>")
    return "".join(out)


def scale_legend(low: float, high: float, colour: Colour) -> str:
    """A line of HTML: the colour scale between two values."""
    r, g, b = colour
    bar = f'<i style="background:linear-gradient(90deg,transparent,rgb({r},{g},{b}))"></i>'
    return f'<span class="scale">{100 * low:.3g}%{bar}{100 * high:.3g}%</span>'

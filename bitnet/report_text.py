"""How a report writes values: text of a run made harmless, numbers short, "–" for what is not known."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path
from typing import Any

UNKNOWN = "–"
MOST_ITEMS, MOST_CHARACTERS = 20, 300  # of an option's value
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def escape(value: Any) -> str:
    """Text for HTML: markup escaped, characters that steer a terminal or turn a line around replaced by U+FFFD."""
    return CONTROL.sub("\ufffd", html.escape(str(value), quote=True))


def plain(value: Any) -> str:
    """An option's value; of an absolute path only the last part, for pages travel."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_short(str(item)) for item in value[:MOST_ITEMS]) or "none"
    return _short(str(value))


def number(value: float) -> str:
    """A number for a tick: short, exact for round numbers."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.6g}{unit}"
    if size >= 1e-4 or size == 0:
        return f"{value:,.6g}"
    mantissa, power = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def percent(value: float) -> str:
    """A share for a tick."""
    return f"{100 * value:.4g}%"


def _short(text: str) -> str:
    return Path(text).name if text.startswith("/") else text[:MOST_CHARACTERS]


def nats(value: float) -> str:
    """A loss."""
    return f"{value:.4f}" if math.isfinite(value) else UNKNOWN


def difference(value: float) -> str:
    """A gap between losses."""
    return f"{value:+.4f}" if math.isfinite(value) else UNKNOWN


def perplexity(value: float) -> str:
    """Four digits, more before the point if it needs them."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"


def whole(value: float) -> str:
    """A number without its fraction."""
    return f"{value:,.0f}" if math.isfinite(value) else UNKNOWN


def share(value: float) -> str:
    """Per cent."""
    return f"{value:.1%}" if math.isfinite(value) else UNKNOWN


def count(value: float) -> str:
    """Three digits and a unit: 2.05 M."""
    if not math.isfinite(value):
        return UNKNOWN
    return re.sub(r"(?=[kMG]$)", " ", number(float(f"{value:.3g}")))


def size(value: float) -> str:
    """Bytes."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def duration(value: float) -> str:
    """Seconds, minutes, or hours and minutes."""
    if not math.isfinite(value):
        return UNKNOWN
    if value < 60:
        return f"{value:.3g} s"
    if value < 3600:
        return f"{value / 60:.3g} min"
    return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"

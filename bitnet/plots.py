"""Pictures of a run: how the loss fell, how the latent weights lie around the ternary thresholds, what the codes do.

matplotlib is imported when the first picture is drawn, and draws into files only: no window, no global state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.metrics import read_metrics, smoothed
from bitnet.model import BitNetForCausalLM
from bitnet.nn import BitLinear

Records = Sequence[dict[str, Any]]

BLUE, ORANGE, GREY, GREEN = "#2a6fbb", "#d9822b", "#8a8f98", "#3a9a5b"
CODES = (("-1", BLUE), ("0", "#c9ccd1"), ("+1", ORANGE))
STYLE: Any = {
    "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e8eb", "axes.axisbelow": True,
    "legend.frameon": False, "figure.dpi": 120, "savefig.facecolor": "white",
}  # fmt: skip


def draw_all(folder: str | Path, model: BitNetForCausalLM, history: Records, compare: str | Path | None = None) -> None:
    """Writes loss.png, and for ternary models weights.png and codes.png; compare: another run folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    other = read_metrics(Path(compare) / "metrics.jsonl") if compare else []
    loss_curves(folder / "loss.png", history, other, "" if compare is None else Path(compare).name)
    layers = dict(model.bitlinears())
    if layers:
        weight_histograms(folder / "weights.png", layers)
        code_shares(folder / "codes.png", layers, history)


def loss_curves(path: str | Path, history: Records, other: Records = (), other_name: str = "twin") -> None:
    """Training loss (each step faint, averaged strong) and validation loss over steps, another run's beside them."""
    with _figure(path, 8, 4.8) as figure:
        axes = figure.subplots()
        ends = []
        for records, color, name in ((other, GREY, other_name), (history, BLUE, "")):
            if not records:
                continue
            label = f" ({name})" if name else ""
            steps = [r["step"] for r in records]
            losses = [r["train_loss"] for r in records]
            axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.7)
            axes.plot(steps, _smooth(losses), color=color, linewidth=1.6, label=f"training{label}")
            points = [(r["step"], r["val_loss"]) for r in records if r["val_loss"] is not None]
            if points:
                mark = ORANGE if records is history else "#4d5157"
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "o-", color=mark, markersize=4, linewidth=1, label=f"validation{label}")
                ends.append((*points[-1], mark))
        for step, loss, color in ends:
            place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{loss:.3f}", (step, loss), color=color, fontsize=9, **place)
        # The first steps of warm-up are far above the rest; the picture is about the rest.
        shown = [r["train_loss"] for r in history] or [0.0]
        low = min(shown + [r["val_loss"] for r in [*history, *other] if r["val_loss"] is not None])
        high = max(shown)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.03 * (high - low) + 1e-3)
        axes.set(title="Loss", xlabel="step", ylabel="nats per token")
        axes.margins(x=0.06)
        axes.legend(loc="upper right")


def weight_histograms(path: str | Path, layers: dict[str, BitLinear]) -> None:
    """Latent weights of every kind of projection, in units of their own mean |w|; codes change at -0.5 and +0.5."""
    kinds: dict[str, list[BitLinear]] = {}
    for name, layer in layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(layer)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    with _figure(path, 2.9 * columns, 2.5 * rows + 0.5) as figure:
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        edges = np.linspace(-4, 4, 161)
        middles = (edges[1:] + edges[:-1]) / 2
        for axes, (kind, members) in zip(grid.flat, kinds.items(), strict=False):
            counts = np.zeros(len(middles))
            for layer in members:
                weight = layer.weight.numpy(copy=True)
                counts += np.histogram(weight / max(float(np.abs(weight).mean()), 1e-30), edges)[0]
            density = counts / max(counts.sum(), 1) / (edges[1] - edges[0])
            for part, (code, color) in zip(_regions(middles), CODES, strict=True):
                axes.bar(middles[part], density[part], width=edges[1] - edges[0], color=color)
                share = counts[part].sum() / max(counts.sum(), 1)
                place = {"-1": 0.14, "0": 0.5, "+1": 0.86}[code]
                text = f"{code}\n{share:.0%}"
                axes.text(place, 0.97, text, transform=axes.transAxes, ha="center", va="top", fontsize=8.5)
            for threshold in (-0.5, 0.5):
                axes.axvline(threshold, color="#30343a", linewidth=0.9, linestyle="--")
            axes.set(title=f"{kind}" + (f" (x {len(members)})" if len(members) > 1 else ""), xlim=(-4, 4), yticks=[])
            axes.set_ylim(top=max(float(density.max()), 1e-9) * 1.35)
            axes.grid(False)
        for axes in grid.flat[len(kinds) :]:
            axes.set_visible(False)
        for column in range(columns):  # the lowest picture of each column has the numbers
            last = [axes for axes in grid[:, column] if axes.get_visible()][-1]
            last.tick_params(labelbottom=True)
            last.set_xlabel("latent weight / mean |w|")
        figure.suptitle("Latent weights and the ternary code they round to", x=0.02, ha="left", fontsize=12)


def code_shares(path: str | Path, layers: dict[str, BitLinear], history: Records) -> None:
    """Shares of -1, 0, +1 in every layer, and over the steps how many codes are 0 and how many change."""
    with _figure(path, 11, max(4.2, 0.17 * len(layers) + 1.4)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
        stats = [layer.ternary_stats() for layer in layers.values()]
        start = np.zeros(len(stats))
        tally = np.array([(s.minus, s.zero, s.plus) for s in stats], float)
        for (code, color), share in zip(CODES, (tally / tally.sum(1, keepdims=True)).T, strict=True):
            left.barh(range(len(stats)), share, left=start, color=color, height=0.85, label=code)
            start += share
        names = [re.sub(r"^model\.layers\.(\d+)\..*\.(\w+)$", r"\1 \2", name) for name in layers]
        left.set_yticks(range(len(names)), names, fontsize=8 if len(names) < 60 else 5)
        left.invert_yaxis()
        left.grid(False)
        left.set(title="Codes of each layer's projections", xlabel="share", xlim=(0, 1), ylim=(len(stats) - 0.5, -0.5))
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.04), ncols=3)
        records = [r for r in history if r.get("zero_share") is not None]
        steps = [r["step"] for r in records]
        zeros = [100 * r["zero_share"] for r in records]
        right.plot(steps, zeros, color=GREY, linewidth=1.6)
        middle = (max(zeros, default=0) + min(zeros, default=0)) / 2
        half = max(0.5, max(zeros, default=0) - middle) * 1.1  # at least a percent: less would magnify noise
        right.set_ylim(middle - half, middle + half)
        right.set(title="Over training", xlabel="step")
        right.set_ylabel("zeros, % of codes", color=GREY)
        flips = right.twinx()
        flips.spines["right"].set_visible(True)
        flips.grid(False)
        flips.plot(steps, [100 * r["flip_share"] for r in records], color=GREEN, linewidth=1.2)
        flips.set_ylim(bottom=0)
        flips.set_ylabel("codes changed by a step, %", color=GREEN)


def _smooth(losses: list[float]) -> list[float]:
    """Averaged from both sides: unlike the number on the progress bar, the curve does not lag behind."""
    forward, backward = smoothed(losses), smoothed(losses[::-1])[::-1]
    return [(a + b) / 2 for a, b in zip(forward, backward, strict=True)]


def _regions(middles: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return [middles < -0.5, np.abs(middles) <= 0.5, middles > 0.5]


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure to draw on, saved at the end and then renamed into place: a viewer never sees half a picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    partial = Path(path).with_suffix(".partial.png")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(partial)  # without pyplot, a PNG is drawn by Agg
    partial.replace(path)

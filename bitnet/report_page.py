"""The page of a report: one HTML text that needs no network, no other file, and no script to be read.

Everything that comes out of a run folder is escaped. Numbers of the table stand in full in data-value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bitnet import __version__
from bitnet import report_figures as figures
from bitnet import report_text as text
from bitnet.report_data import Run, differing, twin_of
from bitnet.report_figures import Shown, headed
from bitnet.report_text import escape, plain

HUES = 8  # of report.css
MOST_OPEN = 4  # runs whose maps and samples are in sight; those of the others open at a click
MOST_LEADS = 8
MOST_EVENTS = 200


def page(runs: Sequence[Run], title: str | None = None) -> str:
    """The report of one or more runs."""
    shown = _shown(list(runs))
    title = title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    parts = (
        _header(shown, title),
        _tiles(shown),
        _runs(shown),
        figures.curves(shown),
        figures.layers(shown, MOST_OPEN),
        _samples(shown),
        _events(shown),
        _checkpoints(shown),
        _options(shown),
    )
    body = "\n".join(filter(None, parts))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · bitnet report</title>
<style>
{style}{_run_rules(shown)}</style>
</head>
<body>
<main>
{body}
<footer>Made by bitnet {__version__}.</footer>
</main>
<div id="tip"></div>
<script>
{script}</script>
</body>
</html>
"""


def _shown(runs: list[Run]) -> list[Shown]:
    """A colour for each run; a twin has the colour of the first run that it is the twin of."""
    twins = {id(run): twin_of(run, runs) for run in runs}
    followers = {id(twin) for twin in twins.values() if twin is not None}
    hues: dict[int, int] = {}
    for run in runs:
        if id(run) not in followers:
            hues[id(run)] = len(hues)
    for run in runs:
        twin = twins[id(run)]
        if twin is not None:
            hues.setdefault(id(twin), hues[id(run)])
    return [Shown(run, place, hues[id(run)], twins[id(run)]) for place, run in enumerate(runs)]


def _run_rules(shown: list[Shown]) -> str:
    """The style rules of this page's runs: their colours, and how a check box hides one."""
    hues = sorted({one.hue for one in shown})
    colours = (
        f".hue-{hue} {{ --c: var(--c{hue % HUES}); }}\nsvg .hue-{hue} {{ stroke: var(--c{hue % HUES}); }}\n"
        for hue in hues
    )
    hidden = (
        f"body:has(#show-{one.number}:not(:checked)) svg .run-{one.number} {{ display: none; }}\n" for one in shown
    )
    dotted = (f".line.hue-{hue} {{ stroke-dasharray: {1 + hue // HUES} 4; }}\n" for hue in hues if hue >= HUES)
    return "".join([*colours, *dotted, *hidden])


def _table(head: Iterable[str], rows: Iterable[tuple[Shown, str]], identity: str, css: str = "") -> str:
    """A table with a row a run: head is escaped here, the cells of the rows (<td>...) where they are made."""
    first, *others = (f'<th scope="col">{escape(name)}</th>' for name in ("run", *head))
    body = "".join(
        f'<tr><th scope="row" class="key {one.css}">{escape(one.run.name)}</th>{cells}</tr>' for one, cells in rows
    )
    return (
        f'<div class="card scroll {css}"><table id="{identity}" class="{css}"><thead><tr>{first}{"".join(others)}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _header(shown: list[Shown], title: str) -> str:
    """What was run: what all runs have in common, and of each what it has not."""
    facts = [_facts(one.run) for one in shown]
    common = [fact for fact in facts[0] if all(fact in other for other in facts)]
    lines = ['<header><p class="eyebrow">bitnet report</p>', f"<h1>{escape(title)}</h1>", _lead(common)]
    for one, own in list(zip(shown, facts, strict=True))[:MOST_LEADS]:
        rest = [fact for fact in own if fact not in common]
        if rest:
            lines.append(_lead([f"{one.run.name}: {rest[0]}", *rest[1:]], f" key {one.css}"))
    if len(shown) > MOST_LEADS and len(common) < len(facts[-1]):
        lines.append(_lead(["what differs in the others stands under Options"]))
    return "\n".join([*lines, "</header>"])


def _lead(facts: list[str], css: str = "") -> str:
    return f'<p class="lead{css}">{" · ".join(f"<span>{escape(fact)}</span>" for fact in facts)}</p>'


def _facts(run: Run) -> list[str]:
    facts = ["full-precision twin" if run.is_twin else "ternary"]
    if run.option("preset"):
        facts.append(f"preset {plain(run.option('preset'))}")
    if run.parameters:
        facts.append(f"{text.count(run.parameters)} parameters")
    for name, word in (("num_hidden_layers", "layers"), ("hidden_size", "wide")):
        if run.option(name) is not None:
            facts.append(f"{plain(run.option(name))} {word}")
    source, tokenizer = run.manifest.get("source"), run.manifest.get("tokenizer")
    of = source.get("name") if isinstance(source, dict) else None
    of = of or plain(run.options.get("data") or run.options.get("recipe"))
    if of != text.UNKNOWN:
        facts.append(f"text: {of}")
    if isinstance(tokenizer, dict):
        facts.append(f"{plain(tokenizer.get('name'))} of {plain(tokenizer.get('vocab_size'))} ids")
    if math.isfinite(run.last("tokens")):
        facts.append(f"{text.count(run.last('tokens'))} tokens in {text.whole(run.last('step'))} steps")
    for name in ("precision", "seed"):
        if run.option(name) is not None:
            facts.append(f"{name} {plain(run.option(name))}")
    return [*facts, f"machine: {run.machine or 'not recorded'}"]


def _tiles(shown: list[Shown]) -> str:
    """The numbers of the best ternary run (of any, where there is none)."""
    candidates = [one for one in shown if not one.run.is_twin] or shown
    best = min(candidates, key=lambda one: (math.isnan(one.run.best()[1]), one.run.best()[1]))
    run = best.run
    step, loss = run.best()
    whose = f"{run.name}, " * (len(shown) > 1)
    tiles = [(text.nats(loss), "best validation loss, nats", f"{whose}step {step}" if step else "")]
    gap, at = best.gap()
    if best.twin is not None and at:
        tiles.append((text.difference(gap), "gap to full precision, nats", f"to {best.twin.name}, step {at}"))
    tiles.append((text.perplexity(math.exp(min(loss, 700.0))), "perplexity", "of the best loss" * bool(step)))
    tiles.append((text.whole(run.typical("tokens_per_second")), "tokens/s", "median of the steps"))
    tiles.append((text.share(run.typical("mfu")), "MFU", "of the machine's peak"))
    if math.isfinite(run.last("zero_share")):
        tiles.append((text.share(run.last("zero_share")), "zeros", "of the last codes"))
    tiles.append((text.duration(run.last("seconds")), "of training", f"{text.count(run.last('tokens'))} tokens"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span><small>{escape(note)}</small></div>'
        for value, what, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _runs(shown: list[Shown]) -> str:
    """The table of runs, and under it what is missing of them."""
    head = (
        "best validation loss", "final", "perplexity", "gap to twin, nats", "training loss", "tokens", "tokens/s",
        "MFU", "memory", "time",
    )  # fmt: skip
    losses = [one.run.best()[1] for one in shown]
    lowest = min(filter(math.isfinite, losses), default=math.nan)
    rows = []
    for one in shown:
        run, (step, loss), (gap, at) = one.run, one.run.best(), one.gap()
        no_gap = "twin" if run.is_twin else text.UNKNOWN
        speed, mfu = run.typical("tokens_per_second"), run.typical("mfu")
        is_best = loss == lowest and len(shown) > 1
        cells = [
            _cell("best_val_loss", loss, text.nats(loss), f"step {step}" if step else "", css="best" * is_best),
            _cell("val_loss", run.last("val_loss"), text.nats(run.last("val_loss"))),
            _cell("perplexity", run.last("perplexity"), text.perplexity(run.last("perplexity"))),
            _cell("gap", gap, text.difference(gap) if at else no_gap, f"step {at}" if at not in (0, step) else ""),
            _cell("train_loss", run.last("train_loss"), text.nats(run.last("train_loss"))),
            _cell("tokens", run.last("tokens"), text.count(run.last("tokens"))),
            _cell("tokens_per_second", speed, text.whole(speed)),
            _cell("mfu", mfu, text.share(mfu)),
            _cell("memory", run.last("memory"), text.size(run.last("memory"))),
            _cell("seconds", run.last("seconds"), text.duration(run.last("seconds"))),
        ]
        rows.append((one, "".join(cells)))
    about = (
        "Losses are nats per token; speed and MFU are medians over the steps. The gap is what ternary weights cost: "
        "the validation loss minus that of the full-precision run of the same text, seed and shape."
    )
    return f"<section><h2>Runs</h2><p>{about}</p>{_table(head, rows, 'runs')}{_notes(shown)}</section>"


def _notes(shown: list[Shown]) -> str:
    """What is missing, and of which runs."""
    names: dict[str, list[str]] = {}
    for one in shown:
        for note in one.run.notes:
            names.setdefault(note, []).append(one.run.name)
    lines = []
    for note, of in names.items():
        who = "all runs" if len(of) == len(shown) > 1 else ", ".join(of[:MOST_OPEN])
        more = f" and {len(of) - MOST_OPEN} more" if who != "all runs" and len(of) > MOST_OPEN else ""
        lines.append(f'<p class="note">{escape(who)}{more}: {escape(note)}.</p>')
    return "".join(lines)


def _cell(name: str, value: float, shown: str, note: str = "", css: str = "") -> str:
    exact = f' data-value="{value!r}"' if math.isfinite(value) else ""
    small = f"<small>{escape(note)}</small>" if note else ""
    marked = f' class="{css}"' if css else ""
    return f'<td data-name="{name}"{exact}{marked}>{escape(shown)}{small}</td>'


def _samples(shown: list[Shown]) -> str:
    parts = []
    for place, one in enumerate(one for one in shown if one.run.samples):
        cards = "".join(
            f'<figure class="card"><figcaption>step {sample.step}<small>validation loss {escape(sample.loss)}</small>'
            f"</figcaption><pre>\n{escape(sample.text)}</pre></figure>"
            for sample in one.run.samples[::-1]
        )
        strip = f'<div class="strip" tabindex="0">{cards}</div>'
        parts.append(headed(one, strip, len(shown) > 1, place < MOST_OPEN))
    if not parts:
        return ""
    about = "What the model wrote after an evaluation, the last first."
    return f"<section><h2>Samples</h2><p>{about}</p>{''.join(parts)}</section>"


def _events(shown: list[Shown]) -> str:
    events = [(one, event) for one in shown for event in one.run.events]
    if not events:
        return ""
    kinds = Counter(str(event["event"]) for _, event in events).most_common(8)
    about = ", ".join(f"{number} x {kind}" for kind, number in kinds)
    rows = [
        (one, f"<td>{event['step']}</td><td>{escape(event['event'])}</td><td>{escape(_about(event))}</td>")
        for one, event in events[:MOST_EVENTS]
    ]
    more = len(events) - MOST_EVENTS
    note = f'<p class="note">{more} more are in metrics.jsonl.</p>' if more > 0 else ""
    table = _table(("step", "event", "about it"), rows, "events", "plain")
    return f"<section><h2>Events</h2><p>{escape(about)}.</p>{table}{note}</section>"


def _about(event: dict[str, Any]) -> str:
    return ", ".join(f"{name} {plain(value)}" for name, value in event.items() if name not in ("event", "step"))[:400]


def _checkpoints(shown: list[Shown]) -> str:
    rows = []
    for one in shown:
        for kept in one.run.checkpoints:
            css = ' class="best"' * (kept.step == one.run.best()[0])
            loss, size = text.nats(kept.loss), text.size(kept.bytes)
            rows.append((one, f"<td>{kept.step}</td><td{css}>{loss}</td><td>{size}</td>"))
    if not rows:
        return ""
    table = _table(("step", "validation loss", "size"), rows, "checkpoints", "narrow")
    return f"<section><h2>Checkpoints</h2>{table}</section>"


def _options(shown: list[Shown]) -> str:
    """The options that differ, and all of each run."""
    out = ["<section><h2>Options</h2>"]
    runs = [one.run for one in shown]
    names = differing(runs)
    if names:
        rows = [(one, "".join(f"<td>{escape(plain(one.run.option(name)))}</td>" for name in names)) for one in shown]
        out += ["<p>Those that are not the same in all runs.</p>", _table(names, rows, "differing", "options")]
    elif len(runs) > 1:
        out.append("<p>All that can change a result is the same in these runs.</p>")
    parts = []
    for run in runs:
        values = run.options | {f"model: {name}": value for name, value in run.model.items()}
        cells = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(plain(value))}</td></tr>'
            for name, value in values.items()
        )
        table = f'<div class="card scroll"><table class="plain"><tbody>{cells}</tbody></table></div>'
        nothing = '<p class="note">none recorded</p>'
        parts.append(f"<details><summary>All of {escape(run.name)}</summary>{table if cells else nothing}</details>")
    every = "".join(parts)
    out.append(every if len(runs) <= MOST_OPEN else f"<details><summary>All of each run</summary>{every}</details>")
    return "".join([*out, "</section>"])

"""bitnet report: the page stands alone, says what the files say, trusts nothing in them, and stays small."""

from __future__ import annotations

import json
import math
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet import report
from bitnet.errors import ConfigError
from bitnet.report_chart import Axis, Curve, line_chart, nice, smooth, thin
from bitnet.report_data import gaps, read_run, read_runs, twin_of
from bitnet.report_heat import heat_map, png
from bitnet.report_page import page
from bitnet.report_text import number

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """A page taken apart: its elements in order, the text inside each kind, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a kind that have these among them."""
        return [attrs for kind, attrs in self.elements if kind == tag and wanted.items() <= attrs.items()]

    def cells(self, name: str) -> list[float | None]:
        """The numbers in a column of the table of runs, one a run."""
        values = [attrs.get("data-value") for attrs in self.all("td", **{"data-name": name})]
        return [None if value is None else float(value) for value in values]


def record(step: int, **changes: Any) -> dict[str, Any]:
    loss = 2 + 3 / step
    values: dict[str, Any] = {
        "step": step, "tokens": 1024 * step, "train_loss": loss, "val_loss": None, "perplexity": None,
        "tokens_per_second": 1000.0 + step, "mfu": 0.1, "lr": 1e-3, "grad_norm": 1.0, "zero_share": 0.31,
        "flip_share": 0.01, "seconds": 0.5 * step, "memory": 10**8,
    }  # fmt: skip
    if step % 10 == 0:
        values |= {"val_loss": loss + 0.1, "perplexity": math.exp(loss + 0.1)}
    return values | changes


def make_run(folder: Path, records: list[dict[str, Any]], options: str = "seed: 0\ndata: [text.txt]\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "train.yaml").write_text(options)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def add_layers(folder: Path, steps: range, layers: int = 4) -> None:
    histogram = np.histogram(np.random.default_rng(0).standard_normal(4000), 64, (-3, 3))[0].tolist()
    one = {"minus": 0.3, "zero": 0.4, "plus": 0.3, "flip": 0.02, "scale": 0.05, "histogram": histogram}
    names = [f"model.layers.{layer // 2}.mlp.{('up', 'down')[layer % 2]}_proj" for layer in range(layers)]
    lines = [json.dumps({"step": step, "layers": dict.fromkeys(names, one)}) + "\n" for step in steps]
    (folder / "layers.jsonl").write_text("".join(lines))


def page_of(*folders: Path) -> Page:
    return Page(page(read_runs([str(folder) for folder in folders])))


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(step) for step in range(1, 41)])
    add_layers(run, range(1, 41))
    found = page_of(run)
    for tag, attrs in found.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        for name in ("src", "href", "action", "xlink:href", "data", "srcset"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")]
    (style,), (script,) = found.texts["style"], found.texts["script"]
    for words in ("@import", "url(", "http:", "https:", "fetch(", "XMLHttpRequest", "import("):
        assert words not in style + script
    assert len(found.all("image")) == 3
    identities = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(identities) == len(set(identities))


def test_the_table_says_what_the_file_says(tmp_path: Path) -> None:
    records = [record(step) for step in range(1, 41)]
    records[19] |= {"val_loss": 1.2345678901234567}
    found = page_of(make_run(tmp_path / "run", records))
    assert found.cells("best_val_loss") == [1.2345678901234567]
    assert found.cells("val_loss") == [records[-1]["val_loss"]]
    assert found.cells("perplexity") == [records[-1]["perplexity"]]
    assert found.cells("train_loss") == [records[-1]["train_loss"]]
    assert found.cells("tokens") == [40 * 1024]
    assert found.cells("seconds") == [20.0]
    assert found.cells("memory") == [1e8]
    assert found.cells("tokens_per_second") == [float(np.median([one["tokens_per_second"] for one in records]))]
    assert found.cells("gap") == [None]
    assert "1.2346" in found.texts["table"][0]
    assert "step 20" in found.texts["table"][0]


def test_gap_is_to_the_twin_of_the_same_seed_and_text(tmp_path: Path) -> None:
    ternary = make_run(tmp_path / "ternary", [record(step) for step in range(1, 41)], "seed: 0\ntwin: false\nlr: 2\n")
    shorter = [record(step) for step in range(1, 31)]
    for one in shorter:
        one["val_loss"] = one["val_loss"] and one["val_loss"] - 0.0625
    make_run(tmp_path / "other-seed", shorter, "seed: 1\ntwin: true\n")
    make_run(tmp_path / "twin", shorter, "seed: 0\ntwin: true\n")
    runs = read_runs([str(ternary), str(tmp_path / "other-seed"), str(tmp_path / "twin")])
    assert [twin_of(run, runs) for run in runs] == [runs[2], None, None]
    places, values = gaps(runs[0], runs[2])
    assert runs[0].curves["step"][places].tolist() == [10, 20, 30]
    assert values == pytest.approx([0.0625] * 3)
    found = Page(page(runs))
    assert found.cells("gap") == [pytest.approx(0.0625), None, None]
    assert "+0.0625" in found.texts["table"][0]
    assert "step 30" in found.texts["table"][0]
    assert "Gap to the twin" in "".join(found.texts["figcaption"])
    assert "lr" in found.texts["table"][-4]  # of the options that differ


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src=http://x onerror=y>&lt;\x00\x1b[31m\u202e\"'"
    run = make_run(
        tmp_path / "a<b>&", [record(10), {"step": 11, "event": evil, "why": evil}], f"{json.dumps(evil)}: 1\n"
    )
    (run / "samples.txt").write_text(f"=== step 10, validation loss 2.4\n{evil}\n=== step 3, validation loss 9\n\n")
    name = f"model.layers.0.{evil}_proj"
    (run / "layers.jsonl").write_text(json.dumps({"step": 10, "layers": {name: {"zero": 0.3, "flip": 0.1}}}) + "\n")
    found = page_of(run)
    assert len(found.all("script")) == 1
    assert not found.all("img")
    (sample,) = found.texts["pre"]
    shown = evil.translate(dict.fromkeys((0, 0x1B, 0x202E), "\ufffd"))
    assert sample.strip("\n") == shown + "\n=== step 3, validation loss 9"
    assert found.texts["h1"] == ["a<b>&"]


def test_broken_runs_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    empty = make_run(tmp_path / "empty", [])
    one = make_run(tmp_path / "one", [record(1)])
    odd = make_run(
        tmp_path / "odd", [record(1), record(2, train_loss=math.nan), record(3, train_loss=math.inf, lr=None, mfu="x")]
    )
    with open(odd / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train_lo')
    (odd / "train.yaml").write_text("a: [")
    (odd / "checkpoints" / "step-00000002").mkdir(parents=True)
    (odd / "checkpoints" / "step-00000002" / "state.json").write_text("[1")
    add_layers(odd, range(1, 3))
    with open(odd / "layers.jsonl", "a") as file:
        file.write('{"step": 3, "layers": {"mod')
    run = read_run(odd)
    assert run.curves["step"].tolist() == [1, 2, 3]
    assert run.layers is not None
    assert run.layers.steps.tolist() == [1, 2]
    found = page_of(empty, one, odd)
    assert found.cells("train_loss") == [None, 5.0, 5.0]
    notes = " ".join(found.texts["p"])
    assert "empty: metrics.jsonl holds no step" in notes
    assert "empty, one: no layers.jsonl" in notes
    assert "odd: train.yaml cannot be read" in notes
    for text in ("nan", "inf"):
        assert not [attrs for tag, attrs in found.elements if tag == "path" and text in (attrs.get("d") or "")]
    page_of(empty)


def test_damage_anywhere_never_stops_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(step) for step in range(8, 12)])
    add_layers(run, range(1, 4), layers=2)
    saved = run / "checkpoints" / "step-00000010"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text('{"val_loss": 2.0, "config": {"seed": 1}}')
    (saved / "config.json").write_text('{"linear": "bitlinear", "hidden_size": 64}')
    (saved / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (run / "samples.txt").write_text("=== step 10, validation loss 2.3\nabc\n\n")
    rng = np.random.default_rng(1)
    scraps = [b"1e999", b"-1", b"NaN", b"null", b"{}", b"[]", b'"', b"\xff", b"9" * 400, b": &a [*a]", b"\n", b""]
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for _ in range(15):
            begin, length = int(rng.integers(len(whole))), int(rng.integers(12))
            scrap = scraps[rng.integers(len(scraps))]
            path.write_bytes(whole[:begin] + scrap + whole[begin + length :])
            page_of(run)
        path.write_bytes(whole)


def test_events_and_steps_done_again(tmp_path: Path) -> None:
    records = [record(step) for step in range(1, 8)]
    again = [record(step, train_loss=1.0) for step in range(5, 10)]
    event = {"step": 7, "event": "rollback", "to": 4, "reason": "loss 99"}
    run = read_run(make_run(tmp_path / "run", [*records, event, *again]))
    assert run.curves["step"].tolist() == list(range(1, 10))
    assert run.curve("train_loss")[4:].tolist() == [1.0] * 5
    found = Page(page([run]))
    assert [text for text in found.texts["table"] if "rollback" in text and "to 4, reason loss 99" in text]
    assert len([attrs for attrs in found.all("path") if (attrs.get("class") or "").startswith("event")]) >= 2


def test_long_and_many_runs_stay_small(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(20_000).tolist()
    with_spike = [record(step, train_loss=value) for step, value in enumerate(values, 1)]
    with_spike[17_776]["grad_norm"] = 1e9
    long = make_run(tmp_path / "long", with_spike)
    add_layers(long, range(1, 2000), layers=6)
    folders = [long] + [make_run(tmp_path / f"run{i}", with_spike[: 300 + i]) for i in range(19)]
    runs = read_runs([str(folder) for folder in folders])
    assert runs[0].layers is not None
    assert len(runs[0].layers.steps) == 120
    assert runs[0].layers.steps[[0, -1]].tolist() == [1, 1999]
    text = page(runs)
    assert len(text) < 3_000_000
    Page(text)


def test_thinning_keeps_spikes_and_the_last_value() -> None:
    x = np.arange(1.0, 100_001)
    y = np.sin(x)
    y[54_321] = 50
    raw, plain = (thin(Curve(x, y, "", "", raw=raw), 300) for raw in (True, False))
    assert len(raw.x) == len(plain.x) == 300
    assert raw.high.max() == 50
    assert plain.y[-1] == y[-1]
    assert plain.x[0] == 1
    y[::2] = np.nan
    assert np.isfinite(thin(Curve(x, y, "", "", raw=True), 300).y).all()
    assert smooth(np.full(5, 3.0)) == pytest.approx([3.0] * 5)
    assert line_chart("none", [Curve(x, np.full(len(x), np.nan), "", "")], "steps") == ""


@pytest.mark.parametrize(("low", "high", "ticks"), [(0.0, 1000.0, 5), (2.03, 2.051, 4), (0.0, 1e-9, 5)])
def test_ticks_are_round_and_inside(low: float, high: float, ticks: int) -> None:
    found = Axis(low, high).ticks(ticks)
    assert 2 <= len(found) <= ticks + 1
    assert all(low - 1e-9 * high <= tick <= high * (1 + 1e-9) for tick in found)
    assert nice(0.03) == pytest.approx(0.05)
    assert [number(value) for value in (0, 0.0025, 1500, 2_500_000, 3e-5)] == ["0", "0.0025", "1,500", "2.5M", "3e-5"]
    assert Axis(0.1, 1000, True).ticks(5) == pytest.approx([0.1, 1, 10, 100, 1000])


def test_a_heat_map_is_a_png_of_its_values() -> None:
    data = png(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    start = data.index(b"IDAT") + 4
    assert zlib.decompress(data[start:-16]) == b"\0" + bytes(range(12)) + b"\0" + bytes(range(12, 24))
    values = np.array([[0.0, 0.5, 1.0], [np.nan, 2.0, -1.0]])
    svg = heat_map("map", values, np.array([1, 2, 3]), [(1, 2, 3)], low=0, high=1, rows=["a", "b"], marks=[])
    Page(svg)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / place / "run", [record(1)]) for place in ("a", "b")]
    assert [run.name for run in read_runs([str(folder) for folder in folders])] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([str(folders[0])] * 2)] == ["a/run", "a/run (2)"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make_run(tmp_path / "run", [record(step) for step in range(1, 21)]), tmp_path / "page.html"
    assert report.main([str(run), "-o", str(out), "--title", "A & B"]) == 0
    assert Page(out.read_text()).texts["h1"] == ["A & B"]
    assert "1 run, " in capsys.readouterr().out
    first = out.read_bytes()
    assert report.main([str(run), "-o", str(out), "--title", "A & B"]) == 0
    assert out.read_bytes() == first
    assert str(tmp_path) not in first.decode()
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert "nothing is no run folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"it has none of train\.yaml"):
        read_run(tmp_path)

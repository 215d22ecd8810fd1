"""Short forms of benchmarks/removal.py and shares.py: they find what is there, and would say so if it were not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import removal
import shares


def test_removal_counts_what_it_planted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasketch")
    texts, pairs = removal.planted(400, 3)
    assert len(texts) == len(set(texts)) == 400 + len(pairs) == 592
    assert all(pair.similarity == 1 for pair in pairs if pair.edits == 0)
    assert all(pair.similarity < 0.5 for pair in pairs if pair.edits >= 0.1)
    assert removal.main(["--documents", "400", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line[:24].strip(): line[48:].split() for line in lines if line.startswith(("duplicate", "leak"))}
    assert table["duplicate, exact"] == table["leak, exact"] == ["16", "16", "16", "100.0%"]
    assert table["leak, 2% of words"] == ["16", "0", "16", "100.0%"]
    assert table["duplicate, 20% of words"] == ["16", "0", "0", "0.0%"]
    assert sum(line.endswith("removed were planted (100.00%)") for line in lines) == 2
    monkeypatch.setattr(removal, "packed", lambda source, out, dedup: (texts[:500], texts[500:]))
    monkeypatch.setattr(removal, "planted", lambda documents, seed: ([*texts, "lost"], pairs))
    assert removal.main(["--documents", "400"]) == 1  # exact copies stayed, and a document of its own is gone
    assert "precision of near: 0 of 1 removed were planted" in capsys.readouterr().out


def test_shares_are_tested_against_weights(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares.p_value(10.828, 1) == pytest.approx(0.001, rel=1e-3)  # tabulated quantiles
    assert shares.p_value(13.816, 2) == pytest.approx(0.001, rel=1e-3)
    assert shares.main(["--rows", "500", "--seeds", "2"]) == 0
    output = capsys.readouterr().out
    assert len({line.split()[-1] for line in output.splitlines() if "SHA-256" in line}) == 1
    assert output.count("SHA-256") == 6
    monkeypatch.setattr(shares, "streams", lambda folder, seed: {"one"})
    monkeypatch.setattr(shares, "show", lambda title, found, weights: 0.0)
    assert shares.main(["--rows", "100", "--seeds", "1"]) == 1

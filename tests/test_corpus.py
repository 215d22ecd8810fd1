"""Documents come exactly as stored, in one order, with a clear word about what is wrong; the split never leaks."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
import types
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet.corpus import Corpus, Split, Survey, documents, stdlib
from bitnet.errors import ConfigError, DataError


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def test_folders_are_read_in_sorted_order(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "b.txt": b"b\r\n",
            "a.PY": "\ufeffa \u00e9".encode(),
            "sub/c.md": b"c",
            "sub/d.jsonl": lines("d1", "d2"),
            "sub/e.jsonl.gz": gzip.compress(lines("e")),
            "empty.txt": b"",
            "picture.png": b"no text suffix",
            ".hidden.txt": b"hidden",
            ".git/config.txt": b"hidden",
            "binary.txt": b"a\0b",
            "latin.txt": b"\xe9",
        },
    )
    corpus = Corpus([tmp_path])
    expected = ["\ufeffa \u00e9", "b\r\n", "c", "d1", "d2", "e"]
    for _ in range(2):
        assert list(corpus) == expected
        assert {path.name for path in corpus.skipped} == {"binary.txt", "latin.txt"}
    assert list(documents([tmp_path / "sub", tmp_path / "b.txt"])) == ["c", "d1", "d2", "e", "b\r\n"]
    assert list(documents([put(tmp_path, {"picture.png": b"named"}) / "picture.png"])) == ["named"]


@pytest.mark.parametrize("data", [b"a\0b", b"\xff"])
def test_a_named_file_must_be_text(tmp_path: Path, data: bytes) -> None:
    put(tmp_path, {"x.txt": data})
    with pytest.raises(DataError, match=r"x\.txt is not UTF-8 text"):
        list(documents([tmp_path / "x.txt"]))
    with pytest.raises(DataError, match="there is no file or folder"):
        documents([tmp_path / "absent"])


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"{", "line 3 is not JSON"),
        (b"\xff", "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b'["text"]', "line 3 has no string named 'text'"),
        (b'{"body": "x"}', "line 3 has no string named 'text'"),
        (b'{"text": 5}', "line 3 has no string named 'text'"),
        (b'{"text": "\\ud800"}', "line 3 is not Unicode text"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_bad_lines_are_named(tmp_path: Path, name: str, line: bytes, match: str) -> None:
    data = lines("one") + b"\n" + line + b"\n" + lines("four")
    put(tmp_path, {name: gzip.compress(data) if name.endswith(".gz") else data})
    reader = documents([tmp_path / name])
    assert next(reader) == "one"
    with pytest.raises(DataError, match=rf"{name} {match}"):
        next(reader)


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(lines(*map(str, range(100))))
    for data in (whole[:-9], whole[:40], b"plain", whole[:60] + b"\xff" * 20 + whole[80:]):
        put(tmp_path, {"x.jsonl.gz": data})
        with pytest.raises(DataError, match=r"x\.jsonl\.gz"):
            list(documents([tmp_path]))


@given(pieces=st.lists(st.text("ab\u00e9|", min_size=1, max_size=5), min_size=1, max_size=6), size=st.integers(0, 3))
def test_separator(tmp_path_factory: pytest.TempPathFactory, pieces: list[str], size: int) -> None:
    """Also where a separator lies across the blocks the file is read in."""
    pieces = [*pieces, "x" * ((1 << 20) - size), "end"]
    path = tmp_path_factory.mktemp("separator") / "x.txt"
    path.write_bytes("\n<|end|>\n".join(pieces).encode())
    assert list(documents([path], separator="<|end|>")) == pieces


def test_separator_refusals(tmp_path: Path) -> None:
    put(tmp_path, {"x.txt": b"a<>\xff"})
    with pytest.raises(DataError, match="is not UTF-8 text"):
        list(documents([tmp_path], separator="<>"))
    with pytest.raises(ConfigError, match="must not be empty"):
        documents([tmp_path], separator="")


def test_max_bytes_stops_at_whole_documents(tmp_path: Path) -> None:
    put(tmp_path, {"x.jsonl": lines("\u00e9\u00e9", "abc", "d")})
    for limit, expected in ((3, 0), (4, 1), (6, 1), (7, 2), (8, 3)):
        assert len(list(Corpus([tmp_path], max_bytes=limit))) == expected


def test_stdlib_is_this_interpreters_and_the_same_each_time() -> None:
    once = list(stdlib(max_bytes=2_000_000))
    assert once == list(stdlib(max_bytes=2_000_000))
    assert 1_000_000 < sum(len(text.encode()) for text in once) <= 2_000_000
    paths = stdlib().files
    assert {"json", "asyncio"} <= {path.parent.name for path in paths}
    assert not any({"site-packages", "encodings"} & set(path.parts) for path in paths)


def test_survey_reads_every_document() -> None:
    survey = Survey.of(["a", "b\u00e9"])
    assert (survey.documents, survey.bytes) == (2, 4)
    assert survey.sha256 != Survey.of(["ab", "\u00e9"]).sha256
    with pytest.raises(DataError, match="the corpus is empty"):
        Survey.of([])


def sides(split: Split, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    parts = [split.parts(text) for text in texts]
    return [train for train, _ in parts if train], [held for _, held in parts if held]


def test_hash_split_never_leaks_and_holds_out_its_share() -> None:
    texts = [f"document {i % 3000}" for i in range(5000)]  # with duplicates
    split = Split.choose(Survey.of(texts), 0.1)
    assert not split.by_position
    train, held = sides(split, texts)
    assert sorted(train + held) == sorted(texts)
    assert not set(train) & set(held)
    # 3000 draws at 0.1: mean 300, standard deviation 16.4; five of them either way.
    assert 218 < len(set(held)) < 382
    # Neighbours do not matter: a document keeps its side when others come or go.
    again = sides(Split.choose(Survey.of(texts[:900]), 0.1), texts[:900])
    assert again == (
        [text for text in texts[:900] if text in set(train)],
        [text for text in texts[:900] if text in set(held)],
    )


@given(texts=st.lists(st.text(max_size=300), min_size=1, max_size=20), fraction=st.floats(0, 0.35))
def test_few_documents_are_cut(texts: list[str], fraction: float) -> None:
    split = Split.choose(Survey.of(texts), fraction)
    assert split.by_position
    for text in texts:
        train, held = split.parts(text)
        assert train + held == text
        assert -1e-9 < len(held) - len(text) * fraction < 1 + 1e-9


def test_default_fractions() -> None:
    assert Split.choose(Survey(1, 10, "")) == Split(0.1, by_position=True)
    assert Split.choose(Survey(799, 10, "")) == Split(0.01, by_position=True)
    assert Split.choose(Survey(800, 10, "")) == Split(0.01, by_position=False)
    assert Split.choose(Survey(1, 10, ""), 0.0).parts("text") == ("text", "")
    # The customary cut of a single file: its first nine tenths.
    assert len(Split.choose(Survey(1, 10, "")).parts("x" * 1_115_394)[0]) == 1_003_854
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="validation fraction"):
            Split.choose(Survey(1, 10, ""), fraction)


def test_records_of_every_kind_are_the_same_documents(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"body": f"text {i} \u00e9", "meta": {"score": i / 2}, "id": i} for i in range(700)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    two_frames = zstandard.compress(data[:5000]) + zstandard.compress(data[5000:])
    put(tmp_path, {"a.jsonl": data, "b.jsonl.gz": gzip.compress(data), "c.jsonl.zst": two_frames})
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=300)
    found = [*Corpus([tmp_path], text_field="body", fields=["meta.score", "absent"]).documents()]
    assert [document.text for document in found] == [row["body"] for row in rows] * 4
    assert [document.fields for document in found] == [{"meta.score": i / 2} for i in range(700)] * 4
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]
    assert [document.source for document in found[::700]] == [f"{tmp_path.name}/{name}" for name in names]
    for name in ("a.jsonl", "d.parquet"):
        with pytest.raises(DataError, match=rf"{name} (line|row) 1 has no string named 'text'"):
            list(Corpus([tmp_path / name]))


def test_a_reading_tells_how_far_it_is(tmp_path: Path) -> None:
    texts = [f"text {i} " * 50 for i in range(40)]
    put(tmp_path, {"a.txt": b"a" * 5000, "b.jsonl": lines(*texts), "c.jsonl.gz": gzip.compress(lines(*texts))})
    corpus = Corpus([tmp_path])
    sizes = [path.stat().st_size for path in corpus.files]
    assert corpus.size() == sum(sizes)
    for _ in range(2):
        found = [corpus.position for _ in corpus]
        assert found == sorted(found)
        assert found[0] == 5000  # all of a document's text has gone by
        assert found[40] == 5000 + sum(map(len, texts)) < found[41] == 5000 + sizes[1] + min(len(texts[0]), sizes[2])
        assert (
            found[-1] == corpus.position == sum(sizes)
        )  # compressed: more text than bytes, and no more than there are
    assert Corpus([tmp_path], max_bytes=9).size() is None
    assert Corpus(["hub:owner/name", tmp_path]).size() is None


def test_damaged_zstd_and_parquet(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.compress(lines(*map(str, range(100))))
    for data in (whole[:-3], whole[:8], b"plain", whole[:30] + b"\xff" * 20 + whole[50:]):
        put(tmp_path, {"x.jsonl.zst": data})
        with pytest.raises(DataError, match=r"x\.jsonl\.zst"):
            list(documents([tmp_path]))
    put(tmp_path, {"x.parquet": b"PAR1 and not more"})
    with pytest.raises(DataError, match=r"x\.parquet is a damaged Parquet file"):
        list(documents([tmp_path / "x.parquet"]))


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library: the network is not asked, but what would be asked for is."""
    asked = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        asked.append((args, options))
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    library = types.ModuleType("datasets")
    monkeypatch.setattr(library, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert list(Corpus(["hub:owner/name@abc123#sample-10BT/validation", "hub:plain"])) == ["one", "two"] * 2
    assert asked == [
        (("owner/name", "sample-10BT"), {"split": "validation", "revision": "abc123", "streaming": True}),
        (("plain", None), {"split": "train", "revision": None, "streaming": True}),
    ]
    with pytest.raises(ConfigError, match="is not of the form hub:OWNER/NAME"):
        Corpus(["hub:a/b/c"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"hub:plain needs datasets: pip install 'bitnet\[data\]'"):
        list(Corpus(["hub:plain"]))


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.txt"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, name: str) -> None:
    """What Python holds at most while 16 MB go by; pyarrow's own buffers are a row group's."""
    zstandard, arrow, parquet = map(pytest.importorskip, ("zstandard", "pyarrow", "pyarrow.parquet"))
    texts = [f"{i} " * 800 for i in range(4000)]
    if name == "x.parquet":
        parquet.write_table(arrow.table({"text": texts}), tmp_path / name)
    elif name == "x.txt":
        put(tmp_path, {name: "<>".join(texts).encode()})
    else:
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
        put(tmp_path, {name: pack(lines(*texts))})
    del texts
    tracemalloc.start()
    size = sum(map(len, Corpus([tmp_path / name], separator="<>")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 15_000_000
    assert peak < 6_000_000

"""Planted duplicates and planted leaks are found, and nothing else; the bytes depend on neither workers nor kills."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bitnet import recipes
from bitnet.corpus import Corpus, Document, Split
from bitnet.data import ShardDataset
from bitnet.data_cli import main
from bitnet.errors import ConfigError, DataError
from bitnet.mixture import Mixture
from bitnet.prepare import Filters, HeldOut, Preparation, pack
from bitnet.prepare.exact import digest
from bitnet.prepare.filters import repetition
from bitnet.prepare.near import PERMUTATIONS, signature
from bitnet.prepare.screening import REASONS, screen
from bitnet.shard import read_manifest

pytest.importorskip("datasketch")
WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=2 + i % 7)) for i in range(3000)]
QUIET: Any = {"log": lambda line: None}


def prose(draw: random.Random, words: int = 150) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def edited(draw: random.Random, text: str, share: float) -> str:
    """The text with a share of its words replaced: about (1 - share)^5 of its five-word stretches survive."""
    words = text.split(" ")
    for i in draw.sample(range(len(words)), round(share * len(words))):
        words[i] = draw.choice(WORDS)
    return " ".join(words)


def write(path: Path, rows: list[Any]) -> Path:
    lines = (json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def dropped(path: Path, preparation: Preparation, **options: Any) -> list[str]:
    found = screen(Corpus([path], fields=preparation.filters.fields), preparation, **options)
    return [REASONS[code] for code in found.codes or bytes(found.survey.documents)]


def planted() -> tuple[list[str], list[str]]:
    """1200 texts and what should become of each: 800 of their own, 200 exact and 200 near duplicates of some."""
    draw = random.Random(7)
    rows = [(prose(draw), "") for _ in range(800)]
    for text, _ in draw.sample(rows[:800], 200):
        rows.append((text.upper().replace(" ", "\n ", 40), "exact"))
    for text, _ in draw.sample(rows[:800], 200):
        rows.append((edited(draw, text, 0.02), "near"))
    tail = rows[800:]
    draw.shuffle(tail)
    texts, fates = zip(*rows[:800], *tail, strict=True)
    return list(texts), list(fates)


def test_planted_duplicates_are_found(tmp_path: Path) -> None:
    texts, fates = planted()
    path = write(tmp_path / "x.jsonl", texts)
    verdicts = dropped(path, Preparation(dedup="near"), workers=2)
    # An edit of 2 % leaves a similarity of about 0.82, which 128 numbers estimate to 0.034: 0.7 is 3.5 of them away.
    planted_ = [fate != "" for fate in fates]
    removed = [verdict != "" for verdict in verdicts]
    hits = sum(a and b for a, b in zip(planted_, removed, strict=True))
    assert hits / sum(removed) == 1.0  # precision
    assert hits / sum(planted_) >= 0.99  # recall
    assert [v for v, f in zip(verdicts, fates, strict=True) if f == "exact"] == ["exact"] * 200
    assert verdicts == dropped(path, Preparation(dedup="near"))
    exact = dropped(path, Preparation(dedup="exact"))
    assert exact == ["exact" if fate == "exact" else "" for fate in fates]


def test_signatures_estimate_similarity() -> None:
    draw = random.Random(1)
    for share in (0.0, 0.02, 0.1, 0.3):
        text = prose(draw, 2000)
        other = edited(draw, text, share)
        sets = [{tuple(t.split()[i : i + 5]) for i in range(1996)} for t in (text, other)]
        true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        error = (true * (1 - true) / PERMUTATIONS) ** 0.5
        assert abs(signature(text).jaccard(signature(other)) - true) <= 5 * error + 1e-9
    assert digest("Stra\u00dfe  A\n") == digest("STRASSE a") != digest("strasse b")


def similarity(a: str, b: str) -> float:
    sets = [{tuple(t.casefold().split()[i : i + 5]) for i in range(len(t.split()) - 4)} for t in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_nothing_held_out_has_a_near_duplicate_in_training(tmp_path: Path) -> None:
    """Leaks planted in both directions, before and after: half of every held-out text's stretches occur in training."""
    draw = random.Random(3)
    split = Split(0.1, by_position=False)
    own = [prose(draw) for _ in range(400)]
    rows, leaks = list(own), 0
    for text in own:
        for _ in range(40):
            copy = edited(draw, text, draw.choice((0.02, 0.06)))  # similarities of about 0.82 and 0.58
            if split.holds_out(copy) != split.holds_out(text):
                rows.insert(draw.randrange(len(rows) + 1), copy)
                leaks += 1
                break
    assert leaks > 250
    path = write(tmp_path / "x.jsonl", rows)

    def sides(preparation: Preparation) -> tuple[list[str], list[str]]:
        out = pack(path, tmp_path / "out", "bytes", val_fraction=0.1, preparation=preparation, **QUIET)
        parts = (ShardDataset(out), ShardDataset(out, "validation"))
        texts = [data.tokenizer().decode([t if t < 256 else 0 for t in data.read(0, len(data))]) for data in parts]
        train, held = (text.split("\0")[:-1] for text in texts)
        return train, held

    def leaked(train: list[str], held: list[str], least: float) -> int:
        where: dict[tuple[str, ...], set[int]] = {}
        for i, text in enumerate(train):
            words = text.casefold().split()
            for j in range(len(words) - 4):
                where.setdefault(tuple(words[j : j + 5]), set()).add(i)
        count = 0
        for text in held:
            words = text.casefold().split()
            near = {i for j in range(len(words) - 4) for i in where.get(tuple(words[j : j + 5]), ())}
            count += any(similarity(text, train[i]) >= least for i in near)
        return count

    assert leaked(*sides(Preparation()), 0.5) > 50
    train, held = sides(Preparation(dedup="near"))
    # The bound is 0.5 and the estimate's error 0.044: none of 400 pairs is 3.4 errors off, one in twenty is 1.6 off.
    assert leaked(train, held, 0.65) == 0
    assert leaked(train, held, 0.57) <= 0.05 * len(held)
    assert len(held) > 40
    assert set(held) <= set(rows)


@pytest.mark.parametrize("words", [15, 60])
def test_few_documents_are_on_both_sides(tmp_path: Path, words: int) -> None:
    """Cut documents: a likeness of about 0.63 is one across the split, whatever a hash of the texts would say."""
    draw = random.Random(11)
    own = [prose(draw, 10 * words) for _ in range(40)]
    copies = [edited(draw, text, 0.05) for text in own]
    path = write(tmp_path / "x.jsonl", own + copies)
    hashes = Split(0.09, by_position=False)
    assert 0 < sum(hashes.holds_out(a) != hashes.holds_out(b) for a, b in zip(own, copies, strict=True)) < 20
    estimates = [signature(a).jaccard(signature(b)) for a, b in zip(own, copies, strict=True)]
    found = screen(Corpus([path]), Preparation(dedup="near"), 0.09)
    assert found.split == Split(0.09, by_position=True)
    verdicts = [REASONS[code] for code in found.codes or bytes(80)]
    assert verdicts[:40] == [""] * 40
    # The index (32 bands of 4) misses one in a hundred of a likeness of 0.6: of 40, hardly ever three.
    missed = [value for verdict, value in zip(verdicts[40:], estimates, strict=True) if value >= 0.6 and not verdict]
    assert len(missed) < 3
    assert not any(verdict for verdict, value in zip(verdicts[40:], estimates, strict=True) if value < 0.5)
    assert verdicts.count("across") > 20
    whole = screen(Corpus([path]), Preparation(dedup="near"), 0.0)  # nothing is held out: there is no other side
    verdicts = [REASONS[code] for code in whole.codes or bytes(80)]
    assert verdicts[40:] == ["near" if value >= 0.7 else "" for value in estimates]


def test_filters(tmp_path: Path) -> None:
    good = {"text": "a good one", "score": 3, "id": 1, "meta": {"language": "en"}}
    rows = [
        good,
        good | {"score": 2.9},
        good | {"score": "4"},
        {"text": "no record"},
        good | {"meta": {"language": "de"}},
        good | {"id": 2},
        good | {"text": "short"},
        good | {"text": "so long " * 9},
        good | {"text": "la la la la la la la"},
    ]
    filters = Filters(3.0, "score", "en", "meta.language", 6, 50, 0.3, (("id", "1"),))
    path = write(tmp_path / "x.jsonl", rows)
    fates = ["", "score", "score", "score", "language", "where", "length", "length", "repetition"]
    assert dropped(path, Preparation(filters)) == fates
    assert repetition("a b c d") == 0
    assert repetition("a b c d e f g") == 0
    assert repetition("a a a a a a") == 0.5
    assert Filters().refuses(Document("")) is None
    with pytest.raises(DataError, match="no document is left of 9: 6 by language, 3 by score"):
        dropped(path, Preparation(Filters(2.95, language="fr", language_field="meta.language")))
    for bad in ({"min_chars": -1}, {"max_repetition": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Filters(**bad)
    with pytest.raises(ConfigError, match="dedup must be one of none, exact, near, not 'fuzzy'"):
        Preparation(dedup="fuzzy")
    with pytest.raises(ConfigError, match="near must be above 0"):
        dropped(path, Preparation(dedup="near", near=0.0))


def test_the_manifest_tells_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": prose(random.Random(i), 30), "score": i % 5} for i in range(100)] * 2
    write(tmp_path / "x.jsonl", rows)
    flags = [
        "--out",
        str(tmp_path / "out"),
        "--tokenizer",
        "bytes",
        "--min-score",
        "3",
        "--dedup",
        "exact",
        "--seq",
        "9",
    ]
    assert main(["--data", str(tmp_path / "x.jsonl"), *flags]) == 0
    assert "left out: 40 exact, 120 score; kept 40 documents" in capsys.readouterr().out
    source = read_manifest(tmp_path / "out")["source"]
    assert source["filters"] == {"min_score": 3.0, "dedup": "exact"}
    assert (source["read"], source["documents"], source["files"]) == (200, 40, {"x.jsonl": 40})
    assert source["left_out"] == {"exact": 40, "score": 120}
    assert main(["--data", str(tmp_path / "x.jsonl"), *flags]) == 0
    assert "already holds this pack" in capsys.readouterr().out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    return write(tmp_path_factory.mktemp("text") / "x.jsonl", [prose(draw, 100) for _ in range(6000)])


FLAGS = (
    "--tokenizer sentencepiece --vocab-size 500 --max-mb 2 --shard-tokens 20000 --dedup exact --val-fraction 0.05"
).split()


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(["--data", str(text), "--out", str(out), *FLAGS]) == 0
    return contents(out)


def test_workers_change_no_byte(text: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert main(["--data", str(text), "--out", str(tmp_path / "out"), *FLAGS, "--workers", "2"]) == 0
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_packs_end_in_the_same_bytes(
    text: Path, tmp_path: Path, undisturbed: dict[str, bytes], workers: str
) -> None:
    out = tmp_path / "out"
    journal = out / "unfinished" / "shards.jsonl"
    words = [sys.executable, "-m", "bitnet.data_cli", "--data", text, "--out", out, *FLAGS, "--workers", workers]
    for lines in (1, 6):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with open(journal, "ab") as file:  # as a power cut may leave it
        file.write(b'{"split": "tra')
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*")}
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "going on with it" in run.stdout
    assert "finished shard(s) kept" in run.stdout
    assert contents(out) == undisturbed
    assert sum(path.stat().st_mtime_ns == kept.get(path.name) for path in out.glob("train-*")) >= 5


def test_a_killed_pack_of_other_text_is_begun_again(text: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    (out / "unfinished").mkdir(parents=True)
    (out / "unfinished" / "plan.json").write_text('{"stamp": "another"}', encoding="utf-8")
    (out / "train-00099.bin").write_bytes(b"of another pack")
    assert main(["--data", str(text), "--out", str(out), *FLAGS]) == 0
    assert contents(out) == undisturbed


def test_workers_report_errors_and_leave(tmp_path: Path) -> None:
    alphabet = tmp_path / "bitnet_tokenizer.json"
    alphabet.write_text(json.dumps({"kind": "chars", "characters": " abcdefghijklmnop"}), encoding="utf-8")
    path = write(tmp_path / "x.jsonl", [prose(random.Random(0)), "not THIS"])
    with pytest.raises(DataError, match="is not among the 17 characters"):
        pack(path, tmp_path / "out", str(alphabet), workers=2, **QUIET)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ConfigError, match="workers must be at least 1, not 0"):
        pack(path, tmp_path / "out", "bytes", workers=0, **QUIET)


def test_a_recipe_of_parts_makes_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Offline: files in the place of the recipe's source."""
    draw = random.Random(2)
    sets = ["CommonCrawl", "C4", "Github", "ArXiv", "Book", "Wikipedia", "StackExchange"]
    rows = [
        {"text": prose(draw, 60), "meta": {"redpajama_set_name": f"RedPajama{name}"}}
        for name in sets
        for _ in range(30)
    ]
    path = write(tmp_path / "chunk.jsonl", rows)
    flags = ["--tokenizer", "bytes", "--shards", "3", "--seq", "16", "--verify"]
    assert main(["--recipe", "redpajama", "--data", str(path), "--out", str(tmp_path / "out"), *flags]) == 0
    assert "part wikipedia:" in capsys.readouterr().out
    mix = Mixture.open([str(tmp_path / "out" / "mixture.yaml")])
    assert [source.name for source in mix.sources][:2] == ["commoncrawl", "c4"]
    assert mix.weights == pytest.approx([0.522, 0.267, 0.052, 0.046, 0.042, 0.038, 0.033])
    assert {source.dataset.documents for source in mix.sources} == {30}
    assert {len(source.dataset.shards) for source in mix.sources} == {3}  # the flag, not what the recipe says of a part
    assert main(["--recipe", "tinystories", "--data", str(path), "--out", str(tmp_path / "one"), *flags]) == 0
    data = ShardDataset(tmp_path / "one")
    assert len(data.shards) == 3
    sizes = [len(shard) for shard in data.shards]
    assert max(sizes) - min(sizes) < 0.1 * max(sizes)


def packed_texts(folder: Path, split: str) -> list[str]:
    data = ShardDataset(folder, split)
    return data.tokenizer().decode([t if t < 256 else 0 for t in data.read(0, len(data))]).split("\0")[:-1]


@pytest.mark.parametrize("dedup", ["exact", "near"])
@pytest.mark.parametrize("short", [False, True])
def test_no_part_trains_on_what_another_holds_out(tmp_path: Path, dedup: str, short: bool) -> None:
    """Leaks planted in both directions, from two parts that a hash splits, or one whose few documents are cut."""
    draw = random.Random(13)
    split = Split(0.1, by_position=False)
    counts = {"web": 300, "code": 30 if short else 300}
    own = {name: [prose(draw, 90) for _ in range(count)] for name, count in counts.items()}
    rows = {name: list(texts) for name, texts in own.items()}
    planted: dict[str, list[str]] = {"web": [], "code": []}  # trained on, and a likeness of what the other holds out
    for name, other in (("web", "code"), ("code", "web")):
        cut = short and other == "code"  # all its documents are held out in part
        for number, text in enumerate(text for text in own[other] if cut or split.holds_out(text)):
            copy = text
            while copy == text or ((name == "web" or not short) and split.holds_out(copy)):
                near = dedup == "near" and number % 2
                copy = edited(draw, text, 0.02) if near else text.upper() + "\n" * draw.randrange(9)
            planted[name].append(copy)
            rows[name].insert(draw.randrange(len(rows[name]) + 1), copy)
    assert min(map(len, planted.values())) >= 20
    for name, texts in rows.items():
        write(tmp_path / f"{name}.jsonl", texts)
    parts = {name: {"weight": 0.5, "source": [str(tmp_path / f"{name}.jsonl")]} for name in rows}
    recipe = {"about": "a", "licence": "b", "sha256": "unknown", "source": ["none"], "parts": parts}
    recipe |= {"pack": {"tokenizer": "bytes", "val_fraction": 0.1}, "prepare": {"dedup": dedup}}
    (tmp_path / "x.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    out = tmp_path / "out"
    recipes.run(recipes.find(str(tmp_path / "x.yaml")), out, pack_options={"seq_len": 16}, **QUIET)
    train, held = ({name: packed_texts(out / name, side) for name in rows} for side in ("train", "validation"))
    whole = {name: set(train[name]) for name in rows}
    if short:
        assert len(train["code"]) == len(held["code"])
        whole["code"] = {"".join(pair) for pair in zip(train["code"], held["code"], strict=True)}
    for name in rows:
        assert not whole[name] & set(planted[name])  # recall: near ones have a likeness of about 0.82, all are found
        assert set(own[name]) <= whole[name] | set(held[name])  # and nothing else is lost
        left_out = read_manifest(out / name)["source"]["left_out"]
        assert left_out == {"leak": len(planted[name])}
    said: list[str] = []
    recipes.run(recipes.find(str(tmp_path / "x.yaml")), out, pack_options={"seq_len": 16}, log=said.append)
    assert sum("already holds this pack" in line for line in said) == 2


def test_of_two_cut_parts_the_later_gives_way(tmp_path: Path) -> None:
    draw = random.Random(17)
    common, first, last = ([prose(draw, 60) for _ in range(10)] for _ in range(3))
    paths = [write(tmp_path / "a.jsonl", first + common + common), write(tmp_path / "b.jsonl", common + last)]
    prepare = Preparation(dedup="near")
    held_out = HeldOut([(Corpus([path]), prepare) for path in paths], 0.1, workers=2)
    verdicts = []
    for number, path in enumerate(paths):
        found = screen(Corpus([path]), prepare, 0.1, guard=held_out.guard(number))
        assert found.split == Split(0.1, by_position=True)
        verdicts.append([REASONS[code] for code in found.codes or b""])
    assert verdicts == [[""] * 20 + ["exact"] * 10, ["leak"] * 10 + [""] * 10]
    nothing = HeldOut([(Corpus([path]), prepare) for path in paths], 0.0)  # held out: nothing to give way to
    assert screen(Corpus([paths[1]]), prepare, 0.0, guard=nothing.guard(1)).codes is None


@pytest.mark.parametrize("parts", [{}, {"one": {"weight": 1}}])
def test_a_recipe_tells_its_text_from_another(tmp_path: Path, parts: dict[str, Any]) -> None:
    texts = [f"{i} some words of text" for i in range(20)]
    path = write(tmp_path / "x.jsonl", texts)
    true = hashlib.sha256(b"".join(len(text).to_bytes(8, "little") + text.encode() for text in texts)).hexdigest()
    file, out = tmp_path / "r.yaml", tmp_path / "out"

    def run(sha256: str, **options: Any) -> None:
        fields = {"about": "a", "licence": "b", "sha256": sha256, "source": [str(path)], "parts": parts}
        file.write_text(json.dumps({**fields, "pack": {"tokenizer": "bytes"}}), encoding="utf-8")
        recipes.run(recipes.find(str(file)), out, pack_options={"seq_len": 9, **options}, **QUIET)

    other = "0" * 64
    with pytest.raises(DataError, match=f"the text of x.jsonl has the sha256 {true}, not {other} as the recipe says"):
        run(other)
    assert not out.exists()
    run(true.upper())
    assert read_manifest(out / "one" if parts else out)["source"]["sha256"] == true
    run("unknown (see the manifest)")
    run(other, max_bytes=200)  # of a beginning of the text nothing can be said
    with pytest.raises(ConfigError, match="must be 64 hex digits or begin with unknown, not '00'"):
        run("00")


def test_recipes_name_what_they_need() -> None:
    files = sorted((Path(__file__).parents[1] / "datasets").glob("*.yaml"))
    assert [path.stem for path in files] == ["fineweb-edu", "redpajama", "slimpajama", "tinystories"]
    for path in files:
        recipe = recipes.find(path.stem)
        assert recipe.sha256 == "unknown" or "unknown (" in recipe.sha256
        recipes.preparation(recipe.prepare)
        Corpus(recipe.source)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- 5", "should hold names and values"),
        ("{", "is not YAML"),
        ("about: a", "has no text 'licence'"),
        ("{about: a, licence: b, sha256: c}", "has no list of sources"),
        (
            "{about: a, licence: b, sha256: c, source: [x], pack: {shard: 5}}",
            "a field 'shard' that recipes do not know",
        ),
        ("{about: a, licence: b, sha256: c, source: [x], prepare: {minscore: 5}}", "a field 'minscore'"),
        ("{about: a, licence: b, sha256: c, source: [x], parts: {one: {wait: 1}}}", "a field 'wait'"),
    ],
)
def test_recipe_lies(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=match):
        recipes.find(str(tmp_path / "x.yaml"))
    with pytest.raises(ConfigError, match="there is no recipe 'pile'; one of fineweb-edu, "):
        recipes.find("pile")

"""A batch is a function of seed and position; an epoch visits every window once; packing is deterministic."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.config import BitNetConfig
from bitnet.corpus import Corpus
from bitnet.data import DataLoader, ShardDataset, eval_blocks
from bitnet.data_cli import main, pack
from bitnet.errors import ConfigError, DataError
from bitnet.model import BitNetForCausalLM
from bitnet.ops import no_grad
from bitnet.rows import DocumentWindows, permute
from bitnet.shard import SUFFIX, ShardWriter, write_manifest
from bitnet.tokenizer import ByteTokenizer

VOCAB = 70_000
PRINT = "cd" * 32


def sums(writer: ShardWriter) -> dict[str, str]:
    return {"sha256": writer.sha256, "index_sha256": writer.index_sha256}


def make_dataset(folder: Path, sizes: list[int]) -> ShardDataset:
    """Shards of the given sizes, holding 0, 1, 2 ... so that a token is its own place."""
    files, begin = [], 0
    for i, size in enumerate(sizes):
        with ShardWriter(folder / f"{i}{SUFFIX}", VOCAB, PRINT) as writer:
            writer.append(range(begin, begin + size))
        files.append({"file": writer.path.name, "tokens": size, "documents": 1, **sums(writer)})
        begin += size
    tokenizer = {"name": "bytes", "vocab_size": VOCAB, "fingerprint": PRINT, "files": []}
    split = {"tokens": begin, "documents": len(sizes), "text_bytes": 2 * begin, "files": files}
    write_manifest(folder, {"key": "", "tokenizer": tokenizer, "splits": {"train": split}})
    return ShardDataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return make_dataset(tmp_path_factory.mktemp("data"), [300, 1, 699, 3])


def test_shards_are_joined(dataset: ShardDataset) -> None:
    assert (len(dataset), dataset.documents, dataset.bytes_per_token) == (1003, 4, 2.0)
    for begin, end in ((0, 1003), (299, 302), (300, 300), (301, 1000), (999, 1003), (1003, 1003)):
        assert dataset.read(begin, end).tolist() == list(range(begin, end))
    for begin, end in ((-1, 5), (0, 1004), (6, 5)):
        with pytest.raises(DataError, match=r"tokens 0\.\.1003"):
            dataset.read(begin, end)
    dataset.verify()


@pytest.mark.parametrize("order", ["shuffled", "random"])
def test_batches_are_a_function_of_seed_and_position(dataset: ShardDataset, order: str) -> None:
    loader = DataLoader(dataset, 4, 16, seed=7, order=order)
    straight = list(islice(loader, 60))
    assert loader.position == 60
    for position in (59, 0, 31):  # any batch alone, in any order, from a fresh loader
        tokens, targets = DataLoader(dataset, 4, 16, seed=7, order=order).batch(position)
        assert np.array_equal(tokens, straight[position][0])
        assert np.array_equal(targets, straight[position][1])
    resumed = DataLoader(dataset, 4, 16, seed=7, order=order, position=25)
    for (tokens, targets), (old_tokens, old_targets) in zip(islice(resumed, 35), straight[25:], strict=True):
        assert np.array_equal(tokens, old_tokens)
        assert np.array_equal(targets, old_targets)
    other = DataLoader(dataset, 4, 16, seed=8, order=order)
    assert sum(other.starts(p) == loader.starts(p) for p in range(60)) == 0
    for tokens, targets in straight:
        assert tokens.shape == targets.shape == (4, 16)
        assert tokens.dtype == targets.dtype == np.int32
        assert tokens.flags.c_contiguous
        assert targets.flags.c_contiguous
        assert np.array_equal(targets, tokens + 1)
        assert np.array_equal(tokens, tokens[:, :1] + np.arange(16))


@settings(deadline=None)  # it waits for the disk
@given(size=st.integers(2, 200), seq_len=st.integers(1, 40), batch=st.integers(1, 7), seed=st.integers(0, 2**64 - 1))
def test_an_epoch_visits_every_window_once(
    tmp_path_factory: pytest.TempPathFactory, size: int, seq_len: int, batch: int, seed: int
) -> None:
    seq_len = min(seq_len, size - 1)
    loader = DataLoader(make_dataset(tmp_path_factory.mktemp("epoch"), [size]), batch, seq_len, seed)
    count = loader.windows_per_epoch
    assert count == max(1, (size - 1) // seq_len - 1)
    rows = [start for position in range(3 * count // batch + 1) for start in loader.starts(position)]
    for epoch in range(3):
        starts = sorted(rows[epoch * count : (epoch + 1) * count])
        assert [start - starts[0] for start in starts] == [i * seq_len for i in range(count)]
        assert starts[0] >= 0
        assert starts[-1] + seq_len + 1 <= size


def test_epochs_differ_in_order_and_grid(dataset: ShardDataset) -> None:
    loader = DataLoader(dataset, 61, 16, seed=1)
    assert loader.windows_per_epoch == 61
    assert loader.epoch(5) == 5.0
    epochs = [loader.starts(epoch) for epoch in range(40)]
    assert len({min(starts) for starts in epochs}) > 15  # of 27 places for the grid
    orders = {tuple(start - min(starts) for start in starts) for starts in epochs}
    assert len(orders) == 40
    assert set(range(1003)) == {start + i for starts in epochs for start in starts for i in range(17)}


def test_random_order_reaches_both_ends(dataset: ShardDataset) -> None:
    starts = [start for p in range(300) for start in DataLoader(dataset, 4, 1000, order="random").starts(p)]
    assert set(starts) == {0, 1, 2}
    narrow = DataLoader(dataset, 2, 1000, order="random")
    assert narrow.starts(9) == DataLoader(dataset, 4, 1000, order="random").starts(9)[:2]


def test_order_is_pinned(dataset: ShardDataset) -> None:
    """The very places: a change of NumPy, machine or code that moved them would change every training run."""
    assert DataLoader(dataset, 6, 16, seed=1234).starts(20) == [484, 628, 677, 917, 805, 437]
    assert DataLoader(dataset, 6, 16, seed=1234, order="random").starts(20) == [734, 70, 331, 131, 917, 135]


@given(count=st.integers(1, 700), keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6))
def test_permute_is_a_bijection(count: int, keys: list[int]) -> None:
    assert sorted(permute(i, count, keys) for i in range(count)) == list(range(count))


def test_permute_is_even() -> None:
    """Where each of ten indices goes under 5000 keys: chi-squared, expected 90, standard deviation 14.1."""
    words = np.random.Philox(key=1).random_raw(30_000).reshape(5000, 6).tolist()
    counts = np.zeros((10, 10))
    for keys in words:
        for i in range(10):
            counts[i, permute(i, 10, keys)] += 1
    assert np.sum((counts - 500) ** 2 / 500) < 90 + 5 * 14.1


def make_documents(folder: Path, documents: list[list[int]], shards: int = 2) -> ShardDataset:
    files = []
    for i in range(shards):
        with ShardWriter(folder / f"{i}{SUFFIX}", VOCAB, PRINT) as writer:
            for document in documents[i::shards]:
                writer.append(document)
        size, count = writer.tokens, writer.documents
        files.append({"file": writer.path.name, "tokens": size, "documents": count, **sums(writer)})
    tokenizer = {"name": "bytes", "vocab_size": VOCAB, "fingerprint": PRINT, "files": []}
    totals = {name: sum(entry[name] for entry in files) for name in ("tokens", "documents")}
    split = {**totals, "text_bytes": 2 * totals["tokens"], "files": files}
    write_manifest(folder, {"key": "", "tokenizer": tokenizer, "splits": {"train": split}})
    return ShardDataset(folder)


@settings(deadline=None)  # it waits for the disk
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=12), seq_len=st.integers(1, 20))
def test_separate_documents(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int) -> None:
    """Every row is of one document, from its start or a cut; every token but each first is a target once an epoch."""
    documents = [[1000 * i + j for j in range(length)] for i, length in enumerate(lengths, start=1)]
    data = make_documents(tmp_path_factory.mktemp("documents"), documents)
    assert np.diff(data.document_starts()).tolist() == [len(d) for i in (0, 1) for d in documents[i::2]]
    if max(lengths) == 1:
        with pytest.raises(DataError, match="no document of two tokens"):
            DataLoader(data, 1, seq_len, documents="separate")
        return
    loader = DataLoader(data, 1, seq_len, seed=3, documents="separate")
    for epoch in range(2):
        found = []
        for position in range(epoch * loader.windows_per_epoch, (epoch + 1) * loader.windows_per_epoch):
            tokens, targets = (part[0] for part in loader.batch(position))
            count = int((targets != -100).sum())
            assert count > 0
            assert (targets[count:] == -100).all()
            assert (tokens[count:] == 0).all()
            assert np.array_equal(targets[:count], tokens[:count] + 1)
            assert len(set(tokens[:count] // 1000)) == 1
            found += targets[:count].tolist()
        assert sorted(found) == sorted(token for document in documents for token in document[1:])
    assert isinstance(loader.rows, DocumentWindows)
    assert loader.rows.filled == pytest.approx(len(found) / (loader.windows_per_epoch * seq_len))
    with pytest.raises(ConfigError, match="separate documents come in the order 'shuffled'"):
        DataLoader(data, 1, seq_len, order="random", documents="separate")


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_whether_one_document_changes_the_loss_of_another(tmp_path: Path, documents: str) -> None:
    """The loss of every row but those of the changed document: the same bits, or, joined, not."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(1, 90, draw.integers(5, 60)).tolist() for _ in range(20)]
    changed = [*texts[:7], [91 + token for token in texts[7]], *texts[8:]]
    model = BitNetForCausalLM(BitNetConfig(200, 32, 48, 1, 2, max_position_embeddings=16), 0)
    losses = []
    for name, version in (("before", texts), ("after", changed)):
        (tmp_path / name).mkdir()
        loader = DataLoader(make_documents(tmp_path / name, version, 1), 1, 16, documents=documents)
        rows = [loader.batch(position) for position in range(loader.windows_per_epoch)]
        with no_grad():
            losses.append([(tokens.max() > 90, model(tokens, targets).item()) for tokens, targets in rows])
    untouched = [before == after for (_, before), (own, after) in zip(*losses, strict=True) if not own]
    mixed = [before != after for (_, before), (own, after) in zip(*losses, strict=True) if own]
    assert len(untouched) > 10
    assert any(mixed)
    assert all(untouched)
    # Joined, a window that holds the changed document holds tokens of others, whose losses change with it.
    shared = [tokens for tokens, _ in rows if tokens.max() > 90 and (tokens[tokens > 0] < 91).any()]
    assert bool(shared) == (documents == "joined")


@pytest.mark.parametrize(("batch", "seq_len", "blocks"), [(4, 16, 62), (1, 1002, 1), (7, 501, 2), (100, 1, 1002)])
def test_eval_blocks(dataset: ShardDataset, batch: int, seq_len: int, blocks: int) -> None:
    batches = list(eval_blocks(dataset, batch, seq_len))
    tokens = np.concatenate([tokens for tokens, _ in batches])
    assert tokens.tolist() == np.arange(blocks * seq_len).reshape(blocks, seq_len).tolist()
    assert np.array_equal(np.concatenate([targets for _, targets in batches]), tokens + 1)
    assert all(len(tokens) == batch for tokens, _ in batches[:-1])
    assert all(part.flags.c_contiguous and part.dtype == np.int32 for pair in batches for part in pair)


def test_refusals(dataset: ShardDataset) -> None:
    for options, error, match in (
        ({"seq_len": 1003}, DataError, "has 1003 tokens: too few for one window of 1003"),
        ({"batch_size": 0}, ConfigError, "at least 1, not 0 and 16"),
        ({"seq_len": 0}, ConfigError, "at least 1"),
        ({"seed": -1}, ConfigError, "seed must be"),
        ({"order": "sorted"}, ConfigError, "not 'sorted'"),
    ):
        with pytest.raises(error, match=match):
            DataLoader(dataset, **{"batch_size": 4, "seq_len": 16, **options})
    with pytest.raises(ConfigError, match="counted from 0"):
        DataLoader(dataset, 4, 16).batch(-1)
    with pytest.raises(DataError, match="too few"):
        list(eval_blocks(dataset, 4, 1003))
    with pytest.raises(DataError, match="no split 'test', only train"):
        ShardDataset(dataset.folder, "test")


def test_a_shard_of_another_pack_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, [10, 20])
    for suffix in ("bin", "idx"):
        shutil.copy(tmp_path / f"0.{suffix}", tmp_path / f"1.{suffix}")
    with pytest.raises(DataError, match=r"1\.bin is not the one the manifest lists"):
        ShardDataset(tmp_path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf-8")
    rows = [json.dumps({"text": f"story {i} of {i * i}: \u00e9t\u00e9 " * 5}) for i in range(200)]
    (folder / "b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("spec", ["bytes", "chars", "sentencepiece"])
def test_pack_holds_the_text_and_is_deterministic(corpus: Path, tmp_path: Path, spec: str) -> None:
    out = pack(corpus, tmp_path / "one", spec, 400, val_fraction=0.1, seq_len=16, shard_tokens=3000)
    again = pack([corpus], tmp_path / "two", spec, 400, val_fraction=0.1, seq_len=16, shard_tokens=3000)
    assert contents(out) == contents(again)
    texts = []
    for split in ("train", "validation"):
        dataset = ShardDataset(out, split)
        dataset.verify()
        tokenizer = dataset.tokenizer()
        text = tokenizer.decode(dataset.read(0, len(dataset)).tolist())
        assert len(text.encode()) == dataset.text_bytes
        texts.append(text)
    assert sum(text.count("story") for text in texts) == 1000
    assert all(text.count("story") for text in texts)
    assert len(ShardDataset(out).shards) > 1


def test_pack_is_reused_replaced_or_refused(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def run(spec: str, out: Path = tmp_path / "out") -> dict[str, bytes]:
        said.clear()
        return contents(pack(corpus, out, spec, 400, seq_len=16, log=said.append))

    first = run("sentencepiece")
    assert run("sentencepiece") == first
    assert any("already holds this pack" in line for line in said)
    (tmp_path / "out" / "train-00000.bin").write_bytes(first["train-00000.bin"][:-1])
    assert run("sentencepiece") == first  # damaged: made again
    assert any("replacing it" in line for line in said)
    assert "tokenizer.model" not in run("bytes")
    assert any("replacing it" in line for line in said)
    with open(corpus / "a.txt", "a", encoding="utf-8") as file:
        file.write("!")
    before = contents(tmp_path / "out")
    assert run("bytes") != before
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.doc").write_text("years of work", encoding="utf-8")
    with pytest.raises(DataError, match=r"not a pack and not empty: it holds thesis\.doc"):
        run("bytes", other)
    with pytest.raises(DataError, match="is a file"):
        run("bytes", corpus / "a.txt")


def test_pack_notices_an_exchanged_tokenizer(corpus: Path, tmp_path: Path) -> None:
    out = pack(corpus, tmp_path / "out", "chars", seq_len=16, log=lambda line: None)
    ByteTokenizer().save(out)
    with pytest.raises(DataError, match="not the one its tokens were made with"):
        ShardDataset(out).tokenizer()


def test_pack_reports_a_smaller_vocabulary_and_a_thin_validation(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    pack(corpus / "a.txt", tmp_path / "out", "sentencepiece", 5000, log=said.append)
    assert any("ids, fewer than the 5000 asked for" in line for line in said)
    assert any("validation split has" in line for line in said)
    pack(corpus / "a.txt", tmp_path / "none", "bytes", val_fraction=0.0, log=said.append)
    with pytest.raises(DataError, match="no split 'validation'"):
        ShardDataset(tmp_path / "none", "validation")


def test_pack_refusals(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"train split has .* too few for a window of 100000"):
        pack(corpus, out, "bytes", seq_len=100_000, log=lambda line: None)
    with pytest.raises(ConfigError, match="shard_tokens"):
        pack(corpus, out, "bytes", shard_tokens=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the corpus is empty"):
        pack(tmp_path / "empty", out, "bytes")


def test_interrupted_pack_leaves_no_manifest(corpus: Path, tmp_path: Path) -> None:
    (corpus / "z.jsonl").write_text('{"text": "fine"}\n', encoding="utf-8")
    alphabet = tmp_path / "bitnet_tokenizer.json"
    alphabet.write_text(json.dumps({"kind": "chars", "characters": " dehnorstxy"}), encoding="utf-8")
    with pytest.raises(DataError, match="is not among the 11 characters"):
        pack(corpus, tmp_path / "out", str(alphabet), log=lambda line: None)
    assert list((tmp_path / "out").iterdir()) == []
    pack(corpus, tmp_path / "out", "bytes", log=lambda line: None)


def test_command_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--out", str(out), "--vocab-size", "330", "--seq", "16", "--verify"]
    assert main(["--data", str(corpus / "a.txt"), str(corpus / "b.jsonl"), *options]) == 0
    text = capsys.readouterr().out
    assert "201 documents" in text
    assert "330 ids" in text
    assert "verified" in text
    assert text.endswith(f"next: bitnet train --data {out}\n")
    tokens, targets = DataLoader(ShardDataset(out), 2, 16).batch(0)
    assert np.array_equal(tokens[:, 1:], targets[:, :-1])
    assert main(["--data", str(tmp_path / "absent"), *options]) == 2
    assert capsys.readouterr().err.startswith("error: there is no file or folder")
    assert main(["--recipe", "stdlib", "--max-mb", "0.2", "--tokenizer", "bytes", "--out", str(tmp_path / "std")]) == 0
    assert "standard library of" in capsys.readouterr().out


def test_a_disk_that_refuses_is_one_sentence(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(corpus / "a.txt"), "--tokenizer", "bytes", "--seq", "16", "--out"]
    (tmp_path / "file").touch()
    assert main([*command, str(tmp_path / "file" / "pack")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert str(tmp_path / "file") in said
    assert said.count("\n") == 1

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "pack/train-00000.bin")

    monkeypatch.setattr("bitnet.data_cli.pack", full)
    assert main([*command, str(tmp_path / "pack")]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'pack/train-00000.bin'\n"

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitnet.data_cli.pack", stopped)
    assert main([*command, str(tmp_path / "pack")]) == 130
    assert "interrupted; the same command goes on with what is finished" in capsys.readouterr().err


def test_a_pack_is_not_taken_for_text(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither by itself, nor beside text, nor in a folder of it; another file of the manifest's name is text."""
    book = corpus / "packs" / "book"
    words = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--seq", "16"]
    assert main(["--data", str(corpus / "a.txt"), *words[2:], "--out", str(book)]) == 0
    capsys.readouterr()
    for data in ([book], [corpus / "a.txt", book], [corpus]):
        assert main(["--data", *map(str, data), *words]) == 2
        message = (
            f"error: {book} is a pack, not text: train on it as --data {book} alone, or mixed as --data {book}=WEIGHT"
        )
        assert capsys.readouterr().err == message + "\n"
    (book / "manifest.json").write_text('{"name": "an extension"}', encoding="utf-8")
    assert '{"name": "an extension"}' in list(Corpus([book]))


def test_module_runs_as_a_program() -> None:
    run = subprocess.run([sys.executable, "-m", "bitnet.data", "--help"], capture_output=True, text=True, check=True)
    assert "--recipe" in run.stdout

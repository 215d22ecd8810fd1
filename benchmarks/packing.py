"""How fast text becomes packed tokens: `bitnet data` beside datasets + tokenizers, one core, the same tokenizer.json.

`python benchmarks/packing.py [--megabytes 20] [--rounds 3]`; needs pip install '.[data]'. Each engine is a process of
its own, bound to one processor. What counts is the processor's time from the first byte read to the last written, which
a busy machine changes less than the clock's; interpreter and imports are left out. Both read one JSONL file and write
every token of it: bitnet into shards (read twice: once to fingerprint the text and choose the split, once to pack),
datasets into its Arrow folder (`load_dataset`, batched `map`, `save_to_disk`, no cache before). The tokens of both are
compared: engines that make different ones are no comparison. bitnet_near removes near duplicates on the way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import history
import machine

ENGINES = ("bitnet", "bitnet_near", "datasets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20, help="of the standard library's sources")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    history.add_arguments(parser)
    args = parser.parse_args()
    if args.engine:
        print(json.dumps(measure(args.engine, args.work)))
        return
    about = machine.fingerprint()
    print(machine.one_line(about), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        size = write_text(work, args.megabytes, args.vocab_size)
        samples: dict[str, list[float]] = {name: [] for name in ENGINES}
        digests = {}
        for _ in range(args.rounds):
            for name in ENGINES:
                found = run_alone(name, work)
                samples[name].append(size / 1e6 / found["seconds"])
                digests[name] = found["sha256"]
    assert len({digests[name] for name in ("bitnet", "datasets")}) == 1, "the engines made different tokens"
    results = []
    for name in ENGINES:
        middle = statistics.median(samples[name])
        print(f"{name:14} {middle:6.2f} MB/s a core  ({min(samples[name]):.2f} to {max(samples[name]):.2f})")
        results.append(history.entry(name, samples[name], "MB/s", True))
    settings = {"megabytes": args.megabytes, "vocab_size": args.vocab_size, "rounds": args.rounds}
    history.keep(args, [history.run("packing", settings, about, results)])


def write_text(work: Path, megabytes: float, vocab_size: int) -> int:
    """x.jsonl and tokenizer.json; returns the bytes of text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from bitnet.corpus import stdlib

    texts = list(stdlib(int(megabytes * 1e6)))
    with open(work / "x.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts[:300], trainer)
    tokenizer.save(str(work / "tokenizer.json"))
    return sum(len(text.encode()) for text in texts)


def run_alone(engine: str, work: Path) -> dict[str, Any]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    words = [sys.executable, __file__, "--engine", engine, "--work", str(work)]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(engine: str, work: Path) -> dict[str, Any]:
    """Seconds, and the SHA-256 of all tokens."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder, "out")
        seconds, tokens = (with_datasets if engine == "datasets" else with_bitnet)(engine, work, out)
    return {"seconds": seconds, "sha256": hashlib.sha256(tokens).hexdigest()}


def with_bitnet(engine: str, work: Path, out: Path) -> tuple[float, bytes]:
    from bitnet.data import ShardDataset
    from bitnet.prepare import Preparation, pack

    chosen = Preparation(dedup="near" if engine.endswith("near") else "none")
    options: dict[str, Any] = {"val_fraction": 0.0, "preparation": chosen, "log": lambda line: None}
    start = time.process_time()
    pack(work / "x.jsonl", out, str(work / "tokenizer.json"), **options)
    seconds = time.process_time() - start
    data = ShardDataset(out)
    return seconds, data.read(0, len(data)).tobytes()


def with_datasets(engine: str, work: Path, out: Path) -> tuple[float, bytes]:
    import numpy as np
    from tokenizers import Tokenizer

    import datasets

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [one.ids for one in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    start = time.process_time()
    cache = tempfile.mkdtemp(dir=out.parent)
    rows = datasets.load_dataset("json", data_files=str(work / "x.jsonl"), split="train", cache_dir=cache)
    rows = rows.map(encode, batched=True, remove_columns=["text"])
    rows.save_to_disk(str(out))
    seconds = time.process_time() - start
    return seconds, np.concatenate([np.array(ids, np.int32) for ids in rows["input_ids"]]).tobytes()


if __name__ == "__main__":
    main()

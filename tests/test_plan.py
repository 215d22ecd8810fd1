"""What is planned against what is taken: the CPU's arena and the process in a real run; and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, _core, plan_cli
from bitnet.data import pack
from bitnet.errors import ConfigError
from bitnet.plan import Plan, generation_plan, process_bytes, training_plan
from bitnet.system_memory import SystemMemory, system_memory
from bitnet.trainer_config import TrainerConfig

SHAPE = (257, 192, 512, 3, 6)  # ids, channels, of the feed-forward layers, blocks, heads
TRAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "less": {"activation_checkpointing": True, "moments": "bf16"},
    "exact": {"precision": "fp32"},
    "levers": {"ema": 0.9, "requantize_every": 2, "ternary_from": 1, "ternary_ramp": 2},
    "muon": {"optimizer": "muon", "grad_accum": 2},
}

# In a process of its own: the arena is the process's, and what it holds at most is asked for.
RUN = """
import json, sys
import bitnet
from bitnet import _core
from bitnet.data import ShardDataset
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig

def resident(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

shape, config, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
before = resident("VmRSS")
Trainer(bitnet.BitNetForCausalLM(bitnet.BitNetConfig(*shape)), ShardDataset(folder), TrainerConfig(**config),
        log=lambda line: None).fit()
stats = _core.memory_stats("cpu")
print(json.dumps({"arena": stats["in_use"] + stats["cached"], "resident": resident("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "text.txt").write_text("to be, or not to be: that is the question\n" * 400)
    return pack([str(folder / "text.txt")], folder / "data", "bytes")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("name", TRAIN)
def test_a_run_takes_what_was_planned(name: str, text: Path) -> None:
    """Beside the plan, a run makes short-lived tensors: a batch, the statistics of a layer. A megabyte here."""
    config = {"batch_size": 4, "seq_len": 96, "steps": 6, "eval_every": 2, "sample_tokens": 0} | TRAIN[name]
    planned = training_plan(BitNetConfig(*SHAPE), TrainerConfig(**config)).total
    command = [sys.executable, "-c", RUN, json.dumps(SHAPE), json.dumps(config), str(text)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert planned == pytest.approx(found["arena"], rel=0.01, abs=1e6)
    assert found["resident"] < planned + process_bytes()


def test_generation_takes_what_was_planned() -> None:
    """The same model, packed in the same way and run on the CPU: block by block the same."""
    shape, context = BitNetConfig(*SHAPE, tie_word_embeddings=True), 40
    planned = generation_plan(shape, context, batch=2, head="int6", cache="int8").parts
    code = f"""
import numpy as np
import bitnet
from bitnet import _core
from bitnet.decoder import Decoder
model = bitnet.BitNetForCausalLM(bitnet.BitNetConfig(*{SHAPE}, tie_word_embeddings=True)).pack("2", "int6")
weights = _core.memory_stats()["in_use"]
decoder = Decoder(model, 2, {context}, "int8")
print(weights, _core.memory_stats()["in_use"] - weights)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    weights, cache = (int(word) for word in found)
    assert planned["ternary weights"] + planned["embedding, head and norms"] == weights
    assert planned[f"keys and values of 2 x {context} tokens"] == cache


def test_the_levers_take_less_in_their_order() -> None:
    shape = BitNetConfig(*SHAPE)
    plain = training_plan(shape, TrainerConfig(batch_size=8)).total
    each = [training_plan(shape, TrainerConfig(**{"batch_size": 8, **changes})).total
            for _, changes in plan_cli.training_levers(TrainerConfig(batch_size=8))]  # fmt: skip
    assert len(each) == 3
    assert max(each) < plain


def test_what_a_teacher_and_a_background_save_take_is_named() -> None:
    shape = BitNetConfig(*SHAPE)
    config = TrainerConfig(batch_size=2, seq_len=64, teacher="x", distill_attention=1.0, background_save=True)
    parts = training_plan(shape, config, shape.replace(linear="linear")).parts
    assert parts["teacher"] == parts["weights"]
    assert parts["copy that is written meanwhile"] == 12 * BitNetForCausalLM(shape).num_parameters()


def test_planning_leaves_nothing_behind() -> None:
    before = _core.memory_stats("cpu")["in_use"]
    for _ in range(2):
        training_plan(BitNetConfig.preset("1.3b"), TrainerConfig(batch_size=4, seq_len=2048))
    other = bitnet.zeros((1000,), device="meta")  # of somebody else's: not counted
    assert training_plan(BitNetConfig.preset("char"), TrainerConfig()) == training_plan(
        BitNetConfig.preset("char"), TrainerConfig()
    )
    del other
    assert _core.memory_stats("meta")["in_use"] == 0
    assert _core.memory_stats("cpu")["in_use"] == before
    assert _core.get_device() == "cpu"


@pytest.mark.parametrize("room", [0, 99, 100, 1000, 1699, 10**9])
def test_the_largest_batch_is_the_largest(room: int) -> None:
    found = plan_cli.most_rows(lambda rows: 100 * rows, room)
    assert found == min(room // 100, 2 * plan_cli.MOST_ROWS - 1)


# ---- what there is ------------------------------------------------------------------------------------------------


def test_memory_of_the_machine_and_of_the_container(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  2000 kB\nMemFree: 5 kB\nMemAvailable:  1500 kB\nHugePages_Total: 0\n")
    assert system_memory(proc, groups) == SystemMemory(2_048_000, 1_536_000)
    (groups / "user/box").mkdir(parents=True)
    (groups / "user/memory.max").write_text("1000000\n")
    (groups / "user/memory.current").write_text("400000\n")
    (groups / "user/box/memory.max").write_text("max\n")
    (groups / "user/box/memory.current").write_text("1\n")
    (proc / "self/cgroup").write_text("0::/user/box\n")
    assert system_memory(proc, groups) == SystemMemory(1_000_000, 600_000)
    (groups / "memory/box").mkdir(parents=True)
    (groups / "memory/box/memory.limit_in_bytes").write_text("500000\n")
    (groups / "memory/box/memory.usage_in_bytes").write_text("600000\n")
    (proc / "self/cgroup").write_text("7:cpu,memory:/box\n3:freezer:/\n")
    assert system_memory(proc, groups) == SystemMemory(500_000, 0)
    assert system_memory(tmp_path / "none", groups).total > 10**6


def test_pages_of_files_can_be_had_back(tmp_path: Path) -> None:
    """A container that has read large files is full of them; of memory.stat, either version has a row for that."""
    proc, group, first = tmp_path / "proc", tmp_path / "groups/box", tmp_path / "groups/memory/box"
    for folder in (proc / "self", group, first):
        folder.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:  1500 kB\n")
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 100000\nfile 750000\ninactive_file 700000\nodd\n")
    (proc / "self/cgroup").write_text("0::/box\n")
    assert system_memory(proc, tmp_path / "groups") == SystemMemory(1_000_000, 800_000)
    (first / "memory.limit_in_bytes").write_text("500000\n")
    (first / "memory.usage_in_bytes").write_text("400000\n")
    (first / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 300000\n")
    (proc / "self/cgroup").write_text("4:memory:/box\n")
    assert system_memory(proc, tmp_path / "groups") == SystemMemory(500_000, 400_000)


def test_nothing_that_a_system_says_stops_a_run(tmp_path: Path) -> None:
    """Names of any bytes, lines without their parts, limits that are none: passed over, and the others count."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_bytes(b"\xff\nMemTotal:  2000 kB\nMemFree: many kB\nMemAvailable: kB\nSwap\n")
    (groups / "größe/in").mkdir(parents=True)
    (groups / "größe/memory.max").write_text("1000000\n")
    (groups / "größe/memory.current").write_text("400000\n")
    (groups / "größe/in/memory.max").write_text("-1\n")
    (groups / "größe/in/memory.current").write_text("")
    lines = ["", "odd", "1:memory", "2::", "0::/gr\0", "0::/größe/in"]
    (proc / "self/cgroup").write_bytes("\n".join(lines).encode() + b"\n0::/\xff\n")
    assert system_memory(proc, groups) == SystemMemory(1_000_000, 600_000)


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_tells_parts_levers_and_room(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_cli.main(["train", "--preset", "char", "--batch-size", "4", "--seq-len", "64"]) == 0
    text = capsys.readouterr().out
    for word in ("weights", "moments", "activations of 4 x 64 tokens", "in all", "--moments bf16", "all of these"):
        assert word in text
    assert plan_cli.main(["generate", "--preset", "2b-4t", "--cache-dtype", "int8"]) == 0
    text = capsys.readouterr().out
    assert "keys and values of 1 x 4096 tokens" in text
    assert "--head screened" in text
    assert "--cache-dtype bf16" in text


def test_the_vocabulary_is_that_of_the_pack(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_cli.main(["train", "--data", str(text), "--preset", "char"]) == 0
    assert "vocabulary 257" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate"], "either a run or --preset"),
        (["generate", "--preset", "char", "--context", "9999"], "1 to 1024 positions"),
        (["train", "--preset", "none"], "unknown preset"),
        (["train", "--seq-len", "5000"], "seq_len 5000 is more than the model's max_position_embeddings 2048"),
        (["generate", "/nowhere/run"], "/nowhere/run"),
        (["train", "--init", "/nowhere/run", "--lora", "4"], "adapters"),
    ],
)
def test_the_command_refuses_with_a_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_cli.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_a_run_that_cannot_fit_is_refused_before_it_begins(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitnet import train

    monkeypatch.setattr(train, "system_memory", lambda: SystemMemory(150_000_000, 1))
    words = ["--data", str(text), "--preset", "char", "--out", str(tmp_path / "run"), "--steps", "1"]
    assert train.main(words) == 2
    assert "this machine has 150 MB; `bitnet plan train`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(train, "system_memory", lambda: SystemMemory(10**12, 1))
    assert train.main([*words, "--seq-len", "32", "--sample-tokens", "0", "--plots", "false"]) == 0
    assert "1e-06 MB are free; `bitnet plan train`" in capsys.readouterr().out


def test_a_plan_is_the_sum_of_its_parts() -> None:
    assert Plan({"a": 1, "b": 2}).total == 3
    with pytest.raises(ConfigError, match="positions"):
        generation_plan(BitNetConfig(*SHAPE), 10**6)

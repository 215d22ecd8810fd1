"""What is planned against what is taken: the CPU's arena and the process in a real run; and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, _core, checkpoint, cli, from_pretrained, plan_cli, run_model, train
from bitnet.data import pack
from bitnet.errors import ConfigError
from bitnet.formats.packing import save_packed
from bitnet.lora import LoraConfig
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
    "adapters": {"moments": "bf16"},
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
model = bitnet.BitNetForCausalLM(bitnet.BitNetConfig(*shape))
if sys.argv[4] == "adapters":
    model.add_lora(4, norms=True)
Trainer(model, ShardDataset(folder), TrainerConfig(**config), log=lambda line: None).fit()
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
    lora = LoraConfig.chosen(4, norms=True) if name == "adapters" else None
    planned = training_plan(BitNetConfig(*SHAPE), TrainerConfig(**config), lora=lora).total
    command = [sys.executable, "-c", RUN, json.dumps(SHAPE), json.dumps(config), str(text), name]
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_opening_takes_what_was_planned(tmp_path: Path) -> None:
    """Latent weights are f32 until all are packed: of 3 MB in each layer and 16 MB of embedding, some 100 MB."""
    shape = BitNetConfig(8192, 512, 1408, 6, 8)
    checkpoint.save(tmp_path, 1, BitNetForCausalLM(shape), {}, {"step": 1})
    plan = generation_plan(shape, 64, head="int6", is_latent=True)
    assert plan.most == plan.opening > 3 * plan.total
    assert generation_plan(shape, 64, head="int6").opening == 0
    code = f"""
import bitnet
def resident(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
before = resident("VmRSS")
bitnet.from_pretrained({str(tmp_path)!r}).pack("2", "int6")
print(resident("VmHWM") - before)
"""
    found = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0.9 * plan.opening < found < plan.opening + process_bytes()


def test_a_twin_has_no_ternary_weights_and_a_ternary_head_has() -> None:
    shape = BitNetConfig(*SHAPE)
    twin = generation_plan(shape.replace(linear="linear"), 40, is_latent=True)
    assert "ternary weights" not in twin.parts
    assert twin.most == twin.total
    plain, head = (generation_plan(shape.replace(quantize_head=wanted), 40) for wanted in (False, True))
    assert head.parts["ternary weights"] > plain.parts["ternary weights"]
    less = plain.total - head.total  # two bits instead of 32
    assert less == pytest.approx(30 / 8 * shape.vocab_size * shape.hidden_size, rel=0.1)


def test_a_plan_is_the_same_wherever_it_is_made() -> None:
    """What the caller's thread records, or does not, and in which precision, has no part in it."""
    shape, config = BitNetConfig(*SHAPE), TrainerConfig(batch_size=2, seq_len=32)
    plans = training_plan(shape, config), generation_plan(shape, 40)
    with bitnet.no_grad():
        assert plans == (training_plan(shape, config), generation_plan(shape, 40))
    with _core.Tape():
        assert plans == (training_plan(shape, config), generation_plan(shape, 40))
    with pytest.raises(ConfigError, match="seq_len"):
        training_plan(shape, TrainerConfig(seq_len=10**6))


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


def test_what_a_trainer_refuses_is_not_planned() -> None:
    shape, lora = BitNetConfig(*SHAPE), LoraConfig.chosen(4)
    with pytest.raises(ConfigError, match=r"ema 0\.5 is for training all weights"):
        training_plan(shape, TrainerConfig(seq_len=32, ema=0.5), lora=lora)
    with pytest.raises(ConfigError, match="adapters go beside ternary layers"):
        training_plan(shape.replace(linear="linear"), TrainerConfig(seq_len=32), lora=lora)
    with pytest.raises(ConfigError, match="teacher x has a vocabulary of 9 ids, not 257"):
        training_plan(shape, TrainerConfig(seq_len=32, teacher="x"), shape.replace(vocab_size=9))


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
    assert found == min(room // 100, plan_cli.MOST_ROWS)


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


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What `bitnet plan train` prints."""
    capsys.readouterr()
    assert plan_cli.main(["train", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_vocabulary_is_what_training_makes_of_it(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the tokenizer, a larger one that is asked for, and of characters none before they are counted."""
    assert "vocabulary 300," in told(capsys, "--data", text, "--vocab-size", "300", "--preset", "char")
    assert plan_cli.main(["train", "--data", str(text), "--vocab-size", "100"]) == 2
    assert f"vocab_size 100 is less than the 257 ids of the text in {text}" in capsys.readouterr().err
    words = text.parent / "text.txt"
    assert "vocabulary 257," in told(capsys, "--data", words, "--tokenizer", "bytes")
    assert "vocabulary 4,096," in told(capsys, "--data", words)
    assert "vocabulary 600," in told(capsys, "--data", words, "--vocab_size", "600")
    said = told(capsys, "--data", words, "--tokenizer", "chars")
    assert "are counted when it is packed: --vocab-size N plans with another number" in said
    assert "are counted" not in told(capsys, "--data", words, "--tokenizer", "chars", "--vocab-size", "99")


def test_a_run_that_goes_on_has_its_own_options(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = "--hidden-size 64 --intermediate-size 96 --num-hidden-layers 2 --num-attention-heads 2".split()
    rest = "--batch-size 3 --seq-len 32 --sample-tokens 0 --plots false --steps 1".split()
    assert train.main(["--data", str(text), *shape, *rest, "--out", "a"]) == 0
    said = told(capsys, "--data", text, *shape, *rest)
    assert "3 x 32 tokens, vocabulary 257" in said
    assert told(capsys, "--resume", "a").partition("\nthis machine")[0] == said.partition("\nthis machine")[0]
    assert "--activation-checkpointing" not in told(capsys, "--resume", "a", "--activation-checkpointing")
    assert plan_cli.main(["train", "--resume", "a", "--batch-size", "4"]) == 2
    assert "batch_size is 3 in a and cannot become 4 on resume" in capsys.readouterr().err
    save_packed(from_pretrained("a"), "a.bitnet")
    for words, sentence in {
        ("--init", "a.bitnet"): "a.bitnet is packed: it has codes and scales, but no latent weights",
        ("--init", "a", "--convert"): "a is ternary already",
        ("--init", "a", "--seq-len", "4096"): "seq_len 4096 is more than the model's",
    }.items():
        assert plan_cli.main(["train", *words, "--data", str(text)]) == 2
        assert sentence in capsys.readouterr().err
    whole = told(capsys, "--init", "a", "--data", text)
    beside = told(capsys, "--init", "a.bitnet", "--lora", "4", "--lora-norms", "--data", text)
    assert "moments" in beside
    kilobytes = [float(next(line for line in s.splitlines() if line.startswith("moments")).split()[1])
                 for s in (whole, beside)]  # fmt: skip
    assert kilobytes[0] > 4 * kilobytes[1]
    assert train.main(["--init", "a", "--data", str(text), *rest, "--out", "b"]) == 0
    assert "memory: about " in capsys.readouterr().out
    assert plan_cli.main(["generate", "a", "--context", "32"]) == 0
    assert "while it is opened" in capsys.readouterr().out
    assert plan_cli.main(["generate", "a.bitnet", "--context", "32"]) == 0
    assert "while it is opened" not in capsys.readouterr().out


def test_a_teacher_tells_how_many_ids_a_text_has(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tokenizer learns is known when the text is packed, and a teacher was trained on the same."""
    monkeypatch.chdir(tmp_path)
    shape = "--hidden-size 64 --intermediate-size 96 --num-hidden-layers 1 --num-attention-heads 2".split()
    rest = "--batch-size 2 --seq-len 16 --sample-tokens 0 --plots false --steps 1 --tokenizer chars".split()
    words = ["--data", str(text.parent / "text.txt"), *shape, *rest]
    assert train.main([*words, "--twin", "--out", "twin"]) == 0
    assert "vocabulary 16," in told(capsys, *words, "--teacher", "twin")
    assert train.main([*words, "--teacher", "twin", "--out", "student"]) == 0


def test_any_batch_is_planned_without_being_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert "activations of 10000000 x 256 tokens" in told(capsys, "--preset", "char", "--batch-size", "10000000")
    for rows in (10**9, 10**15):  # more than there are addresses
        assert plan_cli.main(["train", "--batch-size", str(rows)]) == 2
        assert capsys.readouterr().err.startswith("error: no memory for ")


def test_where_the_search_ends_is_not_the_most(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_cli, "MOST_ROWS", 4)
    assert "at least --batch-size 4 fits" in told(capsys, "--preset", "char", "--seq-len", "8")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate"], "either a run or --preset"),
        (["generate", "--preset", "char", "--context", "9999"], "1 to 1024 positions"),
        (["train", "--preset", "none"], "unknown preset"),
        (["train", "--seq-len", "5000"], "seq_len 5000 is more than the model's max_position_embeddings 2048"),
        (["generate", "/nowhere/run"], "/nowhere/run"),
        (["train", "--init", "/nowhere/run", "--lora", "4"], "there is no folder /nowhere/run"),
        (["train", "--data", "/nowhere/text"], "there is no file or folder /nowhere/text"),
        (["train", "--data", "/nowhere/text=0.5"], "/nowhere/text"),
        (["train", "--tokenizer", "words"], "tokenizer 'words' is neither"),
        (["train", "--tokenizer", "bytes", "--vocab-size", "9"], "less than the 257 ids of tokenizer bytes"),
        (["train", "--hiden-size", "3"], "unknown option 'hiden_size' on the command line (did you mean 'hidden_size'"),
        (["train", "extra"], "'extra' on the command line belongs to no flag"),
        (["train", "--resume", "/nowhere/run"], "/nowhere/run is no run to resume: it has no train.yaml"),
        (["train", "--resume", "/nowhere/run", "--out", "x"], "leave --out and --config away"),
        (["train", "--max-position-embeddings", "100000000000"], "made for at most 1048576"),
        (["train", "--threads", "-1"], "not -1"),
        (["train", "--twin", "--requantize-every", "2"], "this is a twin"),
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
    monkeypatch.setattr(run_model, "system_memory", lambda: SystemMemory(150_000_000, 1))
    words = ["--data", str(text), "--preset", "char", "--out", str(tmp_path / "run"), "--steps", "1"]
    assert train.main(words) == 2
    assert "this machine has 150 MB; `bitnet plan train`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(train, "prepare", lambda *_: pytest.fail("the text was read"))
    assert train.main([*words, "--data", str(text.parent / "text.txt"), "--preset", "125m"]) == 2
    assert "this machine has 150 MB" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(run_model, "system_memory", lambda: SystemMemory(10**12, 1))
    assert train.main([*words, "--seq-len", "32", "--sample-tokens", "0", "--plots", "false"]) == 0
    assert "1e-06 MB are free; `bitnet plan train`" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "said"), [(MemoryError(), "not enough memory"), (MemoryError("no room"), "no room")])
def test_memory_that_is_not_there_is_told_in_a_sentence(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    error: MemoryError, said: str,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(train, "build", fail)
    monkeypatch.setattr(plan_cli, "system_memory", fail)
    assert train.main(["--data", str(text), "--preset", "char", "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(["plan", "train", "--preset", "char"]) == 2
    assert said in capsys.readouterr().err


def test_a_plan_is_the_sum_of_its_parts() -> None:
    assert Plan({"a": 1, "b": 2}).total == 3
    with pytest.raises(ConfigError, match="positions"):
        generation_plan(BitNetConfig(*SHAPE), 10**6)

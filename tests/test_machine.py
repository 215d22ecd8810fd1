"""machines.jsonl: where a run ran, a line at its start and at each resume, and what a report makes of it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from small_runs import pack_numbers

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM
from bitnet.machine import FILE, cpu_name, machine_record, one_line
from bitnet.metrics import read_lines
from bitnet.report_data import read_run
from bitnet.report_page import page
from bitnet.trainer import Trainer
from bitnet.trainer_config import TrainerConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_numbers(tmp_path_factory.mktemp("text"), 300)


def fit(folder: Path, out: Path, steps: int, resume: bool = False) -> None:
    config = TrainerConfig(
        steps, batch_size=2, seq_len=16, eval_every=2, save_every=2, eval_blocks=2, sample_tokens=0, plots=False
    )
    model = BitNetForCausalLM(BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64), 0)
    Trainer(model, folder, config, out=out, log=lambda line: None).fit(resume)


def test_a_start_and_each_resume_have_a_line(folder: Path, tmp_path: Path) -> None:
    isas = bitnet.isa_names()
    chosen = bitnet.current_isa()
    fit(folder, tmp_path, 2)
    with open(tmp_path / FILE, "a") as file:
        file.write('{"step": 2, "cpu"')  # what a crash leaves
    bitnet.use_isa(isas[0])
    fit(folder, tmp_path, 4, resume=True)
    bitnet.use_isa(chosen)
    first, second = read_lines(tmp_path / FILE)
    assert (first["step"], second["step"]) == (0, 2)
    assert (first["instruction_set"], second["instruction_set"]) == (chosen, isas[0])
    assert first["cpu"] == cpu_name() != ""
    assert (first["threads"], first["version"]) == (bitnet.get_threads(), bitnet.__version__)
    assert datetime.fromisoformat(first["started"]) <= datetime.fromisoformat(second["started"])
    shown = read_run(tmp_path).machine
    assert shown == "; then ".join(dict.fromkeys((one_line(first), one_line(second))))
    text = page([read_run(tmp_path)])
    assert f"{isas[0]}, {bitnet.get_threads()} thread" in text.partition("<span>machine: ")[2]
    assert not any("cpu" in record for record in read_lines(tmp_path / "metrics.jsonl"))


def test_a_processor_has_a_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: other\n")
    assert cpu_name(info) == "Some CPU @ 2 GHz"
    info.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert cpu_name(info) == cpu_name(tmp_path / "none") != ""


def test_a_report_trusts_no_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_run(tmp_path).machine is None
    lines = [{"step": 0, "cpu": "<b>" + "x" * 500, "threads": "many"}, {"step": 1}, {"step": 2, "threads": 1}]
    lines += [{"step": 3, "cpu": f"cpu {n}"} for n in range(8)]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + "[")
    found = read_run(tmp_path).machine
    assert found is not None
    assert found.split("; then ")[1:] == ["1 thread", "cpu 0", "cpu 1 and 6 more"]
    assert len(found) < 200
    assert "<b>x" not in page([read_run(tmp_path)])
    assert one_line(machine_record(3)).startswith(cpu_name())

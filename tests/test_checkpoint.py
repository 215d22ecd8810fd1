"""Checkpoints come back as they went; what is damaged, missing or foreign is named, and never used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitnet
from bitnet import BitNetConfig, BitNetForCausalLM, checkpoint
from bitnet.errors import CheckpointError
from bitnet.formats.safetensors_file import TensorPart, write_file
from bitnet.optim import AdamW
from bitnet.tokenizer import ByteTokenizer

SHAPE = BitNetConfig(257, 32, 48, 1, 2, max_position_embeddings=64)


def put(run: Path, step: int, seed: int = 0, shape: BitNetConfig = SHAPE) -> BitNetForCausalLM:
    model = BitNetForCausalLM(shape, seed)
    optimizer = AdamW(model)
    state = {"step": step, "config": {"seq_len": 16}}
    path = checkpoint.save(run, step, model, optimizer.state_dict(), state, ByteTokenizer())
    assert path == checkpoint.folder_of(run, step)
    return model


def same(a: BitNetForCausalLM, b: BitNetForCausalLM) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"linear": "linear", "sub_norms": False}])
def test_what_was_saved_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    put(tmp_path, 5, seed=1)
    saved = put(tmp_path, 10, seed=2, shape=SHAPE.replace(**changes))
    opened = bitnet.from_pretrained(tmp_path)
    assert same(opened, saved)
    assert opened.config == saved.config
    assert isinstance(vars(opened)["tokenizer"], ByteTokenizer)
    assert (vars(opened)["step"], vars(opened)["trained_seq_len"]) == (10, 16)
    assert not same(bitnet.from_pretrained(tmp_path / "checkpoints" / "step-00000005"), saved)
    tokens = np.arange(8)[None]
    assert np.array_equal(opened(tokens).numpy(), saved(tokens).numpy())


def test_the_optimizer_comes_back(tmp_path: Path) -> None:
    model = BitNetForCausalLM(SHAPE)
    optimizer = AdamW(model)
    tokens = np.arange(16)[None]
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, tokens).backward()
        optimizer.step()
    checkpoint.save(tmp_path, 2, model, optimizer.state_dict(), {"step": 2}, None)
    found = checkpoint.newest(tmp_path, optimizer=True)
    assert found.tokenizer is None
    assert found.optimizer is not None
    wanted = optimizer.state_dict()
    assert found.optimizer.keys() == wanted.keys()
    assert all(np.array_equal(found.optimizer[name], wanted[name]) for name in wanted)


def test_files_are_those_of_published_checkpoints(tmp_path: Path) -> None:
    put(tmp_path, 1)
    folder = checkpoint.folder_of(tmp_path, 1)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BitNetForCausalLM"]
    assert config["model_type"] == "bitnet"
    assert config["quantization_config"]["quantization_mode"] == "online"
    assert config["eos_token_id"] == 256
    assert {name: config[name] for name in SHAPE.as_dict()} == SHAPE.as_dict()
    header = (folder / "model.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert names["__metadata__"] == {"format": "pt"}
    assert names["model.layers.0.self_attn.q_proj.weight"]["dtype"] == "F32"
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "state.json", "bitnet_tokenizer.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str) -> None:
    older = put(tmp_path, 5, seed=1)
    put(tmp_path, 10, seed=2)
    file = checkpoint.folder_of(tmp_path, 10) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=rf"{name} is damaged: .*; using step-00000005 instead"):
        opened = bitnet.from_pretrained(tmp_path)
    assert same(opened, older)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        bitnet.from_pretrained(checkpoint.folder_of(tmp_path, 10))
    lines: list[str] = []
    used = checkpoint.newest(tmp_path, lines.append)
    checkpoint.set_aside_newer(used, lines.append)
    assert checkpoint.steps(tmp_path) == [5]
    assert "set aside" in lines[-1]


def test_a_damaged_optimizer_matters_to_training_only(tmp_path: Path) -> None:
    put(tmp_path, 5)
    file = checkpoint.folder_of(tmp_path, 5) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    bitnet.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        checkpoint.newest(tmp_path, optimizer=True)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        bitnet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither a run \(no folder .*\) nor a checkpoint \(no config\.json\)"):
        bitnet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r"is of the architecture model_type 'gpt2'"):
        bitnet.from_pretrained(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it has no model\.safetensors, SHA256SUMS"):
        bitnet.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not the config of a BitNet model: it has no vocab_size, hidden_size"):
        checkpoint.read_config(tmp_path / "config.json")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        bitnet.from_pretrained(run)


def test_weights_in_bf16_are_not_taken_for_integers(tmp_path: Path) -> None:
    put(tmp_path, 1)
    folder = checkpoint.folder_of(tmp_path, 1)
    write_file(folder / "model.safetensors", [TensorPart("a", "BF16", (2,), lambda: b"1234")])
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    kept = [line for line in lines if "model.safetensors" not in line]
    (folder / "SHA256SUMS").write_text("\n".join([*kept, f"{digest}  model.safetensors"]) + "\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a is BF16"):
        checkpoint.load(folder)


def test_sums_that_are_no_sums(tmp_path: Path) -> None:
    put(tmp_path, 1)
    file = checkpoint.folder_of(tmp_path, 1) / "SHA256SUMS"
    file.write_text("0" * 64 + "  ../../outside\n")
    with pytest.raises(CheckpointError, match="is not a checksum and a file name"):
        bitnet.from_pretrained(tmp_path)
    file.write_text("")
    with pytest.raises(CheckpointError, match=r"does not list config\.json"):
        bitnet.from_pretrained(tmp_path)


def test_a_write_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = put(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    for step in (1, 2):
        with pytest.raises(CheckpointError, match=rf"step-0000000{step} could not be written: No space left on device"):
            put(tmp_path, step, seed=3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert same(bitnet.from_pretrained(tmp_path), kept)


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    put(tmp_path, 1, seed=1)
    again = put(tmp_path, 1, seed=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert same(bitnet.from_pretrained(tmp_path), again)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (100, 20, 3, 5000):
        put(tmp_path, step)
    partial = tmp_path / "checkpoints" / ".partial-step-00000007"
    partial.mkdir()
    checkpoint.prune(tmp_path, 2, 3)
    assert checkpoint.steps(tmp_path) == [3, 100, 5000]
    checkpoint.clean(tmp_path)
    assert not partial.exists()


@pytest.mark.parametrize("harm", ["cut", "edit", "none", "replaced"])
def test_a_file_that_changes_between_opening_and_reading(tmp_path: Path, harm: str) -> None:
    """Of a mapped file, bytes that were cut off would be SIGBUS, and others weights that no checksum has seen."""
    put(tmp_path, 1)
    file = checkpoint.folder_of(tmp_path, 1) / "model.safetensors"
    opened = checkpoint.load(file.parent)
    if harm == "cut":
        os.truncate(file, 4096)
    elif harm == "edit":
        with open(file, "r+b") as data:
            data.seek(-4, 2)
            data.write(b"\xff\xff\xff\xff")
    elif harm == "replaced":  # what was opened is still there
        file.rename(file.with_name("old"))
        file.write_bytes(b"")
    if harm in ("none", "replaced"):
        assert same(opened.model(), BitNetForCausalLM(SHAPE, 0))
    else:
        with pytest.raises(CheckpointError, match=rf"{file}: it changed while it was read; \S+ may not be"):
            opened.model()

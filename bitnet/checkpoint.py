"""Checkpoints: everything a run needs to go on, in a folder that is either complete or not there.

    RUN/checkpoints/step-00000500/
        config.json            the model's shape, in the style of published checkpoints
        model.safetensors      latent f32 weights under their published names
        optimizer.safetensors  both moments (m.NAME, v.NAME; Muon's momentum.NAME) and the step count
        ema.safetensors        averaged latent weights, of a run with --ema
        held.safetensors       ternary codes that the next step goes on with, of one with --requantize-every
        state.json             step, loader position, seed, options, best loss
        tokenizer files, SHA256SUMS (as `sha256sum -c` reads it)

One of a run that trains adapters (bitnet/lora.py) has adapters.safetensors, what was trained alone, instead of
model.safetensors, and adapters.json, which tells what they are and beside which model they go.

A checkpoint is written under a hidden temporary name, every file and the folder synced, then renamed: after a crash at
any moment the folders with a step's name are whole. Checksums catch what happens to them later.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.config import BitNetConfig
from bitnet.durable import sync
from bitnet.errors import BitnetError, CheckpointError
from bitnet.formats.hf_config import CONFIG, config_json, read_config, read_json
from bitnet.formats.safetensors_file import SafetensorsFile, TensorPart, parts_of, write_file
from bitnet.lora import LoraConfig
from bitnet.model import BitNetForCausalLM
from bitnet.tokenizer import Tokenizer, load_tokenizer

Arrays = Mapping[str, np.ndarray[Any, Any]]

WEIGHTS, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"
AVERAGE, HELD = "ema.safetensors", "held.safetensors"
LORA, ADAPTERS = "adapters.json", "adapters.safetensors"
PARTIAL = ".partial-"


@dataclass(frozen=True)
class Checkpoint:
    """What is in one checkpoint folder, its checksums verified; lora: of which adapters the weights are.

    Arrays lie in their files, read-only, and are read when they are looked at: one at a time is in memory.
    """

    path: Path
    config: BitNetConfig
    weights: Arrays
    state: dict[str, Any]
    tokenizer: Tokenizer | None
    optimizer: Arrays | None = None
    lora: LoraConfig | None = None

    def model(self) -> BitNetForCausalLM:
        """The model; its attributes tokenizer (or None), checkpoint (the folder), step and trained_seq_len say more.

        Of adapters: their base, opened where it was, with them beside its layers.
        """
        if self.lora is not None:
            return self._beside(self.lora)
        model = BitNetForCausalLM(self.config)
        try:
            model.load_state_dict(self.weights)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path / WEIGHTS} does not fit {CONFIG}: {error.args[0]}") from None
        vars(model).update(self.about())
        return model

    def average(self) -> Arrays:
        """The averaged latent weights, which only runs with --ema have. CheckpointError for others."""
        if not (self.path / AVERAGE).is_file():
            raise CheckpointError(f"{self.path} has no averaged weights ({AVERAGE}): it was trained without --ema")
        return _read_arrays(self.path / AVERAGE)

    def held(self) -> Arrays:
        """What the next step multiplies, between two requantizations. CheckpointError for others."""
        if not (self.path / HELD).is_file():
            raise CheckpointError(f"{self.path} has no held codes ({HELD}), which its step {self.state['step']} needs")
        return _read_arrays(self.path / HELD)

    def _beside(self, lora: LoraConfig) -> BitNetForCausalLM:
        from bitnet.lora import put
        from bitnet.pretrained import from_pretrained

        if lora.base is None or not Path(lora.base).exists():
            raise CheckpointError(
                f"{self.path} holds adapters for the model {lora.base}, which is not there: open that one with "
                f"`bitnet generate BASE --lora {self.path}`"
            )
        model = from_pretrained(lora.base)
        put(model, self)
        vars(model).update(self.about())
        return model

    def about(self) -> dict[str, Any]:
        """The attributes that a model has beside its weights."""
        trained = self.state.get("config", {}).get("seq_len")
        return {"tokenizer": self.tokenizer, "checkpoint": self.path, "step": self.state.get("step"),
                "trained_seq_len": trained}  # fmt: skip


def open_checkpoint(folder: Path) -> Checkpoint:
    """What a run folder (its newest complete checkpoint) or a checkpoint folder holds. Raises CheckpointError."""
    for is_format, read in FORMATS:
        if is_format(folder):
            return read(folder)
    raise _neither(folder)


def place_of(folder: Path) -> Path:
    """Where that lies, unread: the folder of a run's newest checkpoint, whole or not, or the checkpoint's own.

    Raises CheckpointError, as open_checkpoint does.
    """
    if _is_run(folder):
        if not steps(folder):
            raise _none_yet(folder)
        return folder_of(folder, steps(folder)[-1])
    if _is_checkpoint(folder):
        return folder
    raise _neither(folder)


def _neither(folder: Path) -> CheckpointError:
    if not folder.exists():
        return CheckpointError(f"there is no folder {folder}")
    return CheckpointError(f"{folder} is neither a run (no folder checkpoints) nor a checkpoint (no {CONFIG})")


def _none_yet(run: Path) -> CheckpointError:
    return CheckpointError(f"run {run} has no checkpoint yet")


def newest(run: Path, log: Callable[[str], None] | None = None, optimizer: bool = False) -> Checkpoint:
    """The newest checkpoint of a run that is whole; damaged newer ones are reported (to `log`, else as warnings)."""
    damage = []
    for step in reversed(steps(run)):
        try:
            found = load(folder_of(run, step), optimizer)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        for message in damage:
            message = f"{message}; using {found.path.name} instead"
            if log is not None:
                log(f"warning: {message}")
            else:
                warnings.warn(message, stacklevel=2)
        return found
    raise CheckpointError(damage[0]) if damage else _none_yet(run)


def load(folder: str | Path, optimizer: bool = False) -> Checkpoint:
    """Reads one checkpoint folder; the optimizer's state only when asked for."""
    folder = Path(folder)
    adapts = (folder / LORA).is_file()
    weights = ADAPTERS if adapts else WEIGHTS
    wanted = [CONFIG, weights, STATE] + [LORA] * adapts + [OPTIMIZER] * optimizer
    missing = [name for name in [*wanted, SUMS] if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {', '.join(missing)}")
    sums = _read_sums(folder)
    for name in wanted + sorted(sums.keys() - {OPTIMIZER, *wanted}):
        if name not in sums:
            raise CheckpointError(f"{folder / SUMS} does not list {name}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {name}")
        if _sha256(folder / name) != sums[name]:
            raise CheckpointError(f"{folder / name} is damaged: its checksum differs from the one in {SUMS}")
    try:
        tokenizer = load_tokenizer(folder) if sums.keys() - {OPTIMIZER, AVERAGE, HELD, *wanted} else None
    except BitnetError as error:
        raise CheckpointError(f"{folder} has a tokenizer that cannot be read: {error}") from None
    return Checkpoint(
        folder,
        read_config(folder / CONFIG),
        _read_arrays(folder / weights),
        read_json(folder / STATE),
        tokenizer,
        _read_arrays(folder / OPTIMIZER) if optimizer else None,
        LoraConfig.of(read_json(folder / LORA), folder / LORA) if adapts else None,
    )


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


# What open_checkpoint opens: a test of the folder, and its reader.
FORMATS: list[tuple[Callable[[Path], bool], Callable[[Path], Checkpoint]]] = [(_is_run, newest), (_is_checkpoint, load)]


# ---- writing --------------------------------------------------------------------------------------------------------


def save(
    run: str | Path,
    step: int,
    model: BitNetForCausalLM,
    optimizer: Arrays,
    state: dict[str, Any],
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes RUN/checkpoints/step-NNNNNNNN and returns it. Raises CheckpointError (a full disk), leaving no trace."""
    return write(run, step, model.config, model.parts(), parts_of(optimizer), state, tokenizer, lora=model.lora)


def write(
    run: str | Path,
    step: int,
    config: BitNetConfig,
    weights: Sequence[TensorPart],
    optimizer: Sequence[TensorPart],
    state: dict[str, Any],
    tokenizer: Tokenizer | None,
    average: Sequence[TensorPart] | None = None,
    lora: LoraConfig | None = None,
    held: Sequence[TensorPart] | None = None,
) -> Path:
    """save() of tensors that are made as they are written; where all were copied before, another thread can do it."""
    target = folder_of(run, step)
    partial = target.with_name(PARTIAL + target.name)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_text(partial / CONFIG, json.dumps(config_json(config, tokenizer), indent=2) + "\n")
        write_file(partial / (WEIGHTS if lora is None else ADAPTERS), weights)
        if lora is not None:
            _write_text(partial / LORA, json.dumps(asdict(lora), indent=2) + "\n")
        write_file(partial / OPTIMIZER, optimizer)
        if average is not None:
            write_file(partial / AVERAGE, average)
        if held is not None:
            write_file(partial / HELD, held)
        _write_text(partial / STATE, json.dumps(state, indent=1) + "\n")
        if tokenizer is not None:
            tokenizer.save(partial)
        names = sorted(path.name for path in partial.iterdir())
        _write_text(partial / SUMS, "".join(f"{_sha256(partial / name)}  {name}\n" for name in names))
        for path in [*partial.iterdir(), partial]:
            sync(path)
        old = target.with_name(PARTIAL + "old-" + target.name)
        if target.exists():  # the same step, saved again
            target.rename(old)
        partial.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint {target} could not be written: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def prune(run: str | Path, keep: int, *others: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and those of the `others` (the best, the one to roll back to)."""
    for step in steps(run)[:-keep]:
        if step not in others:
            _remove(folder_of(run, step))


def remove_newer(run: str | Path, step: int) -> None:
    """Removes the checkpoints above a step, which a rollback made those of another past."""
    for newer in steps(run):
        if newer > step:
            _remove(folder_of(run, newer))


def _remove(folder: Path) -> None:
    # Renamed first: a removal that is cut short leaves no folder with a step's name.
    shutil.rmtree(folder.rename(folder.with_name(PARTIAL + folder.name)), ignore_errors=True)


def clean(run: str | Path) -> None:
    """Removes what a killed process left half-written."""
    for folder in Path(run, "checkpoints").glob(PARTIAL + "*"):
        shutil.rmtree(folder, ignore_errors=True)


def set_aside_newer(used: Checkpoint, log: Callable[[str], None]) -> None:
    """Renames the damaged checkpoints that are newer than the one in use, so that the run can write theirs again."""
    run = used.path.parent.parent
    for step in steps(run):
        if step > used.state["step"]:
            folder = folder_of(run, step)
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            log(f"{folder.name} is set aside as {aside.name}")


def steps(run: str | Path) -> list[int]:
    """Steps that have a checkpoint, rising."""
    folder = Path(run, "checkpoints")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name))


def folder_of(run: str | Path, step: int) -> Path:
    return Path(run, "checkpoints", f"step-{step:08d}")


# ---- files ----------------------------------------------------------------------------------------------------------


def _read_sums(folder: Path) -> dict[str, str]:
    sums = {}
    for line in (folder / SUMS).read_text(errors="replace").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)
        if not found:
            raise CheckpointError(f"{folder / SUMS} is damaged: {line[:80]!r} is not a checksum and a file name")
        sums[found[2]] = found[1]
    return sums


def _read_arrays(path: Path) -> Arrays:
    file = SafetensorsFile(path)
    for entry in file.entries.values():
        if entry.dtype == "BF16":  # NumPy would take the bits for integers
            raise CheckpointError(f"{path}: {entry.name} is BF16, which no checkpoint has")
    return file.arrays()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

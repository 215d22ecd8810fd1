"""What a report tells of a run folder, read without trust: a file that is missing, cut short or damaged costs what it
held and leaves a note, never the report.

Curves are arrays over the records of metrics.jsonl, NaN where a record has no number. Only bytes of bounded size reach
the page: curves and layers are thinned here, however long the run was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.checkpoint import STATE, WEIGHTS, folder_of, steps
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.hf_config import CONFIG
from bitnet.formats.safetensors_file import SafetensorsFile
from bitnet.machine import FILE as MACHINES
from bitnet.machine import one_line
from bitnet.metrics import Record, in_both, read_lines
from bitnet.shard import MANIFEST

Array = np.ndarray[Any, Any]

MOST_LAYER_STEPS = 120  # columns of a heat map
MOST_SAMPLES = 8
SAMPLE_CHARACTERS = 1200
MOST_LAYERS = 2000
MOST_MACHINES, MACHINE_CHARACTERS = 4, 120
LARGEST = 1e30  # of a number that is drawn; beyond, a sum of two might not be a number
BINS = 64  # of a layer's histogram, from -3 to 3 scales
# Options that say where a run lies and how it is shown, not what it computes.
INCIDENTAL = (
    "out", "compare", "threads", "plots", "keep", "sample_prompt", "sample_tokens", "eval_every", "save_every",
    "minutes", "activation_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What the model wrote after an evaluation."""

    step: int
    loss: str
    text: str


@dataclass(frozen=True)
class SavedStep:
    """One checkpoint."""

    step: int
    loss: float
    bytes: int


@dataclass(frozen=True)
class Layers:
    """layers.jsonl: steps (S,), and for L layers shares of zeros and flips (L, S) and histogram counts (L, BINS, S)."""

    steps: Array
    names: list[str]
    zero: Array
    flip: Array
    counts: Array


@dataclass(frozen=True)
class Run:
    """All that a report says of one run."""

    folder: Path
    name: str
    options: dict[str, Any]
    model: dict[str, Any]  # the fields of config.json, {} without a checkpoint
    curves: dict[str, Array]  # one value a step; "step" and "tokens" among them
    events: list[Record]
    samples: list[Sample]
    checkpoints: list[SavedStep]
    manifest: dict[str, Any]  # of the packed text
    parameters: int | None
    machine: str | None  # or several, in their order
    layers: Layers | None
    notes: list[str] = field(default_factory=list)

    @property
    def is_twin(self) -> bool:
        """Whether its linear layers are full precision."""
        return self.option("linear") == "linear" or self.options.get("twin") is True

    def option(self, name: str, default: Any = None) -> Any:
        """An option of the run or, if it was left open, the model's own field."""
        value = self.options.get(name)
        return self.model.get(name, default) if value is None else value

    def curve(self, name: str) -> Array:
        """A curve's values (steps,), all NaN if the run has none of that name."""
        return self.curves.get(name, np.full(len(self.curves["step"]), np.nan))

    def last(self, name: str) -> float:
        """The last number of a curve, NaN if there is none."""
        values = self.curve(name)
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else math.nan

    def typical(self, name: str) -> float:
        """The median of a curve, NaN if it is empty."""
        values = self.curve(name)
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else math.nan

    def best(self) -> tuple[int, float]:
        """(step, validation loss) of the lowest validation loss, (0, NaN) without one."""
        values = self.curve("val_loss")
        if not np.isfinite(values).any():
            return 0, math.nan
        place = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
        return int(self.curves["step"][place]), float(values[place])


def read_run(folder: str | Path) -> Run:
    """A run folder. ConfigError if there is no such folder or nothing in it is of a run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no run folder: there is no such folder")
    known = ("train.yaml", "metrics.jsonl", "checkpoints")
    if not any((folder / name).exists() for name in known):
        raise ConfigError(f"{folder} is no run folder: it has none of {', '.join(known)}")
    notes: list[str] = []
    curves, events = _metrics(folder, notes)
    saved = list(_checkpoints(folder))
    newest = folder_of(folder, saved[-1].step) if saved else None
    state = {} if newest is None else _json(newest / STATE, notes)
    options = _options(folder, notes) or state.get("config", {})
    run = Run(
        folder=folder,
        name=folder.resolve().name,
        options=options if isinstance(options, dict) else {},
        model={} if newest is None else _json(newest / CONFIG, notes),
        curves=curves,
        events=events,
        samples=_samples(folder / "samples.txt"),
        checkpoints=saved,
        manifest=_manifest(folder, options, notes),
        parameters=None if newest is None else _parameters(newest / WEIGHTS),
        machine=_machines(folder, notes)
        or next((str(one["machine"]) for one in (state, *events) if one.get("machine")), None),
        layers=_layers(folder / "layers.jsonl", notes),
        notes=notes,
    )
    if not run.samples:
        notes.append("no samples.txt, so nothing of what the model wrote")
    return run


def read_runs(folders: list[str]) -> list[Run]:
    """Several runs, each with a name of its own: runs of one name get their parent's before it."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    out: list[Run] = []
    for place, run in enumerate(runs):
        name = run.name
        if names.count(name) > 1:
            name = f"{run.folder.resolve().parent.name}/{name}"
        if name in [other.name for other in out]:
            name = f"{name} ({place + 1})"
        out.append(replace(run, name=name))
    return out


def twin_of(run: Run, runs: list[Run]) -> Run | None:
    """The full-precision run of the same text, seed and shape: of several, the one whose options differ least."""
    if run.is_twin or not run.options:
        return None
    fixed = ("data", "recipe", "seed", "tokenizer", "vocab_size", "preset", "seq_len", "hidden_size",
             "intermediate_size", "num_hidden_layers", "max_mb", "val_fraction")  # fmt: skip
    fits = [
        other
        for other in runs
        if other.is_twin and other.options and all(run.option(name) == other.option(name) for name in fixed)
    ]
    return min(fits, key=lambda other: len(differing([run, other])), default=None)


def gaps(run: Run, twin: Run) -> tuple[Array, Array]:
    """(places in the run's curves, validation loss minus the twin's in nats), at steps where both were evaluated."""
    own, theirs = (zip(one.curves["step"].tolist(), one.curve("val_loss").tolist(), strict=True) for one in (run, twin))
    found = in_both(own, theirs)
    return np.array([place for place, _, _ in found], int), np.array([loss - its for _, loss, its in found])


def differing(runs: list[Run]) -> list[str]:
    """Names of options that are not the same in all runs, without those that cannot change a result."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    return [name for name in names if name not in INCIDENTAL and len({str(run.option(name)) for run in runs}) > 1]


def _metrics(folder: Path, notes: list[str]) -> tuple[dict[str, Array], list[Record]]:
    """Curves of the steps that count (those not done again after a rollback), and the events."""
    try:
        records = read_lines(folder / "metrics.jsonl")
    except (OSError, UnicodeDecodeError) as error:
        notes.append(f"metrics.jsonl cannot be read: {_first_line(error)}")
        records = []
    events = [record for record in records if "event" in record]
    kept: list[Record] = []
    for record in records:
        if "event" in record:
            continue
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    if not kept:
        notes.append("metrics.jsonl holds no step, so there is no curve")
    rows = [dict(_numbers(record)) for record in kept]
    names = dict.fromkeys(name for row in rows for name in row)
    curves = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    curves.setdefault("step", np.zeros(0))
    curves.setdefault("tokens", np.full(len(kept), np.nan))
    return curves, events


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by name; those of an object inside it as name.key."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + str(name), float(value) if abs(value) < LARGEST else math.nan


def _machines(folder: Path, notes: list[str]) -> str | None:
    """Those of machines.jsonl, each once, in the order in which the run came to them; None without any."""
    try:
        records = read_lines(folder / MACHINES)
    except OSError as error:
        notes.append(f"{MACHINES} cannot be read: {_first_line(error)}")
        records = []
    names = list(dict.fromkeys(filter(None, map(one_line, records))))
    more = f" and {len(names) - MOST_MACHINES} more" if len(names) > MOST_MACHINES else ""
    return "; then ".join(name[:MACHINE_CHARACTERS] for name in names[:MOST_MACHINES]) + more or None


def _options(folder: Path, notes: list[str]) -> dict[str, Any]:
    """train.yaml as it stands: a report must not refuse a run for an option that this version does not know."""
    import yaml

    try:
        values = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        notes.append(f"train.yaml cannot be read: {_first_line(error)}")
        return {}
    return {str(name): value for name, value in values.items()} if isinstance(values, dict) else {}


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {_first_line(error)}")
        return {}
    return value if isinstance(value, dict) else {}


def _manifest(folder: Path, options: Any, notes: list[str]) -> dict[str, Any]:
    """The manifest of the packed text, in the run folder or where `data` points."""
    data = options.get("data") if isinstance(options, dict) else None
    places = [folder / "data", *(Path(str(path)) for path in (data if isinstance(data, list) else []))]
    found = next((place / MANIFEST for place in places if (place / MANIFEST).is_file()), None)
    return {} if found is None else _json(found, notes)


def _samples(path: Path) -> list[Sample]:
    """At most MOST_SAMPLES of samples.txt, first and last among them."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    heads: list[re.Match[str]] = []
    for head in re.finditer(r"^=== step (\d{1,15}), validation loss (\S{1,20})$", text, re.MULTILINE):
        if not heads or int(head[1]) > int(heads[-1][1]):  # else a line that the model wrote
            heads.append(head)
    if not heads:
        return []
    ends = [*(head.start() for head in heads[1:]), len(text)]
    samples = [
        Sample(int(head[1]), head[2], text[head.end() : end].strip("\n")[:SAMPLE_CHARACTERS])
        for head, end in zip(heads, ends, strict=True)
    ]
    return [samples[place] for place in spread(len(samples), MOST_SAMPLES)]


def _checkpoints(folder: Path) -> Iterator[SavedStep]:
    for step in steps(folder):
        path = folder_of(folder, step)
        try:
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        except OSError:  # a run that is still training pruned it
            continue
        yield SavedStep(step, _number(_json(path / STATE, []).get("val_loss")), size)


def _parameters(path: Path) -> int | None:
    """Numbers in a safetensors file, from its header alone."""
    try:
        return sum(math.prod(entry.shape) for entry in SafetensorsFile(path).entries.values())
    except (OSError, CheckpointError):
        return None


def _layers(path: Path, notes: list[str]) -> Layers | None:
    """layers.jsonl, at most MOST_LAYER_STEPS of its lines, first and last among them."""
    try:
        with open(path, "rb") as file:
            starts = [0]
            for line in file:
                starts.append(starts[-1] + len(line))
            records = []
            for place in spread(len(starts) - 1, MOST_LAYER_STEPS):
                file.seek(starts[place])
                try:
                    record = json.loads(file.readline())
                except ValueError:  # the last line, cut short
                    continue
                if not isinstance(record, dict) or not isinstance(record.get("layers"), dict):
                    continue
                if math.isfinite(_number(record.get("step"))):
                    records.append(record)
    except OSError:
        notes.append(
            "no layers.jsonl, so no histograms and no maps of its layers: runs before it was written have none"
        )
        return None
    names = list(dict.fromkeys(name for record in records for name in record["layers"]))[:MOST_LAYERS]
    if not names:
        notes.append("layers.jsonl tells of no ternary layer, so no histograms and no maps")
        return None
    zero, flip = (np.full((len(names), len(records)), np.nan) for _ in range(2))
    counts = np.zeros((len(names), BINS, len(records)))
    for column, record in enumerate(records):
        for row, name in enumerate(names):
            layer = record["layers"].get(name)
            if not isinstance(layer, dict):
                continue
            zero[row, column] = _number(layer.get("zero"))
            flip[row, column] = _number(layer.get("flip"))
            histogram = layer.get("histogram")
            if isinstance(histogram, list) and len(histogram) == BINS:
                counts[row, :, column] = [max(_number(count), 0.0) for count in histogram]
    steps = np.array([_number(record["step"]) for record in records])
    return Layers(steps, names, zero, flip, np.nan_to_num(counts))


def _first_line(error: Exception) -> str:
    """What went wrong, without the path: the page travels."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < LARGEST else math.nan


def spread(count: int, most: int) -> list[int]:
    """At most `most` places among `count`, even, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(place) for place in np.linspace(0, count - 1, most)]

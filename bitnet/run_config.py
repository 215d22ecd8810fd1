"""The options of a run: flags and YAML files to dataclasses and back, all under the same flat names.

Every name is a field of RunConfig (where text and model come from), TrainerConfig (how to train) or BitNetConfig (the
model's shape, laid over a preset). Later sources win: defaults, a YAML file, flags.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bitnet.config import PRESETS, BitNetConfig
from bitnet.corpus import RECIPES
from bitnet.errors import ConfigError
from bitnet.lora import LoraConfig
from bitnet.mixture import is_mixture
from bitnet.option import option
from bitnet.shipped import shipped_names
from bitnet.threads import check_threads
from bitnet.tokenizer import SPECS
from bitnet.trainer_config import TrainerConfig
from bitnet.yaml_file import load_yaml


@dataclass(frozen=True)
class RunConfig:
    """Where the text comes from, and which model reads it."""

    data: tuple[str, ...] = option(
        (), "text or .jsonl files, folders of them, one folder packed by bitnet data, or PACK=WEIGHT ..."
    )
    recipe: str | None = option(None, f"text already on this machine: {', '.join(RECIPES)} (if there is no data)")
    tokenizer: str = option("sentencepiece", f"{', '.join(SPECS)}, or a .model or .json file")
    vocab_size: int | None = option(None, "ids that sentencepiece learns (4096); for other tokenizers, of the model")
    val_fraction: float | None = option(None, "share held out for validation (0.01; one document: 0.1)")
    separator: str | None = option(None, "what stands between documents in text files")
    max_mb: float | None = option(None, "most megabytes of text read")
    preset: str = option("nano", f"model shape: {', '.join(PRESETS)}")
    init: str | None = option(None, "run, checkpoint, Hugging Face folder to go on from, with its tokenizer", True)
    convert: bool = option(False, "make the full-precision LLaMA that init names ternary, and insert sub-norms")
    lora: int = option(0, "rank of adapters to train beside the frozen layers of init; 0: train all weights")
    lora_alpha: float | None = option(None, "weight of the adapters, times 1 / rank (2 rank)")
    lora_targets: str | None = option(None, "layers that have one, as q_proj,v_proj (all seven)")
    lora_norms: bool = option(False, "train the gains of the norms too, beside the adapters")
    twin: bool = option(False, "the same model with full-precision linear layers")
    threads: int = option(0, "kernel threads, 0: one a core; never changes a result", True)

    def __post_init__(self) -> None:
        check_threads(self.threads)
        if self.data and self.recipe:
            raise ConfigError(f"data ({self.data[0]}) and recipe ({self.recipe}) exclude each other")
        if self.init is not None and self.twin:
            raise ConfigError("twin and init exclude each other: the model that init names is what it is")
        if self.convert and self.init is None:
            raise ConfigError("convert needs init: the full-precision model that is to become ternary")
        if self.convert and self.lora:
            raise ConfigError(f"lora {self.lora} and convert exclude each other: what is converted is trained whole")
        if self.lora < 0:
            raise ConfigError(f"lora must be at least 0, not {self.lora}")
        if self.lora and self.init is None:
            raise ConfigError(f"lora {self.lora} needs init: adapters go beside a model that is there")
        for name in ("lora_alpha", "lora_targets", "lora_norms"):
            if getattr(self, name) and not self.lora:
                raise ConfigError(f"{name} needs lora, the rank of the adapters")
        if self.recipe not in (None, *RECIPES) and self.recipe in shipped_names("datasets"):
            raise ConfigError(
                f"recipe {self.recipe!r} has to be packed first: `bitnet data --recipe {self.recipe} --out PACK`, then "
                "--data PACK (PACK/mixture.yaml for one of several parts)"
            )
        for name, allowed in {"recipe": (None, *RECIPES), "preset": tuple(PRESETS)}.items():
            if getattr(self, name) not in allowed:
                value, known = getattr(self, name), ", ".join(filter(None, allowed))
                raise ConfigError(f"unknown {name} {value!r}{_closest(value, allowed)}; one of {known}")

    @property
    def adapters(self) -> LoraConfig | None:
        """What is trained beside frozen layers, of whatever base; None where all weights are trained."""
        targets = None if self.lora_targets is None else [name.strip() for name in self.lora_targets.split(",")]
        return LoraConfig.chosen(self.lora, self.lora_alpha, targets, self.lora_norms) if self.lora else None

    @property
    def stem(self) -> str:
        """A short name of the text."""
        if not self.data:
            return self.recipe or RECIPES[0]
        first = self.data[0].rpartition("=")[0] if is_mixture(self.data) else self.data[0]
        return Path(first or self.data[0]).resolve().stem


GROUPS: tuple[type, ...] = (RunConfig, TrainerConfig, BitNetConfig)
# What a model that is there already decides.
DECIDED_BY_INIT = ("preset", "twin", "tokenizer", *(f.name for f in fields(BitNetConfig)))
OPTIONS: dict[str, Field[Any]] = {f.name: f for group in reversed(GROUPS) for f in fields(group)}


@dataclass(frozen=True)
class Settings:
    """All options of a run; `model` holds the BitNetConfig fields that were set, without vocab_size."""

    run: RunConfig
    trainer: TrainerConfig
    model: dict[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """From names and values, already of the right types; ConfigError for values that cannot be."""
        if values.get("init") is not None:
            name = next((name for name in DECIDED_BY_INIT if name in values), None)
            if name is not None:
                raise ConfigError(f"{name} and init exclude each other: {values['init']} decides the {name}")
        parts = [{f.name: values[f.name] for f in fields(group) if f.name in values} for group in GROUPS]
        parts[2].pop("vocab_size", None)
        settings = cls(RunConfig(**parts[0]), TrainerConfig(**parts[1]), parts[2])
        settings.model_config(1)  # a shape that cannot be is refused before any text is read
        return settings

    def model_config(self, vocab_size: int) -> BitNetConfig:
        """The model's shape."""
        changes = dict(self.model)
        if self.run.twin:
            if changes.get("linear", "linear") != "linear":
                raise ConfigError(f"twin means linear='linear', but linear is {changes['linear']!r}")
            changes["linear"] = "linear"
        return BitNetConfig.preset(self.run.preset, **changes).replace(vocab_size=vocab_size)

    def values(self) -> dict[str, Any]:
        """Names and values, as written to YAML."""
        out = asdict(self.run) | asdict(self.trainer) | self.model
        out["data"] = list(out["data"])
        if self.run.init is not None:
            out = {name: value for name, value in out.items() if name not in DECIDED_BY_INIT}
        return out


def parse(name: str, value: Any, where: str = "") -> Any:
    """The value of an option in its declared type: `value` is text of a flag, or what YAML made of it."""
    name = name.replace("-", "_")
    if name not in OPTIONS:
        raise ConfigError(f"unknown option {name!r}{where}{_closest(name, OPTIONS)}")
    kind = str(OPTIONS[name].type)
    kinds = kind.removesuffix(" | None")
    if value is None or (value == "null" and kinds != "str"):
        if kinds == kind:
            raise ConfigError(f"{name} must have a value{where}")
        return None
    try:
        return _convert(kinds, value)
    except (TypeError, ValueError):
        words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
        raise ConfigError(f"{name} must be {words.get(kinds, 'a list of paths')}, not {value!r}{where}") from None


def _convert(kind: str, value: Any) -> Any:
    if kind == "bool":
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if not isinstance(value, bool) and str(value).lower() not in words:
            raise ValueError
        return value if isinstance(value, bool) else words[str(value).lower()]
    if isinstance(value, bool):
        raise TypeError
    if kind == "int":
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if kind == "float":
        return float(value)  # text too: YAML 1.1 reads 1e-3 as text
    if kind == "str":
        if not isinstance(value, (str, int, float)):
            raise TypeError
        return str(value)
    if isinstance(value, str):
        return (value,)
    return tuple(_convert("str", item) for item in value)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options of a YAML file, checked. ConfigError naming file and key."""
    values = load_yaml(Path(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold names and values, such as `lr: 1e-3`")
    return {str(name).replace("-", "_"): parse(str(name), value, f" in {path}") for name, value in values.items()}


def write_yaml(path: Path, settings: Settings) -> None:
    """All options of a run, one a line, under the names read_yaml knows; in place all at once."""
    import yaml

    partial = path.with_suffix(".partial")
    text = yaml.safe_dump(settings.values(), sort_keys=False, allow_unicode=True)
    partial.write_text("# All options of this run, for `python -m bitnet.train --config`.\n" + text, encoding="utf-8")
    partial.replace(path)


def resumed(before: Mapping[str, Any], given: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Options of a run that goes on: those it was begun with, changed by flags where that leaves it the same run."""
    old = Settings.of(before)
    now = asdict(old.model_config(1)) | asdict(old.run) | old.values()
    for name, value in given.items():
        value = list(value) if isinstance(value, tuple) else value
        if value != now[name] and not OPTIONS[name].metadata.get("resume", False):
            raise ConfigError(f"{name} is {now[name]} in {run} and cannot become {value} on resume; start a new run")
    merged = {**before, **given}
    if "minutes" in given and "steps" not in given:
        merged["steps"] = None  # as many as fit
    return merged


def _closest(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), [str(word) for word in known], 1)
    return f" (did you mean {close[0]!r}?)" if close else ""

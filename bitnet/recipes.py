"""Recipes for known corpora: YAML files that name a source and say how its text is packed; see datasets/README.md.

    about: what the text is             licence: under which it is published       size: what its publisher says
    source: [hub:OWNER/NAME ...]        sha256: of the text that is read (see Survey), or unknown, and how to find it
    pack: {tokenizer: ..., vocab_size: ..., shards: ..., separator: ..., text_field: ..., val_fraction: ...}
    prepare: {dedup: ..., min_score: ..., ...}, the fields of Preparation and Filters
    parts: {NAME: {weight: ..., epochs: ..., shards: ..., where: {field: value}}}, each a pack of its own, with a
        mixture.yaml beside them

Nothing is fetched but by naming a recipe; with files of your own in the place of its source it works offline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bitnet.errors import ConfigError
from bitnet.prepare import Filters, HeldOut, Preparation, open_corpus, pack
from bitnet.shipped import shipped, shipped_names
from bitnet.yaml_file import load_yaml

FIELDS = ("about", "licence", "size", "source", "sha256", "pack", "prepare", "parts")
PACK_FIELDS = ("tokenizer", "vocab_size", "shards", "separator", "text_field", "val_fraction", "shard_tokens")
PART_FIELDS = ("weight", "epochs", "shards", "where", "source")
MIXTURE = "mixture.yaml"


@dataclass(frozen=True)
class Recipe:
    """A recipe's file, its names checked."""

    path: Path
    about: str
    licence: str
    source: tuple[str, ...]
    sha256: str
    pack: dict[str, Any]
    prepare: dict[str, Any]
    parts: dict[str, dict[str, Any]]


def find(name: str) -> Recipe:
    """A recipe by name, or by the path of its file. Raises ConfigError."""
    path = Path(name) if name.endswith(".yaml") else shipped("datasets", name)
    if path is not None and path.is_file():
        return read(path)
    known = ", ".join(sorted({*shipped_names("datasets"), "stdlib"}))
    raise ConfigError(f"there is no recipe {name!r}; one of {known}, or a file that ends in .yaml")


def read(path: Path) -> Recipe:
    """Raises ConfigError naming file and field."""
    value = load_yaml(path)
    _check(path, value, FIELDS)
    for name in ("about", "licence", "sha256"):
        if not isinstance(value.get(name), str):
            raise ConfigError(f"{path} has no text {name!r}")
    source = value.get("source")
    if not isinstance(source, list) or not source or not all(isinstance(one, str) for one in source):
        raise ConfigError(f"{path} has no list of sources")
    _check(path, value.get("pack", {}), PACK_FIELDS)
    _check(path, value.get("prepare", {}), _preparation_fields())
    _check(path, value.get("parts", {}), None)
    for part in value.get("parts", {}).values():
        _check(path, part, PART_FIELDS)
    if not re.fullmatch(r"[0-9a-fA-F]{64}|unknown\b.*", value["sha256"], re.DOTALL):
        raise ConfigError(f"the sha256 of {path} must be 64 hex digits or begin with unknown, not {value['sha256']!r}")
    inner = [value.get(name, {}) for name in ("pack", "prepare", "parts")]
    return Recipe(path, value["about"], value["licence"], tuple(source), value["sha256"], *inner)


def preparation(values: dict[str, Any]) -> Preparation:
    """From the flat names of Preparation and Filters."""
    values = dict(values)
    if "where" in values:
        values["where"] = tuple((name, str(value)) for name, value in dict(values["where"]).items())
    own = {field.name for field in fields(Preparation)} - {"filters"}
    try:
        filters = Filters(**{name: value for name, value in values.items() if name not in own})
        return Preparation(filters, **{name: value for name, value in values.items() if name in own})
    except TypeError as error:
        raise ConfigError(f"a filter has a value of the wrong type: {error}") from None


def run(
    recipe: Recipe,
    out: str | Path,
    data: Sequence[str] = (),
    pack_options: dict[str, Any] | None = None,
    prepare_options: dict[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Pack a recipe into folder `out`. data: files in the place of its source; options override the recipe's.

    Raises DataError, before a shard is written, for text with another sha256 than the recipe's. That is of the whole
    text of its source, so a part with a source of its own is not compared, nor text cut off by max_bytes.
    """
    log(f"recipe: {recipe.about} ({recipe.licence})")
    options = {**recipe.pack, **(pack_options or {})}
    prepare = {**recipe.prepare, **(prepare_options or {})}
    out = Path(out)
    known = None if recipe.sha256.startswith("unknown") else recipe.sha256.lower()
    if known is not None and options.get("max_bytes") is not None:
        log(f"note: the sha256 of {recipe.path} is of the whole text: not compared")
        known = None
    if not recipe.parts:
        options |= {"preparation": preparation(prepare), "sha256": known}
        return pack(list(data) or list(recipe.source), out, **options, log=log)
    sources = [list(data) or part.get("source") or list(recipe.source) for part in recipe.parts.values()]
    wheres = [{**prepare.get("where", {}), **part.get("where", {})} for part in recipe.parts.values()]
    preparations = [preparation({**prepare, "where": where}) for where in wheres]
    held_out = None
    if preparations[0].dedup != "none":
        log("first: what all parts hold out, so that none trains on a likeness of it")
        read = {name: options[name] for name in ("separator", "max_bytes", "text_field") if name in options}
        parts = [
            (open_corpus(source, fields=one.filters.fields, **read)[0], one)
            for source, one in zip(sources, preparations, strict=True)
        ]
        held_out = HeldOut(parts, options.get("val_fraction"), options.get("workers", 1))
    for number, (name, part) in enumerate(recipe.parts.items()):
        log(f"part {name}:")
        shards = {"shards": part["shards"]} if "shards" in part and "shards" not in (pack_options or {}) else {}
        guard = None if held_out is None else held_out.guard(number)
        own = {**options, **shards, "preparation": preparations[number], "guard": guard}
        own["sha256"] = None if "source" in part and not data else known
        pack(sources[number], out / name, **own, log=log)
        options["tokenizer"] = str(out / name)  # of the first part, for all
    _write_mixture(recipe, out)
    return out / MIXTURE


def _write_mixture(recipe: Recipe, out: Path) -> None:
    import yaml

    sources = [
        {"data": name, **{key: part[key] for key in ("weight", "epochs") if key in part}}
        for name, part in recipe.parts.items()
    ]
    partial = out / (MIXTURE + ".partial")
    partial.write_text(yaml.safe_dump({"sources": sources}, sort_keys=False), encoding="utf-8")
    partial.replace(out / MIXTURE)


def _preparation_fields() -> tuple[str, ...]:
    return tuple(field.name for kind in (Preparation, Filters) for field in fields(kind) if field.name != "filters")


def _check(path: Path, value: Any, known: Sequence[str] | None) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{path} should hold names and values, not {value!r}")
    strange = [name for name in value if known is not None and name not in known]
    if strange:
        raise ConfigError(
            f"{path} has a field {strange[0]!r} that recipes do not know; one of {', '.join(known or ())}"
        )

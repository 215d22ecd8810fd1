"""YAML files that come with the package, found by name: recipes for corpora (datasets/) and for runs (recipes/)."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def _folders(kind: str) -> list[Path]:
    """Beside the package in a checkout, or where it was installed, for everyone or with --user."""
    installed = [sysconfig.get_path("data"), sysconfig.get_path("data", sysconfig.get_preferred_scheme("user"))]
    return [Path(__file__).parents[1] / kind, *(Path(root, "share", "bitnet", kind) for root in installed)]


def shipped(kind: str, name: str) -> Path | None:
    """The file of a name, without its .yaml; None if there is none. kind: "datasets" or "recipes"."""
    if Path(name).name != name:
        return None
    paths = (folder / f"{name}.yaml" for folder in _folders(kind))
    return next((path for path in paths if path.is_file()), None)


def shipped_names(kind: str) -> list[str]:
    """All names, in order."""
    return sorted({path.stem for folder in _folders(kind) for path in folder.glob("*.yaml")})

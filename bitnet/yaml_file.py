"""A YAML file as Python values: the one way in for options, recipes and mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitnet.errors import ConfigError


def load_yaml(path: Path) -> Any:
    """What the file holds, whatever that is. ConfigError naming the file if it cannot be read, or is not YAML."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None

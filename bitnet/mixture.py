"""Several packs as one: each row of a batch comes from one of them, as often as its weight says.

Which source row n comes from, and which of that source's rows it is, is a function of (seed, n). Rows come in blocks of
BLOCK; in each, a source has its share to the nearest whole row, at places that a permutation of the block chooses. A
source with an epoch cap drops out when it has been read that often, and the others share its place by their weights.

A mixture is a list of PACK=WEIGHT, or a YAML file:

    temperature: 1.0          # weights are raised to 1 / temperature: above 1, small sources are read more
    sources:
      - data: packs/web       # a folder made by `bitnet data`, relative to this file
        weight: 0.7           # left out of all sources: their numbers of tokens
        epochs: 4             # at most; left out: any number
        name: web             # the folder's name if left out
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.data import ShardDataset
from bitnet.errors import ConfigError, DataError
from bitnet.rows import MIXTURE_STREAM, ROUNDS, Row, Rows, permute, words
from bitnet.tokenizer import Tokenizer
from bitnet.yaml_file import load_yaml

BLOCK = 1 << 16
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Source:
    """One pack of a mixture; weight None: its number of tokens."""

    dataset: ShardDataset
    name: str
    weight: float | None = None
    epochs: float | None = None


class Mixture:
    """Packs with weights, to be used like a ShardDataset. Raises ConfigError if they do not fit together."""

    def __init__(self, sources: Sequence[Source], temperature: float = 1.0) -> None:
        if not sources:
            raise ConfigError("a mixture needs at least one source")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"a mixture's temperature must be positive, not {temperature}")
        self.sources = list(sources)
        first = sources[0].dataset
        names: set[str] = set()
        for source in sources:
            if source.dataset.fingerprint != first.fingerprint:
                raise ConfigError(f"{source.dataset.folder} was made with another tokenizer than {first.folder}")
            if source.name in names:
                raise ConfigError(f"two sources of a mixture are named {source.name!r}")
            names.add(source.name)
            for what, value in (("weight", source.weight), ("epochs", source.epochs)):
                if value is not None and not 0 < value < math.inf:
                    raise ConfigError(f"the {what} of source {source.name!r} must be positive, not {value}")
        if len({source.weight is None for source in sources}) > 1:
            raise ConfigError("either all sources of a mixture have a weight or none")
        raw = [source.weight or float(len(source.dataset)) for source in sources]
        scaled = [(weight / max(raw)) ** (1 / temperature) for weight in raw]
        self.weights = [weight / math.fsum(scaled) for weight in scaled]  # sum to one
        self.folder, self.split = first.folder, first.split
        self.vocab_size, self.fingerprint = first.vocab_size, first.fingerprint

    @classmethod
    def open(cls, specs: Sequence[str]) -> Mixture:
        """From one YAML file, or from PACK=WEIGHT words."""
        if len(specs) == 1 and specs[0].endswith(SUFFIXES):
            return _from_yaml(Path(specs[0]))
        sources = []
        for spec in specs:
            folder, _, weight = spec.rpartition("=")
            try:
                sources.append(Source(ShardDataset(folder), Path(folder).name, float(weight)))
            except ValueError as error:
                if isinstance(error, DataError):
                    raise
                raise ConfigError(f"the weight in {spec!r} is not a number") from None
        return cls(sources)

    def __len__(self) -> int:
        """Number of tokens of all sources."""
        return sum(len(source.dataset) for source in self.sources)

    def tokenizer(self) -> Tokenizer:
        """The one all sources were made with."""
        return self.sources[0].dataset.tokenizer()

    def read(self, begin: int, end: int) -> Any:
        """Tokens of the first source."""
        return self.sources[0].dataset.read(begin, end)

    def rows(self, batch_size: int, seq_len: int, seed: int, order: str, documents: str) -> Rows:
        """Rows of all sources, mixed."""
        own = [source.dataset.rows(batch_size, seq_len, seed, order, documents) for source in self.sources]
        caps = [
            None if source.epochs is None else int(source.epochs * rows.per_epoch)
            for source, rows in zip(self.sources, own, strict=True)
        ]
        return MixtureRows(own, self.weights, caps, seed)

    def held_out(self) -> dict[str, ShardDataset]:
        """The validation splits by the names of their sources."""
        held_out = [(source.name, source.dataset.held_out().get("validation")) for source in self.sources]
        return {name: held for name, held in held_out if held is not None}

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must find again."""
        return {
            "tokens": len(self),
            "mixture": [
                {"name": source.name, "weight": weight, "epochs": source.epochs, **source.dataset.identity()}
                for source, weight in zip(self.sources, self.weights, strict=True)
            ],
        }


def is_mixture(specs: Sequence[str]) -> bool:
    """Whether `--data` names a mixture: a YAML file with sources, or PACK=WEIGHT where no such file is."""
    if len(specs) == 1 and specs[0].endswith(SUFFIXES) and Path(specs[0]).is_file():
        fields = load_yaml(Path(specs[0]))
        return isinstance(fields, dict) and "sources" in fields
    return bool(specs) and all("=" in spec and not Path(spec).exists() for spec in specs)


@dataclass(frozen=True)
class _Phase:
    """A stretch of rows in which the shares stay as they are."""

    first: int  # number of its first row
    block: int  # rows in a block
    quotas: list[int]  # of them, from each source
    read: list[int]  # rows of each source before


class MixtureRows:
    """Rows of several sources. caps: most rows of each source, None for any number."""

    def __init__(
        self, sources: Sequence[Rows], weights: Sequence[float], caps: Sequence[int | None], seed: int
    ) -> None:
        self._sources, self._seed = sources, seed
        self.per_epoch = sum(rows.per_epoch for rows in sources)
        self._phases, self.limit = _phases(weights, caps)  # limit: rows in all, None for any number
        self._firsts = [phase.first for phase in self._phases]

    def choose(self, number: int) -> tuple[int, int]:
        """(source, row of that source) of a row. Raises DataError after the last that the epoch caps allow."""
        if self.limit is not None and number >= self.limit:
            raise DataError(f"the epoch caps of the mixture allow {self.limit} rows: there is no row {number}")
        phase = self._phases[bisect_right(self._firsts, number) - 1]
        block, index = divmod(number - phase.first, phase.block)
        keys = words(self._seed, MIXTURE_STREAM, number - index, ROUNDS)
        place = permute(index, phase.block, keys)
        source = 0
        while place >= phase.quotas[source]:
            place -= phase.quotas[source]
            source += 1
        return source, phase.read[source] + block * phase.quotas[source] + place

    def row(self, number: int) -> Row:
        source, own = self.choose(number)
        return self._sources[source].row(own)


def _phases(weights: Sequence[float], caps: Sequence[int | None]) -> tuple[list[_Phase], int | None]:
    """The stretches between one source's end and the next, and the rows in all (None: no end)."""
    phases: list[_Phase] = []
    alive = set(range(len(weights)))
    first, read = 0, [0] * len(weights)
    while alive:
        quotas = _quotas([weight if i in alive else 0.0 for i, weight in enumerate(weights)])
        left = {i: cap - read[i] for i in alive if (cap := caps[i]) is not None}
        if not left:
            return [*phases, _Phase(first, BLOCK, quotas, list(read))], None
        ending = min(left, key=lambda i: (left[i] / quotas[i], i))
        whole = left[ending] // quotas[ending]
        rest = left[ending] % quotas[ending]
        last = [quota * rest // quotas[ending] for quota in quotas]  # a shorter block, in which it comes to its end
        for blocks, shares in ((whole, quotas), (1, last)):
            if blocks and sum(shares):
                phases.append(_Phase(first, sum(shares), shares, list(read)))
                first += blocks * sum(shares)
                read = [have + blocks * share for have, share in zip(read, shares, strict=True)]
        alive.remove(ending)
    return phases, first


def _quotas(weights: Sequence[float]) -> list[int]:
    """Rows of each source in a block: whole numbers by largest remainder. Raises ConfigError for one without any."""
    exact = [weight / math.fsum(weights) * BLOCK for weight in weights]
    out = [int(value) for value in exact]
    by_remainder = sorted(range(len(out)), key=lambda i: (out[i] - exact[i], i))
    for i in by_remainder[: BLOCK - sum(out)]:
        out[i] += 1
    for weight, quota in zip(weights, out, strict=True):
        if weight > 0 and quota == 0:
            raise ConfigError(f"a source has a share of {weight / math.fsum(weights):.2g}: the least is one in {BLOCK}")
    return out


def _from_yaml(path: Path) -> Mixture:
    fields = load_yaml(path)
    if not isinstance(fields, dict) or not isinstance(fields.get("sources"), list):
        raise ConfigError(f"{path} is no mixture: it has no list of sources")
    strange = [name for name in fields if name not in ("sources", "temperature")]
    sources = []
    for entry in fields["sources"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("data"), str):
            raise ConfigError(f"a source in {path} has no `data`: {entry!r}")
        strange += [name for name in entry if name not in ("data", "weight", "epochs", "name")]
        folder = path.parent / entry["data"]
        numbers = [_number(path, entry, name) for name in ("weight", "epochs")]
        sources.append(Source(ShardDataset(folder), str(entry.get("name", folder.name)), *numbers))
    if strange:
        raise ConfigError(f"{path} has a field {strange[0]!r} that no mixture has")
    return Mixture(sources, _number(path, fields, "temperature") or 1.0)


def _number(path: Path, fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ConfigError(f"{name} in {path} must be a number, not {value!r}")
    return None if value is None else float(value)

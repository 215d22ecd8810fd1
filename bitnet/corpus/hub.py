"""Documents of a data set on the Hugging Face hub, streamed: nothing is asked for unless it was named.

`hub:OWNER/NAME[@REVISION][#CONFIG[/SPLIT]]`, such as `hub:roneneldan/TinyStories#default/train`. A pack of it can be
made again byte for byte only with a REVISION: what a name alone means may change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitnet.corpus.document import Document, of_record
from bitnet.corpus.readers import need
from bitnet.errors import ConfigError, DataError

PREFIX = "hub:"
PATTERN = re.compile(r"hub:([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?(?:#([\w.-]*)(?:/([\w.-]+))?)?")


@dataclass(frozen=True)
class HubSource:
    """A name taken apart."""

    name: str
    revision: str | None
    config: str | None
    split: str

    @classmethod
    def parse(cls, spec: str) -> HubSource:
        """Raises ConfigError for a name that cannot be one."""
        found = PATTERN.fullmatch(spec)
        if found is None:
            raise ConfigError(f"{spec!r} is not of the form hub:OWNER/NAME[@REVISION][#CONFIG[/SPLIT]]")
        name, revision, config, split = found.groups()
        return cls(name, revision, config or None, split or "train")

    def read(self, text_field: str, wanted: Sequence[str]) -> Iterator[Document]:
        """The documents in the data set's own order. Raises DataError if the hub cannot be reached or does not know."""
        library = need("datasets", f"{PREFIX}{self.name}")
        try:
            rows = library.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
            for number, record in enumerate(rows):
                where = f"{PREFIX}{self.name} row {number + 1}"
                document = of_record(dict(record), text_field, wanted, PREFIX + self.name, where)
                if document is not None:
                    yield document
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{PREFIX}{self.name} cannot be read: {first}") from None

"""The `.bitnet` file: a packed model, its config, tokenizer and provenance in one file that is mapped, not read.

    0    8  magic: 89 "BITNET" 0A, which a transfer as text would change
    8    4  version: 1                                          u32; all numbers are little-endian
    12   4  CRC-32 of the header                                u32
    16   8  length of the header                                u64
    24      header: a JSON object, with spaces after it up to a multiple of 64
            sections, each at the next multiple of 64 after the one before, zeros between; the last ends the file

    header      {"config": {...}, "provenance": {name: text}, "sections": [section, ...]}
    section     {"name", "form", "shape", "offset", "bytes", "crc32"}, and for ternary codes "scale", or "scales": that
                many, one for each row, lie in f32 before the codes

    form          what the bytes are
    f32, bf16     numbers of a tensor, row by row
    fifths        ternary codes, five a byte (csrc/quant/fifths.h): 1.6 bits a weight
    fifths-coded  the same bytes, entropy-coded (csrc/formats/rans.h)
    bytes         a file of the tokenizer, named tokenizer/NAME

CRC-32 finds what happens to files by accident: any run of at most 32 flipped bits, and all but one in four billion of
other changes. It is in the standard library, about as fast as a disk, and computed without the GIL. Against intent it
is no help, so the reader trusts nothing: there are no holes, no overlaps, no names twice, and no size is believed
before it is compared with that of the file. Every refusal is a CheckpointError that names file and section.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet import _core
from bitnet.durable import whole_file
from bitnet.errors import CheckpointError
from bitnet.formats.mapped import is_size, map_file, release, strict_json
from bitnet.formats.source import Progress

if TYPE_CHECKING:
    from typing_extensions import Buffer

Array = np.ndarray[Any, Any]
MAGIC = b"\x89BITNET\n"
VERSION = 1
PREFIX = struct.Struct("<8sIIQ")
ALIGN = 64
HEADER_MAX = 64 << 20  # ten thousand times the header of a model of thirty layers
TERNARY = ("fifths", "fifths-coded")
FORMS = ("f32", "bf16", *TERNARY, "bytes")
TOKENIZER = "tokenizer/"


@dataclass(frozen=True)
class Section:
    """Where one tensor (or file of the tokenizer) lies, and how to read it.

    Ternary codes have a scale, or as many scales as rows, which lie before them; all else has neither.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    crc32: int
    scale: float | None = None
    scales: int | None = None

    @property
    def head(self) -> int:
        """Bytes of the scales before the codes."""
        return 4 * (self.scales or 0)

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.bytes


# ---- reading --------------------------------------------------------------------------------------------------------


class BitnetFile:
    """An open file: everything but the sections' contents is checked, and nothing of those is read yet.

    path, config (as in config.json), provenance, sections (by name, in the order of the file).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = map_file(self.path, PREFIX.size, ".bitnet")
        header, begin = self._read_header()
        self.config: dict[str, Any] = header["config"]
        self.provenance: dict[str, str] = header["provenance"]
        self.sections: dict[str, Section] = {}
        for i, fields in enumerate(header["sections"]):
            section = self._section(i, fields)
            if section.name in self.sections:
                raise self._refusal(f"it has two sections {section.name}")
            self.sections[section.name] = section
        self._check_layout(begin)

    def view(self, section: Section) -> memoryview:
        """The bytes of a section as they lie in the file: shared, read-only, unverified."""
        return memoryview(self._map)[section.offset : section.end]

    def is_whole(self, section: Section) -> bool:
        """Whether the bytes of a section have the checksum that the header gives."""
        return zlib.crc32(self.view(section)) == section.crc32

    def verify(self, section: Section) -> None:
        """Raises CheckpointError if the bytes of a section are not those that were written."""
        if not self.is_whole(section):
            raise self._refusal(f"{section.name} is damaged: its checksum differs from the one in the header")

    def release(self, section: Section) -> None:
        """Takes the section's pages out of this process's memory; who looks at them again has them again."""
        release(self._map, section.offset, section.end)

    def fifths(self, section: Section) -> memoryview:
        """The codes of a ternary section, five a byte: shared, or decoded. CheckpointError if they do not decode."""
        codes = self.view(section)[section.head :]
        if section.form == "fifths":
            return codes
        try:
            return _core.rans_decode(codes, -(-section.count // 5)).data
        except ValueError as error:
            raise self._refusal(f"{section.name} cannot be decoded: {error}") from None

    def scales(self, section: Section) -> Array:
        """The scales of a ternary section, f32, one or as many as rows. CheckpointError for one that cannot be."""
        if section.scale is not None:
            return np.array([section.scale], np.float32)
        scales = np.frombuffer(self.view(section)[: section.head], "<f4")
        bad = np.flatnonzero(~((scales > 0) & np.isfinite(scales)))
        if bad.size:
            raise self._refusal(f"{section.name} has the scale {scales[bad[0]]} in row {bad[0]}")
        return scales

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's own files by name, verified; empty where there are none."""
        files = {}
        for name, section in self.sections.items():
            if section.form == "bytes":
                self.verify(section)
                files[name.removeprefix(TOKENIZER)] = bytes(self.view(section))
        return files

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """The header, and the offset of its end."""
        size = len(self._map)
        magic, version, crc32, length = PREFIX.unpack_from(self._map)
        if magic != MAGIC:
            raise self._refusal(f"it is no .bitnet file: it begins with {magic!r}")
        if version != VERSION:
            raise self._refusal(f"it is a .bitnet file of version {version}; this program reads version {VERSION}")
        if length > HEADER_MAX or length > size - PREFIX.size:
            raise self._refusal(f"its header should have {length} bytes, but {size - PREFIX.size} follow")
        text = self._map[PREFIX.size : PREFIX.size + length]
        if zlib.crc32(text) != crc32:
            raise self._refusal("its header is damaged: its checksum differs")
        try:
            header = strict_json(text)
        except (ValueError, RecursionError) as error:
            raise self._refusal(f"its header is no JSON: {error}") from None
        kinds = {"config": dict, "provenance": dict, "sections": list}
        if not isinstance(header, dict) or any(not isinstance(header.get(name), kind) for name, kind in kinds.items()):
            raise self._refusal(f"its header is no object with {', '.join(kinds)}")
        for name, value in header["provenance"].items():
            if not isinstance(value, str):
                raise self._refusal(f"its provenance {name!r} is no text, but {value!r}")
        return header, PREFIX.size + length

    def _section(self, i: int, fields: Any) -> Section:
        """Section i of the header, each of its fields checked by itself."""
        if not isinstance(fields, dict) or not isinstance(fields.get("name"), str) or not fields["name"]:
            raise self._refusal(f"section {i} of its header has no name")
        name, form, shape = fields["name"], fields.get("form"), fields.get("shape")
        if form not in FORMS:
            raise self._refusal(f"{name} has the unknown form {form!r}; known are {', '.join(FORMS)}")
        unknown = sorted(fields.keys() - Section.__dataclass_fields__.keys())
        if unknown:
            raise self._refusal(f"{name} has an unknown field {unknown[0]!r}")
        if not isinstance(shape, list) or not 1 <= len(shape) <= 8 or not all(is_size(d) and d > 0 for d in shape):
            raise self._refusal(f"{name} has no shape of positive sizes, but {shape!r}")
        for key, limit in (("offset", 2**63), ("bytes", 2**63), ("crc32", 2**32)):
            if not is_size(fields.get(key)) or fields[key] >= limit:
                raise self._refusal(f"{name} has {key} {fields.get(key)!r}, which is no number below {limit}")
        scales = fields.get("scales")
        if scales is not None and (form not in TERNARY or "scale" in fields or not is_size(scales) or
                                   scales != shape[0]):  # fmt: skip
            raise self._refusal(f"{name} ({form}) has the scales {scales!r}, which belong to ternary codes without a "
                                f"scale for all, one for each of {shape[0]} rows")  # fmt: skip
        section = Section(name, form, tuple(shape), fields["offset"], fields["bytes"], fields["crc32"], _scale(fields),
                          scales)  # fmt: skip
        has_scale = section.scale is not None or scales is not None
        if has_scale != (form in TERNARY) or (section.scale is None and fields.get("scale") is not None):
            raise self._refusal(f"{name} ({form}) has the scale {fields.get('scale')!r}")
        if form in TERNARY and len(shape) != 2:
            raise self._refusal(f"{name} has ternary codes of shape {shape}, which is no matrix")
        needed, least = bytes_needed(form, section.count), section.head + 1
        needed = None if needed is None else section.head + needed
        if section.bytes < least or section.bytes != (needed or section.bytes):
            wanted = needed or f"at least {least}"
            raise self._refusal(f"{name} has {section.bytes} bytes, but {wanted} for its shape {shape}")
        if (form == "bytes") != name.startswith(TOKENIZER) or (form == "bytes" and not _is_file_name(name)):
            raise self._refusal(f"{name!r} is no name of a section of form {form}")
        return section

    def _check_layout(self, begin: int) -> None:
        """Each section follows the one before, with nothing but zeros between, and the last ends the file."""
        end, size = begin, len(self._map)
        for section in self.sections.values():
            if section.offset != -(-end // ALIGN) * ALIGN:
                raise self._refusal(f"{section.name} begins at {section.offset}, not at the next multiple of {ALIGN} "
                                    f"after {end}")  # fmt: skip
            if section.end > size:
                raise self._refusal(f"it is cut off: {section.name} ends at {section.end}, the file at {size}")
            if any(self._map[end : section.offset]):
                raise self._refusal(f"the space before {section.name} is damaged: it is not zero")
            end = section.end
        if end != size:
            raise self._refusal(f"its last section ends at {end}, the file at {size}")


def bytes_needed(form: str, count: int) -> int | None:
    """Bytes of `count` elements; None where that depends on their values."""
    return {"f32": 4 * count, "bf16": 2 * count, "fifths": -(-count // 5), "bytes": count}.get(form)


def _is_file_name(name: str) -> bool:
    """Whether what follows the prefix is one plain name, which a folder made for it can hold."""
    base = name.removeprefix(TOKENIZER)
    return base not in ("", ".", "..") and not any(c in base for c in "/\\:\0") and base.isprintable()


def _scale(fields: dict[str, Any]) -> float | None:
    """A positive finite f32, or None."""
    value = fields.get("scale")
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not 0 < value < 3.5e38
        or float(np.float32(value)) != value
    ):
        return None
    return float(value)


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What goes into a section: any C-contiguous buffer. scale: of ternary codes, or f32 (rows,), one for each row."""

    form: str
    data: Buffer
    scale: float | Array | None = None

    @property
    def head(self) -> bytes:
        """The scales of rows, which lie before the data."""
        return self.scale.astype("<f4").tobytes() if isinstance(self.scale, np.ndarray) else b""


@dataclass(frozen=True)
class Part:
    """A section to be: `make` is called once, when its turn has come, so that one part at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Content]


def file_parts(files: dict[str, bytes]) -> list[Part]:
    """Parts of form bytes for files of a tokenizer, by name."""
    return [Part(TOKENIZER + name, (len(data),), partial(Content, "bytes", data)) for name, data in files.items()]


def write(
    path: str | Path,
    config: dict[str, Any],
    provenance: dict[str, str],
    parts: Sequence[Part],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a file that is either complete or not there: under another name first, synced, then renamed.

    force: replace a file that exists. progress: wraps the names of the parts, as tqdm does. Raises
    CheckpointError (a full disk), leaving no trace.
    """
    with whole_file(Path(path), force) as file:
        _write(file, config, provenance, parts, (progress or iter)([part.name for part in parts]))


def _write(file: Any, config: dict[str, Any], provenance: dict[str, str], parts: Sequence[Part],
           turns: Iterable[str]) -> None:  # fmt: skip
    # The header comes first but is known last, so its room is that of the longest numbers there could be.
    longest = [Section(part.name, "fifths-coded", part.shape, 2**63, 2**63, 2**32 - 1, -2.2250738585072014e-308)
               for part in parts]  # fmt: skip
    room = -(-(PREFIX.size + len(_header(config, provenance, longest))) // ALIGN) * ALIGN
    if room - PREFIX.size > HEADER_MAX:
        raise CheckpointError(f"a header of {room - PREFIX.size} bytes is longer than the {HEADER_MAX} that are read")
    file.write(bytes(room))
    sections, end = [], room
    for part, _ in zip(parts, turns, strict=True):
        content = part.make()
        data = memoryview(content.data).cast("B")
        head = content.head
        offset = -(-end // ALIGN) * ALIGN
        file.write(bytes(offset - end))
        file.write(head)
        file.write(data)
        size, crc32 = len(head) + data.nbytes, zlib.crc32(data, zlib.crc32(head))
        scale = None if isinstance(content.scale, np.ndarray) else content.scale
        section = Section(part.name, content.form, part.shape, offset, size, crc32, scale, len(head) // 4 or None)
        sections.append(section)
        end = offset + size
        del content, data  # before the next is made
    text = _header(config, provenance, sections).ljust(room - PREFIX.size)
    file.seek(0)
    file.write(PREFIX.pack(MAGIC, VERSION, zlib.crc32(text), len(text)) + text)


def _header(config: dict[str, Any], provenance: dict[str, str], sections: Sequence[Section]) -> bytes:
    entries = [{name: value for name, value in asdict(section).items() if value is not None} for section in sections]
    header = {"config": config, "provenance": provenance, "sections": entries}
    return json.dumps(header, allow_nan=False, separators=(",", ":")).encode()

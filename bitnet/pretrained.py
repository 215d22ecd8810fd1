"""from_pretrained: a model from whatever holds one, found out by looking at it.

a run folder              its newest complete checkpoint
a checkpoint folder       of a run
a folder with config.json as Hugging Face's transformers reads it: BitNet, packed or not, LLaMA
NAME/NAME                 such a folder on the hub, if nothing here has that name; downloaded once
a folder with model.onnx  as bitnet export writes it, or the file alone
a file                    .bitnet or GGUF, told apart by their first bytes
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet.checkpoint import LORA, STATE, SUMS, Checkpoint, open_checkpoint, place_of
from bitnet.config import BitNetConfig
from bitnet.errors import CheckpointError, ConfigError
from bitnet.formats.bitnet_file import MAGIC
from bitnet.formats.hf_config import CONFIG, hf_config, read_config, read_json
from bitnet.formats.source import Progress, Reading, Source, assemble
from bitnet.lora import LoraConfig
from bitnet.model import BitNetForCausalLM

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def from_pretrained(
    path: str | Path,
    *,
    layout: str = "auto",
    hidden_act: str | None = None,
    linear: str | None = None,
    i2s_order: str = "x86",
    revision: str | None = None,
) -> BitNetForCausalLM:
    """Opens a run, a checkpoint, a Hugging Face folder or hub id, a `.bitnet`, GGUF or ONNX file.

    layout: of packed weights, as for Module.pack. hidden_act, linear, i2s_order: what a file does not say, see
    formats.source.Reading. revision: branch, tag or commit of a hub id. The model's attribute `tokenizer` is the one
    that came with it, or None. CheckpointError names what is missing or damaged.
    """
    return open_model(path, Reading(hidden_act, linear, i2s_order), layout, revision=revision)


def open_model(
    path: str | Path,
    reading: Reading,
    layout: str = "auto",
    progress: Progress | None = None,
    revision: str | None = None,
) -> BitNetForCausalLM:
    """As from_pretrained; progress: wraps the names of the weights of another project's file, as tqdm does."""
    place = _local(path, revision)
    source = _source(place, reading)
    if source is not None:
        return assemble(source, layout, progress)
    if reading != Reading():
        raise ConfigError(f"{place} says itself what it holds: its activation and kind of layer cannot be chosen")
    if place.is_file():
        from bitnet.formats.packing import load_packed

        return load_packed(place, layout=layout)
    return open_checkpoint(place).model()


@dataclass(frozen=True)
class Outline:
    """What is known of a model that is not opened: its shape, and what it will be when it is.

    is_latent: f32 all through, with latent weights if it is ternary; otherwise packed. lora: of which adapters it is.
    """

    config: BitNetConfig
    is_latent: bool
    lora: LoraConfig | None = None


def outline_of(path: str | Path) -> Outline:
    """Of what from_pretrained opens, without its weights: of a hub id no more than its JSON is downloaded.

    Raises CheckpointError, as opening does.
    """
    from bitnet.formats.bitnet_file import BitnetFile
    from bitnet.formats.packing import PackedSource

    place = Path(path)
    if _is_on_hub(path):
        file = _local(path, None, ["*.json"]) / CONFIG
        said = hf_config(read_json(file), file)
        return Outline(said.config, said.config.linear == "linear" or said.is_online)
    source = _source(place, Reading())
    if source is None and place.is_file():
        source = PackedSource(BitnetFile(place))
    if source is not None:
        return Outline(source.config, source.is_trainable)
    folder = place_of(place)
    config = read_config(folder / CONFIG)
    if not (folder / LORA).is_file():
        return Outline(config, True)
    lora = LoraConfig.of(read_json(folder / LORA), folder / LORA)
    is_there = lora.base is not None and Path(lora.base).exists()
    return Outline(config, not is_there or outline_of(str(lora.base)).is_latent, lora)


def config_of(path: str | Path) -> BitNetConfig:
    """The shape of what from_pretrained opens, without its weights. Raises CheckpointError."""
    return outline_of(path).config


def open_without_copies(
    path: str | Path, reading: Reading, progress: Progress | None = None
) -> tuple[BitNetForCausalLM, dict[str, str]]:
    """A model to be written elsewhere, and its provenance; that of a run lies over the arrays that were read."""
    from bitnet.formats.packing import SavedSource, provenance_of

    place = _local(path, None)
    if _is_own_folder(place) and reading == Reading():
        saved: Checkpoint = open_checkpoint(place)
        if saved.lora is None:
            return assemble(SavedSource(saved), progress=progress), provenance_of(saved)
    model = open_model(place, reading, progress=progress)
    provenance: dict[str, str] = getattr(model, "provenance", {})
    return model, provenance


def _source(place: Path, reading: Reading) -> Source | None:
    """The reader of another project's file or folder; None for this project's own, which have their own ways."""
    if place.is_file():
        with open(place, "rb") as file:
            magic = file.read(len(MAGIC))
        if magic.startswith(b"GGUF"):
            from bitnet.formats.gguf_source import open_gguf

            return open_gguf(place, reading)
    if is_onnx(place):
        from bitnet.formats.onnx_source import open_onnx

        return open_onnx(place)
    if place.is_file():
        return None
    if _is_own_folder(place) or not (place / CONFIG).is_file():
        return None
    from bitnet.formats.hf_source import open_hf

    return open_hf(place, reading)


def _is_own_folder(place: Path) -> bool:
    """Whether it is a run or a checkpoint of this project, complete or not."""
    return (place / "checkpoints").is_dir() or any((place / name).is_file() for name in (STATE, SUMS))


def is_onnx(place: Path) -> bool:
    """Whether it is an ONNX file, or a folder with one."""
    return place.suffix == ".onnx" or (place / "model.onnx").is_file()


def located(path: str) -> str:
    """A path made absolute, to be opened from another folder; a hub id as it is."""
    return path if _is_on_hub(path) else str(Path(path).resolve())


def _is_on_hub(path: str | Path) -> bool:
    """Whether it is a hub id: nothing here has that name."""
    return bool(HUB_ID.fullmatch(str(path))) and not Path(path).exists()


def _local(path: str | Path, revision: str | None, files: Sequence[str] = HUB_FILES) -> Path:
    """The path itself, or the folder that these files of a hub id were downloaded to."""
    if not _is_on_hub(path):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"there is no folder {path} here, nor could it be had from the hub: {reason}") from None

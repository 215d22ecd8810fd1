"""The model that a run trains, as far as its options tell: its shape before any text is read, what it must not be, and
what training it takes in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitnet import checkpoint, nn, ops
from bitnet.config import BitNetConfig
from bitnet.convert import refuse_ternary, ternary_shape
from bitnet.corpus import Corpus
from bitnet.data import ShardDataset
from bitnet.errors import ConfigError
from bitnet.mixture import Mixture, is_mixture
from bitnet.model import BitNetForCausalLM, Factory
from bitnet.plan import META, PackedFactory, Plan, process_bytes, training_plan
from bitnet.pretrained import Outline, config_of, outline_of
from bitnet.report_text import size
from bitnet.run_config import RunConfig, Settings
from bitnet.shard import MANIFEST
from bitnet.system_memory import system_memory
from bitnet.tokenizer import build_tokenizer
from bitnet.trainer import check_readable

DEFAULT_VOCAB = 4096
LEARNED = "sentencepiece"  # how tokenizers are named that learn as many ids as they are told to


@dataclass(frozen=True)
class Prospect:
    """What a run is to be. vocabulary: of its model, None where it is known when the text is packed; given: the shape
    that `init` decides; teacher: the shape of that one.
    """

    settings: Settings
    vocabulary: int | None
    given: BitNetConfig | None
    teacher: BitNetConfig | None

    def shape(self, unknown: int) -> BitNetConfig:
        """Of the model, with `unknown` ids where their number is not known."""
        return self.given or self.settings.model_config(unknown if self.vocabulary is None else self.vocabulary)


def prospect_of(settings: Settings, out: Path | None = None) -> Prospect:
    """Of a run in the folder out, or of one that has none yet.

    Raises what training would for a text that is not there, or a model that is not or cannot be trained.
    """
    run, path = settings.run, settings.trainer.teacher
    teacher = None if path is None else config_of(path)
    given = None if run.init is None else _initial_shape(run, run.init, out)
    data = packed_text(run, out)
    if given is not None and data is not None:
        check_readable(given, settings.trainer.seq_len, data)
    vocabulary = _vocabulary(run, data, teacher, out) if given is None else given.vocab_size
    if data is None:
        Corpus(run.data)  # refuses what is not there
    return Prospect(settings, vocabulary, given, teacher)


def _initial_shape(run: RunConfig, source: str, out: Path | None) -> BitNetConfig:
    """Of the model that init names, or of the run's own checkpoints."""
    if goes_on_with_its_own(run, out):
        return config_of(str(out))
    found = outline_of(source)
    refuse_untrainable(_without_values(found), run, source)
    return ternary_shape(found.config) if run.convert else found.config


def goes_on_with_its_own(run: RunConfig, out: Path | None) -> bool:
    """Whether the run has checkpoints of a whole model, which take the place of what init names."""
    return out is not None and bool(checkpoint.steps(out)) and not run.lora


def _without_values(found: Outline) -> BitNetForCausalLM:
    with ops.device(META):
        model = BitNetForCausalLM(found.config, factory=Factory if found.is_latent else PackedFactory)
    model.lora = found.lora
    return model


def refuse_untrainable(model: BitNetForCausalLM, run: RunConfig, source: str) -> None:
    """Raises ConfigError for a model, opened from source, that a run with these options cannot train."""
    if model.lora is not None:
        raise ConfigError(f"{source} holds adapters: go on with --resume, or begin with their base {model.lora.base}")
    if run.convert:
        refuse_ternary(model, source)
    if run.lora:
        return
    if any(layer.is_packed for _, layer in model.bitlinears()):
        raise ConfigError(
            f"{source} is packed: it has codes and scales, but no latent weights to go on with; --lora RANK trains "
            "adapters beside them"
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module.weight, nn.Parameter):
            raise ConfigError(f"{source} keeps {path} in {module.weight.dtype}, which cannot be trained")


def packed_text(run: RunConfig, out: Path | None) -> ShardDataset | Mixture | None:
    """The text where it is packed: in the run's folder, or because `data` is a pack, or several."""
    if out is not None and (out / "data" / MANIFEST).is_file():  # written last: the pack is whole
        return ShardDataset(out / "data")
    if is_mixture(run.data):
        return Mixture.open(run.data)
    if len(run.data) == 1 and (Path(run.data[0]) / MANIFEST).is_file():
        return ShardDataset(run.data[0])
    return None


def _vocabulary(
    run: RunConfig, data: ShardDataset | Mixture | None, teacher: BitNetConfig | None, out: Path | None
) -> int | None:
    """The ids of a new model for a text, packed or not; None where the text itself says what it needs."""
    if data is not None:
        return model_vocabulary(run, data.vocab_size, data.folder, out)
    if run.tokenizer == "chars" or run.tokenizer.startswith(LEARNED):
        if teacher is not None:  # of the same text, or refused when that is packed
            return teacher.vocab_size
        return run.vocab_size or (None if run.tokenizer == "chars" else DEFAULT_VOCAB)
    return model_vocabulary(run, build_tokenizer(run.tokenizer, [], 0).vocab_size, None, out)


def model_vocabulary(run: RunConfig, ids: int, folder: Path | None, out: Path | None) -> int:
    """The ids of a new model for a text of so many, in `folder` (None: of one that is not packed yet).

    Raises ConfigError where fewer were asked for.
    """
    wanted = run.vocab_size
    # SentencePiece may find fewer pieces than asked for; a larger table than the tokenizer needs is otherwise meant.
    learned = run.tokenizer.startswith(LEARNED) and out is not None and folder == out / "data"
    if wanted is not None and wanted < ids:
        of = f"tokenizer {run.tokenizer}" if folder is None else f"the text in {folder}"
        raise ConfigError(f"vocab_size {wanted} is less than the {ids} ids of {of}")
    return ids if learned or wanted is None else wanted


def planned(prospect: Prospect, shape: BitNetConfig) -> Plan:
    """What the run takes if its model has this shape. Raises ConfigError for what training refuses."""
    settings = prospect.settings
    return training_plan(shape, settings.trainer, prospect.teacher, settings.run.adapters)


def memory_line(plan: Plan) -> str:
    """What a run will take, for people. Raises ConfigError if that is more than this machine has."""
    room, need = system_memory(), plan.most + process_bytes()
    parts = ", ".join(f"{name} {size(part)}" for name, part in plan.parts.items())
    less = "`bitnet plan train` with the same options tells what takes less"
    if need > room.total:
        raise ConfigError(
            f"this run takes {size(need)} of memory ({parts}), and this machine has {size(room.total)}; {less}"
        )
    short = "" if need <= room.free else f"; {less}"
    return f"memory: about {size(need)} ({parts}); {size(room.free)} are free{short}"

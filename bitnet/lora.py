"""Low-rank adapters beside frozen ternary layers: y = bitlinear(x, W) + (alpha / rank) B (A x), A and B in f32.

A (rank, in) begins normal and B (out, rank) at zero, so that a new adapter changes nothing (Hu et al. 2021, arXiv
2106.09685). W, embeddings and head stay as they are; norms do too unless asked for. At inference the adapters stay
beside the packed layers: W + B A has more than three values, so it cannot be merged into a ternary matrix.

    model = from_pretrained("runs/base").add_lora(rank=8)       # ready for a Trainer
    model = attach(from_pretrained("base.bitnet"), "runs/lora")  # ready to generate

The backward pass of a bitlinear reads latent weights, so training keeps W as frozen f32, also for a base that is
packed: a latent matrix with exactly its codes and its scale is made for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet import _core, nn, ops
from bitnet._core import Tensor
from bitnet.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from bitnet.checkpoint import Checkpoint
    from bitnet.model import BitNetForCausalLM

Array = np.ndarray[Any, Any]

LEAST_SCALE = float(np.float32(1e-5))  # BN_QUANT_EPS
ATTEMPTS = 32  # each leaves about half of the few scales that the one before missed
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """What a model's adapters are.

    targets: last names of the layers that have one. norms: whether the gains of all norms are trained too. base: where
    the frozen model was opened, and base_sha256 what it is (fingerprint); two configs are equal wherever it lies.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = PROJECTIONS
    norms: bool = False
    base: str | None = field(default=None, compare=False)
    base_sha256: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank of an adapter must be at least 1, not {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"the alpha of an adapter must be positive, not {self.alpha}")
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown or not self.targets:
            what = f"not {unknown[0]!r}" if unknown else "at least one"
            raise ConfigError(f"adapters go beside layers named {', '.join(PROJECTIONS)}: {what}")

    @staticmethod
    def chosen(
        rank: int, alpha: float | None = None, targets: Iterable[str] | None = None, norms: bool = False,
        base: str | None = None,
    ) -> LoraConfig:  # fmt: skip
        """With twice the rank as alpha and every projection as targets, where they are None."""
        return LoraConfig(rank, 2.0 * rank if alpha is None else alpha, tuple(targets or PROJECTIONS), norms, base)

    @staticmethod
    def of(values: dict[str, Any], where: Path) -> LoraConfig:
        """From what asdict() gave and JSON kept. Raises CheckpointError naming the file."""
        try:
            return LoraConfig(**{**values, "targets": tuple(values["targets"])})
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{where} does not describe adapters: {error}") from None


class LoRALinear(nn.BitLinear):
    """A BitLinear with an adapter beside it; `base` gives its weight, which is not trained.

    x (..., in_features) -> (..., out_features).
    """

    def __init__(self, base: nn.BitLinear, rank: int, alpha: float, seed: int | None = None, name: str = "") -> None:
        super().__init__(base.in_features, base.out_features, weight=base.weight, activation_bits=base.activation_bits)
        self.bias = base.bias
        self.factor = alpha / rank
        a = nn.normal((rank, base.in_features), base.in_features**-0.5, seed, f"{name}.lora_A.weight" if name else None)
        self.lora_A = nn.Linear(base.in_features, rank, weight=a)
        self.lora_B = nn.Linear(rank, base.out_features, weight=nn.Parameter(ops.zeros((base.out_features, rank))))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., in_features) f32 -> (..., out_features), plus residual."""
        return self.lora_B(self.lora_A(x) * self.factor, super().forward(x, residual))

    @property
    def reads_int8(self) -> bool:
        """No: A reads x before it is quantized."""
        return False

    def to_full_precision(self) -> nn.Linear:
        """A Linear with code * weight_scale and the adapter in one matrix, which has no ternary form."""
        linear = super().to_full_precision()
        a, b = (layer.weight.numpy(copy=True) for layer in (self.lora_A, self.lora_B))
        linear.weight.copy_(linear.weight.numpy(copy=True) + np.float32(self.factor) * (b @ a))
        return linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.lora_A.out_features}"


def add_lora(model: BitNetForCausalLM, config: LoraConfig, seed: int = 0, training: bool = True) -> None:
    """Puts adapters beside the layers that config names, in place; initial values are a function of (seed, name).

    training: freezes everything else, and makes latent weights of packed ones. ConfigError for a model without ternary
    layers, with adapters, or whose fingerprint is not config's (where that has one).
    """
    _targets(model, config)  # refused before the weights are read through
    found = fingerprint(model)
    wanted = config.base_sha256
    if wanted not in ("", found):
        raise ConfigError(f"the adapters were made for another model: {wanted[:12]}, and this one is {found[:12]}")
    place(model, replace(config, base_sha256=found), seed, training)


def place(model: BitNetForCausalLM, config: LoraConfig, seed: int = 0, training: bool = True) -> None:
    """What add_lora does to the layers, whatever their values are: on meta, where there are none, too."""
    layers = _targets(model, config)
    if training:
        freeze(model, config.norms)
    modules = dict(model.named_modules())
    for path, layer in layers:
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, LoRALinear(layer, config.rank, config.alpha, seed, path))
    model.lora = config


def _targets(model: BitNetForCausalLM, config: LoraConfig) -> list[tuple[str, nn.BitLinear]]:
    """The layers that get an adapter, by their paths. ConfigError if there are none, or have one."""
    if model.lora is not None:
        raise ConfigError("the model has adapters already")
    layers = [(path, layer) for path, layer in model.bitlinears() if path.rpartition(".")[2] in config.targets]
    if not layers:
        raise ConfigError("adapters go beside ternary layers, and the model has none of these names")
    return layers


def attach(model: BitNetForCausalLM, adapters: str | Path) -> BitNetForCausalLM:
    """Puts the trained adapters of a run or checkpoint folder beside the layers of their base; returns the model.

    Raises CheckpointError for a folder that has none, ConfigError for a model that is not the one they were made for.
    """
    from bitnet.checkpoint import open_checkpoint

    saved = open_checkpoint(Path(adapters))
    if saved.lora is None:
        raise CheckpointError(f"{saved.path} holds a whole model, not adapters")
    put(model, saved)
    return model


def put(model: BitNetForCausalLM, saved: Checkpoint) -> None:
    """The adapters of a checkpoint, beside the layers of a model that is not trained further."""
    assert saved.lora is not None
    add_lora(model, saved.lora, training=False)
    names = dict(model.named_modules())
    adapters = [path for path, layer in model.bitlinears() if isinstance(layer, LoRALinear)]
    wanted = [f"{path}.{part}.weight" for path in adapters for part in ("lora_A", "lora_B")]
    if missing := [name for name in wanted if name not in saved.weights]:
        raise CheckpointError(f"{saved.path} has no {missing[0]}, which its {len(adapters)} adapters need")
    for name, values in saved.weights.items():
        path, _, last = name.rpartition(".")
        weight = vars(names[path]).get(last) if path in names else None
        if not isinstance(weight, Tensor) or weight.shape != values.shape:
            raise CheckpointError(f"{saved.path}: its {name} of shape {values.shape} fits nothing in the model")
        weight.copy_(values)


def freeze(model: BitNetForCausalLM, norms: bool = False) -> None:
    """Leaves nothing to train, but for the gains of norms if asked: the weights stay, as f32 that wants no gradient."""
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if not isinstance(value, Tensor) or value.dtype == "i32":
                continue
            if isinstance(module, nn.BitLinear) and module.is_packed and name == "weight":
                by_row = module.has_channel_scales
                scale = module.scales().numpy() if by_row else module.weight_scale
                latent = Tensor(latent_of(module.codes().numpy(), scale, path))
                if by_row:
                    _core.scale_channels(latent)
                setattr(module, name, latent)
            elif isinstance(value, nn.Parameter) and not (norms and isinstance(module, nn.RMSNorm)):
                setattr(module, name, value.detach())
            elif value.dtype == "bf16":
                with ops.no_grad():
                    setattr(module, name, ops.convert(value, "f32"))
    model.head = None  # another form of a matrix that is f32 again


def latent_of(codes: Array, scale: float | Array, name: str = "the layer") -> Array:
    """A latent matrix (out, in) f32 that has exactly these codes and this scale; codes i8 of the same shape.

    scale: one, or one for each row, f32 (out,). ConfigError where no choice that was tried gives it.
    """
    by_row = isinstance(scale, np.ndarray)
    lines = codes if by_row else codes.reshape(1, -1)  # what has a scale of its own
    wanted = np.asarray(scale, np.float64).reshape(-1)
    latent = np.zeros(lines.shape, np.float32)

    def weight(values: Array) -> Tensor:
        made = Tensor(values if by_row else values.reshape(codes.shape))
        if by_row:
            _core.scale_channels(made)
        return made

    def scales_of(values: Array) -> Array:
        return _core.ternary_scales(weight(values)).numpy().astype(np.float64)

    left = np.arange(len(lines))
    for attempt in range(ATTEMPTS):
        latent[left] = _fitted(lines[left], wanted[left], attempt, scales_of)
        left = np.flatnonzero(scales_of(latent) != wanted)
        if not left.size:
            break
    if left.size or not np.array_equal(_core.ternary_codes(weight(latent)).numpy(), codes):
        value = wanted[left[0]] if left.size else wanted[0]
        raise ConfigError(f"no latent weights of {name} give its codes and its scale {value:g} exactly")
    return latent.reshape(codes.shape)


def _fitted(lines: Array, wanted: Array, attempt: int, scales_of: Callable[[Array], Array]) -> Array:
    """Latent lines (n, count) whose means are those wanted, or nearly: sums in f32 may jump over one.

    Zeros are 0 and the others +-a, with a just below scale / (share of the others), some of them one float larger: how
    many decides the last bit of the mean. Attempts after the first begin some floats apart from each other, which puts
    the roundings elsewhere. Below the least scale that a mean gives, any a does.
    """
    signs = lines.astype(np.float32)
    rank = np.cumsum(lines != 0, 1, dtype=np.int32) - 1
    others = (rank[:, -1] + 1).astype(np.int64)
    is_mean = (others > 0) & (wanted > LEAST_SCALE)
    apart = np.random.default_rng(attempt).integers(-8, 9, lines.shape, np.int32) if attempt else np.int32(0)

    def made(size: Array, larger: Array) -> Array:
        """Numbers of floats are those of their bits."""
        bits = size.view(np.int32)[:, None] + apart + (rank < larger[:, None])
        latent: Array = signs * bits.astype(np.int32, copy=False).view(np.float32)
        return latent

    none = np.zeros_like(others)
    size = np.where(is_mean, wanted * lines.shape[1] / np.maximum(others, 1), 0.75 * wanted).astype(np.float32)
    for _ in range(3):  # the mean's own roundings move it by a few in 10^7
        near = scales_of(made(size, none))
        size = np.where(is_mean, size.astype(np.float64) * wanted / near, size).astype(np.float32)
    while (over := is_mean & (scales_of(made(size, none)) >= wanted)).any():
        size = np.where(over, np.nextafter(size, np.float32(0)), size)
    while (under := is_mean & (scales_of(made(size, others)) < wanted)).any():
        size = np.where(under, np.nextafter(size, np.float32(np.inf)), size)
    low, high = none, np.where(is_mean, others, 0)
    while (between := low < high).any():
        middle = (low + high) // 2
        less = scales_of(made(size, middle)) < wanted
        low, high = np.where(between & less, middle + 1, low), np.where(between & ~less, middle, high)
    return made(size, low)


def fingerprint(model: BitNetForCausalLM) -> str:
    """SHA-256 in hex of the shape, the codes and scales of the ternary layers, and the norms.

    The same packed or not; embedding and head, which may be rounded, take no part.
    """
    digest = hashlib.sha256(json.dumps(model.config.as_dict(), sort_keys=True).encode())
    for path, module in model.named_modules():
        if isinstance(module, nn.BitLinear):
            # detach(): the codes that quantizing keeps beside a weight go with this window.
            weight = module.weight if module.is_packed else module.weight.detach()
            digest.update(path.encode() + _core.ternary_scales(weight).numpy().tobytes())
            digest.update(_core.ternary_codes(weight).numpy().tobytes())
        elif isinstance(module, nn.RMSNorm):
            digest.update(path.encode() + module.weight.numpy(copy=True).tobytes())
    return digest.hexdigest()

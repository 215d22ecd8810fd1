"""A model as a Hugging Face folder that transformers runs: config.json, safetensors, files of the tokenizer.

    the model                          packed                            masters
    ternary, sub-norms                 BitNetForCausalLM, U8 codes       BitNetForCausalLM, quantized online
    ternary, no sub-norms              LlamaForCausalLM, U8 codes        LlamaForCausalLM, quantized online
    full-precision twin                refused                           dense BitNetForCausalLM or LlamaForCausalLM

transformers runs a packed model in the number format of its file, all of it, so one dtype is written throughout:
bf16 where that changes no number, else f32. A scale that divides (linear_class "bitlinear") is chosen so that 1 / scale
in f32 is the one that multiplied, where there is such a number, and otherwise the nearest to it.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitnet import nn
from bitnet._core import Tensor
from bitnet.chat_template import TURN_ENDS
from bitnet.durable import whole_folder
from bitnet.errors import ConfigError
from bitnet.formats.hf_config import CONFIG, LINEAR_CLASSES, hf_json
from bitnet.formats.hf_source import INNER_NORM, SCALE, pack_rows
from bitnet.formats.hf_tokenizer import save_hf_tokenizer
from bitnet.formats.safetensors_file import SHARD_BYTES, TensorPart, write_safetensors
from bitnet.formats.source import Progress
from bitnet.formats.weights import (
    bf16_bits,
    bf16_of,
    codes_of,
    floats_of,
    is_bf16,
    model_weights,
    refuse_adapters,
    refuse_levers,
)
from bitnet.model import BitNetForCausalLM
from bitnet.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
DTYPES = {"f32": ("F32", "float32"), "bf16": ("BF16", "bfloat16")}


def save_hf(
    model: BitNetForCausalLM,
    folder: str | Path,
    *,
    packed: bool,
    linear_class: str = "autobitlinear",
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    force: bool = False,
    progress: Progress | None = None,
    max_shard_size: int = SHARD_BYTES,
) -> None:
    """Writes a model for transformers' AutoModelForCausalLM.from_pretrained; the model is not changed.

    packed: codes and scales; otherwise the latent weights, which transformers quantizes when it uses them (or the
    weights of a full-precision twin). linear_class: of packed layers. dtype: "f32" or "bf16", of everything but codes;
    None chooses bf16 where that is exact. Masters rounded to bf16 have other codes here and there. tokenizer: default
    the model's own, if it has one. force: replace a folder. progress: wraps the names of the tensors. Raises
    ConfigError for what transformers cannot run, CheckpointError (a full disk), leaving no trace.
    """
    _check(model, packed, linear_class, dtype)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    form = dtype or ("bf16" if _fits_bf16(model, packed, linear_class) else "f32")
    mode = "offline" if packed else "online"
    config = hf_json(model.config, tokenizer, DTYPES[form][1], linear_class if packed else "autobitlinear", mode)
    with whole_folder(Path(folder), force) as unfinished:
        _write_json(unfinished / CONFIG, config)
        _write_json(unfinished / "generation_config.json", _generation(tokenizer))
        if tokenizer is not None:
            save_hf_tokenizer(tokenizer, unfinished)  # before the tensors: it may refuse
        write_safetensors(
            unfinished, _parts(model, packed, linear_class, form), max_shard_size=max_shard_size, progress=progress
        )


def _check(model: BitNetForCausalLM, packed: bool, linear_class: str, dtype: str | None) -> None:
    """Refuses what cannot be written, or what transformers could not run."""
    refuse_adapters(model)
    c = model.config
    refuse_levers(c, "a packed layer of transformers has one for all" if packed else
                  "transformers would quantize the latent weights again, with one for all")  # fmt: skip
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if linear_class not in LINEAR_CLASSES:
        raise ConfigError(f"linear_class must be one of {', '.join(LINEAR_CLASSES)}, not {linear_class!r}")
    if c.quantize_head:
        raise ConfigError(
            "quantize_head: transformers leaves the output head out of quantization; a .bitnet file keeps it"
        )
    if not c.input_norms:
        raise ConfigError("input_norms false: transformers' blocks have norms before attention and feed-forward; "
                          "a .bitnet file keeps a model without them")  # fmt: skip
    layers = dict(model.bitlinears())
    if c.linear == "bitlinear" and not layers:
        raise ConfigError("the model's layers are in full precision, but its config says bitlinear; a model made with "
                          "linear='linear' can be written")  # fmt: skip
    if c.linear == "linear":
        if packed:
            raise ConfigError("a full-precision model has no ternary codes to pack; hf-masters writes its weights")
        if c.use_rms_norm:
            raise ConfigError("use_rms_norm: transformers has norms inside projections of ternary models only")
    for name, layer in layers.items():
        if not packed and layer.is_packed:
            raise ConfigError(f"{name} is packed and has no latent weights, and codes * scale would be quantized again "
                              "to another scale; hf-packed writes its codes")  # fmt: skip
        if packed and layer.out_features % 4:
            raise ConfigError(f"{name} has {layer.out_features} outputs, and transformers reads packed layers of a "
                              "multiple of 4 only; hf-masters writes its latent weights")  # fmt: skip


# ---- tensors --------------------------------------------------------------------------------------------------------


def _parts(model: BitNetForCausalLM, packed: bool, linear_class: str, form: str) -> list[TensorPart]:
    dtype = DTYPES[form][0]
    parts = []
    for name, weight in model_weights(model):
        if not isinstance(weight, nn.BitLinear):
            parts.append(TensorPart(name, dtype, weight.shape, partial(_floats, weight, form)))
            continue
        rows, cols = weight.out_features, weight.in_features
        path = name.removesuffix(".weight")
        if packed:
            parts.append(TensorPart(name, "U8", (-(-rows // 4), cols), partial(_codes, weight)))
            parts.append(TensorPart(path + SCALE, dtype, (1,), partial(_scale, weight, linear_class, form)))
        else:
            parts.append(TensorPart(name, dtype, (rows, cols), partial(_floats, weight.weight, form)))
        if model.config.use_rms_norm:
            parts.append(TensorPart(path + INNER_NORM, dtype, (cols,), partial(_ones, cols, form)))
    return parts


def _floats(weight: Tensor, form: str) -> memoryview:
    return (np.ascontiguousarray(floats_of(weight), "<f4") if form == "f32" else bf16_of(weight)).data


def _codes(layer: nn.BitLinear) -> memoryview:
    return pack_rows(codes_of(layer).codes).data


def _scale(layer: nn.BitLinear, linear_class: str, form: str) -> memoryview:
    return _formed(np.array([stored_scale(layer.weight_scale, linear_class)], np.float32), form)


def _ones(size: int, form: str) -> memoryview:
    return _formed(np.ones(size, np.float32), form)


def _formed(values: Array, form: str) -> memoryview:
    return (np.ascontiguousarray(values, "<f4") if form == "f32" else bf16_bits(values)).data


def stored_scale(scale: float, linear_class: str) -> np.float32:
    """weight_scale of a layer whose codes are multiplied by `scale`.

    Of the f32 whose reciprocal is the scale (there may be none, or two), bf16 goes first: a file that holds bf16 is
    written so again.
    """
    exact = np.float32(scale)
    if linear_class == "autobitlinear":
        return exact
    nearest = np.float32(1) / exact
    near = [nearest, *(np.nextafter(nearest, np.float32(end)) for end in (0, np.inf))]
    fitting = [w for w in near if np.float32(1) / w == exact]
    return next((w for w in fitting if is_bf16(np.array([w]))), fitting[0] if fitting else nearest)


def _fits_bf16(model: BitNetForCausalLM, packed: bool, linear_class: str) -> bool:
    """Whether every number but the codes is a bf16."""
    for _, weight in model_weights(model):
        if isinstance(weight, nn.BitLinear) and packed:
            values = np.array([stored_scale(weight.weight_scale, linear_class)])
        else:
            tensor = weight.weight if isinstance(weight, nn.BitLinear) else weight
            if tensor.dtype == "bf16":
                continue
            values = floats_of(tensor)
        if not is_bf16(values):
            return False
    return True


# ---- the files beside them ------------------------------------------------------------------------------------------


def _generation(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Where a text begins, and every token that ends an answer."""
    found: dict[str, Any] = {}
    if tokenizer is not None:
        special = tokenizer.special_tokens()
        ends = {end for end in (tokenizer.eos_id, *map(special.get, TURN_ENDS)) if end is not None}
        found = {"bos_token_id": tokenizer.bos_id} if tokenizer.bos_id is not None else {}
        if ends:
            found["eos_token_id"] = sorted(ends) if len(ends) > 1 else min(ends)
    return found


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

"""A model as an ONNX file: one matrix at a time in memory beside the model itself, whatever the size of the file.

An ONNX file is a ModelProto, a message of protocol buffers. The package onnx makes everything in it but the weights,
which are written where its last repeated field, graph.initializer, goes on: so that the file needs not be in memory.
Protocol buffers end at 2 GB. In a model that would be larger, initializers of 64 KiB and more are `external data`:
they lie in NAME.onnx.data beside NAME.onnx, each at a multiple of 64 KiB, which can be mapped everywhere.

    metadata       bitnet.config    config.json's object, without what a tokenizer adds
                   bitnet.weights   how ternary codes are stored, int8 or int2

The same model gives the same bytes every time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from bitnet.durable import refuse_existing, whole_file, whole_folder
from bitnet.errors import ConfigError
from bitnet.formats.hf_config import config_json
from bitnet.formats.onnx_genai import GENAI_FILE, genai_config
from bitnet.formats.onnx_graph import Weight, require_onnx
from bitnet.formats.onnx_model import OPSET_INT2, TERNARY, ModelGraph
from bitnet.formats.protobuf import opening
from bitnet.formats.source import Progress
from bitnet.formats.weights import refuse_adapters, refuse_levers
from bitnet.model import BitNetForCausalLM
from bitnet.tokenizer import Tokenizer

if TYPE_CHECKING:
    from onnx import TensorProto

MODEL_FILE, DATA_SUFFIX = "model.onnx", ".data"
CONFIG_KEY, WEIGHTS_KEY = "bitnet.config", "bitnet.weights"
SINGLE_MAX = (1 << 31) - 1  # bytes of a message; what is larger has external data
EXTERNAL_MIN = ALIGN = 1 << 16
IR_VERSION, IR_VERSION_INT2 = 10, 13  # those of the opsets: runtimes refuse what is newer than they are
# Numbers of fields: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9


def save_onnx(
    model: BitNetForCausalLM,
    path: str | Path,
    *,
    weights: str = "int8",
    tokenizer: Tokenizer | None = None,
    force: bool = False,
    progress: Progress | None = None,
    cache: bool = True,
) -> None:
    """Writes a model, packed or not, as ONNX; the model is not changed. Inputs and outputs: onnx_model.ModelGraph.

    path: a file NAME.onnx, which has a NAME.onnx.data beside it if the model is larger than 2 GB; or a folder, which
    will hold model.onnx, config.json, the files of the tokenizer (default the model's own, if it has one) and, with a
    cache, the genai_config.json of ONNX Runtime GenAI; a file alone has no tokenizer. weights: how ternary codes are
    stored, "int8" (opset 21), or "int2" (opset 25), a quarter of the size with the same results. cache: with past and
    present keys and values. force: replace what exists. progress: wraps the names of the weights, as tqdm does.
    ConfigError if onnx is not installed or the options do not fit; CheckpointError, leaving no trace, if the disk is
    full.
    """
    refuse_adapters(model)
    refuse_levers(model.config, "a ternary matrix of the graph that is written has one for all")
    require_onnx()
    if weights not in TERNARY:
        raise ConfigError(f"weights of an ONNX file are {' or '.join(TERNARY)}, not {weights!r}")
    if weights == "int2" and model.config.linear == "linear" and not model.config.quantize_head:
        raise ConfigError("a full-precision twin has no ternary weights to store as int2: use weights int8")
    path = Path(path)
    if path.suffix == ".onnx":
        refuse_existing(path, force)
        _save(OnnxFile(model, weights, cache), path, force, progress)
        return
    refuse_existing(path, force, folder=True)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    with whole_folder(path, force) as folder:
        _save(OnnxFile(model, weights, cache), folder / MODEL_FILE, force, progress)
        described = {"config.json": config_json(model.config, tokenizer)}
        if cache:
            described[GENAI_FILE] = genai_config(model.config, tokenizer, MODEL_FILE)
        for name, values in described.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(folder)


def _save(file: OnnxFile, path: Path, force: bool, progress: Progress | None) -> None:
    order = file.order()
    turns = (progress or iter)([weight.name for weight in order])
    if not file.is_external:
        with whole_file(path, force) as out:
            for part in file.single(zip(order, turns, strict=True)):
                out.write(part)
        return
    data_path = path.with_name(path.name + DATA_SUFFIX)
    # Whoever finds a model finds its own data: the model gets its name after them, and an old one goes before.
    with whole_file(path, force) as out, whole_file(data_path, force) as data:
        for part in file.external(zip(order, turns, strict=True), data, data_path.name):
            out.write(part)
        for written in (out, data):  # a full disk is found here
            written.flush()
        path.unlink(missing_ok=True)


class OnnxFile:
    """The messages of a file: what the package onnx makes of them, and where weights go in."""

    def __init__(self, model: BitNetForCausalLM, weights: str, cache: bool) -> None:
        from onnx import ModelProto

        from bitnet import __version__

        graph = ModelGraph(model, weights, cache)
        self.weights = graph.weights
        proto = ModelProto()
        proto.graph.name = "bitnet"
        proto.graph.node.extend(graph.nodes)
        proto.graph.input.extend(graph.inputs)
        proto.graph.output.extend(graph.outputs)
        proto.graph.initializer.extend(graph.constants)
        self.graph = proto.graph.SerializeToString(deterministic=True)
        proto.ClearField("graph")
        proto.ir_version = IR_VERSION_INT2 if graph.opset >= OPSET_INT2 else IR_VERSION
        proto.producer_name, proto.producer_version = "bitnet", __version__
        proto.opset_import.add(domain="", version=graph.opset)
        config = json.dumps(config_json(model.config, None), sort_keys=True)
        for key, value in ((CONFIG_KEY, config), (WEIGHTS_KEY, weights)):
            proto.metadata_props.add(key=key, value=value)
        self.rest = proto.SerializeToString(deterministic=True)
        single = len(self.rest) + len(self.graph) + sum(weight.bytes + 256 for weight in self.weights.values())
        self.is_external = single > SINGLE_MAX

    def order(self) -> list[Weight]:
        """The weights in the order in which they are written: that of their first use."""
        return list(self.weights.values())

    def single(self, turns: Iterable[tuple[Weight, str]]) -> Iterable[bytes | memoryview]:
        """The parts of a file that holds everything; a weight is made when its turn has come."""
        heads = {name: _head(weight) for name, weight in self.weights.items()}
        length = sum(len(heads[name]) + weight.bytes for name, weight in self.weights.items())
        yield self.rest + opening(GRAPH, len(self.graph) + length) + self.graph
        for weight, _ in turns:
            yield heads[weight.name]
            yield _made(weight)

    def external(self, turns: Iterable[tuple[Weight, str]], data: BinaryIO, location: str) -> Iterable[bytes]:
        """Writes large weights to `data`, a file of that name; then the parts of the file that tells where they are."""
        initializers = []
        for weight, _ in turns:
            if weight.bytes < EXTERNAL_MIN:
                initializers.append(_head(weight) + bytes(_made(weight)))
                continue
            data.write(bytes(-data.tell() % ALIGN))
            tensor = _tensor(weight)
            tensor.data_location = tensor.EXTERNAL
            for key, value in (("location", location), ("offset", data.tell()), ("length", weight.bytes)):
                tensor.external_data.add(key=key, value=str(value))
            message = tensor.SerializeToString(deterministic=True)
            initializers.append(opening(INITIALIZER, len(message)) + message)
            data.write(_made(weight))
        graph = self.graph + b"".join(initializers)
        yield self.rest + opening(GRAPH, len(graph)) + graph


def _tensor(weight: Weight) -> TensorProto:
    from onnx import TensorProto

    return TensorProto(name=weight.name, data_type=weight.dtype, dims=weight.shape)


def _head(weight: Weight) -> bytes:
    """An initializer of a graph up to its raw data, which end it."""
    message = _tensor(weight).SerializeToString(deterministic=True) + opening(RAW_DATA, weight.bytes)
    return opening(INITIALIZER, len(message) + weight.bytes) + message


def _made(weight: Weight) -> memoryview:
    made = np.ascontiguousarray(weight.make())
    assert made.nbytes == weight.bytes
    return made.reshape(-1).view(np.uint8).data

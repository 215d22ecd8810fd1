"""The extension loaded again and again under its own name: each copy's types and exceptions go with it."""

import gc
import importlib.util
import weakref

import growth

from bitnet import _core


def load() -> list["weakref.ref[type]"]:
    spec = importlib.util.spec_from_file_location("bitnet._core", _core.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Tensor is not _core.Tensor
    assert (module.Tensor([1.0]) * 2.0).item() == 2.0
    with module.Tape() as tape:
        module.Tensor([1.0]).sum()
    assert len(tape) == 1
    return [weakref.ref(module.Tensor), weakref.ref(module.Tape), weakref.ref(module.ShapeError)]


def step() -> None:
    types = load()
    gc.collect()
    assert [reference() for reference in types] == [None] * 3


growth.assert_none(step)

"""The stub of the extension against the extension: the same names, the same parameters, and clean under mypy.

C functions carry no signature, but their argument parsers say what they want when they are called wrongly: how many
arguments they take, which required one is missing, and which keyword they do not know.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitnet import _core

STUB = Path(_core.__file__).with_name("_core.pyi")
ROOT = STUB.parents[1]
Function = ast.FunctionDef


def definitions(body: list[ast.stmt]) -> dict[str, list[Function]]:
    """Functions by name, overloads together; branches on sys.version_info as this Python takes them."""
    found: dict[str, list[Function]] = {}
    for node in body:
        if isinstance(node, ast.If):
            taken = node.body if eval(ast.unparse(node.test), {"sys": sys}) else node.orelse
            for name, parts in definitions(taken).items():
                found.setdefault(name, []).extend(parts)
        elif isinstance(node, Function):
            found.setdefault(node.name, []).append(node)
    return found


TREE = ast.parse(STUB.read_text(encoding="utf-8"))
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
FUNCTIONS = definitions(TREE.body)
CALLED = ("__new__", "__dlpack__", "__dlpack_device__")  # of the special methods, those with parameters of their own
METHODS = [
    (owner, name, parts[0])
    for owner, node in CLASSES.items()
    for name, parts in definitions(node.body).items()
    if not parts[0].decorator_list and (not name.startswith("__") or name in CALLED)
]


def refusal(call: Callable[[], Any]) -> str:
    """What a call says that cannot succeed, or nothing."""
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def most_arguments(call: Callable[..., Any]) -> int:
    """The number of arguments, positional and keyword, that a call accepts."""
    said = refusal(lambda: call(*[None] * 60))
    count = re.search(r"takes (?:at most |exactly )?(no|one|\d+) arguments?", said)
    assert count, said
    words = {"no": 0, "one": 1}
    return words[count[1]] if count[1] in words else int(count[1])


def required_by_name(call: Callable[..., Any]) -> list[str]:
    """The required keyword arguments in order: each call says which is the first that is missing."""
    given: dict[str, Any] = {}
    while missing := re.search(r"missing required argument '(\w+)'", refusal(lambda: call(**given))):
        given[missing[1]] = 0
    return list(given)


def compare(function: Function, call: Callable[..., Any], bound: int) -> None:
    """bound: how many leading parameters the call has already (self or cls)."""
    a = function.args
    assert a.vararg is None, "variadic functions are not compared"
    positional, by_name = [p.arg for p in a.posonlyargs][bound:], [p.arg for p in a.args]
    if not a.posonlyargs:
        by_name = by_name[bound:]
    keyword_only = [p.arg for p in a.kwonlyargs]
    optional = len(a.defaults)
    assert most_arguments(call) == len(positional) + len(by_name) + len(keyword_only)
    if positional:
        assert "no keyword arguments" in refusal(lambda: call(**{positional[0]: None}))
        return
    required = by_name[: len(by_name) - optional]
    required += [name for name, default in zip(keyword_only, a.kw_defaults, strict=True) if default is None]
    assert required_by_name(call) == required
    for name in by_name + keyword_only:
        said = refusal(lambda name=name: call(**(dict.fromkeys(required, 0) | {name: 0})))
        assert not re.search("invalid keyword|unexpected keyword", said), said


def public(names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def test_the_same_names_in_the_module() -> None:
    assert FUNCTIONS.keys() | CLASSES.keys() == public(dir(_core))


@pytest.mark.parametrize("owner", ["Tensor", "Tape"])
def test_the_same_attributes_in_each_type(owner: str) -> None:
    own = set(dir(getattr(_core, owner))) - set(dir(object)) - {"__module__"}
    stub = set(definitions(CLASSES[owner].body)) - {"__new__"}
    stub |= {ast.unparse(node.target) for node in CLASSES[owner].body if isinstance(node, ast.AnnAssign)}
    assert own == stub


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_parameters_of_functions(name: str) -> None:
    compare(FUNCTIONS[name][0], getattr(_core, name), 0)
    assert getattr(_core, name).__doc__


@pytest.mark.parametrize(("owner", "name", "function"), METHODS, ids=[f"{m[0]}.{m[1]}" for m in METHODS])
def test_the_same_parameters_of_methods(owner: str, name: str, function: Function) -> None:
    made = _core.Tensor(1.0) if owner == "Tensor" else _core.Tape()
    compare(function, getattr(_core, owner) if name == "__new__" else getattr(made, name), 1)


def test_reshape_takes_sizes_or_a_shape() -> None:
    x = _core.Tensor([1.0, 2.0])
    assert x.reshape(2, 1).shape == x.reshape((2, 1)).shape == x.reshape([2, 1]).shape == (2, 1)


@pytest.mark.parametrize("owner", ["Tensor", "Tape"])
def test_attributes_that_the_stub_lets_be_set_can_be_set_and_no_others(owner: str) -> None:
    made: Any = _core.Tensor(1.0) if owner == "Tensor" else _core.Tape()
    for name, parts in definitions(CLASSES[owner].body).items():
        decorators = [ast.unparse(d) for part in parts for d in part.decorator_list]
        if "property" in decorators:
            said = refusal(lambda name=name: setattr(made, name, None))
            assert ("not writable" in said) == (f"{name}.setter" not in decorators), f"{name}: {said}"


def mypy(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed: pip install '.[lint]'")
def test_mypy_accepts_the_stub_and_finds_it_true(tmp_path: Path) -> None:
    # "Tensor is a disjoint base at runtime": a word that many type checkers do not know yet.
    (tmp_path / "allow").write_text("bitnet\\._core\\.Tensor\n")
    options = ["--allowlist", "allow", "--ignore-unused-allowlist", "--concise"]
    run = mypy("mypy.stubtest", "bitnet._core", *options, where=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    options = ["--strict", "--follow-imports=silent", "--config-file=", "--cache-dir", str(tmp_path)]
    run = mypy("mypy", *options, str(STUB), where=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr

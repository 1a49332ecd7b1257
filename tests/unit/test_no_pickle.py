"""Nothing in the product can be made to run a peer's code by reading its bytes."""

import ast
from collections.abc import Iterator

import pytest

from conftest import REPOSITORY

SOURCES = [*REPOSITORY.glob("shared/src/**/*.py"), *REPOSITORY.glob("services/*/src/**/*.py")]
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module)):
                found = {module.partition(".")[0]}
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(str(name))]):
                found = {name.partition(".")[0]}
            case _:
                found = set()
        yield from found & UNPICKLERS
        if isinstance(node, ast.Call):
            yield from _calls(node)


def _calls(call: ast.Call) -> Iterator[str]:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    match call.func:
        case ast.Name(id=name) if name in RUNS_TEXT:
            yield name
        case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="load"):
            if given.get("allow_pickle", "False") != "False":
                yield "np.load with allow_pickle"
        case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
            if given.get("weights_only") != "True":
                yield "torch.load without weights_only"
        case ast.Attribute(attr="recv") if not call.args and not call.keywords:
            yield "recv() of a multiprocessing connection"
        case ast.Attribute(value=ast.Name(id="yaml"), attr="load" | "unsafe_load" | "full_load"):
            yield "yaml.load"


def test_no_module_unpickles_or_runs_text() -> None:
    assert len(SOURCES) > 40
    found = {
        str(path.relative_to(REPOSITORY)): list(faults(ast.parse(path.read_text())))
        for path in SOURCES
    }
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p, os",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "importlib.import_module('dill')",
        "np.load(f, allow_pickle=True)",
        "numpy.load(f, allow_pickle=flag)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "connection.recv()",
        "yaml.load(f)",
        "exec(text)",
    ],
)
def test_the_walk_finds(line: str) -> None:
    assert list(faults(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "np.load(f)",
        "torch.load(f, weights_only=True)",
        "sock.recv(4096)",
        "model.eval()",
        "import re",
    ],
)
def test_the_walk_lets_pass(line: str) -> None:
    assert not list(faults(ast.parse(line)))

"""Pruning methods as Lightning callbacks: one file each, found by name.

A method is any file here that defines a public subclass of `PruningCallback`; its file name is its `--method`. Classes
are imported on first use, so listing the methods imports neither torch nor Lightning.
"""

import ast
import importlib
import tokenize
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from prunelit.errors import BadOption, nearest

_NOT_METHODS = ("__init__", "base", "job", "method", "recorder", "dashboard")


class Method(NamedTuple):
    """A method as its file declares it."""

    name: str
    class_name: str
    card: str  # the file's docstring

    @property
    def summary(self) -> str:
        return self.card.split("\n", 1)[0]


@cache
def _files() -> tuple[dict[str, Method], dict[str, str]]:
    """The methods by name, and what is wrong with the files that are no Python."""
    found, wrong = {}, {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in _NOT_METHODS:
            continue
        try:
            with tokenize.open(path) as file:  # in the encoding that it declares, as Python reads it
                tree = ast.parse(file.read(), filename=str(path))
        except (SyntaxError, ValueError) as error:  # one that is being written stops none of the others
            line, said = getattr(error, "lineno", None), getattr(error, "msg", str(error))
            at = f", line {line}" if line else ""
            wrong[path.stem] = f"prunelit/callbacks/{path.name}{at}: expected Python, got: {said}"
            continue
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        if classes:
            found[path.stem] = Method(path.stem, classes[-1], ast.get_docstring(tree) or "")
    return found, wrong


def methods() -> dict[str, Method]:
    """All methods by name, read from the files' syntax trees (nothing is imported)."""
    return _files()[0]


def broken() -> dict[str, str]:
    """Files among the methods that are no Python: name -> what is wrong and where, in one line."""
    return _files()[1]


def method_class(name: str) -> Any:
    """The class of a method, by its name ("llm_bip") or by the import path of a class of your own ("my.module.Mine").

    Raises:
        BadOption: no such method, which names the nearest; or its file is no Python.
    """
    if name in broken():
        raise BadOption(f"method {name!r}: {broken()[name]}; mend it")
    if name in methods():
        return getattr(importlib.import_module(f"{__name__}.{name}"), methods()[name].class_name)
    module, _, class_name = name.rpartition(".")
    if module:
        try:
            return getattr(importlib.import_module(module), class_name)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise BadOption(f"method {name!r}: can not be imported: {error}") from error
    raise BadOption(f"method {name!r}: expected one of {', '.join(methods())}{nearest(name, methods())}")


def __getattr__(name: str) -> Any:
    for method in methods().values():
        if method.class_name == name:
            return method_class(method.name)
    if name == "PruningCallback":
        return importlib.import_module(f"{__name__}.base").PruningCallback
    if name == "Dashboard":
        return importlib.import_module(f"{__name__}.dashboard").Dashboard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The pruning methods, found by their names in `prunelit/callbacks` without importing one.

A method is a file there that defines a public subclass of `PruningCallback`, or a folder whose `callback.py` does. The
name of the file or folder is its `--method`. Classes are imported on first use, so listing the methods imports neither
torch nor Lightning.
"""

import ast
import importlib
import tokenize
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from prunelit.runtime.errors import BadOption, suggest_name

PACKAGE = "prunelit.callbacks"
FOLDER = Path(__file__).parents[1] / "callbacks"
"""Where the methods are."""


class Method(NamedTuple):
    """A method as its file declares it.

    Example: see `methods`.
    """

    name: str
    class_name: str
    card: str  # the docstring of the file
    path: Path  # the file that defines the class

    @property
    def summary(self) -> str:
        return self.card.split("\n", 1)[0]

    @property
    def module(self) -> str:
        """Dotted name of the module that defines the class."""
        return f"{PACKAGE}.{self.name}" + ".callback" * (self.path.name == "callback.py")


@cache
def _read_files() -> tuple[dict[str, Method], dict[str, str]]:
    """Read the methods by name, and what is wrong with files that Python cannot parse."""
    method_by_name, fault_by_name = {}, {}
    files = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    files |= {path.parent.name: path for path in FOLDER.glob("*/callback.py")}
    for name, path in sorted(files.items()):
        try:
            with tokenize.open(path) as file:  # in the encoding that it declares, as Python reads it
                tree = ast.parse(file.read(), filename=str(path))
        except (SyntaxError, ValueError) as error:  # one that is being written stops none of the others
            line, reason = getattr(error, "lineno", None), getattr(error, "msg", str(error))
            at = f", line {line}" if line else ""
            fault_by_name[name] = f"prunelit/callbacks/{path.relative_to(FOLDER)}{at}: expected Python, got: {reason}"
            continue
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        if classes:
            method_by_name[name] = Method(name, classes[-1], ast.get_docstring(tree) or "", path)
    return method_by_name, fault_by_name


def methods() -> dict[str, Method]:
    """All methods by name, read from the syntax trees of their files; nothing is imported.

    Example:
        >>> methods()["llm_bip"].class_name
        'LLMBIP'
    """
    return _read_files()[0]


def list_broken_files() -> dict[str, str]:
    """Files among the methods that Python cannot parse: name -> the fault and its place, in one line.

    Example:
        >>> list_broken_files()
        {}
    """
    return _read_files()[1]


def method_class(name: str) -> Any:
    """Import the class of a method, by its name ("llm_bip") or by the import path of your own class ("my.module.Mine").

    Raises:
        BadOption: no such method (the message suggests the nearest name), or Python cannot parse its file.

    Example:
        >>> method_class("flap").__name__
        'FLAP'
    """
    if name in list_broken_files():
        raise BadOption(f"method {name!r}: {list_broken_files()[name]}; mend it")
    if name in methods():
        return getattr(importlib.import_module(f"{PACKAGE}.{name}"), methods()[name].class_name)
    module, _, class_name = name.rpartition(".")
    if module and not module.startswith("."):  # no path of a file
        try:
            return getattr(importlib.import_module(module), class_name)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise BadOption(f"method {name!r}: cannot be imported: {error}") from error
    raise BadOption(f"method {name!r}: expected one of {', '.join(methods())}{suggest_name(name, methods())}")


def get_method_name(kind: type) -> str:
    """The name of a method: that of the file which defines its class, or of the folder around `callback.py`.

    Example:
        >>> get_method_name(method_class("saap")), get_method_name(method_class("flap"))
        ('saap', 'flap')
    """
    folder, _, file = kind.__module__.rpartition(".")
    return folder.rpartition(".")[2] if file == "callback" and folder else file

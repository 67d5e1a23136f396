"""How the code speaks: names of functions and variables, and docstrings with examples, read from the syntax trees."""

import ast
import collections
from collections.abc import Iterator
from pathlib import Path

import pytest

import prunelit

ROOT = Path(prunelit.__file__).parent
SOURCES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))
}
# Names that say nothing about what they hold.
EMPTY_NAMES = {"found", "said", "wanted", "both", "seen", "mine", "theirs"}
# One-word functions: verbs of the package, and interfaces that other code calls by this name.
VERBS = {"plan", "apply", "save", "load", "observe", "perplexity", "register", "methods", "main", "run", "restore"}
VERBS |= {"prune", "recover", "evaluate"}
COPIED = "model/per_layer.py"  # its source is in saved folders, so it stays as it is


def list_public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("file", [file for file in SOURCES if file != COPIED])
def test_variables_say_what_they_hold(file: str) -> None:
    names = {node.id: node.lineno for node in ast.walk(SOURCES[file]) if isinstance(node, ast.Name)}
    names |= {node.arg: node.lineno for node in ast.walk(SOURCES[file]) if isinstance(node, ast.arg)}
    assert {name: line for name, line in names.items() if name in EMPTY_NAMES} == {}


@pytest.mark.parametrize("file", [file for file in SOURCES if file != COPIED])
def test_public_functions_are_verbs_with_an_object(file: str) -> None:
    functions = [node.name for node in list_public(SOURCES[file]) if isinstance(node, ast.FunctionDef)]
    assert [name for name in functions if "_" not in name and name not in VERBS] == []


def test_no_public_function_shares_its_name() -> None:
    homes = collections.defaultdict(list)
    for file, tree in SOURCES.items():
        for node in list_public(tree):
            if isinstance(node, ast.FunctionDef):
                homes[node.name].append(file)
    shared = {name: files for name, files in homes.items() if len(files) > 1}
    assert all(file.startswith("cli/") for file in shared.pop("run"))  # the interface of commands
    assert shared == {}


@pytest.mark.parametrize("file", [file for file in SOURCES if file != COPIED])
def test_public_definitions_have_an_example_or_a_link_to_one(file: str) -> None:
    without = [node.name for node in list_public(SOURCES[file]) if "xample" not in (ast.get_docstring(node) or "")]
    assert without == []

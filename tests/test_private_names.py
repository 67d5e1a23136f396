"""Names that other packages do not promise: every one that prunelit uses is on the page about versions, and exists."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prunelit

ROOT = Path(prunelit.__file__).parent
PAGE = ROOT.parent / "docs" / "reference" / "versions.md"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
# Without underscore, and yet without a page in the documentation: parts of transformers that load and save weights.
INTERNAL_MODULES = ("transformers.conversion_mapping", "transformers.core_model_loading")
# Of Python itself and of notebooks, documented in spite of their names.
STANDARD = {"_asdict", "_fields", "_replace", "_getframe", "_repr_png_", "_repr_html_"}
# Set on objects while they are made, by these modules.
ATTRIBUTES_OF_LIVE_OBJECTS = {
    "model._weight_conversions": "transformers.core_model_loading",
    "compiled._orig_mod": "torch._dynamo.eval_frame",
    "action._typehint": "jsonargparse._typehints",
    "host._models": "accelerate.accelerator",
}
ROW = re.compile(r"^\| `([\w.()\[\]]+)` \| ([^|]+) \|", re.MULTILINE)


def list_defined(tree: ast.AST) -> Iterator[str]:
    """What a module defines: functions, classes, variables, attributes of its own objects."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                yield node.attr


def list_private(tree: ast.AST) -> Iterator[str]:
    """Attributes with an underscore, read by name or through getattr, and what comes from internal modules."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if re.match(r"_[^_]", name):
                yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                if re.match(r"_[^_]", name):
                    yield name
            case ast.ImportFrom(module=str(module), names=names):
                of_internal = module in INTERNAL_MODULES
                yield from (item.name for item in names if of_internal or re.match(r"_[^_]", item.name))


def find_private_names() -> dict[str, set[str]]:
    own = {name for tree in TREES.values() for name in list_defined(tree)} | STANDARD
    found: dict[str, set[str]] = {}
    for path, tree in TREES.items():
        for name in set(list_private(tree)) - own:
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def read_page() -> dict[str, tuple[str, set[str]]]:
    """{last part of a name: (the whole of it, files of prunelit)}, of the table on the page."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    return {
        path.rpartition(".")[2].removesuffix("()"): (path, set(re.findall(r"`([\w/]+\.py)`", files)))
        for path, files in rows
    }


def test_the_page_names_every_private_name_and_where_it_is_used() -> None:
    page = {name: files for name, (_, files) in read_page().items()}
    assert page.pop("_run") == {"pruning/job.py"}  # not called: its local variables are read from the stack
    assert page.pop("_trainer") >= {"pruning/job.py"}  # a name that a class here has too
    assert page == find_private_names()


def resolve(path: str) -> Any:
    """The object at a dotted path; "()" after a class stands for an object of it."""
    words = path.split(".")
    for length in range(len(words) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            thing = getattr(thing, word.removesuffix("()"))
            thing = thing() if word.endswith("()") else thing
        return thing
    raise LookupError(path)


@pytest.mark.parametrize("path", [path for path, _ in read_page().values()])
def test_the_installed_packages_have_it(path: str) -> None:
    if path.startswith("wandb"):
        pytest.importorskip("wandb_workspaces")
    if path in ATTRIBUTES_OF_LIVE_OBJECTS:
        source = inspect.getsource(importlib.import_module(ATTRIBUTES_OF_LIVE_OBJECTS[path]))
        assert path.partition(".")[2] in source
    else:
        resolve(path)


def test_a_run_of_the_trainer_holds_the_path_of_its_checkpoint() -> None:
    from lightning.pytorch import Trainer

    code = Trainer._run.__code__
    assert {"ckpt_path", "weights_only"} <= set(code.co_varnames[: code.co_argcount])

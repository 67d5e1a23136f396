"""An import only goes down: the floors of prunelit, read from the syntax trees, imports inside functions included."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import prunelit

ROOT = Path(prunelit.__file__).parent
FLOORS = (
    (
        "errors",
        "files",
        "record",
        "architectures",
        "shapes",
        "plan",
        "plan_json",
        "plan_diff",
        "stock_shapes",
        "serving",
        "progress",
        "versions",
        "numbers",
        "positions",
        "scrub",
    ),
    ("rank", "ladders", "hetero", "decoder", "on_disk", "machine"),
    (
        *(
            "calibrate",
            "surgery",
            "measure",
            "models",
            "model_source",
            "quiet",
            "text",
            "stream",
            "clock",
            "latency",
            "kept",
            "whole",
            "skeleton",
            "pictures",
            "samples",
            "page",
        ),
        *("streamed", "layerwise"),  # models that do not fit
        *(
            "lora",
            "quantize",
            "int4",
            "linears",
            "losses",
            "instructions",
            "int4_folder",
            "twin",
            "adapters",
        ),  # what recovery is made of
        *(
            "slices",
            "gradients",
            "taylor_importance",
            "moments",
            "sensitivity",
            "similarity",
            "own_text",
        ),  # what scores are made of
        *(
            "bias",
            "least_squares",
            "lockstep",
            "reconstruct",
            "two_step",
            "distill",
            "spectral",
            "stability",
            "search",
            "blocks",
            "evaluator",
            "journal",
        ),  # what works on a plan
    ),
    ("strategies", "loggers"),
    ("recovery", "data", "export", "callbacks"),
    ("cli", "commands", "console", "compare", "cells", "trial", "evaluation", "report", "checkpoint", "__main__"),
)
SIBLINGS_APART = 4  # on this floor packages and modules do not import each other
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
# Third parties of the modules that are to run without the others.
ONLY = {
    "errors": set(),
    "files": set(),
    "record": set(),
    "machine": {"torch"},
    "architectures": set(),
    "shapes": set(),
    "plan": set(),
    "plan_json": set(),
    "plan_diff": set(),
    "stock_shapes": set(),
    "serving": set(),
    "report.plan_card": set(),
    "report.method_card": set(),
    "progress": {"tqdm"},
    "versions": set(),
    "numbers": set(),
    "positions": set(),
    "scrub": set(),
    "hetero": {"torch", "transformers"},
}
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"  # lazy: it names modules of all floors and imports none
}


def floor_of(module: str) -> int:
    part = module.split(".")[0]
    for number, parts in enumerate(FLOORS):
        if part in parts:
            return number
    raise AssertionError(f"prunelit.{module} has no floor: add it to FLOORS in tests/test_floors.py")


def imported(source: str, modules: set[str]) -> Iterator[str]:
    """Dotted names that a file imports anywhere; `from package import module` counts as `package.module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import: write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("prunelit.") in modules or node.module == "prunelit" else node.module
        elif isinstance(node, ast.Call) and isinstance(first := next(iter(node.args), None), ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(first.value)


def wrong(module: str, name: str, modules: set[str]) -> str | None:
    """Why `module` may not import `name`; None where it may."""
    top = name.split(".")[0]
    if top != "prunelit":
        if top in LIGHTNING and floor_of(module) < 3:
            return "Lightning below floor 3"
        allowed = ONLY.get(module)
        return None if allowed is None or top in allowed or top in sys.stdlib_module_names else "third party"
    target = name.removeprefix("prunelit.")
    if target == "__version__":
        return None
    if target not in modules:
        return "not a module: import a name from the module that defines it"
    if module == "hetero":
        return "hetero.py is copied into folders, where there is no prunelit"
    here, there = floor_of(module), floor_of(target)
    if there > here:
        return "up"
    if here == there == SIBLINGS_APART and module.split(".")[0] != target.split(".")[0]:
        return "between siblings"
    return None


def test_the_documented_floors_are_these() -> None:
    page = (ROOT.parent / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.+?) \|", page, re.MULTILINE)
    found = {int(number): re.findall(r"`(\w+)(?:/\*)?`", modules) for number, modules in rows}
    assert {number: set(modules) for number, modules in found.items()} == {n: set(m) for n, m in enumerate(FLOORS)}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module: str) -> None:
    names = imported(SOURCES[module].read_text(encoding="utf-8"), set(SOURCES))
    found = {name: wrong(module, name, set(SOURCES)) for name in names}
    assert {name: reason for name, reason in found.items() if reason} == {}


def test_imports_have_no_circles() -> None:
    graph = {
        module: {
            name.removeprefix("prunelit.")
            for name in imported(path.read_text(encoding="utf-8"), set(SOURCES))
            if name.removeprefix("prunelit.") in SOURCES and name.startswith("prunelit.")
        }
        - {module}
        for module, path in SOURCES.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(SOURCES)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("plan", "import torch", "third party"),
        ("plan", "def f():\n    from transformers import AutoConfig", "third party"),
        ("plan", "import json, os.path", None),
        ("plan", "from prunelit import decoder", "up"),
        ("plan", "from prunelit.runtime.errors import BadPlan", None),
        ("hetero", "from prunelit.runtime.errors import BadPlan", "copied"),
        ("hetero", "import safetensors", "third party"),
        ("rank", "import prunelit.data.loading", "up"),
        ("decoder", "from lightning.pytorch import Trainer", "Lightning"),
        ("models", "import lightning", "Lightning"),
        ("models", "from prunelit import text", None),
        ("models", "from prunelit import load", "not a module"),
        ("measure", "import importlib\nimportlib.import_module('prunelit.recovery.datamodule')", "up"),
        ("callbacks.magnitude", "from prunelit.pruning.callback import PruningCallback", None),
        ("callbacks.magnitude", "from prunelit import data", "between siblings"),
        ("callbacks.base", "if True:\n    import prunelit.export.write", "between siblings"),
        ("recovery", "from prunelit.callbacks import base", "between siblings"),
        ("recovery", "from prunelit import cli", "up"),
        ("export.write", "from prunelit.export import uniform", None),
        ("cli", "from prunelit.callbacks import method_class", None),
    ],
)
def test_reader_sees_what_is_wrong(module: str, source: str, reason: str | None) -> None:
    reasons = {wrong(module, name, set(SOURCES)) for name in imported(source, set(SOURCES))} - {None}
    assert (reason is not None) == bool(reasons)
    assert all(reason in found for found in reasons)


def test_every_module_has_a_floor_and_a_new_one_needs_it() -> None:
    assert {floor_of(module) for module in SOURCES} == set(range(len(FLOORS)))
    with pytest.raises(AssertionError, match="no floor"):
        floor_of("brand_new")


@pytest.mark.parametrize(
    "statement",
    [
        "import prunelit; prunelit.__version__; dir(prunelit)",
        "import prunelit.core.plan, prunelit.planning.serving, prunelit.core.architectures, prunelit.runtime.errors, prunelit.runtime.progress",
        "import prunelit; prunelit.PruningPlan; prunelit.Architecture",
    ],
)
def test_import_loads_no_torch(statement: str) -> None:
    code = f"import sys; {statement}; print({{'torch', 'transformers', 'lightning'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr

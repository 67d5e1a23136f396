"""Which package may import which: the arrows between rooms, read from the syntax trees, local imports included."""

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
ALLOWED = {
    "runtime": set(),
    "core": {"runtime"},
    "model": {"runtime", "core"},
    "planning": {"runtime", "core", "model"},
    "quantization": {"runtime", "core", "model"},
    "strategies": {"model"},
    "report": {"runtime", "core", "planning"},
    "calibration": {"runtime", "core", "model", "quantization"},
    "data": {"runtime", "core", "model", "quantization", "calibration"},
    "repair": {"runtime", "core", "model", "calibration"},
    "export": {"runtime", "core", "model", "planning", "quantization", "calibration", "data"},
    "pruning": {"runtime", "core", "model", "planning", "calibration", "data", "repair", "export"},
    "recovery": {"runtime", "core", "model", "quantization", "strategies", "calibration", "data", "export"},
    "callbacks": {"runtime", "core", "model", "planning", "calibration", "repair", "pruning"},
    "evaluation": {"runtime", "core", "model", "report", "calibration", "data", "export", "recovery"},
    "monitoring": {
        "runtime",
        "core",
        "model",
        "strategies",
        "report",
        "calibration",
        "export",
        "pruning",
        "recovery",
        "evaluation",
    },
    "compare": {"runtime", "model", "planning", "report", "calibration", "data", "pruning"},
    "cli": {
        "runtime",
        "core",
        "model",
        "planning",
        "report",
        "calibration",
        "data",
        "export",
        "pruning",
        "recovery",
        "evaluation",
        "monitoring",
        "compare",
    },
}
"""From the ground up: a package imports only what stands before it."""
MOST_ROOMS, MOST_ARROWS = 20, 100
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
WITH_LIGHTNING = {"strategies", "pruning", "callbacks", "recovery", "monitoring", "compare", "cli"}
# Third parties of the modules that run without the others.
ONLY: dict[str, set[str]] = {
    "runtime.errors": set(),
    "runtime.events": set(),
    "runtime.atomic_files": set(),
    "runtime.text_files": set(),
    "runtime.versions": set(),
    "runtime.parser_messages": set(),
    "runtime.progress": {"tqdm"},
    "core.architectures": set(),
    "core.unsupported": set(),
    "core.shapes": set(),
    "core.plan": set(),
    "core.plan_json": set(),
    "core.plan_diff": set(),
    "planning.stock_shapes": set(),
    "planning.serving": set(),
    "model.context_length": set(),
    "model.per_layer": {"torch", "transformers"},
    "pruning.registry": set(),
    "report.plan_card": set(),
    "report.format_numbers": set(),
    "report.family_table": set(),
    "cli.method_cards": set(),
    "monitoring.scrub": set(),
}
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"  # lazy: it names modules of all packages and imports none
}


def list_imports(source: str, modules: set[str]) -> Iterator[str]:
    """Dotted names that a file imports anywhere; `from package import module` counts as `package.module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import: write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("prunelit.") in modules or node.module == "prunelit" else node.module
        elif isinstance(node, ast.Call) and isinstance(argument := next(iter(node.args), None), ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(argument.value)


def find_fault(module: str, name: str, modules: set[str]) -> str | None:
    """Why `module` may not import `name`; None where it may."""
    package, top = module.split(".")[0], name.split(".")[0]
    if top != "prunelit":
        if top in LIGHTNING and package not in WITH_LIGHTNING | {"__main__"}:
            return "Lightning"
        third_parties = ONLY.get(module)
        return None if third_parties is None or top in third_parties | sys.stdlib_module_names else "third party"
    target = name.removeprefix("prunelit.")
    if target == "__version__":
        return None
    if target not in modules:
        return "not a module: import a name from the module that defines it"
    if module == "model.per_layer":
        return "per_layer.py is copied into folders, where there is no prunelit"
    other = target.split(".")[0]
    if other == package or package == "__main__":
        return None
    return None if other in ALLOWED[package] else f"no arrow from {package} to {other}"


def list_arrows() -> set[tuple[str, str]]:
    """(importing package, imported package), without the command line's front."""
    arrows = set()
    for module, path in SOURCES.items():
        for name in list_imports(path.read_text(encoding="utf-8"), set(SOURCES)):
            if name.startswith("prunelit.") and (target := name.removeprefix("prunelit.")) in SOURCES:
                arrows.add((module.split(".")[0], target.split(".")[0]))
    return {(a, b) for a, b in arrows if a != b and a != "__main__"}


def test_the_documented_arrows_are_these() -> None:
    page = (ROOT.parent / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("| package | may import |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE)
    documented = {package: re.findall(r"`(\w+)`", targets) for package, targets in rows}
    assert {package: set(targets) for package, targets in documented.items()} == {p: set(t) for p, t in ALLOWED.items()}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_arrows(module: str) -> None:
    names = list_imports(SOURCES[module].read_text(encoding="utf-8"), set(SOURCES))
    faults = {name: find_fault(module, name, set(SOURCES)) for name in names}
    assert {name: reason for name, reason in faults.items() if reason} == {}


def test_every_arrow_is_used_and_none_points_up() -> None:
    packages = list(ALLOWED)
    assert {(package, target) for package, targets in ALLOWED.items() for target in targets} == list_arrows()
    for place, package in enumerate(packages):
        assert ALLOWED[package] <= set(packages[:place]), package
    assert len(packages) + 2 <= MOST_ROOMS  # with the front and the benchmarks
    assert len(list_arrows()) <= MOST_ARROWS


def test_packages_are_documented_and_small() -> None:
    folders = {path.parent for path in SOURCES.values()} - {ROOT}
    assert {folder.relative_to(ROOT).parts[0] for folder in folders} == set(ALLOWED)
    for folder in folders:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert docstring and len(docstring.splitlines()[0]) <= 120, folder
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 14, folder
    assert {path.name for path in ROOT.iterdir() if path.is_file()} == {"__init__.py", "__main__.py", "py.typed"}


def test_tests_mirror_the_packages() -> None:
    tests = Path(__file__).parent
    folders = {p.parent.relative_to(tests).parts[0] for p in tests.rglob("test_*.py") if p.parent != tests}
    assert folders <= {*ALLOWED, "compatibility"}


def test_imports_have_no_circles() -> None:
    graph = {
        module: {
            name.removeprefix("prunelit.")
            for name in list_imports(path.read_text(encoding="utf-8"), set(SOURCES))
            if name.removeprefix("prunelit.") in SOURCES and name.startswith("prunelit.")
        }
        - {module}
        for module, path in SOURCES.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(SOURCES)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("core.plan", "import torch", "third party"),
        ("core.plan", "def f():\n    from transformers import AutoConfig", "third party"),
        ("core.plan", "import json, os.path", None),
        ("core.plan", "from prunelit.model import decoder", "no arrow from core to model"),
        ("core.plan", "from prunelit.runtime.errors import BadPlan", None),
        ("model.per_layer", "from prunelit.runtime.errors import BadPlan", "copied"),
        ("model.per_layer", "import safetensors", "third party"),
        ("planning.budget", "import prunelit.data.loading", "no arrow from planning to data"),
        ("model.decoder", "from lightning.pytorch import Trainer", "Lightning"),
        ("data.loading", "import lightning", "Lightning"),
        ("data.loading", "from prunelit.data import text", None),
        ("data.loading", "from prunelit import load", "not a module"),
        ("calibration.metrics", "import importlib\nimportlib.import_module('prunelit.data.text')", "no arrow"),
        ("callbacks.magnitude", "from prunelit.pruning.callback import PruningCallback", None),
        ("callbacks.magnitude", "from prunelit.recovery import datamodule", "no arrow from callbacks to recovery"),
        ("pruning.callback", "if True:\n    import prunelit.monitoring.scrub", "no arrow from pruning to monitoring"),
        ("recovery.module", "from prunelit.callbacks import flap", "no arrow from recovery to callbacks"),
        ("recovery.module", "from prunelit.cli import fit", "no arrow from recovery to cli"),
        ("export.write", "from prunelit.export import uniform", None),
        ("cli.fit", "from prunelit.pruning.registry import method_class", None),
    ],
)
def test_reader_sees_what_is_wrong(module: str, source: str, reason: str | None) -> None:
    reasons = {find_fault(module, name, set(SOURCES)) for name in list_imports(source, set(SOURCES))} - {None}
    assert (reason is not None) == bool(reasons)
    assert all(reason in fault for fault in reasons if fault and reason)


def test_a_new_package_needs_an_entry() -> None:
    with pytest.raises(KeyError, match="brand_new"):
        find_fault("brand_new.module", "prunelit.core.plan", set(SOURCES))


@pytest.mark.parametrize(
    "statement",
    [
        "import prunelit; prunelit.__version__; dir(prunelit)",
        "import prunelit.core.plan, prunelit.planning.serving, prunelit.core.architectures, prunelit.runtime.progress",
        "import prunelit.pruning.registry, prunelit.cli.method_cards, prunelit.report.plan_card",
        "import prunelit; prunelit.PruningPlan; prunelit.Architecture",
        "import prunelit.__main__, prunelit.cli.main",
    ],
)
def test_import_loads_no_torch(statement: str) -> None:
    code = f"import sys; {statement}; print({{'torch', 'transformers', 'lightning'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr

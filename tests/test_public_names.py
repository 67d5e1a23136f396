"""What `prunelit` exports: names that exist, that tools see, and that include every method."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prunelit
from prunelit.callbacks import methods

ROOT = Path(prunelit.__file__).parent


@pytest.mark.parametrize("name", prunelit._HOME)
def test_every_name_is_what_its_module_has(name: str) -> None:
    assert getattr(prunelit, name).__name__ == name
    assert name in dir(prunelit)


def test_type_checkers_see_the_same_names_at_their_homes() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen.keys() == prunelit._HOME.keys()
    for name, module in seen.items():
        assert getattr(prunelit, name).__module__ == module, name


def test_every_method_is_exported() -> None:
    assert {method.class_name for method in methods().values()} <= prunelit._HOME.keys()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = prunelit.Nothing


@pytest.mark.slow
def test_mypy_knows_the_types_of_a_user(tmp_path: Path) -> None:
    code = (
        "import prunelit\nfrom prunelit import LLMBIP, PruningPlan\n"
        "plan: PruningPlan = LLMBIP(ratio=0.2).plan_model(prunelit.load('x'))\n"
        "reveal_type(plan.replace_layer(3, ffn_channels=[0, 1]))\nwrong: int = prunelit.plan(prunelit.load('x'))\n"
    )
    (tmp_path / "user.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
    done = subprocess.run(
        [*command, f"--cache-dir={tmp_path / 'cache'}", "user.py"],
        cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT.parent)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'Revealed type is "prunelit.core.plan.PruningPlan"' in done.stdout, done.stdout + done.stderr
    assert 'user.py:5: error: Incompatible types in assignment (expression has type "PruningPlan"' in done.stdout
    assert done.stdout.count("error:") == 1, done.stdout

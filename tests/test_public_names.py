"""What `prunelit` exports: names that exist, that tools see, and that include every method."""

import ast
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

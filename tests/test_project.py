"""The project's own files agree with each other: version, packages, pins."""

import re
import tomllib
from pathlib import Path

import yaml
from setuptools import find_packages

import prunelit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == prunelit.__version__
    assert cited["license"] == PROJECT["project"]["license"]


def test_every_folder_with_modules_is_a_package_that_is_built() -> None:
    wanted = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "prunelit").rglob("*")
        if path.suffix in (".py", ".pyi", ".jinja")
    }
    find = PROJECT["tool"]["setuptools"]["packages"]["find"]
    assert find.pop("namespaces") is False
    assert set(find_packages(str(ROOT), **find)) == wanted


def test_hooks_have_the_pins_of_the_constraints() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    found = dict(pin.split("==") for hook in hooks for pin in hook["additional_dependencies"])
    assert found == {name: PINS.get(name) for name in found}


def test_what_development_asks_for_is_pinned() -> None:
    project = PROJECT["project"]
    asked = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    names = {re.split(r"[\[<>=,]", requirement)[0] for requirement in asked} - {"prunelit"}
    pinned = {name.lower().replace("_", "-") for name in PINS}
    assert {name.lower().replace("_", "-") for name in names} <= pinned

"""The project's own files agree with each other: version, packages, pins."""

import re
import tomllib
from pathlib import Path

import yaml

import prunelit
from prunelit.cli.init.files import FOLDERS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == prunelit.__version__
    assert cited["license"] == PROJECT["project"]["license"]


def test_every_folder_with_modules_is_a_package() -> None:
    """A folder without __init__.py is built all the same, and found by nothing."""
    folders = {path.parent for path in (ROOT / "prunelit").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_takes_the_configs_to_where_they_are_looked_for() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["prunelit"]
    assert wheel["force-include"] == {folder: f"prunelit/shipped/{folder}" for folder in FOLDERS}
    assert all((ROOT / folder).is_dir() for folder in FOLDERS)


def test_the_quickstart_needs_no_extra() -> None:
    names = {re.split(r"[\[<>=,]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]}
    assert "gguf" in names


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

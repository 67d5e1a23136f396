"""Packages that are too old are named in one line, before anything is imported from them."""

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import prunelit
from prunelit.cli.main import main
from prunelit.runtime.errors import TooOld
from prunelit.runtime.versions import LOWEST_VERSIONS, check_lowest_versions

ROOT = Path(__file__).parents[2]
REQUIREMENT = re.compile(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)")


@pytest.fixture(autouse=True)
def _checked_anew() -> Iterator[None]:
    check_lowest_versions.cache_clear()
    yield
    check_lowest_versions.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Make packages have other versions than the installed ones."""
    true_version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or true_version(name))


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("transformers", "5.9.0"),
        ("transformers", "4.57.6"),
        ("torch", "2.8.0+cu128"),
        ("torch", "2.9.0"),
        ("lightning", "2.5.6"),
    ],
)
def test_an_older_package_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    install(monkeypatch, **{name: version})
    message = f"prunelit needs {name} >= {LOWEST_VERSIONS[name]}, found {version}: pip install -U {name}"
    with pytest.raises(TooOld, match=f"^{re.escape(message)}$"):
        check_lowest_versions()


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cpu", "2.10.0a0+git1", "2.13.0", "3.0.0rc1"])
def test_the_lowest_and_newer_ones_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, torch=version)
    check_lowest_versions()


def test_the_command_line_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, transformers="5.1.0")
    assert main(["prune", "--model", "m"]) == 2
    assert capsys.readouterr().err.startswith("prunelit: error: prunelit needs transformers >= ")


def test_names_of_python_say_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, transformers="5.1.0")
    with pytest.raises(TooOld, match="transformers >="):
        _ = prunelit.Decoder
    with pytest.raises(TooOld, match="transformers >="):
        from prunelit.callbacks import LLMBIP  # noqa: F401


def test_they_are_those_that_installers_read_and_that_were_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(REQUIREMENT.match(requirement).groups() for requirement in project["dependencies"])  # type: ignore[union-attr]
    assert {name: bounds[name] for name in LOWEST_VERSIONS} == LOWEST_VERSIONS
    tried = dict(
        re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8"), re.M)
    )
    for name, bound in bounds.items():
        pin = tried[name.lower().replace("_", "-")]
        assert f"{pin}.0.0".startswith(f"{bound}."), f"{name}: {bound} is asked for, {pin} was tried"

"""A file among the methods that is no Python: it is named, and stops none of the others."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunelit import callbacks
from prunelit.cli.method_cards import answer_methods_command
from prunelit.pruning import registry
from prunelit.pruning.registry import _read_files, list_broken_files, method_class, methods
from tests.cli.test_fit import call, refused

SAID = "prunelit/callbacks/mine.py, line 3: expected Python, got: invalid syntax"


@pytest.fixture(params=[b"x = 1\n\ndef f(:\n    pass\n"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The methods' folder with a file more."""
    shutil.copytree(registry.FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.py").write_bytes(request.param)
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    monkeypatch.setattr(callbacks, "__path__", [*callbacks.__path__, str(tmp_path)])  # the others as they are
    _read_files.cache_clear()
    yield tmp_path
    sys.modules.pop("prunelit.callbacks.mine", None)
    _read_files.cache_clear()


def test_the_others_work(folder: Path) -> None:
    assert list_broken_files() == {"mine": SAID}
    assert "mine" not in methods() and {"best", "flap", "wanda_sp"} < methods().keys()
    assert method_class("flap").__name__ == "FLAP"
    assert answer_methods_command(["flap"]).startswith("flap")


@pytest.mark.parametrize(
    ("folder", "wanted"),
    [
        (b"\x00", "mine.py: expected Python, got: source code string cannot contain null bytes"),
        (b"x = 1\n# \xff\n", "mine.py: expected Python, got: 'utf-8' codec can't decode byte 0xff"),
        (b"# coding: nowhere\n", "got: unknown encoding"),
    ],
    indirect=["folder"],
    ids=["null", "latin", "coding"],
)
def test_other_files_that_are_no_python(folder: Path, wanted: str) -> None:
    assert wanted in list_broken_files()["mine"] and "flap" in methods()


def test_methods_names_it(folder: Path) -> None:
    (line,) = [line for line in answer_methods_command([]).splitlines() if line.startswith("mine")]
    assert line.split(maxsplit=2) == ["mine", "broken", SAID]
    assert json.loads(answer_methods_command(["--json"]))[-1] == {"name": "mine", "error": SAID}


def test_it_is_refused_when_it_is_asked_for(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    refused(call(capsys, "methods", "mine"), "method 'mine'", SAID)
    refused(call(capsys, "prune", "--model", "m", "--method", "mine", "--ratio", "0.2", "--out", "o"), "'mine'", SAID)
    path = "prunelit.callbacks.mine.Mine"
    given = ["prune", "--model", "m", "--method", path, "--ratio", "0.2", "--out", "o"]
    refused(call(capsys, *given), path, "cannot be imported", "mine.py, line 3")


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("prunelit.callbacks.Mine", SAID), ("prunelit.callbacks.mine.Mine", "invalid syntax (mine.py, line 3)")],
)
def test_a_config_of_fit_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, source: str, path: str, wanted: str
) -> None:
    config = f"trainer: {{callbacks: [{{class_path: {path}, init_args: {{ratio: 0.2}}}}]}}"
    (folder / "fit.yaml").write_text(config)
    refused(call(capsys, "fit", "--model", source, "--config", str(folder / "fit.yaml")), path, wanted)

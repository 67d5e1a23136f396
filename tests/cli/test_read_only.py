"""Folders that the user may read and not write: one line before a model is loaded."""

import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunelit.callbacks import Magnitude
from prunelit.cli import compare, evaluate, export, fit, plan, prune  # noqa: F401  (imported before the forks)
from prunelit.cli.main import main
from prunelit.data import loading
from prunelit.export import save
from tests.data.test_sources import write_gguf
from tests.tiny import tiny, tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
_NOBODY = 65534
DATA = {"calibration_windows": 4, "validation_windows": 4, "train_windows": 4, "seqlen": 16}
FIT = {
    "model": {"model": "../model"},
    "data": {"train": "../words.txt", **DATA},
    "trainer": {"default_root_dir": "out", "accelerator": "cpu", "max_steps": 1, "logger": False},
}
COMPARE = {
    "model": "../model",
    "out": "out",
    "methods": ["magnitude"],
    "ratios": [0.2],
    "texts": {"words": {"text": "../words.txt", "seqlen": 16, "windows": 4}},
}
SOURCE = "--model ../model"
COMMANDS = {
    "prune": f"prune {SOURCE} --method magnitude --ratio 0.3 --align 8 --out out",
    "prune, streamed": f"prune {SOURCE} --method magnitude --ratio 0.3 --align 8 --out out --stream",
    "plan": f"plan {SOURCE} --method magnitude --ratio 0.3 --align 8 --out plan.json",
    "evaluate": f"evaluate {SOURCE} --text ../words.txt --seqlen 16 --windows 4 --json result.json",
    "export": "export --model ../pruned --format hetero --out out",
    "export of a file": f"export {SOURCE} --format gguf --out model.gguf",
    "compare": "compare --config ../compare.yaml",
    "fit": "fit --config ../fit.yaml",
}


@pytest.fixture(scope="module")
def read_only() -> Iterator[Path]:
    """A folder without a right to write, beside a model, a pruned one and a text that all may read."""
    place = Path(tempfile.mkdtemp(prefix="prunelit-read-only-"))  # everybody may enter the parents
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    save(model, place / "model", tokenizer)
    cut_plan = Magnitude(0.3, align=8, scope="global").prune(model)
    save(model, place / "pruned", tokenizer, cut_plan)
    (place / "words.txt").write_text(" ".join(f"w{n * 7 % 90}" for n in range(2000)))
    (place / "fit.yaml").write_text(yaml.safe_dump(FIT))
    (place / "compare.yaml").write_text(yaml.safe_dump(COMPARE))
    write_gguf(tiny("llama"), place / "model.gguf")
    (place / "here").mkdir()
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield place / "here"
    for folder in (place, *(path for path in place.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    shutil.rmtree(place)


def run_without_rights(arguments: str, folder: Path, output: Path) -> tuple[int, str]:
    """Run a command in a folder as a user who may write nowhere in it; returns its exit code and what it printed."""
    if not (child := os.fork()):
        code = 70
        try:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.chdir(folder)
            if os.geteuid() == 0:  # root may write everywhere
                os.setgid(_NOBODY)
                os.setuid(_NOBODY)
            try:
                sys.argv = ["prunelit", *arguments.split()]
                code = main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        except BaseException:  # noqa: BLE001  (the child must not go on as the test)
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_folder_that_may_not_be_written_is_one_line_before_the_model_is_loaded(
    command: str, read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        os._exit(99)

    monkeypatch.setattr(loading, "load", refuse)
    with capfd.disabled():
        code, printed = run_without_rights(command, read_only, tmp_path / "printed.txt")
    assert code == 2, (code, printed)
    (line,) = printed.splitlines()
    assert line.startswith("prunelit: error: output ") and "Permission denied" in line
    assert not list(read_only.iterdir())


def test_a_cache_that_may_not_be_written_is_one_line(
    read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRUNELIT_CACHE", str(read_only))
    command = "evaluate --model ../model.gguf --text ../words.txt --seqlen 16 --windows 4"
    with capfd.disabled():
        code, printed = run_without_rights(command, read_only, tmp_path / "printed.txt")
    assert code == 2, (code, printed)
    assert "Permission denied" in printed.splitlines()[-1] and "Traceback" not in printed
    assert not list(read_only.iterdir())

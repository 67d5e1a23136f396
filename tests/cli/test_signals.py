"""Signals that end a command: nothing half written stays, and the exit code is a shell's."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from prunelit.cli import main
from prunelit.report import run_page
from prunelit.report.record import Record
from prunelit.runtime.errors import BadOption
from tests.cli.test_fit import call, small
from tests.cli.test_fit import words as words  # a fixture


class Ending(NamedTuple):
    """A signal, and the exit code and words by which a command that it ended is known."""

    number: int
    status: int
    said: str


ENDINGS = [
    Ending(signal.SIGINT, 130, "interrupted"),
    Ending(signal.SIGTERM, 143, "ended by SIGTERM"),
    Ending(signal.SIGHUP, 129, "ended by SIGHUP"),
]


@pytest.fixture(params=ENDINGS, ids=["SIGINT", "SIGTERM", "SIGHUP"])
def ending(request: pytest.FixtureRequest) -> Iterator[Ending]:
    """A signal that nobody handles before the test, nor after it."""
    number = request.param.number
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    previous = signal.signal(number, handler)  # a runner of tests may ignore it
    yield request.param
    assert signal.signal(number, previous) is handler


def test_a_prune_that_is_stopped_while_it_writes_its_report_leaves_nothing_in_the_way(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    words: str,
    tmp_path: Path,
    ending: Ending,
) -> None:
    write = run_page.write_run_page

    def stop(record: Record, target: Path) -> None:
        assert (target / "report.json").is_file() and (target / "model.safetensors").is_file()
        write(record, target)
        os.kill(os.getpid(), ending.number)

    command = small(source, words, tmp_path / "out", "--method", "magnitude")
    with monkeypatch.context() as patch:
        patch.setattr(run_page, "write_run_page", stop)
        code, _, err = call(capsys, *command)
        assert (code, err.splitlines()[-1]) == (ending.status, f"prunelit: {ending.said}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.txt"]
    code, _, err = call(capsys, *command)
    assert code == 0, err
    assert {"report.json", "report.html", "record.json", "proof.json"} <= {x.name for x in (tmp_path / "out").iterdir()}
    stages = {stage["name"] for stage in json.loads((tmp_path / "out" / "record.json").read_text())["stages"]}
    assert "save" in stages and "save" in json.loads((tmp_path / "out" / "report.json").read_text())["seconds"]
    assert str(tmp_path / "out") in (tmp_path / "out" / "report.html").read_text()


def test_a_signal_that_comes_while_an_object_is_freed_ends_the_command_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ending: Ending
) -> None:
    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(ending.number)  # Python drops what is raised here
            for _ in range(10):
                pass

    def run(arguments: list[str]) -> int:
        freed = Freed()
        del freed
        time.sleep(20)
        return 0

    monkeypatch.setattr(main, "_run_command", run)
    begin = time.monotonic()
    assert main.main(["methods"]) == ending.status
    assert time.monotonic() - begin < 10
    assert "Exception ignored" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("could not determine the shape"), BadOption("model: cannot be loaded")])
def test_a_signal_of_which_another_error_is_made_is_still_what_ended_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, ending: Ending
) -> None:
    def run(arguments: list[str]) -> int:
        try:
            signal.raise_signal(ending.number)
            time.sleep(5)
        except BaseException:  # noqa: BLE001  (as code in C does)
            raise error from None
        return 0

    monkeypatch.setattr(main, "_run_command", run)
    assert main.main(["methods"]) == ending.status
    assert capsys.readouterr().err == f"prunelit: {ending.said}\n"

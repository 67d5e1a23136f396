"""Signals that end a command: nothing half written stays, and the exit code is a shell's."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from prunelit.cli import main
from prunelit.report import run_page
from prunelit.report.record import Record
from prunelit.runtime.errors import BadOption
from tests.cli.test_fit import call, small
from tests.cli.test_fit import words as words  # a fixture


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "ended by SIGTERM"), ("SIGHUP", 129, "ended by SIGHUP")],
)
def test_a_prune_that_is_stopped_while_it_writes_its_report_leaves_nothing_in_the_way(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    words: str,
    tmp_path: Path,
    name: str,
    status: int,
    said: str,
) -> None:
    number = getattr(signal, name)
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    previous = signal.signal(number, handler)  # a runner of tests may ignore it
    write = run_page.write_run_page

    def stop(record: Record, target: Path) -> None:
        assert (target / "report.json").is_file() and (target / "model.safetensors").is_file()
        write(record, target)
        os.kill(os.getpid(), number)

    command = small(source, words, tmp_path / "out", "--method", "magnitude")
    with monkeypatch.context() as patch:
        patch.setattr(run_page, "write_run_page", stop)
        code, _, err = call(capsys, *command)
        assert (code, err.splitlines()[-1]) == (status, f"prunelit: {said}")
    assert signal.signal(number, previous) is handler
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.txt"]
    code, _, err = call(capsys, *command)
    assert code == 0, err
    assert {"report.json", "report.html", "record.json", "proof.json"} <= {x.name for x in (tmp_path / "out").iterdir()}
    stages = {stage["name"] for stage in json.loads((tmp_path / "out" / "record.json").read_text())["stages"]}
    assert "save" in stages and "save" in json.loads((tmp_path / "out" / "report.json").read_text())["seconds"]
    assert str(tmp_path / "out") in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_that_comes_while_an_object_is_freed_ends_the_command_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, status: int
) -> None:
    number = getattr(signal, name)
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    previous = signal.signal(number, handler)

    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(number)  # Python drops what is raised here
            for _ in range(10):
                pass

    def run(arguments: list[str]) -> int:
        del arguments
        freed = Freed()
        del freed
        time.sleep(20)
        return 0

    monkeypatch.setattr(main, "_run_command", run)
    begin = time.monotonic()
    assert main.main(["methods"]) == status
    assert time.monotonic() - begin < 10
    assert "Exception ignored" not in capsys.readouterr().err
    assert signal.signal(number, previous) is handler


@pytest.mark.parametrize("error", [ValueError("could not determine the shape"), BadOption("model: cannot be loaded")])
@pytest.mark.parametrize(
    ("name", "status", "said"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "ended by SIGTERM"), ("SIGHUP", 129, "ended by SIGHUP")],
)
def test_a_signal_of_which_another_error_is_made_is_still_what_ended_the_command(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    name: str,
    status: int,
    said: str,
) -> None:
    number = getattr(signal, name)
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    previous = signal.signal(number, handler)

    def run(arguments: list[str]) -> int:
        try:
            signal.raise_signal(number)
            time.sleep(5)
        except BaseException:  # noqa: BLE001  (as code in C does)
            raise error from None
        return 0

    monkeypatch.setattr(main, "_run_command", run)
    assert main.main(["methods"]) == status
    assert capsys.readouterr().err == f"prunelit: {said}\n"
    assert signal.signal(number, previous) is handler

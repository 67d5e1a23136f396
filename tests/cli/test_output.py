"""What a command says and where: --quiet, --log json, and a script that completes its options."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from prunelit.cli import dispatch
from prunelit.cli.console import configure_logging, print_result, report_result
from prunelit.cli.main import COMMANDS, main
from prunelit.cli.parsing.completion import build_whole_parser
from prunelit.runtime import progress
from prunelit.runtime.errors import PrunelitError
from tests.cli.test_fit import call, small
from tests.cli.test_fit import words as words  # a fixture


def say_everything(command: str, arguments: list[str]) -> int:
    configure_logging()
    with progress.show_stage("reading"):
        list(progress.track_progress(range(3), "scoring", unit="layer"))
    logging.getLogger("prunelit").info("a note")
    logging.getLogger("prunelit").warning("a risk")
    warnings.warn("another risk", stacklevel=1)
    print_result("the result")
    report_result(command, **{"ratio": float("nan"), "out": "o", "command": "the whole line", "event": "x"})
    if arguments:
        raise PrunelitError("wrong\ninput")
    return 0


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "run_command", say_everything)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    warnings.simplefilter("always")


@pytest.mark.usefixtures("logged")
def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["prune", "--log", "json", "--model"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "the result\n"
    events = [json.loads(line) for line in printed.err.splitlines()]
    assert [event["event"] for event in events] == [
        *("stage", "stage", "message", "warning", "warning", "result", "error")
    ]
    assert events[0] | {"time": 0, "seconds": 0} == {
        **{"event": "stage", "time": 0, "name": "scoring", "seconds": 0},
        **{"count": 3, "unit": "layer"},
    }
    assert events[2]["message"] == "a note" and events[4]["message"] == "another risk"
    assert (events[5]["command"], events[5]["ratio"], events[5]["out"]) == ("prune", None, "o")
    assert (events[6]["message"], events[6]["code"]) == ("wrong input", 2)
    assert progress.LOG_VARIABLE not in os.environ


@pytest.mark.usefixtures("logged")
@pytest.mark.parametrize(("flag", "wanted"), [("-q", "a risk\n"), ("--log=text", "a note\na risk\n")])
def test_quiet_leaves_warnings_and_the_result(capsys: pytest.CaptureFixture[str], flag: str, wanted: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["prune", flag]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("the result\n", wanted)
    assert progress.QUIET_VARIABLE not in os.environ


def test_prune_reports_stages_and_its_result_as_json(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    cut = small(source, words, tmp_path / "out", "--method", "magnitude", "--log", "json")
    code, printed, err = call(capsys, *cut)
    assert code == 0 and "removed" in printed
    # The proof, a process of its own elsewhere, is made in this one, where transformers draws a bar.
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    (result,) = [event for event in events if event["event"] == "result"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert result["command"] == "prune" and result["pruned"] == report["pruned"]
    assert "starting" in {event["name"] for event in events if event["event"] == "stage"}


def test_completion_knows_every_command_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_whole_parser(COMMANDS)
    (subcommands,) = [action for action in parser._actions if action.dest == "command"]
    assert set(subcommands.choices or ()) == set(COMMANDS)
    options = {option for action in subcommands.choices["fit"]._actions for option in action.option_strings}  # type: ignore[index]
    assert {"--model.lora_rank", "--trainer.max_steps", "--quiet"} <= options
    code, printed, _ = call(capsys, "completion", "--help")
    assert code == 0 and "bash-completion" in printed
    code, _, error = call(capsys, "completion", "bsh")
    assert code == 2 and "did you mean 'bash'?" in error


def test_the_script_completes_in_bash(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prunelit", "completion", "bash"], capture_output=True, text=True, check=True
    )
    (tmp_path / "script").write_text(
        done.stdout + "\nCOMP_WORDS=(prunelit prune --over); COMP_CWORD=2; _shtab_prunelit; echo ${COMPREPLY[@]}"
    )
    said = subprocess.run(["bash", str(tmp_path / "script")], capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["--overwrite"]

"""Which errors are the user's, in one line; which keep their traceback; what --verbose adds."""

import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch

from prunelit.cli import dispatch
from prunelit.cli.console import _show_warning, condense_errors, configure_logging, print_result
from prunelit.cli.main import main
from prunelit.runtime import progress
from prunelit.runtime.errors import OutOfMemory, PrunelitError
from prunelit.runtime.parser_messages import condense_message
from prunelit.runtime.text_files import escape_controls


@pytest.mark.parametrize(
    ("command", "error", "wanted"),
    [
        ("fit", torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "the GPU.*--data.batch_size.*nf4"),
        ("fit", RuntimeError("CUDA error: out of memory"), "the GPU.*--data.batch_size"),
        ("prune", MemoryError(), "this machine.*--stream true"),
        ("plan", MemoryError(), "this machine.*--stream true"),
        ("evaluate", RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "this machine.*--batch_size"),
        ("compare", MemoryError(), "this machine.*calibration.seqlen"),
        ("export", MemoryError(), "this machine.*--dtype bfloat16"),
    ],
)
def test_out_of_memory_names_what_to_lower(command: str, error: Exception, wanted: str) -> None:
    with pytest.raises(OutOfMemory, match=f"^{command}: {wanted}"), condense_errors(command):
        raise error


def test_a_rank_that_has_lost_another_says_so_in_one_line() -> None:
    said = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:27547. This is typically caused by"
    with pytest.raises(PrunelitError, match=r"^fit: another process of this job has ended"), condense_errors("fit"):
        raise RuntimeError(said)


@pytest.mark.parametrize(("package", "extra"), [("wandb", "wandb"), ("bitsandbytes.nn", "nf4"), ("gguf", "gguf")])
def test_a_missing_extra_names_the_pip_line(package: str, extra: str) -> None:
    missing = ModuleNotFoundError(f"No module named {package!r}", name=package)
    with pytest.raises(PrunelitError, match=rf"pip install 'prunelit\[{extra}\]'"), condense_errors("fit"):
        raise missing


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), ValueError("odd"), ModuleNotFoundError("x", name="x")]
)
def test_what_is_not_input_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, condense_errors("fit"):
        raise error
    assert caught.value is error


def test_a_message_of_several_lines_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: str, arguments: list[str]) -> int:
        raise PrunelitError("model: two\n   lines")

    monkeypatch.setattr(dispatch, "run_command", fail)
    assert main(["prune"]) == 2
    assert capsys.readouterr().err == "prunelit: error: model: two lines\n"


def test_verbose_adds_the_traceback_and_is_forgotten(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(progress.VERBOSE_VARIABLE, raising=False)
    assert main(["methods", "--verbose", "llm_bop"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("prunelit: error: method 'llm_bop'")
    assert not progress.is_verbose()


def test_verbose_lets_libraries_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        for value, wanted in (("", logging.WARNING), ("1", logging.INFO)):
            monkeypatch.setenv(progress.VERBOSE_VARIABLE, value)
            configure_logging()
            assert logging.getLogger("lightning.pytorch").level == wanted
        assert logging.getLogger("prunelit").level == logging.DEBUG
        monkeypatch.delenv(progress.VERBOSE_VARIABLE)
        configure_logging()
        assert logging.getLogger("prunelit").level == logging.INFO


def test_from_the_shell_verbose_is_no_argument_of_lightning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def keep(command: str, arguments: list[str]) -> int:
        seen.append([command, *arguments])
        assert progress.is_verbose()
        return 0

    monkeypatch.setattr(dispatch, "run_command", keep)
    monkeypatch.setattr(sys, "argv", ["prunelit", "fit", "--verbose", "--model", "x"])
    assert main() == 0
    assert seen == [["fit", "--model", "x"]] and sys.argv[1:] == seen[0]


def test_kinds_in_words(tmp_path: Path) -> None:
    listed = "Parser key \"p\": Expected a <class 'collections.abc.Sequence'>. Got value: 0"
    assert condense_message(listed) == "p: expected a list, as [0], got 0"
    assert (
        condense_message("Parser key \"n\": Expected a <class 'int'>. Got value: x")
        == "n: expected a whole number, got 'x'"
    )
    missing = "Parser key \"model\": Expected a <class 'str'>. Got value: None"
    assert condense_message(missing) == "model: expected text, got nothing; pass --model"
    several = "Parser key \"t\":\n  Subtypes: [dict[str, typing.Any], <class 'NoneType'>]\n  Given value: [1]"
    assert condense_message(several) == "t: expected one of a mapping, null, got [1]"


@pytest.mark.parametrize(
    ("cause", "wanted"),
    [
        (ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met."), "fit: needs .*pip install 'prunelit.wandb.'"),
        (ModuleNotFoundError("Neither `a` nor `b` is available."), "fit: a.B: Neither `a` nor `b` is available"),
        (ValueError("every: expected more than 0"), "fit: a.B: every: expected more than 0"),
        (PrunelitError("ratio: expected less"), "^ratio: expected less"),
        (AttributeError("a bug in someone's callback"), None),
    ],
)
def test_what_a_constructor_raised_is_found_behind_the_parser(cause: Exception, wanted: str | None) -> None:
    wrapped = ValueError("Does not validate against any of the Union subtypes")
    wrapped.__cause__ = ValueError("Problem with given class_path 'a.B':\n  ...")
    wrapped.__cause__.__cause__ = cause
    with pytest.raises(PrunelitError if wanted else ValueError, match=wanted), condense_errors("fit"):
        raise wrapped


STEERING = "red \x1b[31m\x07\x9b2J\u202efish\ud800"
ESCAPED = r"red \u001b[31m\u0007\u009b2J\u202efish\ud800"


def test_text_of_strangers_does_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: str, arguments: list[str]) -> int:
        configure_logging()
        print_result(STEERING)
        # Without the half of a character, since pytest hands what was logged to another process.
        logging.getLogger("prunelit").warning("%s", STEERING[:-1])
        _show_warning(STEERING, UserWarning, "/prunelit/a.py", 1)
        raise PrunelitError(STEERING)

    monkeypatch.setattr(dispatch, "run_command", fail)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        assert main(["prune", "--verbose"]) == 2
        configure_logging()  # without --verbose again
    printed = capsys.readouterr()
    assert printed.out == ESCAPED + "\n"
    lines = printed.err.splitlines()
    assert lines[:2] == [ESCAPED[:-6], f"prunelit: warning: {ESCAPED}"] and lines[-1] == f"prunelit: error: {ESCAPED}"
    assert not any(sign in printed.err for sign in "\x1b\x07\x9b\u202e")


def test_progress_shows_names_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(progress, "_ElapsedLine", lambda what: names.append(what))
    with progress.show_stage(f"reading {STEERING}"):
        pass
    assert names == [f"reading {ESCAPED}"]


def test_escaped_json_is_the_same_json() -> None:
    content = {"name": STEERING.replace("\ud800", "") + "\x7f\n"}
    assert json.loads(escape_controls(json.dumps(content, ensure_ascii=False))) == content

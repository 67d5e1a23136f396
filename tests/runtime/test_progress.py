"""What is shown where someone looks, and only there; --verbose says it in lines."""

import io
import logging
import sys
import time
from collections.abc import Callable

import pytest

from prunelit.runtime import progress
from prunelit.runtime.progress import show_stage, track_progress


class Terminal(io.StringIO):
    """A standard error that says it is one."""

    def isatty(self) -> bool:
        return True


def look(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From now on someone looks; not a fixture, since pytest sets `sys.stderr` again when a test begins."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return found


def test_a_bar_says_what_how_far_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look(monkeypatch)
    assert list(track_progress(range(3), "counting", unit="sheep")) == [0, 1, 2]
    said = terminal.getvalue()
    assert "counting:   0%" in said and "0/3" in said and "sheep" in said
    assert said.endswith("\r")  # nothing is left of it
    assert progress._open_displays == []


def test_a_generator_counts_up_to_its_total(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look(monkeypatch)
    assert list(track_progress(iter("ab"), "letters", total=2)) == ["a", "b"]
    assert "0/2" in terminal.getvalue()


def test_a_bar_that_is_left_early_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look(monkeypatch)
    bar = track_progress(range(3), "counting")
    next(bar)
    bar.close()  # type: ignore[attr-defined]
    assert terminal.getvalue().endswith("\r")
    assert progress._open_displays == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_quiet_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    if rank == "1":
        monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("LOCAL_RANK", rank)
    with show_stage("thinking"):
        assert list(track_progress(range(3), "counting")) == [0, 1, 2]
        assert progress._open_displays == []
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert rank == "0" or sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_stage_shows_its_clock_after_a_second_and_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look(monkeypatch)
    with show_stage("thinking"):
        assert terminal.getvalue() == ""
        _until(lambda: "thinking: 00:01" in terminal.getvalue())
        with show_stage("thinking harder"):
            before = len(terminal.getvalue())
            _until(lambda: "thinking harder: 00:01" in terminal.getvalue())
            assert "thinking: " not in terminal.getvalue()[before:]
    assert terminal.getvalue().endswith("\r")
    assert progress._open_displays == []


def _until(true: Callable[[], bool]) -> None:
    deadline = time.time() + 10
    while not true():
        assert time.time() < deadline
        time.sleep(0.02)


def test_a_stage_ends_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch)
    with pytest.raises(ValueError, match="no"), show_stage("thinking"):
        raise ValueError("no")
    assert progress._open_displays == []


def test_verbose_says_stages_and_seconds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="prunelit"), show_stage("thinking"):
        list(track_progress(range(3), "counting", unit="sheep"))
    assert [record.getMessage() for record in caplog.records] == ["counting: 3 x sheep, 0.0 s", "thinking: 0.0 s"]

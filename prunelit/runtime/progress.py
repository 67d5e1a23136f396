"""Progress in one style: work of more than a second shows its name, how far it is and how long it will take.

Progress is shown on a terminal and on rank zero only. With --verbose every finished piece of work is also logged with
its seconds, on a terminal or not; with --quiet nothing is shown; with --log json it is one JSON object a line.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn, TypedDict, TypeVar

from prunelit.runtime.text_files import escape_controls

if TYPE_CHECKING:
    from tqdm import tqdm as ProgressBar

T = TypeVar("T")
VERBOSE_VARIABLE = "PRUNELIT_VERBOSE"
"""Environment variable that --verbose sets, so that other ranks and new processes inherit it."""
QUIET_VARIABLE = "PRUNELIT_QUIET"
"""Environment variable that --quiet sets."""
LOG_VARIABLE = "PRUNELIT_LOG"
"""Environment variable that --log sets: "text" or "json"."""
_log = logging.getLogger("prunelit")
_silent: list[bool] = []


class _BarOptions(TypedDict):
    leave: bool
    dynamic_ncols: bool


_BAR_OPTIONS: _BarOptions = {"leave": False, "dynamic_ncols": True}


def is_verbose() -> bool:
    """Whether --verbose was given.

    Example:
        >>> is_verbose() == bool(os.environ.get(VERBOSE_VARIABLE))
        True
    """
    return bool(os.environ.get(VERBOSE_VARIABLE))


def is_quiet() -> bool:
    """Whether --quiet was given.

    Example:
        >>> is_quiet() == bool(os.environ.get(QUIET_VARIABLE))
        True
    """
    return bool(os.environ.get(QUIET_VARIABLE))


def writes_json() -> bool:
    """Whether --log json was given: what is said on stderr is one JSON object a line.

    Example:
        >>> writes_json() == (os.environ.get(LOG_VARIABLE) == "json")
        True
    """
    return os.environ.get(LOG_VARIABLE) == "json"


def write_event(event: str, /, **facts: object) -> None:
    """Write what happened as one JSON object in one line on stderr, from rank zero.

    Args:
        event: "stage", "message", "warning", "error" or "result".
        facts: that belong to it; NaN and infinity become null.

    Example:
        >>> write_event("stage", name="load_model", seconds=1.5)  # goes to stderr
    """
    if is_rank_zero():
        content = json.loads(json.dumps(facts, default=str), parse_constant=lambda constant: None)
        sys.stderr.write(
            json.dumps({"event": event, "time": round(time.time(), 3)} | content | {"event": event}) + "\n"
        )


def is_rank_zero() -> bool:
    """Whether this process is rank zero of its machine, which writes messages for all.

    Example:
        >>> is_rank_zero()
        True
    """
    return int(os.environ.get("LOCAL_RANK", "0") or 0) == 0


def silence_progress() -> None:
    """Show no progress in this process from now on, because the process that started it shows its own.

    Example: see `is_progress_shown`.
    """
    _silent.append(True)


def is_progress_shown() -> bool:
    """Whether progress is shown: standard error is a terminal for people, and this is rank zero.

    Example:
        >>> is_progress_shown() in (True, False)
        True
    """
    if _silent or is_quiet() or writes_json() or sys.stderr is None:
        return False
    return is_rank_zero() and sys.stderr.isatty()


def track_progress(items: Iterable[T], what: str, unit: str = "batch", total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar that shows the name of the work, how far it is and how long it will take.

    Args:
        items: to iterate over.
        what: name of the work.
        unit: name of one item.
        total: number of items, if `items` has no length.

    Example:
        >>> [2 * number for number in track_progress(range(3), "doubling", unit="number")]
        [0, 2, 4]
    """
    from tqdm.auto import tqdm

    what = escape_controls(what)
    if total is None:
        with suppress(TypeError):  # a generator has no length
            total = len(items)  # type: ignore[arg-type]
    start, count = time.perf_counter(), 0
    with (
        tqdm(total=total, desc=what, unit=unit, disable=not is_progress_shown(), **_BAR_OPTIONS) as bar,
        _redraw_every_second(_ProgressBar(bar)),
    ):
        for item in items:
            yield item
            bar.update()
            count += 1
    _log_finished_work(what, time.perf_counter() - start, count, unit)


@contextmanager
def show_stage(what: str) -> Iterator[None]:
    """Show the name of the work inside the context and its seconds so far, where no number of items is known.

    Progress that is shown inside takes its place.

    Args:
        what: name of the work.

    Example:
        >>> with show_stage("adding"):
        ...     total = 1 + 1
    """
    start = time.perf_counter()
    what = escape_controls(what)
    with _redraw_every_second(_ElapsedLine(what)):
        yield
    _log_finished_work(what, time.perf_counter() - start)


def _log_finished_work(what: str, seconds: float, count: int | None = None, unit: str = "") -> None:
    if writes_json() and not is_quiet():
        counted = {} if count is None else {"count": count, "unit": unit}
        write_event("stage", name=what, seconds=round(seconds, 3), **counted)
    elif count is None:
        _log.debug("%s: %.1f s", what, seconds)
    else:
        _log.debug("%s: %d x %s, %.1f s", what, count, unit, seconds)


class _ProgressBar:
    """A bar of tqdm; it stays visible when another display opens inside it."""

    def __init__(self, bar: "ProgressBar[NoReturn]") -> None:
        self.bar = bar

    def show(self) -> None:
        """Redraw the bar, because its time changes even if no item is finished."""
        self.bar.refresh()

    def hide(self) -> None:
        """Do nothing: the bar stays visible."""


class _ElapsedLine:
    """A line with the time since it was created; it is hidden while another display is open inside it."""

    def __init__(self, what: str) -> None:
        self.what, self.start = what, time.time()
        self.line: ProgressBar[NoReturn] | None = None

    def show(self) -> None:
        """Draw the line, or redraw it."""
        from tqdm.auto import tqdm

        if self.line is None:
            self.line = tqdm(desc=self.what, bar_format="{desc}: {elapsed}", delay=1, **_BAR_OPTIONS)
            self.line.start_t, self.line.delay = self.start, 0
        self.line.refresh()

    def hide(self) -> None:
        """Remove the line from the terminal."""
        if self.line is not None:
            self.line.close()
        self.line = None


_open_displays: list[_ProgressBar | _ElapsedLine] = []
"""The open displays, innermost last."""
_lock = threading.RLock()


@contextmanager
def _redraw_every_second(display: _ProgressBar | _ElapsedLine) -> Iterator[None]:
    """Make a display the innermost one inside the context, and redraw it every second.

    A thread redraws it, because the work itself may not return for minutes.
    """
    if not is_progress_shown():
        yield
        return
    finished = threading.Event()

    def redraw() -> None:
        while not finished.wait(1):
            with _lock:
                if _open_displays and _open_displays[-1] is display:
                    display.show()

    thread = threading.Thread(target=redraw, name="prunelit-progress", daemon=True)
    with _lock:
        if _open_displays:
            _open_displays[-1].hide()
        _open_displays.append(display)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        with _lock:
            _open_displays.remove(display)
            display.hide()

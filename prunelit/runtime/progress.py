"""One style of progress: what takes longer than a second says what it is, how far it is and how long it will take.

Shown on a terminal and on rank zero, silent elsewhere. With --verbose everything finished is also a line with its
seconds, on a terminal or not.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")
VERBOSE_VARIABLE = "PRUNELIT_VERBOSE"
"""Environment variable of --verbose: further ranks and new processes inherit it."""
_log = logging.getLogger("prunelit")
_silent: list[bool] = []
_BAR_OPTIONS: dict[str, Any] = {"leave": False, "dynamic_ncols": True}


def is_verbose() -> bool:
    """Whether --verbose was given."""
    return bool(os.environ.get(VERBOSE_VARIABLE))


def is_rank_zero() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("LOCAL_RANK", "0") or 0) == 0


def silence_progress() -> None:
    """Show nothing in this process from now on: another one shows that it is at work."""
    _silent.append(True)


def is_progress_shown() -> bool:
    """Whether someone is looking: standard error is a terminal, and this is rank zero."""
    return not _silent and is_rank_zero() and sys.stderr is not None and sys.stderr.isatty()


def track_progress(items: Iterable[T], what: str, unit: str = "batch", total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar that says `what`, how far it is (in `unit`s) and how long it will take.

    Args:
        items: to iterate over.
        what: name of the work.
        unit: of an item, singular.
        total: of items, where they have no length.
    """
    from tqdm.auto import tqdm

    if total is None:
        with suppress(TypeError):  # a generator
            total = len(items)  # type: ignore[arg-type]
    start, done = time.perf_counter(), 0
    with (
        tqdm(total=total, desc=what, unit=unit, disable=not is_progress_shown(), **_BAR_OPTIONS) as bar,
        _redraw_every_second(_ProgressBar(bar)),
    ):
        for item in items:
            yield item
            bar.update()
            done += 1
    _log.debug("%s: %d x %s, %.1f s", what, done, unit, time.perf_counter() - start)


@contextmanager
def show_stage(what: str) -> Iterator[None]:
    """Say what is being done, and for how long by now, where no count is known; what is inside takes its place."""
    start = time.perf_counter()
    with _redraw_every_second(_ElapsedLine(what)):
        yield
    _log.debug("%s: %.1f s", what, time.perf_counter() - start)


class _ProgressBar:
    """A bar of tqdm, which stays when another one opens inside it."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def show(self) -> None:
        """Draw it again: the time moves on though no item is done."""
        self.bar.refresh()

    def hide(self) -> None:
        """It stays."""


class _ElapsedLine:
    """A line with the time since it was made, which goes when something opens inside it."""

    def __init__(self, what: str) -> None:
        self.what, self.start = what, time.time()
        self.line: Any = None

    def show(self) -> None:
        """Draw it again."""
        from tqdm.auto import tqdm

        if self.line is None:
            self.line = tqdm(desc=self.what, bar_format="{desc}: {elapsed}", delay=1, **_BAR_OPTIONS)
            self.line.start_t, self.line.delay = self.start, 0
        self.line.refresh()

    def hide(self) -> None:
        """Leave no trace of it."""
        if self.line is not None:
            self.line.close()
        self.line = None


_open_displays: list[_ProgressBar | _ElapsedLine] = []
"""What is shown, innermost last."""
_lock = threading.RLock()


@contextmanager
def _redraw_every_second(shown_now: _ProgressBar | _ElapsedLine) -> Iterator[None]:
    """Inside, it is the innermost, and drawn every second by a thread: the work itself does not come back."""
    if not is_progress_shown():
        yield
        return
    over = threading.Event()

    def run() -> None:
        while not over.wait(1):
            with _lock:
                if _open_displays and _open_displays[-1] is shown_now:
                    shown_now.show()

    thread = threading.Thread(target=run, name="prunelit-progress", daemon=True)
    with _lock:
        if _open_displays:
            _open_displays[-1].hide()
        _open_displays.append(shown_now)
    thread.start()
    try:
        yield
    finally:
        over.set()
        with _lock:
            _open_displays.remove(shown_now)
            shown_now.hide()

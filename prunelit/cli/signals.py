"""Signals that end a command: raised as exceptions, so that what is half written is removed, and never lost."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HANDLERS: dict[str, Any] = {"SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL, "SIGINT": signal.default_int_handler}
"""Signals, and the handlers that say that nobody else handles them. Windows has not all of them."""
_SECONDS_UNTIL_AGAIN = 0.01


class EndedBySignal(SystemExit):
    """SIGTERM or SIGHUP asked the process to end; the exit code is a shell's for it.

    Attributes:
        number: of the signal.

    Example:
        >>> EndedBySignal(signal.SIGTERM).code
        143
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """Raise an exception on signals that end a process; where nobody else handles them, and in the main thread.

    Python drops what is raised while an object is freed, and code in C may make another error of it. The signal is
    sent again in the first case, and named by the right exception in the second.

    Raises:
        EndedBySignal: SIGTERM or SIGHUP came; further ones are ignored, for they would stop the removal.
        KeyboardInterrupt: SIGINT came; the next one stops the removal too.

    Example: see `prunelit.cli.main.main`, which runs every command in it.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {getattr(signal, name): handler for name, handler in _HANDLERS.items() if hasattr(signal, name)}
    numbers = [number for number in handlers if is_main_thread and signal.getsignal(number) is handlers[number]]
    received: list[int] = []

    def raise_end(number: int, frame: FrameType | None) -> None:
        # While Lightning trains, its own handler is in this one's place and calls it: then a checkpoint is saved first.
        if signal.getsignal(number) is not raise_end:
            return
        received.append(number)
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)
        raise _make_end(number)

    def send_again(lost: Any) -> None:
        error = lost.exc_value
        if not isinstance(error, EndedBySignal | KeyboardInterrupt):
            report_lost(lost)
            return
        number = error.number if isinstance(error, EndedBySignal) else signal.SIGINT
        if number in numbers:
            signal.signal(number, raise_end)
        # At once, it would be lost here as well.
        threading.Timer(_SECONDS_UNTIL_AGAIN, _send_to_main_thread, [number]).start()

    for number in numbers:
        signal.signal(number, raise_end)
    report_lost, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        yield
    except Exception as error:
        if received:
            raise _make_end(received[0]) from error
        raise
    finally:
        sys.unraisablehook = report_lost
        for number in numbers:
            signal.signal(number, handlers[number])


def _make_end(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else EndedBySignal(number)


def _send_to_main_thread(number: int) -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:  # Windows
        signal.raise_signal(number)

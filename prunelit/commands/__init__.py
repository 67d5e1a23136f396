"""The commands, one file each: a plain function, and `run`, which parses its options and calls it.

A command is imported when it is run: what it stands on takes seconds, of which `--help` and a misspelt word need little.
"""

import importlib
from collections.abc import Callable
from typing import Any

from prunelit.console import one_line_errors, speak_by_rule

_ELSEWHERE = {"fit": "prunelit.cli", "validate": "prunelit.cli", "compare": "prunelit.compare"}


def run(command: str, arguments: list[str]) -> int:
    """Run a command of `prunelit.__main__.COMMANDS`; the exit code.

    Raises:
        PrunelitError: bad input, in one line.
    """
    speak_by_rule()
    with one_line_errors(command):
        module = importlib.import_module(_ELSEWHERE.get(command, f"{__name__}.{command}"))
        more = {"job_of": _job_of} if command == "plan" else {}
        found: Callable[..., int] = module.run
        return found(command, arguments, **more)


def _job_of(arguments: list[str]) -> Any:
    """The job of a `fit` command line."""
    return importlib.import_module("prunelit.cli").job(arguments)

"""The commands, one file each: a plain function, and `run`, which parses its options and calls it.

A command is imported when it is run: what it stands on takes seconds, of which a misspelt word needs none.
"""

import importlib
from collections.abc import Callable
from typing import Any

from prunelit.cli import config_files
from prunelit.cli.console import one_line_errors, speak_by_rule
from prunelit.runtime.progress import stage

_ELSEWHERE = {"validate": "prunelit.cli.fit"}


def run(command: str, arguments: list[str]) -> int:
    """Run a command of `prunelit.__main__.COMMANDS`; the exit code.

    Raises:
        PrunelitError: bad input, in one line.
    """
    config_files.check(arguments)
    with one_line_errors(command):
        with stage("starting"):
            module = importlib.import_module(_ELSEWHERE.get(command, f"prunelit.cli.{command}"))
        speak_by_rule()  # Lightning sets its own level when it is imported
        more = {"job_of": _job_of} if command == "plan" else {}
        found: Callable[..., int] = module.run
        return found(command, arguments, **more)


def _job_of(arguments: list[str]) -> Any:
    """The job of a `fit` command line."""
    return importlib.import_module("prunelit.cli.fit").job(arguments)

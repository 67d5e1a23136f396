"""The commands, one file each: a plain function, and `run_command`, which parses its options and calls it.

A command is imported when it is run: what it stands on takes seconds, of which a misspelt word needs none.
"""

import importlib
from collections.abc import Callable
from typing import Any

from prunelit.cli import config_files
from prunelit.cli.console import condense_errors, configure_logging
from prunelit.runtime.progress import show_stage

_ELSEWHERE = {"validate": "prunelit.cli.fit"}


def run_command(command: str, arguments: list[str]) -> int:
    """Run a command of `prunelit.__main__.COMMANDS`; the exit code.

    Raises:
        PrunelitError: bad input, in one line.
    """
    config_files.check_config_files(arguments)
    with condense_errors(command):
        with show_stage("starting"):
            module = importlib.import_module(_ELSEWHERE.get(command, f"prunelit.cli.{command}"))
        configure_logging()  # Lightning sets its own level when it is imported
        more = {"job_of": _build_fit_job} if command == "plan" else {}
        found: Callable[..., int] = module.run
        return found(command, arguments, **more)


def _build_fit_job(arguments: list[str]) -> Any:
    """The job of a `fit` command line."""
    return importlib.import_module("prunelit.cli.fit").job(arguments)

"""Dispatch of the commands. Each is a module with a plain function, and `run`, which parses options and calls it.

A command's module is imported when the command is run: its imports take seconds, which a misspelt option need not wait
for.
"""

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from prunelit.cli import config_files
from prunelit.cli.console import condense_errors, configure_logging
from prunelit.runtime.progress import show_stage
from prunelit.runtime.versions import check_lowest_versions

if TYPE_CHECKING:
    from prunelit.cli.plan import FitJob

_MODULES = {"validate": "prunelit.cli.fit", "report": "prunelit.cli.reports.diff"}


def run_command(command: str, arguments: list[str]) -> int:
    """Run a command of `prunelit.cli.main.COMMANDS`.

    Args:
        command: its name.
        arguments: command line after it.

    Returns:
        The exit code.

    Raises:
        PrunelitError: bad input, or a package that is too old, in one line.

    Example:
        python -m prunelit prune --model M --method llm_bip --ratio 0.2 --out DIR
    """
    check_lowest_versions()
    named = [command, *arguments]
    arguments = config_files.resolve_config_names(arguments)
    if sys.argv[1:] == named:  # Lightning reads it, and starts further ranks with it
        sys.argv[2:] = arguments
    config_files.check_config_files(arguments)
    with condense_errors(command):
        with show_stage("starting"):
            module = importlib.import_module(_MODULES.get(command, f"prunelit.cli.{command}"))
        configure_logging()  # after the import: Lightning sets its own log level on import
        extra_arguments = {"job_of": _build_fit_job} if command == "plan" else {}
        run: Callable[..., int] = module.run
        return run(command, arguments, **extra_arguments)


def _build_fit_job(arguments: list[str]) -> "FitJob":
    """Build the job of a `fit` command line."""
    return importlib.import_module("prunelit.cli.fit").build_fit_job(arguments)

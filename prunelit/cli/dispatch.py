"""Dispatch of the commands. Each is a module with a plain function, and `run`, which parses options and calls it.

Parse first, import later: a command line is parsed before the command's module is imported. Its imports take seconds,
for which neither a misspelt option nor `--help` waits.
"""

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from prunelit.cli import config_files
from prunelit.cli.console import condense_errors, configure_logging, print_result
from prunelit.cli.parsing import fit_options, parsers
from prunelit.cli.parsing.aliases import translate_options
from prunelit.cli.parsing.fit_options import is_fit_config, split_plan_options
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
    written = arguments
    arguments = config_files.resolve_configs(written)
    config_files.check_config_files(arguments)
    kind = "plan of fit" if command == "plan" and is_fit_config(arguments) else command
    arguments = translate_options(kind, arguments)
    with condense_errors(command):
        arguments = _check_command_line(kind, arguments)
        if sys.argv[1:] == [command, *written]:
            sys.argv[2:] = arguments  # Lightning reads it, and starts further ranks with it
        with show_stage("starting"):
            module = importlib.import_module(_MODULES.get(command, f"prunelit.cli.{command}"))
        configure_logging()  # after the import: Lightning sets its own log level on import
        extra_arguments = {"job_of": _build_fit_job} if command == "plan" else {}
        run: Callable[..., int] = module.run
        return run(command, arguments, **extra_arguments)


def _check_command_line(command: str, arguments: list[str]) -> list[str]:
    """Check a command line without a slow import; `--help` and `--print_config` are answered here, and end the command.

    Args:
        command: its name; "plan of fit" for `plan` with a config of `fit`.
        arguments: command line after it.

    Returns:
        The command line that the command parses.
    """
    if command in parsers.PARSERS:
        parsers.parse_command(command, arguments)
        return arguments
    if command not in ("fit", "validate", "plan of fit"):  # one that reads files only, and parses its own few words
        return arguments
    is_plan_of_fit = command == "plan of fit"
    fit_command = "fit" if is_plan_of_fit else command
    for word in ("-h", "--help"):
        if word in arguments:
            topic = "".join(arguments[arguments.index(word) + 1 :][:1])
            if topic == "lightning":
                return ["--help"]
            print_result(fit_options.render_fit_help(fit_command, "" if topic.startswith("-") else topic))
            raise SystemExit(0)
    expanded = fit_options.expand_fit_options(arguments)
    own_options = split_plan_options(expanded)[-1] if is_plan_of_fit else expanded
    fit_options.check_fit_command_line(fit_command, own_options)
    return expanded


def _build_fit_job(arguments: list[str]) -> "FitJob":
    """Build the job of a `fit` command line."""
    return importlib.import_module("prunelit.cli.fit").build_fit_job(arguments)

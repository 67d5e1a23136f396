"""Shared parts of the short commands: a parser for plain functions, lists of values, options of methods."""

import argparse
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jsonargparse import ArgumentParser, Namespace

from prunelit.data import text
from prunelit.data.option_types import Sources
from prunelit.data.yaml_text import parse_yaml
from prunelit.pruning.registry import method_class
from prunelit.runtime.errors import BadOption, PrunelitError, suggest_name
from prunelit.runtime.parser_messages import condense_message
from prunelit.runtime.progress import show_stage

if TYPE_CHECKING:
    from prunelit.pruning.callback import PruningCallback

HELP_EPILOG = "--verbose, anywhere: stages with their seconds, what libraries say, the traceback of an error"
"""Last line in the help of every command."""

_COMMAND_OPTIONS = ("config", "method", "plan", "text")

_REPLAY_OPTIONS = ("repair", "windows", "seqlen", "seed", "plan_file")
"""Options of all methods that a replayed plan still uses: the repair of the remaining units, and its text."""

_UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|accept option '([^']+)'|unrecognized arguments: --([\w.]+)")


def build_parser(command: str, description: str) -> ArgumentParser:
    """Build a parser for a short command, with --config.

    Args:
        command: its name.
        description: shown in the help.

    Example:
        >>> build_parser("prune", "prune a model").prog
        'prunelit prune'
    """
    parser = ArgumentParser(
        prog=f"prunelit {command}", description=description, epilog=HELP_EPILOG, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with these options")
    return parser


def parse_command_line(parser: ArgumentParser, arguments: list[str], nested_options: Collection[str] = ()) -> Namespace:
    """Parse a command line. An unknown option is answered with the nearest one; lists may be written `--text a b`.

    Args:
        parser: result of `build_parser`.
        arguments: command line after the command.
        nested_options: names of options inside lists and mappings, which the parser does not know.

    Returns:
        A jsonargparse namespace.

    Raises:
        PrunelitError: bad input, in one line.

    Example:
        >>> parser = build_parser("demo", "shows how to parse")
        >>> _ = parser.add_argument("--ratio", type=float, default=0.2)
        >>> parse_command_line(parser, ["--ratio", "0.3"]).ratio
        0.3
    """
    for action in parser._actions:
        for option in action.option_strings:
            if f"{option}+" in action.option_strings:  # jsonargparse adds this form to options that may be lists
                arguments = _gather_list_values(arguments, option)
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        message, command = condense_message(str(error)), str(parser.prog).rpartition(" ")[2]
        known = {part for action in parser._actions for part in (action.dest, *action.dest.split("."))} | {
            *nested_options
        }
        unknown = _UNKNOWN.search(message)
        hint = suggest_name(next(filter(None, unknown.groups())), known) if unknown else ""
        method = parser.get_defaults().get("method") if unknown else None
        if method:  # an unknown option may belong to another method
            hint = f"; expected an option of {command} or of method {method!r}{hint}"
        raise PrunelitError(f"{command}: {message}{hint}") from error


def add_method_options(parser: ArgumentParser, arguments: list[str], default: str) -> "type[PruningCallback]":
    """Add --method, --plan, --text and the options of the chosen method.

    Args:
        parser: result of `build_parser`.
        arguments: command line after the command.
        default: the method without --method.

    Returns:
        The method's class; with --plan and no --method, a class that replays plans and scores nothing.

    Raises:
        BadOption: not a pruning method, or --plan together with options that only scoring and planning read.

    Example: see `prunelit.cli.prune.run`.
    """
    with show_stage("starting"):
        # Imports Lightning, which takes seconds and which `export` does not need.
        from prunelit.pruning.callback import PruningCallback

    plan, name = peek_option("plan", arguments), peek_option("method", arguments)
    cls = PruningCallback if plan and not name else method_class(name or default)
    if not (isinstance(cls, type) and issubclass(cls, PruningCallback)):
        raise BadOption(f"method {name!r}: expected a subclass of PruningCallback, got {cls!r:.80}")
    parser.add_argument(
        "--method",
        type=str | None,
        default=name or (None if plan else default),
        help="pruning method; `python -m prunelit methods` lists them",
    )
    parser.add_argument("--plan", type=str | None, default=None, help="cut by this plan.json instead of scoring")
    parser.add_argument("--text", type=Sources, default=[text.BUILTIN_TEXT], help="calibration text source(s)")
    skipped = {"calibration", *cls.job_options}
    if plan:
        parser.add_argument("--ratio", type=float | None, default=None)
        skipped.add("ratio")
    added = {"ratio", *parser.add_class_arguments(cls, None, skip=skipped, sub_configs=False)}
    unread = {*cls.ignored_options}
    if plan:
        unread |= added - {*_REPLAY_OPTIONS, *cls.cut_options}
        _check_options_are_read(unread, arguments)
    for action in parser._actions:
        if action.dest in unread or action.dest == "plan_file":  # --plan is its name on the command line
            action.help = argparse.SUPPRESS
        elif action.dest == "repair":  # its type lists the choices of all methods, the class those of this one
            action.metavar = f"{{{','.join(cls.repair_choices)}}}"
    return cls


def _check_options_are_read(unread: Collection[str], arguments: list[str]) -> None:
    """Check that no option is given that a replayed plan would ignore silently.

    Options in config files are allowed: one file serves both a search and a replay of its result.

    Args:
        unread: names of the method's options that only scoring and planning read.
        arguments: command line.

    Raises:
        BadOption: at least one is given.
    """
    option_names = dict.fromkeys(word[2:].partition("=")[0].rstrip("+") for word in arguments if word.startswith("--"))
    if ignored := [name for name in option_names if name in unread]:
        raise BadOption(
            f"plan: expected no options that choose the removed units, got {', '.join(ignored)}; the plan names these "
            "units: leave the options out, or leave out --plan to score again"
        )


def build_method(cls: "type[PruningCallback]", options: Namespace, others: Collection[str]) -> "PruningCallback":
    """Build the method that parsed options ask for.

    Args:
        cls: result of `add_method_options`.
        options: parsed options.
        others: names of options that do not belong to the method.

    Example: see `prunelit.cli.prune.run`.
    """
    method_options = {name: value for name, value in vars(options).items() if name not in (*others, *_COMMAND_OPTIONS)}
    if options.plan:
        method_options |= {"ratio": 0.5, "plan_file": options.plan}  # a ratio is required, but a replay does not use it
    return cls(**method_options)


def _gather_list_values(arguments: list[str], option: str) -> list[str]:
    """Gather `--text a b` into one argument, `--text=["a", "b"]`.

    argparse's own lists (nargs) would refuse a single value in a config file. One value that is a JSON list, `--ratios
    "[0.1, 0.2]"`, is that list; any other value may begin with a bracket, as a prompt does.
    """
    if option not in arguments:
        return arguments
    start = arguments.index(option)
    end = next(
        (index for index, word in enumerate(arguments) if index > start and word.startswith("--")), len(arguments)
    )
    values = arguments[start + 1 : end]
    gathered = [f"{option}={values[0] if _is_json_list(values) else json.dumps(values)}"] if values else [option]
    return [*arguments[:start], *gathered, *_gather_list_values(arguments[end:], option)]


def _is_json_list(values: list[str]) -> bool:
    try:
        return len(values) == 1 and isinstance(json.loads(values[0]), list)
    except ValueError:
        return False


def peek_option(option: str, arguments: list[str]) -> str | None:
    """Read an option from the command line or a --config file, before a parser exists that knows it.

    Args:
        option: its name.
        arguments: command line after the command.

    Example:
        >>> peek_option("method", ["--method", "flap", "--ratio", "0.2"])
        'flap'
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument(f"--{option}")
    peek.add_argument("--config", action="append", default=[])
    known, _ = peek.parse_known_args(arguments)
    if getattr(known, option):
        return str(getattr(known, option))
    for path in reversed(known.config):
        try:
            content = parse_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue  # the parser reports what is wrong with the file
        if isinstance(content, dict) and content.get(option):
            return str(content[option])
    return None

"""What the short commands share: a parser for plain functions, lists of values, devices and dtypes."""

import argparse
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from prunelit.data import text
from prunelit.data.option_types import Sources
from prunelit.pruning.registry import method_class
from prunelit.runtime.errors import BadOption, PrunelitError, suggest_name
from prunelit.runtime.parser_messages import condense_message
from prunelit.runtime.progress import show_stage

HELP_EPILOG = "--verbose, anywhere: stages with their seconds, what libraries say, the traceback of an error"
"""Below the help of every command."""

_NOT_THE_METHODS = ("config", "method", "plan", "text")

_READ_BY_A_REPLAY = ("repair", "windows", "seqlen", "seed", "plan_file")
"""Of the options that all methods have: how what stays is repaired, and on what text."""

_UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|accept option '([^']+)'|unrecognized arguments: --([\w.]+)")


def build_parser(command: str, what: str) -> ArgumentParser:
    """A parser for a short command, with --config."""
    parser = ArgumentParser(
        prog=f"prunelit {command}", description=what, epilog=HELP_EPILOG, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with these options")
    return parser


def parse_command_line(parser: ArgumentParser, arguments: list[str], inner: Collection[str] = ()) -> Any:
    """Parse; an unknown option is answered with the nearest one. Lists may be written `--text a b`.

    Args:
        parser: of `build_parser`.
        arguments: command line after the command.
        inner: names of options inside lists and mappings, which the parser does not list.

    Raises:
        PrunelitError: in one line.
    """
    for action in parser._actions:
        for option in action.option_strings:
            if f"{option}+" in action.option_strings:  # what jsonargparse gives options that may be lists
                arguments = _gather_list_values(arguments, option)
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        message, command = condense_message(str(error)), str(parser.prog).rpartition(" ")[2]
        known = {part for action in parser._actions for part in (action.dest, *action.dest.split("."))} | {*inner}
        unknown = _UNKNOWN.search(message)
        hint = suggest_name(next(filter(None, unknown.groups())), known) if unknown else ""
        method = parser.get_defaults().get("method") if unknown else None
        if method:  # what is no option here may be one of another method
            hint = f"; expected an option of {command} or of method {method!r}{hint}"
        raise PrunelitError(f"{command}: {message}{hint}") from error


def add_method_options(parser: ArgumentParser, arguments: list[str], default: str) -> Any:
    """Add --method, --plan, --text and the options of the method asked for.

    Returns:
        The method's class; with --plan and no --method, one that carries plans out and scores nothing.

    Raises:
        BadOption: not a pruning method, or --plan together with options that only scoring and planning read.
    """
    with show_stage("starting"):
        from prunelit.pruning.callback import PruningCallback  # Lightning: seconds, which `export` does without

    plan, name = peek_option("plan", arguments), peek_option("method", arguments)
    kind = PruningCallback if plan and not name else method_class(name or default)
    if not (isinstance(kind, type) and issubclass(kind, PruningCallback)):
        raise BadOption(f"method {name!r}: expected a subclass of PruningCallback, got {kind!r:.80}")
    parser.add_argument(
        "--method",
        type=str | None,
        default=name or (None if plan else default),
        help="pruning method; `python -m prunelit methods` lists them",
    )
    parser.add_argument("--plan", type=str | None, default=None, help="cut by this plan.json instead of scoring")
    parser.add_argument("--text", type=Sources, default=[text.BUILTIN_TEXT], help="calibration text source(s)")
    skipped = {"calibration"}
    if plan:
        parser.add_argument("--ratio", type=float | None, default=None)
        skipped.add("ratio")
    added = {"ratio", *parser.add_class_arguments(kind, None, skip=skipped, sub_configs=False)}
    unread = {*kind.ignored_options}
    if plan:
        unread |= added - {*_READ_BY_A_REPLAY, *kind.cut_options}
        _check_options_are_read(unread, arguments)
    for action in parser._actions:
        if action.dest in unread or action.dest == "plan_file":  # its name in YAML and Python; here it is --plan
            action.help = argparse.SUPPRESS
        elif action.dest == "repair":  # its type holds what methods can have, the class what this one has
            action.metavar = f"{{{','.join(kind.repair_choices)}}}"
    return kind


def _check_options_are_read(unread: Collection[str], arguments: list[str]) -> None:
    """Check that no option is given that cutting by a plan would pass over in silence.

    Options in config files are no mistake: one file serves a search and a replay of what it found.

    Args:
        unread: names of the method's options that only scoring and planning read.
        arguments: command line.

    Raises:
        BadOption: one or more are given.
    """
    said = dict.fromkeys(word[2:].partition("=")[0].rstrip("+") for word in arguments if word.startswith("--"))
    if found := [name for name in said if name in unread]:
        raise BadOption(
            f"plan: expected no options beside it that choose what goes, got {', '.join(found)}; the plan says what "
            "goes: leave them out, or leave out --plan to score anew"
        )


def build_method(kind: Any, options: Any, others: Collection[str]) -> Any:
    """The method that parsed options ask for.

    Args:
        kind: of `add_method_options`.
        options: parsed.
        others: names of options that are not the method's.
    """
    own = {name: value for name, value in vars(options).items() if name not in (*others, *_NOT_THE_METHODS)}
    if options.plan:
        own |= {"ratio": 0.5, "plan_file": options.plan}  # any ratio: nothing reads it
    return kind(**own)


def _gather_list_values(arguments: list[str], option: str) -> list[str]:
    """`--text a b` as one argument, `--text=["a", "b"]`: argparse's own lists refuse a single value in a file.

    One value that is a JSON list, `--ratios "[0.1, 0.2]"`, is that list; a prompt may begin with a bracket.
    """
    if option not in arguments:
        return arguments
    start = arguments.index(option)
    end = next((i for i, said in enumerate(arguments) if i > start and said.startswith("--")), len(arguments))
    taken = arguments[start + 1 : end]
    given = [f"{option}={taken[0] if _is_json_list(taken) else json.dumps(taken)}"] if taken else [option]
    return [*arguments[:start], *given, *_gather_list_values(arguments[end:], option)]


def _is_json_list(taken: list[str]) -> bool:
    try:
        return len(taken) == 1 and isinstance(json.loads(taken[0]), list)
    except ValueError:
        return False


def peek_option(option: str, arguments: list[str]) -> str | None:
    """The value of an option on the command line or in a --config file, before there is a parser that knows it."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument(f"--{option}")
    peek.add_argument("--config", action="append", default=[])
    found, _ = peek.parse_known_args(arguments)
    if getattr(found, option):
        return str(getattr(found, option))
    for path in reversed(found.config):
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue  # the parser itself says what is wrong with it
        if isinstance(content, dict) and content.get(option):
            return str(content[option])
    return None

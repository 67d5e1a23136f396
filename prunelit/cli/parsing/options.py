"""Shared parts of the short commands: a parser for plain functions, lists of values, options of methods.

Neither torch nor Lightning is imported before a method is built.
"""

import argparse
import json
import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace

from prunelit.cli.config_files import list_configs, read_config
from prunelit.cli.method_cards import list_method_options
from prunelit.cli.parsing.aliases import name_alias
from prunelit.cli.parsing.declarations import (
    UnreadableExpression,
    build_function,
    read_class_value,
    read_constructor,
    resolve_name,
)
from prunelit.data.option_types import Sources
from prunelit.data.yaml_text import parse_yaml
from prunelit.pruning.registry import method_class, methods
from prunelit.runtime.errors import BadOption, PrunelitError, suggest_name
from prunelit.runtime.parser_messages import condense_message
from prunelit.runtime.progress import show_stage

if TYPE_CHECKING:
    from prunelit.pruning.callback import PruningCallback

HELP_EPILOG = (
    "--verbose (-v), anywhere: stages with their seconds, what libraries say, the traceback of an error; --quiet (-q): "
    "warnings and the result only; --log json: stages and results as one JSON object a line, on stderr. A switch may "
    "stand alone, --overwrite for --overwrite true."
)
"""Last lines in the help of every command."""

_COMMAND_OPTIONS = ("config", "method", "plan", "text")

_REPLAY_OPTIONS = ("repair", "windows", "seqlen", "seed", "plan_file")
"""Options of all methods that a replayed plan still uses: the repair of the remaining units, and its text."""

_OPTION = re.compile(r"--|-[A-Za-z]$")
"""How a word begins that is an option and no value; a negative number is a value."""

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
    arguments = write_switch_values(gather_lists(parser, arguments), list_switches(parser))
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        message, command = condense_message(str(error)), str(parser.prog).rpartition(" ")[2]
        known = {part for action in parser._actions for part in (action.dest, *action.dest.split("."))} | {
            *nested_options
        }
        unknown = _UNKNOWN.search(message)
        written = next(filter(None, unknown.groups())) if unknown else ""
        own_name = name_alias(written)  # in a config file: on the command line it was translated
        hint = f"; its name here is {own_name!r}" if own_name in known else suggest_name(written, known)
        method = parser.get_defaults().get("method") if unknown else None
        if method:  # an unknown option may belong to another method
            hint = f"; expected an option of {command} or of method {method!r}{hint}"
        raise PrunelitError(f"{command}: {message}{hint}") from error


class MethodOptions(NamedTuple):
    """What the parser asks of a method.

    Attributes:
        function: has the options as its parameters.
        job_options: see `PruningMethod`, as for the other three.
        ignored_options: that the help does not list.
        cut_options: that may be given with a plan.
        repair_choices: values of `repair`.

    Example:
        >>> declare_method("flap").job_options
        ('target',)
    """

    function: Callable[..., object]
    job_options: tuple[str, ...]
    ignored_options: tuple[str, ...]
    cut_options: tuple[str, ...]
    repair_choices: tuple[str, ...]


_CLASS_VALUES = MethodOptions._fields[1:]


def declare_method(name: str | None) -> MethodOptions:
    """Declare the options of a method, read from its file; a class that lies elsewhere is imported.

    Args:
        name: of the method, or import path of a class; None: a class that replays plans and scores nothing.

    Raises:
        BadOption: no such method, or no pruning method.

    Example: see `MethodOptions`.
    """
    if name is None:
        return _read_method("prunelit.pruning.callback", "PruningCallback", "replay")
    if name in methods():
        try:
            return _read_method(methods()[name].module, methods()[name].class_name, name)
        except UnreadableExpression:
            pass  # it is imported, which takes longer
    cls = import_method(name)
    return MethodOptions(cls, *(getattr(cls, value) for value in _CLASS_VALUES))


def _read_method(module: str, class_name: str, name: str) -> MethodOptions:
    """Read the options of a method from its file, with what is said of each."""
    parameters = read_constructor(module, class_name)
    listed = list_method_options(name) if name in methods() else []
    what = "\n".join(f"    {option.name}: {option.what}" for option in listed)
    summary = methods()[name].summary if name in methods() else "Cut by a plan."
    function = build_function(name, parameters, f"{summary}\n\nArgs:\n{what}" if what else summary)
    return MethodOptions(function, *(tuple(read_class_value(module, class_name, value)) for value in _CLASS_VALUES))


def import_method(name: str | None) -> "type[PruningCallback]":
    """Import the class of a method.

    Args:
        name: of the method, or import path of a class; None: the class that replays plans.

    Raises:
        BadOption: no such method, or no pruning method.

    Example:
        >>> import_method("flap").__name__
        'FLAP'
    """
    with show_stage("starting"):
        # Imports Lightning, which takes seconds and which `export` does not need.
        from prunelit.pruning.callback import PruningCallback

    cls = PruningCallback if name is None else method_class(name)
    if not (isinstance(cls, type) and issubclass(cls, PruningCallback)):
        raise BadOption(f"method {name!r}: expected a subclass of PruningCallback, got {cls!r:.80}")
    return cls


def add_method_options(parser: ArgumentParser, arguments: list[str], default: str) -> None:
    """Add --method, --plan, --text and the options of the chosen method.

    Args:
        parser: result of `build_parser`.
        arguments: command line after the command.
        default: the method without --method; with --plan and no --method nothing is scored.

    Raises:
        BadOption: not a pruning method, or --plan together with options that only scoring and planning read.

    Example: see `prunelit.cli.parsing.parsers`.
    """
    plan, name = peek_option("plan", arguments), peek_option("method", arguments)
    method = declare_method(None if plan and not name else name or default)
    parser.add_argument(
        "--method",
        type=str | None,
        default=name or (None if plan else default),
        help="pruning method; `python -m prunelit methods` lists them",
    )
    parser.add_argument("--plan", type=str | None, default=None, help="cut by this plan.json instead of scoring")
    builtin_text = resolve_name("BUILTIN_TEXT", "prunelit.data.text")
    parser.add_argument("--text", type=Sources, default=[builtin_text], help="calibration text source(s)")
    skipped: set[str | int] = {"calibration", *method.job_options}
    if plan:
        parser.add_argument("--ratio", type=float | None, default=None)
        skipped.add("ratio")
    if isinstance(method.function, type):
        names = parser.add_class_arguments(method.function, None, skip=skipped, sub_configs=False)
    else:
        names = parser.add_function_arguments(method.function, None, skip=skipped, sub_configs=False)
    unread = {*method.ignored_options}
    if plan:
        unread |= {"ratio", *names} - {*_REPLAY_OPTIONS, *method.cut_options}
        _check_options_are_read(unread, arguments)
    for action in parser._actions:
        if action.dest in unread or action.dest == "plan_file":  # --plan is its name on the command line
            action.help = argparse.SUPPRESS
        elif action.dest == "repair":  # its type lists the choices of all methods, the class those of this one
            action.metavar = f"{{{','.join(method.repair_choices)}}}"


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


def build_method(options: Namespace, others: Collection[str]) -> "PruningCallback":
    """Build the method that parsed options ask for; its class is imported here.

    Args:
        options: parsed by a parser with `add_method_options`.
        others: names of options that do not belong to the method.

    Raises:
        BadOption: an option outside its range.

    Example: see `prunelit.cli.prune.run`.
    """
    method_options = {name: value for name, value in vars(options).items() if name not in (*others, *_COMMAND_OPTIONS)}
    if options.plan:
        method_options |= {"ratio": 0.5, "plan_file": options.plan}  # a ratio is required, but a replay does not use it
    return import_method(options.method)(**method_options)


def gather_lists(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """Gather the words behind every option that may be a list: `--text a b` becomes `--text=["a", "b"]`.

    Args:
        parser: knows the options.
        arguments: command line after the command.

    Example:
        >>> parser = ArgumentParser()
        >>> _ = parser.add_argument("--text", type=str | list[str])
        >>> gather_lists(parser, ["--text", "a", "b"])
        ['--text=["a", "b"]']
    """
    for action in parser._actions:
        for option in action.option_strings:
            if f"{option}+" in action.option_strings:  # jsonargparse adds this form to options that may be lists
                arguments = _gather_list_values(arguments, option)
    return arguments


def _gather_list_values(arguments: list[str], option: str) -> list[str]:
    """Gather `--text a b` into one argument, `--text=["a", "b"]`.

    argparse's own lists (nargs) would refuse a single value in a config file. One value that is a list, `--ratios
    "[0.1, 0.2]"` or `--methods "[flap,llm_bip]"`, is that list; a prompt may begin with a bracket, if it is not JSON.
    """
    if option not in arguments:
        return arguments
    start = arguments.index(option)
    end = next((index for index, word in enumerate(arguments) if index > start and _OPTION.match(word)), len(arguments))
    values = arguments[start + 1 : end]
    is_list = _is_list(values, as_yaml=not option.endswith("prompts"))
    gathered = [f"{option}={values[0] if is_list else json.dumps(values)}"] if values else [option]
    return [*arguments[:start], *gathered, *_gather_list_values(arguments[end:], option)]


def _is_list(values: list[str], as_yaml: bool) -> bool:
    if len(values) != 1 or not values[0].startswith("["):
        return False
    try:
        return isinstance(parse_yaml(values[0]) if as_yaml else json.loads(values[0]), list)
    except (ValueError, yaml.YAMLError):
        return False


def _is_switch(action: argparse.Action) -> bool:
    """Whether an option may be true or false."""
    kind = getattr(action, "_typehint", None) or action.type
    return kind is bool or bool in get_args(kind)


def list_switches(parser: ArgumentParser) -> set[str]:
    """List the options of a parser that may be true or false.

    Args:
        parser: of a command.

    Example:
        >>> parser = ArgumentParser()
        >>> _ = parser.add_argument("--overwrite", type=bool)
        >>> list_switches(parser)
        {'--overwrite'}
    """
    return {option for action in parser._actions if _is_switch(action) for option in action.option_strings}


def write_switch_values(arguments: list[str], switches: Collection[str]) -> list[str]:
    """Write `--overwrite` as `--overwrite=true` where no value follows it.

    Args:
        arguments: command line after the command.
        switches: options that are true or false.

    Example:
        >>> write_switch_values(["--overwrite", "--stream", "false", "--out", "a"], {"--overwrite", "--stream"})
        ['--overwrite=true', '--stream', 'false', '--out', 'a']
    """
    following = [*arguments, "--"][1:]
    return [
        f"{word}=true" if word in switches and _OPTION.match(after) else word
        for word, after in zip(arguments, following, strict=True)
    ]


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
    peek.add_argument(f"--{option}", nargs="?", const="true")  # a switch may stand alone
    value = getattr(peek.parse_known_args(arguments)[0], option)
    values = [value, *(read_config(config).get(option) for config in reversed(list_configs(arguments)))]
    return next((str(value) for value in values if value), None)

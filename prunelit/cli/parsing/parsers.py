"""The parser of every short command, built without importing what the command runs.

`fit` and `validate` are Lightning's: see `prunelit.cli.parsing.fit_options`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace

from prunelit.cli.parsing.declarations import build_real_value, declare_function, list_fields
from prunelit.cli.parsing.options import add_method_options, build_parser, parse_command_line, peek_option
from prunelit.data.option_types import Sources
from prunelit.planning.targets import TARGET_OPTIONS, SizeTarget, check_ratio_or_target


class CommandParser(NamedTuple):
    """How the options of a command are declared.

    Attributes:
        description: shown in the help.
        add_options: adds them to a parser; it is given the command line too.
        nested: dataclasses inside its lists and mappings, (module, name), whose fields may be misspelt too.

    Example:
        >>> PARSERS["dashboard"].nested
        ()
    """

    description: str
    add_options: Callable[[ArgumentParser, list[str]], None]
    nested: tuple[tuple[str, str], ...] = ()


def _add_prune_options(parser: ArgumentParser, arguments: list[str]) -> None:
    add_method_options(parser, arguments, "llm_bip")
    _add_parameters(parser, "prunelit.cli.prune", "prune_model", "method", "sources")
    _add_upload_options(parser)


def _add_plan_options(parser: ArgumentParser, arguments: list[str]) -> None:
    add_method_options(parser, arguments, "llm_bip")
    needs_model = not peek_option("plan", arguments)
    parser.add_argument("--model", type=str if needs_model else str | None, required=needs_model, help="model source")
    parser.add_argument("--out", type=str | None, default=None, help="write the plan to this file, or into this folder")
    parser.add_argument("--latency", type=bool, default=False, help="measure small shapes of the model as well")
    parser.add_argument(
        "--estimate",
        type=bool | None,
        default=None,
        help="what it would take, from config.json alone: nothing is loaded or scored (default with parameters, "
        "memory or speedup, unless method, text, out or latency is given)",
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the file of --out")
    _add_parameters(parser, "prunelit.cli.plan", "make_model_plan", "model", "method", "sources", "measured")


def _add_export_options(parser: ArgumentParser, arguments: list[str]) -> None:
    _add_parameters(parser, "prunelit.cli.export", "export_model")
    _add_upload_options(parser)


def _add_upload_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--push_to_hub",
        type=str | None,
        default=None,
        help="also upload the finished model, with its card, to OWNER/NAME on the Hugging Face hub, as a private "
        "repository; reports stay here; the token is that of hf auth login or HF_TOKEN",
    )
    parser.add_argument("--public", type=bool, default=False, help="with push_to_hub: as a public repository")


def _add_evaluate_options(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument(
        "--text", type=Sources | None, default=None, help="text source(s); built-in where nothing else is asked for"
    )
    parser.add_argument("--seqlen", type=int, default=1024, help="of --text: tokens per window")
    parser.add_argument("--windows", type=int | None, default=None, help="of --text: the first so many; null for all")
    parser.add_argument(
        "--stride", type=int | None, default=None, help="of --text: tokens between windows; null: seqlen"
    )
    parser.add_argument("--json", type=str | None, default=None, help="also write the result to this file")
    _add_parameters(parser, "prunelit.evaluation.run", "evaluate_model")


def _add_compare_options(parser: ArgumentParser, arguments: list[str]) -> None:
    _add_parameters(parser, "prunelit.compare.run", "compare_methods")


def _add_dashboard_options(parser: ArgumentParser, arguments: list[str]) -> None:
    _add_parameters(parser, "prunelit.cli.dashboard", "create_dashboard")


def _add_parameters(parser: ArgumentParser, module: str, name: str, *skip: str) -> None:
    parser.add_function_arguments(declare_function(module, name, skip), None, sub_configs=False)


PARSERS: Mapping[str, CommandParser] = {
    "plan": CommandParser("what a cut would leave, and what serves it; no weight is touched", _add_plan_options),
    "prune": CommandParser("cut a model and save it, no training", _add_prune_options),
    "export": CommandParser("write a model in another format, with the proof that it is the same", _add_export_options),
    "evaluate": CommandParser(
        "perplexity, zero-shot tasks, speed and text of any model, alone or against another",
        _add_evaluate_options,
        (("prunelit.evaluation.speed", "Speed"), ("prunelit.evaluation.perplexities", "Text")),
    ),
    "compare": CommandParser(
        "methods x ratios x seeds from one YAML, as tables and figures",
        _add_compare_options,
        (("prunelit.compare.config", "Latency"), ("prunelit.compare.config", "Calibration")),
    ),
    "dashboard": CommandParser("lay out a W&B project for pruning runs: workspace and report", _add_dashboard_options),
}
"""{command: its options}."""


def build_command_parser(command: str, arguments: list[str]) -> ArgumentParser:
    """Build the parser of a short command.

    Args:
        command: a key of `PARSERS`.
        arguments: command line after it; --method and --plan decide which options there are.

    Raises:
        BadOption: no such method.

    Example:
        >>> build_command_parser("export", []).get_defaults().format
        'auto'
    """
    parser = build_parser(command, PARSERS[command].description)
    PARSERS[command].add_options(parser, arguments)
    return parser


def parse_command(command: str, arguments: list[str]) -> Namespace:
    """Parse the command line of a short command. `--help` and `--print_config` print and exit.

    Args:
        command: a key of `PARSERS`.
        arguments: command line after it.

    Returns:
        A jsonargparse namespace; options that are dataclasses are namespaces too, see `build_options`.

    Raises:
        PrunelitError: bad input, in one line.

    Example:
        >>> parse_command("dashboard", ["--project", "p"]).project
        'p'
    """
    nested_options = [field for module, name in PARSERS[command].nested for field in list_fields(module, name)]
    options = parse_command_line(build_command_parser(command, arguments), arguments, nested_options)
    _check_amount(options)
    return options


def _check_amount(options: Namespace) -> None:
    """Check that options of a method say how much is cut; its constructor does so too, after seconds of imports."""
    if not set(TARGET_OPTIONS) <= set(vars(options)) or options.plan or options.get("count") is not None:
        return
    target = SizeTarget.from_options(*(options[name] for name in TARGET_OPTIONS))
    check_ratio_or_target(options.ratio, options.get("budget", "parameters"), options.get("rounding", "above"), target)


def build_options(command: str, arguments: list[str]) -> dict[str, object]:
    """Parse the command line of a short command, and build the dataclasses among its options.

    Args:
        command: a key of `PARSERS`.
        arguments: command line after it.

    Returns:
        {option: value}, without --config.

    Raises:
        PrunelitError: as `parse_command`.

    Example:
        >>> build_options("dashboard", ["--project", "p"])
        {'project': 'p', 'entity': '', 'out': None}
    """
    options = build_command_parser(command, arguments).instantiate(parse_command(command, arguments))
    return {name: build_real_value(value) for name, value in vars(options).items() if name != "config"}

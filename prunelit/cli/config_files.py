"""Config files and misspelt options.

Config files are read before any parser, so that the message names a broken file. Unknown names, in a file or on the
command line, are answered with the nearest known name.
"""

import argparse
import importlib
import inspect
import itertools
import os
import pydoc
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from prunelit.cli.init.files import resolve_config_path, suggest_config
from prunelit.data.yaml_text import parse_yaml
from prunelit.pruning import registry
from prunelit.pruning.registry import list_broken_files, methods
from prunelit.runtime.errors import BadOption, SourceNotFound, suggest_name
from prunelit.runtime.parser_messages import condense_message

_CLASSES = ("callbacks", "loggers", "strategies", "plugins", "profilers")
"""Modules of Lightning whose classes a config may name without the module."""


def list_configs(arguments: list[str]) -> list[str]:
    """List the values of --config on a command line, in its order.

    Args:
        arguments: command line after the command.

    Example:
        >>> list_configs(["--config=a.yaml", "--model", "m", "--config", "b.yaml"])
        ['a.yaml', 'b.yaml']
    """
    words = itertools.pairwise(["", *arguments])
    return [
        word.removeprefix("--config=") for before, word in words if before == "--config" or word.startswith("--config=")
    ]


def resolve_configs(arguments: list[str]) -> list[str]:
    """Replace names of config files that come with prunelit by their paths, and pipes by what is in them.

    A pipe can be read only once, while several readers of a command line need its options.

    Args:
        arguments: command line after the command.

    Example:
        >>> [Path(word).name for word in resolve_configs(["--config", "quickstart", "--config=callbacks/flap"])]
        ['--config', 'quickstart.yaml', 'flap.yaml']
    """
    resolved = list(arguments)
    for index, word in enumerate(arguments):
        if index and arguments[index - 1] == "--config":
            resolved[index] = _resolve_config(word)
        elif word.startswith("--config="):
            resolved[index] = f"--config={_resolve_config(word.removeprefix('--config='))}"
    return resolved


def _resolve_config(config: str) -> str:
    if _is_text(config):
        return config
    is_pipe = os.path.exists(config) and Path(config).is_fifo()
    return f"{_read_text(config)}\n" if is_pipe else resolve_config_path(config)


def _is_text(config: str) -> bool:
    """Whether a value of --config is YAML text itself, which jsonargparse takes too."""
    return "\n" in config or config.lstrip().startswith("{")


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceNotFound(f"config {path!r}: expected a YAML file, got one that is no text") from error
    except OSError as error:
        hint = suggest_config(path) if isinstance(error, FileNotFoundError) else ""
        raise SourceNotFound(f"config {path!r}: cannot be read: {error.strerror}{hint}") from error


def check_config_files(arguments: list[str]) -> None:
    """Read every config file of a command line.

    Args:
        arguments: command line after the command.

    Raises:
        SourceNotFound: a file is missing, is not text, or is not YAML.
        BadOption: a file does not hold options.

    Example:
        >>> check_config_files(["--model", "m"])
    """
    for config in list_configs(arguments):
        read_config(config)


def read_config(config: str) -> Mapping[str, object]:
    """Read the options of a config.

    Args:
        config: value of --config: a file, or YAML text.

    Raises:
        SourceNotFound, BadOption: as `check_config_files`.

    Example:
        >>> read_config("{seed: 1}")
        {'seed': 1}
    """
    try:
        content = parse_yaml(config if _is_text(config) else _read_text(config))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise SourceNotFound(
            f"config {_name_config(config)}: no YAML{where}: {getattr(error, 'problem', None) or error}"
        ) from error
    if not isinstance(content, Mapping):
        got = "an empty file" if content is None else f"{content!r:.60}"
        raise BadOption(f"config {_name_config(config)}: expected options, `name: value`, got {got}")
    return content


def _name_config(config: str) -> str:
    return "given as text" if _is_text(config) else repr(config)


def find_misspelling(arguments: list[str], known: Collection[str], check_classes: bool = True) -> str | None:
    """Find an option that a parser of nested options does not know.

    Args:
        arguments: of the command.
        known: the command's options, as `trainer.max_steps`.
        check_classes: check the classes of the Trainer's section too, which imports Lightning.

    Returns:
        One line with the nearest known name; None where nothing is wrong.

    Example:
        >>> find_misspelling(["--trainer.max_step=5"], ["trainer.max_steps"])
        "--trainer.max_step: expected an option of this command; did you mean 'trainer.max_steps'?"
    """
    all_names = {name.rsplit(".", level)[0] for name in known for level in range(3)} | {
        "config",
        "help",
        "print_config",
    }
    leaves = {name for name in known if not any(other.startswith(f"{name}.") for other in known)}
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].rstrip("+")
        # Options of a class are checked with the class.
        is_inside_class = any(name.startswith(f"{leaf}.") for leaf in leaves)
        if argument.startswith("--") and name not in all_names and not is_inside_class:
            return f"--{name}: expected an option of this command{suggest_name(name, all_names)}"
    for option, value in itertools.pairwise(word for argument in arguments for word in argument.split("=", 1)):
        if check_classes and option == "--trainer.logger" and not value.startswith("{"):
            for message in _find_wrong_class(option, value):
                return message
    for config in list_configs(arguments):
        for message in _find_wrong_names(read_config(config), "", all_names, leaves, check_classes):
            return f"config {_name_config(config)}: {message}"
    return None


def _find_wrong_names(
    options: Mapping[str, object],
    prefix: str,
    all_names: Collection[str],
    leaves: Collection[str],
    check_classes: bool,
) -> Iterator[str]:
    """Yield what is wrong with the names in a config file, level by level."""
    siblings = {name.removeprefix(prefix).partition(".")[0] for name in all_names if name.startswith(prefix)}
    for key, value in options.items():
        name = f"{prefix}{key}".rstrip("+")
        if name not in all_names:
            yield f"{name}: expected an option of this command{suggest_name(str(key), siblings)}"
        elif name not in leaves and isinstance(value, Mapping):
            yield from _find_wrong_names(value, f"{name}.", all_names, leaves, check_classes)
        elif name not in leaves and value is not None and not (isinstance(value, str) and Path(value).is_file()):
            yield f"{name}: expected options, `name: value`, got {value!r:.60}"
        elif check_classes and name.startswith("trainer."):
            for entry in value if isinstance(value, list) else [value]:
                yield from _find_wrong_class(name, entry)


def _find_wrong_class(option: str, entry: object) -> Iterator[str]:
    """Yield what is wrong with an entry {class_path, init_args} of the Trainer's section."""
    from jsonargparse import ArgumentParser  # a slow import that `plan show` does not need

    if isinstance(entry, str) and option.endswith("trainer.logger") and entry.lower() not in ("true", "false", "null"):
        entry = {"class_path": entry}
    if not isinstance(entry, Mapping):
        return
    names = ("class_path", "init_args", "dict_kwargs")
    for name in entry:
        if name not in names:
            yield f"{option}: expected class_path and init_args, got {name!r}{suggest_name(str(name), names)}"
    path, options = str(entry.get("class_path")), entry.get("init_args")
    class_by_name = _list_known_classes()
    try:
        cls = class_by_name.get(path) or pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        if not isinstance(error.value, SyntaxError):
            raise  # a bug in the user's module: its traceback says more
        yield f"{option}: {path!r} cannot be imported: {error.value}"
        return
    if cls is None:
        unread_files = (
            "".join(f"; {message}" for message in list_broken_files().values())
            if path.startswith("prunelit.callbacks.")
            else ""
        )
        yield f"{option}: no class {path!r} can be imported{unread_files or suggest_name(path, class_by_name)}"
    accepted = {
        name
        for base in getattr(cls, "__mro__", ())
        for name, parameter in inspect.signature(base.__init__).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    }
    for name in options if isinstance(options, Mapping) else ():
        if name not in accepted:
            yield f"{option}: {path.rpartition('.')[2]} has no option {name!r}{suggest_name(str(name), accepted)}"
    try:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, None, sub_configs=False)
        parser.parse_object(dict(options or {}))
    except argparse.ArgumentError as error:
        yield f"{option}: {path.rpartition('.')[2]}: {condense_message(str(error))}"


def _list_known_classes() -> dict[str, Any]:
    """List classes by every name that a config may use: Lightning's, and the pruning methods."""
    class_by_name: dict[str, Any] = {}
    for module_name in _CLASSES:
        package = importlib.import_module(f"lightning.pytorch.{module_name}")
        class_by_name |= {name: getattr(package, name) for name in package.__all__}
        class_by_name |= {f"lightning.pytorch.{module_name}.{name}": getattr(package, name) for name in package.__all__}
    package = importlib.import_module(registry.PACKAGE)
    method_classes = (method.class_name for method in methods().values())
    return class_by_name | {f"prunelit.callbacks.{name}": getattr(package, name) for name in method_classes}

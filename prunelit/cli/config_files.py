"""Config files, read before any parser, so that a broken one is named; what in a file or on a line is misspelt."""

import argparse
import importlib
import inspect
import itertools
import pydoc
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from prunelit.pruning import registry
from prunelit.pruning.registry import list_broken_files, methods
from prunelit.runtime.errors import BadOption, SourceNotFound, suggest_file, suggest_name
from prunelit.runtime.parser_messages import condense_message

_CLASSES = ("callbacks", "loggers", "strategies", "plugins", "profilers")
"""Where Lightning keeps classes that a config names without their module."""


def list_config_paths(arguments: list[str]) -> list[str]:
    """The values of --config."""
    following = [value for option, value in itertools.pairwise(arguments) if option == "--config"]
    return following + [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]


def check_config_files(arguments: list[str]) -> None:
    """Read every config file of a command line.

    Raises:
        SourceNotFound: it is missing, no text, or no YAML.
        BadOption: it does not hold options.
    """
    for path in list_config_paths(arguments):
        read_config_file(path)


def read_config_file(path: str) -> Mapping[str, Any]:
    """The options in a config file; nothing for YAML on the command line itself or out of a pipe.

    Raises:
        SourceNotFound, BadOption: as `check_config_files`.
    """
    if "\n" in path or path.lstrip().startswith("{") or Path(path).is_fifo():  # what is read once is the parser's
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise SourceNotFound(f"config {path!r}: no YAML{where}: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise SourceNotFound(f"config {path!r}: expected a YAML file, got one that is no text") from error
    except OSError as error:
        hint = suggest_file(path) if isinstance(error, FileNotFoundError) else ""
        raise SourceNotFound(f"config {path!r}: can not be read: {error.strerror}{hint}") from error
    if not isinstance(content, Mapping):
        got = "an empty file" if content is None else f"{content!r:.60}"
        raise BadOption(f"config {path!r}: expected options, `name: value`, got {got}")
    return content


def find_misspelling(arguments: list[str], known: Collection[str]) -> str | None:
    """What a parser of nested options does not know, in one line with the nearest name; None where nothing is found.

    Args:
        arguments: of the command.
        known: its options, as `trainer.max_steps`.
    """
    every = {name.rsplit(".", level)[0] for name in known for level in range(3)} | {"config", "help", "print_config"}
    leaves = {name for name in known if not any(other.startswith(f"{name}.") for other in known)}
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].rstrip("+")
        inside = any(name.startswith(f"{leaf}.") for leaf in leaves)  # of a class, whose options are its own
        if argument.startswith("--") and name not in every and not inside:
            return f"--{name}: expected an option of this command{suggest_name(name, every)}"
    for option, value in itertools.pairwise(word for argument in arguments for word in argument.split("=", 1)):
        if option == "--trainer.logger" and not value.startswith("{"):
            for said in _find_wrong_class(option, value):
                return said
    for path in list_config_paths(arguments):
        for said in _find_wrong_names(read_config_file(path), "", every, leaves):
            return f"config {path!r}: {said}"
    return None


def _find_wrong_names(
    given: Mapping[Any, Any], above: str, every: Collection[str], leaves: Collection[str]
) -> Iterator[str]:
    below = {name.removeprefix(above).partition(".")[0] for name in every if name.startswith(above)}
    for key, value in given.items():
        name = f"{above}{key}".rstrip("+")
        if name not in every:
            yield f"{name}: expected an option of this command{suggest_name(str(key), below)}"
        elif name not in leaves and isinstance(value, Mapping):
            yield from _find_wrong_names(value, f"{name}.", every, leaves)
        elif name not in leaves and value is not None and not (isinstance(value, str) and Path(value).is_file()):
            yield f"{name}: expected options, `name: value`, got {value!r:.60}"
        elif name.startswith("trainer."):
            for entry in value if isinstance(value, list) else [value]:
                yield from _find_wrong_class(name, entry)


def _find_wrong_class(where: str, entry: Any) -> Iterator[str]:
    """What is wrong with {class_path, init_args}."""
    from jsonargparse import ArgumentParser  # `plan show` does without

    if isinstance(entry, str) and where.endswith("trainer.logger") and entry.lower() not in ("true", "false", "null"):
        entry = {"class_path": entry}
    if not isinstance(entry, Mapping):
        return
    names = ("class_path", "init_args", "dict_kwargs")
    for name in entry:
        if name not in names:
            yield f"{where}: expected class_path and init_args, got {name!r}{suggest_name(str(name), names)}"
    path, options = str(entry.get("class_path")), entry.get("init_args")
    found = _list_known_classes()
    try:
        kind = found.get(path) or pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        if not isinstance(error.value, SyntaxError):
            raise  # a bug, whose traceback says more
        yield f"{where}: {path!r} can not be imported: {error.value}"
        return
    if kind is None:
        unread = (
            "".join(f"; {said}" for said in list_broken_files().values())
            if path.startswith("prunelit.callbacks.")
            else ""
        )
        yield f"{where}: no class {path!r} can be imported{unread or suggest_name(path, found)}"
    accepted = {
        name
        for base in getattr(kind, "__mro__", ())
        for name, parameter in inspect.signature(base.__init__).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    }
    for name in options if isinstance(options, Mapping) else ():
        if name not in accepted:
            yield f"{where}: {path.rpartition('.')[2]} has no option {name!r}{suggest_name(str(name), accepted)}"
    try:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, None, sub_configs=False)
        parser.parse_object(dict(options or {}))
    except argparse.ArgumentError as error:
        yield f"{where}: {path.rpartition('.')[2]}: {condense_message(str(error))}"


def _list_known_classes() -> dict[str, Any]:
    """Classes by the names that a config may call them: Lightning's, and the methods."""
    found: dict[str, Any] = {}
    for module in _CLASSES:
        package = importlib.import_module(f"lightning.pytorch.{module}")
        found |= {name: getattr(package, name) for name in package.__all__}
        found |= {f"lightning.pytorch.{module}.{name}": getattr(package, name) for name in package.__all__}
    package = importlib.import_module(registry.PACKAGE)
    names = (method.class_name for method in methods().values())
    return found | {f"prunelit.callbacks.{name}": getattr(package, name) for name in names}

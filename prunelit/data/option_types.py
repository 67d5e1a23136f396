"""Types of options that several commands share, and a parser of options in mappings."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser

from prunelit.runtime.errors import BadOption
from prunelit.runtime.parser_messages import condense_message


def parse_options(parser: ArgumentParser, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Parse a mapping of options and check their types.

    Args:
        parser: knows the options and their types.
        options: {name: value}, as read from a config file.
        where: place of the mapping in the file, for error messages.

    Raises:
        BadOption: an option is unknown or of another type.

    Example:
        >>> parser = ArgumentParser(exit_on_error=False)
        >>> _ = parser.add_argument("--windows", type=int, default=64)
        >>> parse_options(parser, {"windows": 8}, "calibration")
        {'windows': 8}
    """
    try:
        return vars(parser.parse_object(dict(options)))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise BadOption(f"{where}: {condense_message(str(error))}") from error


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Dtype of a loaded model; "auto" is the one that it was saved in."""

Sources = str | list[str]
"""One or more text sources."""


def wrap_in_list(values: str | Sequence[str]) -> list[str]:
    """Return one or several values as a list.

    Example:
        >>> wrap_in_list("a.txt"), wrap_in_list(("a.txt", "b.txt"))
        (['a.txt'], ['a.txt', 'b.txt'])
    """
    return [values] if isinstance(values, str) else list(values)

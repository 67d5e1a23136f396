"""Types of options that commands and functions share, and parsing them from a mapping."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser

from prunelit.runtime.errors import BadOption
from prunelit.runtime.parser_messages import condense_message


def parse_options(parser: ArgumentParser, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return vars(parser.parse_object(dict(given)))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise BadOption(f"{where}: {condense_message(str(error))}") from error


Dtype = Literal["auto", "float32", "bfloat16", "float16"]

Sources = str | list[str]


def wrap_in_list(given: str | Sequence[str]) -> list[str]:
    """One value or several, as a list."""
    return [given] if isinstance(given, str) else list(given)

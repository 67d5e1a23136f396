"""Types of options that several commands share, and a parser of options in mappings."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser

from prunelit.runtime.errors import BadOption, suggest_name
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


class ClassOptions:
    """The options of a class: what its constructor takes, by name and type.

    Args:
        kind: the class.
        skip: parameters that are not asked for.

    Example:
        >>> class Windows:
        ...     def __init__(self, count: int = 64, seqlen: int = 512): ...
        >>> options = ClassOptions(Windows)
        >>> options.parse_mapping({"count": 8}, "text", "its options")
        {'count': 8}
        >>> options.parse_mapping({"cuont": 8}, "text", "its options")
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.BadOption: text: expected its options, got 'cuont'; did you mean 'count'?
    """

    def __init__(self, kind: type, skip: Collection[str] = ()):
        self._typed_parser = ArgumentParser(exit_on_error=False)
        self._typed_parser.add_class_arguments(kind, None, skip={*skip}, sub_configs=False)
        self.names = frozenset(vars(self._typed_parser.get_defaults()))

    def parse_mapping(
        self, options: Mapping[str, Any], where: str, expected: str, others: Collection[str] = ()
    ) -> dict[str, Any]:
        """Check names and types of options.

        Args:
            options: {name: value}.
            where: begins the message.
            expected: in the message about a name that is not known.
            others: further names that may be meant by it.

        Returns:
            The options that were given, in the types of the class.

        Raises:
            BadOption: an option is unknown, missing or of another type.
        """
        for name in options:
            if name not in self.names:
                hint = suggest_name(name, {*self.names, *others}) or f"; there are {', '.join(sorted(self.names))}"
                raise BadOption(f"{where}: expected {expected}, got {name!r}{hint}")
        typed = parse_options(self._typed_parser, options, where)
        return {name: typed[name] for name in options}


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

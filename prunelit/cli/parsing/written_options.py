"""Options as people read them on cards and help pages: name, default as in YAML, documentation in one line."""

import ast
import json
import re
from contextlib import suppress
from typing import NamedTuple

from prunelit.cli.parsing import declarations


class WrittenOption(NamedTuple):
    """An option as it is shown.

    Attributes:
        name: as on the command line, without dashes.
        default: as in YAML; None where the option is required.
        what: its documentation in one line.

    Example:
        >>> list_written_options("prunelit.callbacks.flap", "FLAP")[0].default
        'null'
    """

    name: str
    default: str | None
    what: str


def list_written_options(module: str, class_name: str, function: str = "__init__") -> list[WrittenOption]:
    """List the parameters of a class's function as its source has them; none where the class does not define it.

    Args:
        module: that defines the class, which is not imported.
        class_name: of the class.
        function: of the class.

    Raises:
        prunelit.cli.parsing.declarations.UnreadableExpression: the module has no source.

    Example: see `WrittenOption`.
    """
    node = declarations.find_function(module, class_name, function)
    if node is None:
        return []
    documentation = declarations.read_documentation(module, class_name)
    positional = [*node.args.posonlyargs, *node.args.args]
    defaults = [*[None] * (len(positional) - len(node.args.defaults)), *node.args.defaults, *node.args.kw_defaults]
    return [
        WrittenOption(
            argument.arg,
            None if default is None else _write_yaml(default, module),
            re.sub(r"\bNone\b", "null", documentation.get(argument.arg, "")),
        )
        for argument, default in zip([*positional, *node.args.kwonlyargs], defaults, strict=True)
        if argument.arg != "self"
    ]


def _write_yaml(node: ast.expr, module: str) -> str:
    with suppress(declarations.UnreadableExpression):
        value = declarations.evaluate_expression(node, module)
        return value if isinstance(value, str) else json.dumps(value)
    return ast.unparse(node)

"""Options of a text source, written behind its name: `chats.jsonl#column=messages,refused=skip`."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from prunelit.runtime.errors import BadOption, suggest_name

Refusal = Literal["error", "skip", "fold"]
Template = Literal["auto", "none"]


@dataclass(frozen=True)
class SourceOptions:
    """How the rows of a source are read.

    Args:
        column: the column to read; None: found by its name, see `prunelit.data.rows.row_shapes`.
        split: of a folder or a hub dataset; None: "train".
        refused: what to do with a chat that the chat template refuses: "error" stops; "skip" leaves it out and says so;
            "fold" writes a system message into the first question, joins neighbours of one role, and tries again.
        template: "auto" writes chats with the tokenizer's chat template; "none" under plain headings, as where it has
            none.

    Example:
        >>> parse_source("chats.jsonl#refused=skip")
        ('chats.jsonl', SourceOptions(column=None, split=None, refused='skip', template='auto'))
    """

    column: str | None = None
    split: str | None = None
    refused: Refusal = "error"
    template: Template = "auto"


_NAMES = [field.name for field in fields(SourceOptions)]
_CHOICES = {"refused": get_args(Refusal), "template": get_args(Template)}
_FRAGMENT = re.compile(r"#(?=\w+=)")


def parse_source(source: str) -> tuple[str, SourceOptions]:
    """Split a source into its name and its options.

    Args:
        source: a text source; a file whose name holds a `#` is named as it is.

    Returns:
        The source without options, and the options.

    Raises:
        BadOption: an option is unknown or has another value than expected.

    Example:
        >>> parse_source("pages.csv#column=body")[1].column
        'body'
        >>> parse_source("pages.csv#column_=body")
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.BadOption: text 'pages.csv#column_=body': expected column, split, refused, template \
behind the #, got 'column_'; did you mean 'column'?
    """
    match = _FRAGMENT.search(source)
    if match is None or Path(source).expanduser().exists():
        return source, SourceOptions()
    values: dict[str, str] = {}
    for option in source[match.end() :].split(","):
        name, _, value = option.partition("=")
        if name not in _NAMES:
            raise BadOption(
                f"text {source!r}: expected {', '.join(_NAMES)} behind the #, got {name!r}{suggest_name(name, _NAMES)}"
            )
        if not value or value not in _CHOICES.get(name, (value,)):
            expected = " or ".join(_CHOICES.get(name, ("a name",)))
            raise BadOption(f"text {source!r}: {name}: expected {expected}, got {value!r}")
        values[name] = value
    return source[: match.start()], SourceOptions(**values)  # type: ignore[arg-type]  # checked above

"""Text and JSON files, written atomically: a reader sees the old file or the new one; and text of strangers, shown."""

import json
import re
from pathlib import Path
from typing import Any

from prunelit.runtime.atomic_files import replace_file

JsonObject = dict[str, Any]
"""A JSON object; whoever makes it says what its names are."""


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that steer a terminal, turn the direction of writing, or cannot be encoded, but for tab and newline."""


def escape_controls(text: str) -> str:
    """Write control characters as `\\uXXXX`, so that text of strangers cannot steer the terminal.

    Names, texts and messages of libraries hold what files hold: colours, cleared screens, titles, links. JSON stays the
    same JSON.

    Example:
        >>> print(escape_controls("red \\x1b[31mfish"))
        red \\u001b[31mfish
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically.

    Raises:
        OutputNotWritable: see `write_text`.

    Example: see `prunelit.cli.dashboard`, which uses it.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically.

    Raises:
        OutputNotWritable: the disk refuses; the old file is unchanged.

    Example: see `tests/runtime/test_atomic_files.py`.
    """
    replace_file(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))

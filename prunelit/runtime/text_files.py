"""Text and JSON files, written atomically: a reader sees the old file or the new one."""

import json
from pathlib import Path
from typing import Any

from prunelit.runtime.atomic_files import replace_file

JsonObject = dict[str, Any]
"""A JSON object; whoever makes it says what its names are."""


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

"""Text and JSON files, written atomically: a reader sees the old one or the new one."""

import json
import os
from pathlib import Path
from typing import Any

from prunelit.runtime.errors import OutputNotWritable


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically.

    Raises:
        OutputNotWritable: see `write_text`.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically.

    Raises:
        OutputNotWritable: the disk refused; the old one is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OutputNotWritable(f"output {str(path)!r}: can not be written: {error.strerror or error}") from error

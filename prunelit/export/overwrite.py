"""What an output may replace: what prunelit wrote, and nothing that is in use.

The mark of our folders is proof.json, which is in every folder that is written, proved or not. A plan alone is no mark:
`plan --out` puts one anywhere.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from prunelit.core.plan import PLAN_FORMAT
from prunelit.export.proof.compare import PROOF_FILE
from prunelit.runtime.atomic_files import check_kind, explain_refusal, try_writing
from prunelit.runtime.errors import OutputNotWritable

_ADAPTER_CONFIG = "adapter_config.json"
_OLDER_OUTPUT_FILES = ({"config.json", "report.json"}, {_ADAPTER_CONFIG})
"""What stands beside plan.json in folders of versions that did not write proof.json: of `prune`, and of adapters."""


def check_output(
    target: str | os.PathLike[str], overwrite: bool = False, file: bool = False, reads: Collection[str] = ()
) -> None:
    """Create the parents of an output that is written anew and check that it can be, before any work is done.

    Args:
        target: a folder, or a file.
        overwrite: it may be there already: a file, or a folder that prunelit wrote (`is_prunelit_output`).
        file: it is a file.
        reads: sources that are read for it; those that are no path of this machine do not matter.

    Raises:
        OutputNotWritable: a file is in the way of a folder or the other way round; something is there, and `overwrite`
            is off, or it is not prunelit's, or holds the working directory or one of `reads`; or writing is refused.
    """
    path = Path(target)
    with explain_refusal(path):
        check_kind(path, file)
        if path.exists() if file else path.is_dir() and any(path.iterdir()):
            _check_replaceable_output(path, overwrite, file, reads)
        try_writing(path)


def _check_replaceable_output(path: Path, overwrite: bool, file: bool, reads: Collection[str]) -> None:
    name, whole = f"output {str(path)!r}", path.resolve()
    held = {"the working directory": Path.cwd()}
    held |= {f"{source!r}, which is read": Path(source).expanduser() for source in reads}
    for what, place in held.items():
        if os.path.exists(place) and place.resolve().is_relative_to(whole):
            raise OutputNotWritable(f"{name}: expected a place of its own, got that of {what}; choose another path")
    ours = file or is_prunelit_output(path)
    if not overwrite:
        expected = "a new file" if file else "a new or empty folder"
        instead = " or pass --overwrite true" if ours else "; --overwrite true replaces only what prunelit wrote"
        raise OutputNotWritable(f"{name}: expected {expected}; choose another path{instead}")
    if not ours:
        raise OutputNotWritable(
            f"{name}: expected an empty folder or one that prunelit wrote, got one without proof.json; choose another "
            "path, or remove it yourself"
        )


def is_prunelit_output(folder: Path) -> bool:
    """Whether prunelit wrote a folder's content, by the files in it; nothing else is read."""
    if {"format", "passed"} <= _read_json_object(folder / PROOF_FILE).keys():
        return True
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if (
        any(beside <= names for beside in _OLDER_OUTPUT_FILES)
        and _read_json_object(folder / "plan.json").get("format") == PLAN_FORMAT
    ):
        return True
    # The adapters of an older run that cut nothing, beside the model that they were merged into.
    return _ADAPTER_CONFIG in names and folder.name == "adapter" and is_prunelit_output(folder.parent / "model")


def _read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

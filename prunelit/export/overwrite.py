"""Check outputs: prunelit replaces only folders that it wrote, and nothing that is in use.

A folder that prunelit wrote is recognised by its proof.json, which is written with or without a proof. A plan alone
does not mark a folder, since `plan --out` writes one anywhere.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from prunelit.core.plan import PLAN_FORMATS
from prunelit.export.proof.compare import PROOF_FILE
from prunelit.runtime.atomic_files import check_kind, explain_refusal, try_replacing_folder, try_writing
from prunelit.runtime.errors import OutputNotWritable

_ADAPTER_CONFIG = "adapter_config.json"
_OLDER_OUTPUT_FILES = ({"config.json", "report.json"}, {_ADAPTER_CONFIG})
"""Files beside plan.json in folders of versions that did not write proof.json: those of `prune`, and of adapters."""


def check_output(
    target: str | os.PathLike[str], overwrite: bool = False, file: bool = False, reads: Collection[str] = ()
) -> None:
    """Check that an output can be written, before any work is done, and create its parent folders.

    Args:
        target: a folder, or a file.
        overwrite: whether it may replace a file, or a folder that prunelit wrote (`is_prunelit_output`).
        file: whether the target is a file.
        reads: sources that are read for the output; those that are no local paths are ignored.

    Raises:
        OutputNotWritable: a file is in the place of a folder, or a folder in that of a file; or the target exists and
            must not be replaced: `overwrite` is off, prunelit did not write it, or it holds the working directory or
            one of `reads`; or the system refuses writing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_output(Path(folder, "new"))
        ...     Path(folder, "words.txt").touch()
        ...     check_output(folder, overwrite=True)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        prunelit.runtime.errors.OutputNotWritable: output ...: expected an empty folder or one that prunelit wrote...
    """
    path = Path(target)
    with explain_refusal(path):
        check_kind(path, file)
        if path.exists() if file else path.is_dir() and any(path.iterdir()):
            _check_replaceable_output(path, overwrite, file, reads)
        if file:
            try_writing(path)
        else:
            try_replacing_folder(path.resolve())


def _check_replaceable_output(path: Path, overwrite: bool, file: bool, reads: Collection[str]) -> None:
    """Check that an existing output may be replaced; arguments and errors are those of `check_output`."""
    name, resolved = f"output {str(path)!r}", path.resolve()
    paths_in_use = {"the working directory": Path.cwd()}
    paths_in_use |= {f"{source!r}, which is read": Path(source).expanduser() for source in reads}
    for description, used in paths_in_use.items():
        # os.path.exists, since Path.exists raises where a source is no valid path (too long a name).
        if os.path.exists(used) and used.resolve().is_relative_to(resolved):
            raise OutputNotWritable(
                f"{name}: expected a place of its own, got that of {description}; choose another path"
            )
    is_replaceable = file or is_prunelit_output(path)
    if not overwrite:
        expected = "a new file" if file else "a new or empty folder"
        advice = "; --overwrite true replaces only what prunelit wrote"
        if is_replaceable:
            advice = " or pass --overwrite true"
        raise OutputNotWritable(f"{name}: expected {expected}; choose another path{advice}")
    if not is_replaceable:
        raise OutputNotWritable(
            f"{name}: expected an empty folder or one that prunelit wrote, got one without proof.json; choose another "
            "path, or remove it yourself"
        )


def is_prunelit_output(folder: Path) -> bool:
    """Tell from the files in a folder whether prunelit wrote it.

    Example: see `tests/export/test_overwrite.py`.
    """
    if {"format", "passed"} <= _read_json_object(folder / PROOF_FILE).keys():
        return True
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if (
        any(beside <= names for beside in _OLDER_OUTPUT_FILES)
        and _read_json_object(folder / "plan.json").get("format") in PLAN_FORMATS
    ):
        return True
    # An older run that pruned nothing wrote its adapters without a plan, beside the model that they were merged into.
    return _ADAPTER_CONFIG in names and folder.name == "adapter" and is_prunelit_output(folder.parent / "model")


def _read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

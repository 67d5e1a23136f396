"""Whose a folder is: what prunelit wrote may be replaced; all else is somebody's.

The mark is proof.json, which stands in every folder that is written, proved or not. A plan alone is none: `plan --out`
puts it anywhere.
"""

import json
from pathlib import Path
from typing import Any

from prunelit.core.plan import FORMAT
from prunelit.export.proof.compare import PROOF

_ADAPTER = "adapter_config.json"
_OLDER = ({"config.json", "report.json"}, {_ADAPTER})
"""What stands beside plan.json in folders of versions that did not write proof.json: of `prune`, and of adapters."""


def is_ours(folder: Path) -> bool:
    """Whether prunelit wrote a folder's content, by the files in it; nothing else is read."""
    if {"format", "passed"} <= _content(folder / PROOF).keys():
        return True
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if any(beside <= names for beside in _OLDER) and _content(folder / "plan.json").get("format") == FORMAT:
        return True
    # The adapters of an older run that cut nothing, beside the model that they were merged into.
    return _ADAPTER in names and folder.name == "adapter" and is_ours(folder.parent / "model")


def _content(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

"""What of hyperparameters may leave this machine: numbers, switches and short plain words; no path, key or text."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]{0,23}")
_SECRET = re.compile(r"key|token|secret|passw|credential|prompt|text|user|host", re.IGNORECASE)


def keep_plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of them is plain; the rest is left out.

    Strings stay where they are one short word, name no file, and stand under a name that promises no secret.
    """
    found = {}
    for name, value in values.items():
        kept = keep_plain_values(value) if isinstance(value, Mapping) else _keep_plain_value(name, value)
        if kept is not None and kept != {}:
            found[str(name)] = kept
    return found


def _keep_plain_value(name: str, value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        kept = [_keep_plain_value(name, item) for item in value]
        return None if None in kept else kept
    if isinstance(value, str) and _WORD.fullmatch(value) and not _SECRET.search(str(name)) and not Path(value).exists():
        return value
    return None

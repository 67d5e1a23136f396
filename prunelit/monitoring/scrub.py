"""Hyperparameters that may leave this machine: numbers, switches and short plain words; no path, key or text."""

import re
from collections.abc import Mapping
from pathlib import Path

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]{0,23}")
_SECRET = re.compile(r"key|token|secret|passw|credential|prompt|text|user|host", re.IGNORECASE)


def keep_plain_values(values: Mapping[str, object]) -> dict[str, object]:
    """Keep the plain values of a mapping, and of the mappings inside it.

    A string is kept if it is one short word, names no existing file, and its name does not suggest a secret or a text.

    Args:
        values: hyperparameters.

    Example:
        >>> keep_plain_values({"lr": 0.1, "method": "flap", "api_key": "abc", "data": {"path": "/home/me"}})
        {'lr': 0.1, 'method': 'flap'}
    """
    plain = {}
    for name, value in values.items():
        plain_value = keep_plain_values(value) if isinstance(value, Mapping) else _keep_plain_value(name, value)
        if plain_value is not None and plain_value != {}:
            plain[str(name)] = plain_value
    return plain


def _keep_plain_value(name: str, value: object) -> object:
    """Return a plain value unchanged, and None for any other."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        items = [_keep_plain_value(name, item) for item in value]
        return None if None in items else items
    if isinstance(value, str) and _WORD.fullmatch(value) and not _SECRET.search(str(name)) and not Path(value).exists():
        return value
    return None

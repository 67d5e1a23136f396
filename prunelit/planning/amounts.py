"""Amounts as people write them: 6B parameters, 12GiB of memory."""

import math
import re
from collections.abc import Mapping

from prunelit.runtime.errors import BadOption

Amount = int | float | str
"""A number, or a number with a unit, as on a command line."""

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)")
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTE_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_parameter_count(value: Amount) -> int:
    """Read a number of parameters.

    Args:
        value: such as "6B", "600M", "1.5e9" or 1500000000.

    Raises:
        BadOption: another unit, no number, or none above zero.

    Example:
        >>> parse_parameter_count("6B"), parse_parameter_count("1.5e9"), parse_parameter_count("600M")
        (6000000000, 1500000000, 600000000)
        >>> parse_parameter_count("6GB")
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: parameters: expected a number such as 6B, 600M or 1.5e9, got '6GB'
    """
    return _parse_amount("parameters", value, _COUNT_UNITS, "a number such as 6B, 600M or 1.5e9")


def parse_memory_size(value: Amount) -> int:
    """Read a size in memory; the unit is part of it, because a bare 12 could be bytes or gigabytes.

    Args:
        value: such as "12GiB" (of 2**30 bytes), "12GB" (of 10**9 bytes) or "800MB".

    Raises:
        BadOption: another unit or none, no number, or none above zero.

    Example:
        >>> parse_memory_size("12GiB"), parse_memory_size("12GB"), parse_memory_size("800MB")
        (12884901888, 12000000000, 800000000)
        >>> parse_memory_size("12")
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: memory: expected a size with its unit, such as 12GiB, 12GB or 800MB, got '12'
    """
    return _parse_amount("memory", value, _BYTE_UNITS, "a size with its unit, such as 12GiB, 12GB or 800MB")


def _parse_amount(name: str, value: Amount, units: Mapping[str, int], expected: str) -> int:
    text = f"{value:.17g}" if isinstance(value, float) else str(value)
    match = None if isinstance(value, bool) else _NUMBER.fullmatch(text.strip())
    if match is None or match[2] not in units or not 1 <= (amount := float(match[1]) * units[match[2]]) < math.inf:
        raise BadOption(f"{name}: expected {expected}, got {value!r:.40}")
    return round(amount)


def format_parameter_count(count: float) -> str:
    """Format a number of parameters as people write it.

    Example:
        >>> format_parameter_count(8030261248), format_parameter_count(134515008), format_parameter_count(5160)
        ('8.03B', '134.5M', '5,160')
    """
    for size, digits, unit in ((1e9, 2, "B"), (1e6, 1, "M")):
        if count >= size:
            return f"{count / size:.{digits}f}{unit}"
    return f"{count:,.0f}"


def format_memory_size(size: float) -> str:
    """Format bytes in binary units.

    Example:
        >>> format_memory_size(12884901888), format_memory_size(800000000), format_memory_size(5000)
        ('12.00 GiB', '762.9 MiB', '4.9 KiB')
    """
    for unit, digits, name in ((2**30, 2, "GiB"), (2**20, 1, "MiB")):
        if size >= unit:
            return f"{size / unit:.{digits}f} {name}"
    return f"{size / 1024:.1f} KiB"

"""The file format of a plan: JSON that is strict to read and easy to edit. It does not know what a plan means.

Indices are written as ranges, "0-511, 515, 600-1023", and read as ranges or as lists of numbers. Repeated names, NaN
and unknown names are errors, because plans are also edited by hand.
"""

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from prunelit.runtime.errors import BadPlan

_RANGE_PATTERN = re.compile(r"(0|[1-9]\d{0,9})(?:\s*-\s*(0|[1-9]\d{0,9}))?", re.ASCII)


def parse_plan_json(text: str) -> Any:
    """Parse JSON text.

    Raises:
        BadPlan: not JSON, a name twice in one object, NaN or infinity, or text that cannot be encoded as UTF-8.

    Example:
        >>> parse_plan_json('{"layers": [1, 2]}')
        {'layers': [1, 2]}
    """
    try:
        data = json.loads(text, object_pairs_hook=_reject_repeated_names, parse_constant=_reject_constant)
        json.dumps(data, ensure_ascii=False).encode()
    except RecursionError as error:
        raise BadPlan("plan: not JSON of a plan: lists in lists in lists") from error
    except UnicodeEncodeError as error:
        raise BadPlan("plan: not JSON of a plan: half of a character in a text") from error
    except ValueError as error:
        raise BadPlan(f"plan: not JSON: {error}; the file is cut short or a comma or bracket is wrong") from error
    return data


def _reject_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise BadPlan(f"plan: {name!r:.40}: expected once, got it twice in one object")
    return dict(pairs)


def _reject_constant(name: str) -> None:
    raise BadPlan(f"plan: expected numbers, got {name}")


def check_object_names(
    where: str, data: Any, names: Collection[str], optional: Collection[str] = ()
) -> Mapping[str, Any]:
    """Check that `data` is an object with all of `names`, and at most those of `optional` besides; return it.

    Raises:
        BadPlan: says which name is missing, or which is unknown and the nearest known one.

    Example:
        >>> check_object_names("plan", {"seeds": 0}, ["seed"])
        Traceback (most recent call last):
        prunelit.runtime.errors.BadPlan: plan: unknown name 'seeds': expected seed; did you mean 'seed'?
    """
    if not isinstance(data, Mapping):
        raise BadPlan(f"{where}: expected an object with {', '.join(names)}, got {data!r:.60}")
    for name in data:
        if name not in names and name not in optional:
            near = difflib.get_close_matches(name, [*names, *optional], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadPlan(f"{where}: unknown name {name!r:.40}: expected {', '.join([*names, *optional])}{hint}")
    for name in names:
        if name not in data:
            raise BadPlan(f"{where}: {name}: expected it to be there, got {', '.join(data) or 'nothing'}")
    return data


def format_index_ranges(indices: Sequence[int]) -> str:
    """Format sorted indices as text.

    Example:
        >>> format_index_ranges((0, 1, 2, 5))
        '0-2, 5'
    """
    if not indices:
        return ""
    breaks = [place for place, (a, b) in enumerate(pairwise(indices), 1) if b != a + 1]
    parts = [indices[start:end] for start, end in pairwise([0, *breaks, len(indices)])]
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def parse_index_ranges(where: str, value: Any, size: int) -> tuple[int, ...]:
    """Parse indices from text as `format_index_ranges` writes it, or from a list of numbers.

    Args:
        where: start of the error message.
        value: the text or list.
        size: the indices must be below it.

    Raises:
        BadPlan: anything else, or no index at all. Order and repeats are checked by the plan.

    Example:
        >>> parse_index_ranges("plan", "0-2, 5", size=8)
        (0, 1, 2, 5)
    """
    if isinstance(value, str):
        numbers = list(_expand_index_ranges(where, value, size))
    elif isinstance(value, list):
        numbers = value
    else:
        raise BadPlan(f'{where}: expected indices as text ("0-5, 8") or a list of numbers, got {value!r:.60}')
    if not numbers:
        raise BadPlan(f"{where}: expected at least one index, got none; write null for a block that is removed")
    for number in numbers:
        if type(number) is not int:
            raise BadPlan(f"{where}: expected integers, got {number!r:.40}")
        if not 0 <= number < size:
            raise BadPlan(f"{where}: expected indices in [0, {size}), got {number!r:.40}")
    return tuple(numbers)


def _expand_index_ranges(where: str, text: str, size: int) -> Iterable[int]:
    for part in text.split(","):
        span = _RANGE_PATTERN.fullmatch(part.strip())
        if span is None:
            raise BadPlan(f'{where}: expected indices like "0-5, 8", got {part.strip()!r:.40}')
        first, last = int(span[1]), int(span[2] or span[1])
        if first > last or last >= size:
            raise BadPlan(f"{where}: expected ranges upwards in [0, {size}), got {part.strip()!r:.40}")
        yield from range(first, last + 1)


def format_plan_json(head: Mapping[str, Any], lists: Mapping[str, Sequence[Any]]) -> str:
    """Format JSON text: `head` indented, then each list with one item per line.

    Example:
        >>> print(format_plan_json({"seed": 0}, {"layers": [1, 2]}), end="")
        {
         "seed": 0,
         "layers": [
          1,
          2
         ]
        }
    """
    body = json.dumps(head, indent=1)[:-2]
    for name, items in lists.items():
        lines = ",\n".join(f"  {json.dumps(item)}" for item in items)
        body += f',\n "{name}": [\n{lines}\n ]'
    return f"{body}\n}}\n"

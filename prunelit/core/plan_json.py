"""How a plan stands in a file: JSON that is strict to read and pleasant to edit, without the meaning of a plan.

Indices are written as ranges, "0-511, 515, 600-1023", and read as such or as lists of numbers. Strict: a name said
twice, NaN, and names that nobody knows are errors, since what is edited by hand goes wrong by hand.
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
    """The content of JSON text.

    Raises:
        BadPlan: not JSON, a name twice in one object, NaN or infinity, or text that no file can hold.
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
    """`data`, once it is an object with all of `names`, and nothing else but `optional`.

    Raises:
        BadPlan: with the name that is missing, or unknown and what it may have meant.
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
    """Sorted indices as text: (0, 1, 2, 5) -> "0-2, 5"."""
    if not indices:
        return ""
    breaks = [place for place, (a, b) in enumerate(pairwise(indices), 1) if b != a + 1]
    parts = [indices[start:end] for start, end in pairwise([0, *breaks, len(indices)])]
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def parse_index_ranges(where: str, said: Any, size: int) -> tuple[int, ...]:
    """Indices below `size`, from text as `format_index_ranges` writes it or from a list of numbers.

    Raises:
        BadPlan: anything else, or none at all; order and repeats are for the plan to judge.
    """
    if isinstance(said, str):
        found = list(_expand_index_ranges(where, said, size))
    elif isinstance(said, list):
        found = said
    else:
        raise BadPlan(f'{where}: expected indices as text ("0-5, 8") or a list of numbers, got {said!r:.60}')
    if not found:
        raise BadPlan(f"{where}: expected at least one index, got none; a block that goes altogether is null")
    for item in found:
        if type(item) is not int:
            raise BadPlan(f"{where}: expected integers, got {item!r:.40}")
        if not 0 <= item < size:
            raise BadPlan(f"{where}: expected indices in [0, {size}), got {item!r:.40}")
    return tuple(found)


def _expand_index_ranges(where: str, said: str, size: int) -> Iterable[int]:
    for part in said.split(","):
        span = _RANGE_PATTERN.fullmatch(part.strip())
        if span is None:
            raise BadPlan(f'{where}: expected indices like "0-5, 8", got {part.strip()!r:.40}')
        first, last = int(span[1]), int(span[2] or span[1])
        if first > last or last >= size:
            raise BadPlan(f"{where}: expected ranges upwards in [0, {size}), got {part.strip()!r:.40}")
        yield from range(first, last + 1)


def format_plan_json(head: Mapping[str, Any], lists: Mapping[str, Sequence[Any]]) -> str:
    """JSON text: `head` indented, then lists with one item a line."""
    body = json.dumps(head, indent=1)[:-2]
    for name, items in lists.items():
        lines = ",\n".join(f"  {json.dumps(item)}" for item in items)
        body += f',\n "{name}": [\n{lines}\n ]'
    return f"{body}\n}}\n"

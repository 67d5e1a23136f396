"""One style of progress bar: shown on a terminal, on rank zero, silent elsewhere."""

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, unit: str = "batch") -> Iterator[T]:
    """Iterate with a progress bar that says `what`, how far it is (in `unit`s) and how long it will take."""
    from tqdm.auto import tqdm

    quiet = True if int(os.environ.get("LOCAL_RANK", "0") or 0) > 0 else None  # None: off when not a terminal
    yield from tqdm(items, desc=what, unit=unit, disable=quiet, leave=False)

"""`plan show FILE` and `plan diff A B`: plans as files, answered without torch.

`diff` exits with 0 where both plans cut alike, 1 where they differ, 2 where they can not be compared.
"""

import sys

from prunelit.core.plan import PruningPlan
from prunelit.core.plan_diff import differences
from prunelit.report.plan_card import card, difference
from prunelit.runtime.errors import PrunelitError, nearest

WORDS = ("show", "diff")


def run(arguments: list[str]) -> int:
    """Carry out `arguments`, one of WORDS and its files.

    Raises:
        PrunelitError: another number of files; BadPlan: one is no plan, or they are for different models.
    """
    word, paths = arguments[0], arguments[1:]
    if word not in WORDS:
        raise PrunelitError(f"plan: expected options, or one of {', '.join(WORDS)}, got {word!r}{nearest(word, WORDS)}")
    wanted = 1 if word == "show" else 2
    if len(paths) != wanted or any(path.startswith("-") for path in paths):
        files = "one plan file" if wanted == 1 else "two plan files"
        raise PrunelitError(f"plan {word}: expected {files}, got {' '.join(paths) or 'nothing'}")
    first = PruningPlan.load(paths[0])
    if word == "show":
        return _say(card(first), 0)
    second = PruningPlan.load(paths[1])
    found = differences(first, second)
    if not found:
        return _say(f"both keep the same units: plan {first.digest}", 0)
    return _say(difference(first, second, found, ("A", "B")), 1)


def _say(lines: str, code: int) -> int:
    sys.stdout.write(lines + "\n")
    return code

"""`plan show FILE` and `plan diff A B`: plans as files, answered without torch.

`diff` exits with 0 where both plans cut alike, 1 where they differ, 2 where they can not be compared.
"""

import sys

from prunelit.core.plan import PruningPlan
from prunelit.core.plan_diff import find_plan_differences
from prunelit.report.plan_card import render_plan_card, render_plan_difference
from prunelit.runtime.errors import PrunelitError, suggest_name

WORDS = ("show", "diff")


def run_plan_files(arguments: list[str]) -> int:
    """Carry out `arguments`, one of WORDS and its files.

    Raises:
        PrunelitError: another number of files; BadPlan: one is no plan, or they are for different models.
    """
    word, paths = arguments[0], arguments[1:]
    if word not in WORDS:
        raise PrunelitError(
            f"plan: expected options, or one of {', '.join(WORDS)}, got {word!r}{suggest_name(word, WORDS)}"
        )
    wanted = 1 if word == "show" else 2
    if len(paths) != wanted or any(path.startswith("-") for path in paths):
        files = "one plan file" if wanted == 1 else "two plan files"
        raise PrunelitError(f"plan {word}: expected {files}, got {' '.join(paths) or 'nothing'}")
    first = PruningPlan.load(paths[0])
    if word == "show":
        return _print_lines(render_plan_card(first), 0)
    second = PruningPlan.load(paths[1])
    found = find_plan_differences(first, second)
    if not found:
        return _print_lines(f"both keep the same units: plan {first.digest}", 0)
    return _print_lines(render_plan_difference(first, second, found, ("A", "B")), 1)


def _print_lines(lines: str, code: int) -> int:
    sys.stdout.write(lines + "\n")
    return code

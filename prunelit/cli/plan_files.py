"""`plan show FILE` and `plan diff A B`: commands on plan files, answered without importing torch.

`diff` exits with 0 where both plans prune alike, 1 where they differ, 2 where they cannot be compared.
"""

import sys
from pathlib import Path

from prunelit.core.plan import PruningPlan
from prunelit.core.plan_diff import find_plan_differences
from prunelit.report.plan_card import render_plan_card, render_plan_difference
from prunelit.runtime.errors import PrunelitError, suggest_name
from prunelit.runtime.text_files import escape_controls

WORDS = ("show", "diff")
_USAGE = """usage: python -m prunelit plan show PLAN      what a plan leaves, and what serves the result
       python -m prunelit plan diff PLAN PLAN  where two plans differ; exits with 0 where they prune alike, else 1

PLAN: a plan.json, or a folder that holds one"""


def run_plan_files(arguments: list[str]) -> int:
    """Run `plan show` or `plan diff`.

    Args:
        arguments: one of `WORDS`, then its files.

    Returns:
        The exit code.

    Raises:
        PrunelitError: another number of files.
        BadPlan: a file is not a plan, or the plans belong to different models.

    Example:
        python -m prunelit plan diff a/plan.json b/plan.json
    """
    word, paths = arguments[0], arguments[1:]
    if word not in WORDS:
        raise PrunelitError(
            f"plan: expected options, or one of {', '.join(WORDS)}, got {word!r}{suggest_name(word, WORDS)}"
        )
    if paths and paths[0] in ("-h", "--help"):
        return _print_lines(_USAGE, 0)
    file_count = 1 if word == "show" else 2
    if len(paths) != file_count or any(path.startswith("-") for path in paths):
        expected_files = "one plan file" if file_count == 1 else "two plan files"
        raise PrunelitError(f"plan {word}: expected {expected_files}, got {' '.join(paths) or 'nothing'}")
    plan = PruningPlan.load(_find_plan(paths[0]))
    if word == "show":
        return _print_lines(render_plan_card(plan), 0)
    other_plan = PruningPlan.load(_find_plan(paths[1]))
    differences = find_plan_differences(plan, other_plan)
    if not differences:
        return _print_lines(f"both keep the same units: plan {plan.digest}", 0)
    return _print_lines(render_plan_difference(plan, other_plan, differences, ("A", "B")), 1)


def _find_plan(path: str) -> str:
    """The plan of a folder; any other path as it is."""
    return str(Path(path) / "plan.json") if Path(path).is_dir() else path


def _print_lines(lines: str, code: int) -> int:
    sys.stdout.write(escape_controls(lines) + "\n")
    return code

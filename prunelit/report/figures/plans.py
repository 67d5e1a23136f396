"""A plan as a picture of its own, outside of a report: what `plan.plot()` returns."""

from typing import TYPE_CHECKING

from prunelit.core.plan import PruningPlan
from prunelit.report.figures.kept import draw_plan_map
from prunelit.report.figures.style import apply_style, make_notebook_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_plan(plan: PruningPlan) -> "Figure":
    """Draw which units of every layer a plan keeps; notebooks show the figure.

    Args:
        plan: the plan.

    Returns:
        A matplotlib figure; `.savefig("plan.png")` writes it.

    Example: see `prunelit.core.plan.PruningPlan.plot`, which calls it.
    """
    with apply_style():
        return make_notebook_figure(draw_plan_map(plan))

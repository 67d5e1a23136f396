"""A block search: perplexity after each removed block, and every evaluation of the search."""

import math
from typing import TYPE_CHECKING

from prunelit.report.figures.style import (
    FAINT,
    KEPT,
    REMOVED,
    clear_background,
    create_figure,
    format_log_axis,
    use_whole_number_ticks,
)
from prunelit.report.record import Record, Removal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMES = 24
_MOST_POINTS = 1000
_HIGHEST_SHOWN = 3.0  # times the highest chosen perplexity; worse evaluations are drawn as triangles there


def draw_search(record: Record) -> "Figure | None":
    """Draw perplexity against the removed blocks (top) and every evaluation in the order of time (bottom).

    Args:
        record: `record.decided` holds the removed blocks, `record.search` the evaluations.

    Returns:
        The figure; None where no block search took place.

    Example:
        >>> draw_search(Record()) is None
        True
    """
    decided = [step for step in record.decided if _is_drawable(step["perplexity"])]
    evaluations = [
        (index + 1, evaluation["perplexity"])
        for index, evaluation in enumerate(record.search)
        if _is_drawable(evaluation["perplexity"])
    ]
    if not decided:
        return None
    figure = create_figure(3.9 if evaluations else 2.3)
    panels = figure.subplots(2 if evaluations else 1, 1, squeeze=False)[:, 0]
    _draw_decisions(clear_background(panels[0]), decided)
    if evaluations:
        panel = clear_background(panels[1])
        highest_shown = _HIGHEST_SHOWN * max(step["perplexity"] for step in decided)
        for marker, points, label in (
            ("o", [point for point in evaluations if point[1] <= highest_shown], "tried"),
            ("^", [(index, highest_shown) for index, value in evaluations if value > highest_shown], "tried, beyond"),
        ):
            if points:
                # Thousands of points would make a large SVG, so they become one embedded image.
                panel.plot(
                    *zip(*points, strict=True),
                    label=label,
                    rasterized=len(points) > _MOST_POINTS,
                    linestyle="none",
                    marker=marker,
                    markersize=2.8,
                    color=FAINT,
                )
        line = [(step.get("after", 0), step["perplexity"]) for step in decided]
        panel.plot(*zip(*line, strict=True), drawstyle="steps-post", color=REMOVED, linewidth=1.6, label="chosen")
        panel.set_yscale("log")
        format_log_axis(panel.yaxis)
        panel.set_xlabel("evaluation")
        panel.set_ylabel("perplexity")
        panel.grid(axis="y")
        panel.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, handlelength=1.2, ncols=3)
        use_whole_number_ticks(panel.xaxis)
    return figure


def _draw_decisions(panel: "Axes", decided: list[Removal]) -> None:
    counts, values = [len(step["order"]) for step in decided], [step["perplexity"] for step in decided]
    panel.plot(counts, values, color=KEPT, marker="o", markersize=3.5, linewidth=1.6)
    panel.set_yscale("log")
    format_log_axis(panel.yaxis)
    panel.grid(axis="y")
    panel.set_ylabel("perplexity")
    removal_order = max(decided, key=lambda step: len(step["order"]))["order"]
    if len(removal_order) <= _MOST_NAMES:
        panel.set_xticks(range(len(removal_order) + 1), ["dense", *removal_order], rotation=90)
        panel.set_xlabel("blocks removed in order (A attention, M FFN, layer)")
    else:
        use_whole_number_ticks(panel.xaxis)
        panel.set_xlabel("blocks removed")


def _is_drawable(perplexity: float | None) -> bool:
    return perplexity is not None and math.isfinite(perplexity)

"""Perplexity against number of parameters: dense, pruned, recovered."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from prunelit.report.figures.style import FAINT, STATES, clear_background, create_figure, format_log_axis
from prunelit.report.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_quality(record: Record) -> "Figure | None":
    """Draw one point for each measured state, with an arrow from each to the next.

    Args:
        record: `record.measured` holds perplexity and parameters of each state.

    Returns:
        The figure; None where fewer than two states have a finite perplexity.

    Example:
        >>> draw_quality(Record()) is None
        True
    """
    points = {
        name: (row["parameters"] / 1e6, row["perplexity"])
        for name, row in record.measured.items()
        if row.get("perplexity") and math.isfinite(row["perplexity"]) and row.get("parameters")
    }
    if len(points) < 2:
        return None
    figure = create_figure(2.5)
    panel = clear_background(figure.subplots())
    places = list(points.values())
    for start, end in pairwise(places):
        panel.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": FAINT, "shrinkA": 5, "shrinkB": 5})
    for name, (parameters, perplexity) in points.items():
        panel.plot(parameters, perplexity, "o", markersize=8, color=STATES.get(name, FAINT))
        # Labels of points in the right half go to the left, where there is room.
        is_right_half = parameters > (max(x for x, _ in places) + min(x for x, _ in places)) / 2
        panel.annotate(
            f"{name} {perplexity:.4g}",
            (parameters, perplexity),
            (-9, -13) if is_right_half else (9, 4),
            textcoords="offset points",
            ha="right" if is_right_half else "left",
        )
    panel.margins(0.12, 0.28)
    panel.set_yscale("log")
    format_log_axis(panel.yaxis)
    unit, scale = ("billions", 1e3) if max(x for x, _ in places) >= 1e3 else ("millions", 1.0)
    panel.xaxis.set_major_formatter(lambda value, position: f"{value / scale:,.4g}")
    panel.set_xlabel(f"parameters ({unit})")
    panel.set_ylabel("perplexity")
    panel.grid(axis="y")
    return figure

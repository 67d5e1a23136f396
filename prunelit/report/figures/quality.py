"""Perplexity against parameters: dense, pruned, recovered."""

import math
from itertools import pairwise
from typing import Any

from prunelit.report.figures.style import FAINT, STATES, clear_background, create_figure, format_log_axis
from prunelit.report.record import Record


def draw_quality(record: Record) -> Any:
    """A point for each state that was measured, an arrow from one to the next."""
    points = {
        name: (row["parameters"] / 1e6, row["perplexity"])
        for name, row in record.measured.items()
        if row.get("perplexity") and math.isfinite(row["perplexity"]) and row.get("parameters")
    }
    if len(points) < 2:
        return None
    made = create_figure(2.5)
    panel = clear_background(made.subplots())
    places = list(points.values())
    for start, end in pairwise(places):
        panel.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": FAINT, "shrinkA": 5, "shrinkB": 5})
    for name, (parameters, perplexity) in points.items():
        panel.plot(parameters, perplexity, "o", markersize=8, color=STATES.get(name, FAINT))
        right = parameters > (max(x for x, _ in places) + min(x for x, _ in places)) / 2  # room is on the other side
        panel.annotate(
            f"{name} {perplexity:.4g}",
            (parameters, perplexity),
            (-9, -13) if right else (9, 4),
            textcoords="offset points",
            ha="right" if right else "left",
        )
    panel.margins(0.12, 0.28)
    panel.set_yscale("log")
    format_log_axis(panel.yaxis)
    unit, scale = ("billions", 1e3) if max(x for x, _ in places) >= 1e3 else ("millions", 1.0)
    panel.xaxis.set_major_formatter(lambda value, place: f"{value / scale:,.4g}")
    panel.set_xlabel(f"parameters ({unit})")
    panel.set_ylabel("perplexity")
    panel.grid(axis="y")
    return made

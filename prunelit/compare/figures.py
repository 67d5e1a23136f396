"""Figures of a comparison: perplexity against parameters and, where it was timed, against latency."""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prunelit.compare.report_content import ComparisonReport
from prunelit.report.figures.style import (
    DENSE,
    INK,
    WIDTH,
    apply_style,
    clear_background,
    create_figure,
    encode_png,
    encode_svg,
    format_log_axis,
    format_tick,
)
from prunelit.report.format_numbers import exponentiate_nll, format_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^v<>PX*hp"
# Colour-blind readers can tell these apart by lightness; they stand out on light and dark backgrounds.
_COLOURS = (
    *("#3a86c8", "#e08a2e", "#2f9e77", "#b5446e", "#8a6fc9", "#a3872b"),
    *("#4aa9b8", "#c4604a", "#7a8f3c", "#94687f", "#d07fb0", "#6f8296"),
)
_LABEL_HEIGHT = 0.15  # inches
_LABEL_PLACE = 1.06  # in widths of a panel
_LONGEST_LABEL = 22
_HIGHEST_SHOWN = 60.0  # times the dense perplexity; worse results are outside the figure


def list_axes(report: ComparisonReport) -> dict[str, str]:
    """List the quantities against which perplexity can be drawn.

    Args:
        report: content of compare.json.

    Returns:
        {name: axis label}; empty where no cell is finished.

    Example:
        >>> list_axes({"cells": [{"status": "finished"}], "latency": None})
        {'parameters': 'parameters (millions)'}
    """
    if not any(cell["status"] == "finished" for cell in report["cells"]):
        return {}
    label_by_axis = {"parameters": "parameters (millions)"}
    if report["latency"]:
        label_by_axis["latency"] = f"time of a prefill of {report['latency']['tokens']} tokens, dense = 1"
    return label_by_axis


def write_comparison_figures(report: ComparisonReport, folder: Path) -> list[Path]:
    """Write perplexity_vs_parameters.png and .svg, and perplexity_vs_latency.png and .svg.

    Args:
        report: content of compare.json.
        folder: where the files are written.

    Returns:
        The files written; none where no cell is finished.

    Example:
        >>> write_comparison_figures({"cells": []}, Path("out"))
        []
    """
    written = []
    for axis in list_axes(report):
        figure = draw_comparison(report, axis)
        for suffix, content in (("png", encode_png(figure)), ("svg", encode_svg(figure).encode())):
            written.append(folder / f"perplexity_vs_{axis}.{suffix}")
            written[-1].write_bytes(content)
    return written


def draw_comparison(report: ComparisonReport, axis: str, texts: Sequence[str] | None = None) -> "Figure":
    """Draw one panel for each text and one line for each row; the line joins the means of the seeds (small points).

    Each line is labelled where it ends, at the deepest cut, with its perplexity there; an arrow marks a line that ends
    above the panel.

    Args:
        report: content of compare.json.
        axis: one of `list_axes`.
        texts: some of the report's texts; None: all of them, side by side.

    Returns:
        The figure.

    Example: see `prunelit.compare.run.compare_methods`.
    """
    texts = list(report["texts"]) if texts is None else texts
    height = max(2.9, 0.9 + _LABEL_HEIGHT * (len(report["rows"]) + 1))
    with apply_style():
        figure = create_figure(height, WIDTH * len(texts))
        panels = figure.subplots(1, len(texts), squeeze=False)[0]
        for panel, text in zip(panels, texts, strict=True):
            _draw_panel(clear_background(panel), report, axis, text, _LABEL_HEIGHT / (height - 0.7))
    return figure


def _draw_panel(panel: "Axes", report: ComparisonReport, axis: str, text: str, label_step: float) -> None:
    dense_position = 1.0 if axis == "latency" else report["dense"]["size"]["parameters"] / 1e6
    dense_perplexity = exponentiate_nll(report["dense"]["texts"][text])
    panel.axhline(dense_perplexity, color=DENSE, linewidth=0.9, linestyle="--")
    panel.plot([dense_position], [dense_perplexity], "*", color=INK, markersize=9, linestyle="none")
    ends = [_LineEnd("dense", INK, "*", dense_position, dense_perplexity)]
    for method_row, colour, marker in zip(report["rows"], cycle(_COLOURS), cycle(_MARKERS), strict=False):
        means = []
        for points in _collect_points(report, method_row["label"], axis, text):
            if len(points) > 1:
                panel.plot(*zip(*points, strict=True), marker, color=colour, markersize=2.5, alpha=0.6)
            means.append([sum(values) / len(points) for values in zip(*points, strict=True)])
        if means:
            panel.plot(*zip(*means, strict=True), color=colour, marker=marker, linewidth=1.3, markersize=4.5)
            ends.append(_LineEnd(method_row["label"], colour, marker, *means[-1]))
    panel.set_yscale("log")
    lowest, highest = panel.get_ylim()
    panel.set_ylim(lowest, min(highest, _HIGHEST_SHOWN * dense_perplexity))
    panel.invert_xaxis()  # from the dense model on the left to the deepest cut on the right, where the labels are
    format_log_axis(panel.yaxis)
    panel.grid(axis="y")
    panel.set_title(text, loc="left")
    panel.set_xlabel(list_axes(report)[axis])
    panel.set_ylabel("perplexity")
    _label_line_ends(panel, ends, label_step)


class _LineEnd(NamedTuple):
    """Where a line ends, at the deepest cut: its label and look, and the position and perplexity there."""

    label: str
    colour: str
    marker: str
    position: float
    perplexity: float


def _label_line_ends(panel: "Axes", ends: Sequence[_LineEnd], step: float) -> None:
    """Write the names and last values of all lines to the right of a panel, joined to the ends of the lines."""
    lowest, highest = (math.log(limit) for limit in panel.get_ylim())
    ranked = sorted(ends, key=lambda end: end.perplexity)
    heights = [min(1.0, (math.log(end.perplexity) - lowest) / (highest - lowest)) for end in ranked]
    for end, height, place in zip(ranked, heights, spread_labels(heights, step), strict=True):
        if end.perplexity <= math.exp(highest) and end.label != "dense":
            panel.annotate(
                "",
                (end.position, end.perplexity),
                (_LABEL_PLACE, place),
                xycoords="data",
                textcoords="axes fraction",
                arrowprops={"arrowstyle": "-", "color": end.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            )
        panel.plot(
            [_LABEL_PLACE],
            [place],
            end.marker,
            color=end.colour,
            markersize=4.5,
            clip_on=False,
            transform=panel.transAxes,
        )
        value = format_perplexity(end.perplexity) if end.perplexity < 1e5 else format_tick(end.perplexity)
        name = end.label if len(end.label) <= _LONGEST_LABEL else f"{end.label[: _LONGEST_LABEL - 3]}..."
        above = " \N{UPWARDS ARROW}" if height == 1.0 and end.perplexity > math.exp(highest) else ""
        panel.text(_LABEL_PLACE + 0.03, place, f"{name} {value}{above}", va="center", transform=panel.transAxes)


def spread_labels(heights: Sequence[float], step: float) -> list[float]:
    """Move labels apart that would overlap, each as little as its neighbours allow.

    Args:
        heights: where the labels should be, ascending, in shares of a panel's height.
        step: least distance between two labels.

    Returns:
        Places, at least `step` apart; the last one is at most 1.

    Example:
        >>> [round(place, 2) for place in spread_labels([0.1, 0.15, 0.5, 1.0, 1.0], 0.1)]
        [0.1, 0.2, 0.5, 0.9, 1.0]
    """
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + step) if places else height)
    limit = 1.0
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], limit)
        limit = places[index] - step
    return places


def _collect_points(report: ComparisonReport, label: str, axis: str, text: str) -> Iterator[list[tuple[float, float]]]:
    """Yield the points of a row at each ratio, one for each seed; infinite perplexities are left out."""
    for ratio in report["ratios"]:
        points = [
            (
                1 / cell["latency"]["speedup"] if axis == "latency" else cell["size"]["parameters"] / 1e6,
                exponentiate_nll(cell["texts"][text]),
            )
            for cell in report["cells"]
            if cell["status"] == "finished" and (cell["label"], cell["ratio"]) == (label, ratio)
        ]
        if points := [point for point in points if math.isfinite(point[1])]:
            yield points

"""A comparison of methods: perplexity against parameters and, where it was measured, against latency."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

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
)
from prunelit.runtime.format_numbers import exponentiate_nll

_MARKERS = "osD^v<>PX*hp"
# Told apart by colour-blind readers, by lightness too; on light and on dark.
_COLOURS = (
    *("#3a86c8", "#e08a2e", "#2f9e77", "#b5446e", "#8a6fc9", "#a3872b"),
    *("#4aa9b8", "#c4604a", "#7a8f3c", "#94687f", "#d07fb0", "#6f8296"),
)
_ROWS_OF_LEGEND = 0.19  # inches each
_ROOM = 60.0  # times the dense perplexity: what is worse than that leaves the picture

ComparisonReport = Mapping[str, Any]
"""The content of compare.json, see `prunelit.compare.run`."""


def list_axes(report: ComparisonReport) -> dict[str, str]:
    """{name: label} of what perplexity is drawn against; none where no cell is finished."""
    if not any(cell["status"] == "finished" for cell in report["cells"]):
        return {}
    found = {"parameters": "parameters (millions)"}
    if report["latency"]:
        found["latency"] = f"time of a prefill of {report['latency']['tokens']} tokens, dense = 1"
    return found


def write_comparison_figures(report: ComparisonReport, folder: Path) -> list[Path]:
    """Write perplexity_vs_parameters.png and .svg, and perplexity_vs_latency.png and .svg.

    Returns:
        The files written.
    """
    written = []
    for axis in list_axes(report):
        made = draw_comparison(report, axis)
        for ending, content in (("png", encode_png(made)), ("svg", encode_svg(made).encode())):
            written.append(folder / f"perplexity_vs_{axis}.{ending}")
            written[-1].write_bytes(content)
    return written


def draw_comparison(report: ComparisonReport, axis: str, texts: Sequence[str] | None = None) -> Any:
    """One panel for each text, one line for each row; every seed is a point, the line goes through their means.

    Args:
        report: content of compare.json.
        axis: one of `list_axes`.
        texts: some of the report's; None: all of them, side by side.
    """
    texts = list(report["texts"]) if texts is None else texts
    with apply_style():
        columns = 2 if len(texts) == 1 else 2 * len(texts)
        legend_rows = math.ceil((len(report["rows"]) + 1) / columns)
        made = create_figure(2.9 + _ROWS_OF_LEGEND * legend_rows, WIDTH * len(texts))
        panels = made.subplots(1, len(texts), squeeze=False)[0]
        for panel, text in zip(panels, texts, strict=True):
            _draw_panel(clear_background(panel), report, axis, text)
        handles = {
            label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        made.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=columns, handlelength=1.6)
    return made


def _draw_panel(panel: Any, report: ComparisonReport, axis: str, text: str) -> None:
    dense = 1.0 if axis == "latency" else report["dense"]["size"]["parameters"] / 1e6
    base = exponentiate_nll(report["dense"]["texts"][text])
    panel.axhline(base, color=DENSE, linewidth=0.9, linestyle="--")
    panel.plot([dense], [base], "*", color=INK, markersize=9, linestyle="none", label="dense")
    for row, colour, marker in zip(report["rows"], cycle(_COLOURS), cycle(_MARKERS), strict=False):
        line = []
        for points in _collect_points(report, row["label"], axis, text):
            if len(points) > 1:
                panel.plot(*zip(*points, strict=True), marker, color=colour, markersize=2.5, alpha=0.6)
            line.append([sum(values) / len(points) for values in zip(*points, strict=True)])
        if line:
            style = {"color": colour, "marker": marker, "linewidth": 1.3, "markersize": 4.5}
            panel.plot(*zip(*line, strict=True), label=row["label"], **style)
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(low, min(high, _ROOM * base))
    format_log_axis(panel.yaxis)
    panel.grid(axis="y")
    panel.set_title(text, loc="left")
    panel.set_xlabel(list_axes(report)[axis])
    panel.set_ylabel("perplexity")


def _collect_points(report: ComparisonReport, label: str, axis: str, text: str) -> Iterator[list[tuple[float, float]]]:
    """Points of a row at each ratio, one for each seed; those that no axis holds are left out."""
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

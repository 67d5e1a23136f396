"""A comparison as pictures: perplexity against parameters and, where it was measured, against latency."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunelit.report.tables import Report, percent, perplexity_of

_MARKERS = "osD^v<>PX*hp"


def draw(report: Report, folder: Path) -> list[Path]:
    """Write the pictures of a comparison.

    Args:
        report: content of compare.json.
        folder: where perplexity_vs_parameters.png and .svg go, and perplexity_vs_latency.png and .svg.

    Returns:
        The files written; none where no cell is finished.

    """
    from matplotlib import rc_context

    written = []
    pictures: list[tuple[str, str, Callable[[Mapping[str, Any]], float], float]] = [
        (
            "parameters",
            "parameters (millions)",
            lambda cell: cell["size"]["parameters"] / 1e6,
            report["dense"]["size"]["parameters"] / 1e6,
        )
    ]
    if report["latency"]:
        tokens = report["latency"]["tokens"]
        label = f"prefill of {tokens} tokens, time relative to the dense model"
        pictures.append(("latency", label, lambda cell: 1 / cell["latency"]["speedup"], 1.0))
    if not any(cell["status"] == "finished" for cell in report["cells"]):
        return []
    for name, label, position, dense in pictures:
        # Equal numbers give equal files: no dates, no random ids; text stays text.
        with rc_context({"svg.hashsalt": "prunelit", "svg.fonttype": "none"}):
            figure = _figure(report, label, position, dense)
            for ending in ("png", "svg"):
                path = folder / f"perplexity_vs_{name}.{ending}"
                figure.savefig(path, dpi=150, metadata={"Date": None} if ending == "svg" else None)
                written.append(path)
    return written


def _figure(report: Report, label: str, position: Callable[[Mapping[str, Any]], float], dense: float) -> Any:
    """One panel for each text, one line for each row; every seed is a point, the line goes through their means."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    texts = list(report["texts"])
    figure = Figure(figsize=(1.8 + 3.6 * len(texts), 4.2), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    colours = colormaps["tab10" if len(report["rows"]) <= 10 else "tab20"]
    for panel, text in zip(panels, texts, strict=True):
        base = perplexity_of(report["dense"]["texts"][text])
        panel.axhline(base, color="0.6", linewidth=0.8, linestyle="--")
        panel.plot([dense], [base], "k*", markersize=11, label="dense")
        for number, row in enumerate(report["rows"]):
            style = {"color": colours(number % colours.N), "marker": _MARKERS[number % len(_MARKERS)]}
            line = []
            for ratio in report["ratios"]:
                points = [
                    (position(cell), perplexity_of(cell["texts"][text]))
                    for cell in report["cells"]
                    if cell["status"] == "finished"
                    and (cell["label"], cell["ratio"]) == (row["label"], ratio)
                    and math.isfinite(perplexity_of(cell["texts"][text]))
                ]
                if len(points) > 1:
                    panel.plot(*zip(*points, strict=True), linestyle="none", markersize=3, alpha=0.6, **style)
                if points:
                    line.append(tuple(sum(axis) / len(points) for axis in zip(*points, strict=True)))
            if line:
                panel.plot(
                    *zip(*line, strict=True),
                    linewidth=1.3,
                    markersize=5,
                    label=row["label"].replace("$", r"\$"),
                    **style,
                )
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        panel.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        panel.grid(visible=True, which="both", linewidth=0.3, alpha=0.5)
        panel.set_title(_plain(text))
        panel.set_xlabel(label if len(texts) == 1 else "")
    if len(texts) > 1:
        figure.supxlabel(label, fontsize="medium")
    panels[0].set_ylabel("perplexity")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
    ratios = ", ".join(percent(ratio) for ratio in report["ratios"])
    figure.suptitle(f"{report['model']}, {ratios} of the decoder layers' budget removed", fontsize="medium")
    return figure


def _plain(label: str) -> str:
    """A label in which matplotlib finds no formula."""
    return label.replace("$", r"\$")

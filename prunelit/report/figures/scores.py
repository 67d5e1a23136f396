"""Histograms of every layer's scores: units that remain, units that are removed, and the threshold."""

from typing import TYPE_CHECKING

from prunelit.report.figures.style import (
    INK,
    KEPT,
    REMOVED,
    add_legend,
    clear_background,
    create_figure,
    format_log_axis,
    format_tick,
    use_whole_number_ticks,
)
from prunelit.report.record import Histogram, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = {
    "heads": "score of a query head",
    "channels": "score of an FFN channel",
    "experts": "score of an expert",
    "expert_channels": "score of a channel of the experts",
}


def draw_scores(record: Record) -> "Figure | None":
    """Draw one panel for each kind of unit and one row for each layer.

    All layers share the score axis, which is logarithmic where all scores are positive and far apart.

    Args:
        record: `record.scores` holds the histograms.

    Returns:
        The figure; None where the method has no scores of single units.

    Example:
        >>> draw_scores(Record()) is None
        True
    """
    kinds = {kind: layers for kind, layers in record.scores.items() if any(layers)}
    if not kinds:
        return None
    layers = max(map(len, kinds.values()))
    figure = create_figure(min(7.5, max(2.1, 0.7 + 0.1 * layers)))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, (kind, histograms) in zip(panels, kinds.items(), strict=True):
        _draw_histograms(clear_background(panel), histograms, _NAMES[kind])
        panel.tick_params(axis="y", length=0)
    panels[0].set_ylabel("layer")
    panels[0].set_ylim(layers - 0.4, -1.1)
    use_whole_number_ticks(panels[0].yaxis)
    add_legend(figure, [("kept", KEPT), ("removed", REMOVED), ("threshold", INK)])
    return figure


def _draw_histograms(panel: "Axes", layers: list[Histogram | None], label: str) -> None:
    """Draw the counts upwards from each layer's base line; the largest bin of a layer is one row high."""
    log = all(histogram.low > 0 for histogram in layers if histogram is not None) and any(
        histogram.log for histogram in layers if histogram is not None
    )
    for layer, histogram in enumerate(layers):
        if histogram is None:
            continue
        baseline = [layer + 0.4] * len(histogram.kept)
        largest_bin = max(
            kept_count + removed_count
            for kept_count, removed_count in zip(histogram.kept, histogram.removed, strict=True)
        )
        for counts, colour in ((histogram.removed, REMOVED), (histogram.kept, KEPT)):
            baseline = _stack_bars(
                panel, baseline, [0.9 * count / largest_bin for count in counts], histogram.edges, colour
            )
        if histogram.cut is not None:
            panel.plot([histogram.cut] * 2, [layer + 0.45, layer - 0.45], color=INK, linewidth=1.1)
    if log:
        panel.set_xscale("log")
        panel.autoscale_view()
        format_log_axis(panel.xaxis)
    else:
        from matplotlib.ticker import MaxNLocator

        low, high, is_complete = _find_axis_range([histogram for histogram in layers if histogram is not None])
        panel.set_xlim(low, high)
        if not is_complete:
            label += "\n(the middle 98%)"
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.xaxis.set_major_formatter(lambda value, position: format_tick(value))
    panel.set_xlabel(label)


def _find_axis_range(layers: list[Histogram]) -> tuple[float, float, bool]:
    """Find the score range to show: all thresholds, and all units except outliers.

    The outermost 1% on each side are left out where showing them would more than double the range.

    Returns:
        (low, high, whether all units lie inside).
    """
    units = sorted(
        (edge, kept_count + removed_count)
        for histogram in layers
        for edge, kept_count, removed_count in zip(histogram.edges, histogram.kept, histogram.removed, strict=False)
        if kept_count + removed_count
    )
    low, high = min(histogram.low for histogram in layers), max(histogram.high for histogram in layers)
    one_percent, cumulative, inner_edges = sum(count for _, count in units) / 100, 0, []
    for edge, count in units:
        cumulative += count
        if one_percent <= cumulative <= 99 * one_percent:
            inner_edges.append(edge)
    cuts = [histogram.cut for histogram in layers if histogram.cut is not None]
    shown = [*inner_edges, *cuts]
    if not inner_edges or high - low < 2 * (max(shown) - min(shown)):
        return low, high, True
    margin = 0.05 * (max(shown) - min(shown))
    return max(low, min(shown) - margin), min(high, max(shown) + margin), False


def _stack_bars(panel: "Axes", base: list[float], heights: list[float], edges: list[float], colour: str) -> list[float]:
    """Draw bars on top of a baseline.

    Args:
        panel: where to draw.
        base: heights on which the bars stand, one for each bin; the y axis points down.
        heights: heights of the bars.
        edges: edges of the bins, one more than there are bins.
        colour: of the bars.

    Returns:
        The new baseline.
    """
    tops = [bottom - height for bottom, height in zip(base, heights, strict=True)]
    filled_bins = [index for index, height in enumerate(heights) if height]
    if filled_bins:
        filled = slice(filled_bins[0], filled_bins[-1] + 1)
        panel.stairs(
            tops[filled], edges[filled_bins[0] : filled_bins[-1] + 2], baseline=base[filled], fill=True, color=colour
        )
    return tops

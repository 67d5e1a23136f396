"""What the scores said: a histogram for every layer, what goes and what stays, and the line between."""

from typing import Any

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

_NAMES = {"heads": "score of a query head", "channels": "score of an FFN channel"}


def draw_scores(record: Record) -> Any:
    """One panel a kind, one row a layer; all layers on one axis, logarithmic where all scores are positive."""
    kinds = {kind: layers for kind, layers in record.scores.items() if any(layers)}
    if not kinds:
        return None
    layers = max(map(len, kinds.values()))
    made = create_figure(min(7.5, max(2.1, 0.7 + 0.1 * layers)))
    panels = made.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, (kind, found) in zip(panels, kinds.items(), strict=True):
        _draw_histograms(clear_background(panel), found, _NAMES[kind])
        panel.tick_params(axis="y", length=0)
    panels[0].set_ylabel("layer")
    panels[0].set_ylim(layers - 0.4, -1.1)
    use_whole_number_ticks(panels[0].yaxis)
    add_legend(made, [("stays", KEPT), ("goes", REMOVED), ("cut", INK)])
    return made


def _draw_histograms(panel: Any, layers: list[Histogram | None], label: str) -> None:
    """Counts drawn upwards from the layer's line, each layer's largest bin one row high."""
    log = all(one.low > 0 for one in layers if one is not None) and any(one.log for one in layers if one is not None)
    for layer, one in enumerate(layers):
        if one is None:
            continue
        base = [layer + 0.4] * len(one.kept)
        most = max(a + b for a, b in zip(one.kept, one.removed, strict=True))
        for counts, colour in ((one.removed, REMOVED), (one.kept, KEPT)):
            base = _stack_bars(panel, base, [0.9 * count / most for count in counts], one.edges, colour)
        if one.cut is not None:
            panel.plot([one.cut] * 2, [layer + 0.45, layer - 0.45], color=INK, linewidth=1.1)
    if log:
        panel.set_xscale("log")
        panel.autoscale_view()
        format_log_axis(panel.xaxis)
    else:
        from matplotlib.ticker import MaxNLocator

        low, high, all_shown = _find_axis_range([one for one in layers if one is not None])
        panel.set_xlim(low, high)
        if not all_shown:
            label += "\n(the middle 98%)"
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.xaxis.set_major_formatter(lambda value, place: format_tick(value))
    panel.set_xlabel(label)


def _find_axis_range(layers: list[Histogram]) -> tuple[float, float, bool]:
    """From where to where the axis goes: all cuts, and all units but the outer hundredths where those lie far out."""
    units = sorted(
        (edge, a + b) for one in layers for edge, a, b in zip(one.edges, one.kept, one.removed, strict=False) if a + b
    )
    low, high = min(one.low for one in layers), max(one.high for one in layers)
    least, seen, inner = sum(count for _, count in units) / 100, 0, []
    for edge, count in units:
        seen += count
        if least <= seen <= 99 * least:
            inner.append(edge)
    cuts = [one.cut for one in layers if one.cut is not None]
    bulk = [*inner, *cuts]
    if not inner or high - low < 2 * (max(bulk) - min(bulk)):
        return low, high, True
    margin = 0.05 * (max(bulk) - min(bulk))
    return max(low, min(bulk) - margin), min(high, max(bulk) + margin), False


def _stack_bars(panel: Any, base: list[float], heights: list[float], edges: list[float], colour: str) -> list[float]:
    """Bars on top of others, where there are any; the new tops."""
    tops = [low - height for low, height in zip(base, heights, strict=True)]
    there = [place for place, height in enumerate(heights) if height]
    if there:
        some = slice(there[0], there[-1] + 1)
        panel.stairs(tops[some], edges[there[0] : there[-1] + 2], baseline=base[some], fill=True, color=colour)
    return tops

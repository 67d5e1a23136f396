"""What the scores said: a histogram for every layer, what goes and what stays, and the line between."""

from typing import Any

from prunelit.pictures.style import INK, KEPT, REMOVED, bare, figure, legend, log_numbers, whole_numbers
from prunelit.record import Histogram, Record

_NAMES = {"heads": "score of a query head", "channels": "score of an FFN channel"}


def draw(record: Record) -> Any:
    """One panel a kind, one row a layer; all layers on one axis, logarithmic where all scores are positive."""
    kinds = {kind: layers for kind, layers in record.scores.items() if any(layers)}
    if not kinds:
        return None
    layers = max(map(len, kinds.values()))
    made = figure(min(7.5, max(2.1, 0.7 + 0.1 * layers)))
    panels = made.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, (kind, found) in zip(panels, kinds.items(), strict=True):
        _rows(bare(panel), found)
        panel.set_xlabel(_NAMES[kind])
        panel.tick_params(axis="y", length=0)
    panels[0].set_ylabel("layer")
    panels[0].set_ylim(layers - 0.4, -1.1)
    whole_numbers(panels[0].yaxis)
    legend(made, [("stays", KEPT), ("goes", REMOVED), ("cut", INK)])
    return made


def _rows(panel: Any, layers: list[Histogram | None]) -> None:
    """Counts drawn upwards from the layer's line, each layer's largest bin one row high."""
    log = all(one.low > 0 for one in layers if one is not None) and any(one.log for one in layers if one is not None)
    for layer, one in enumerate(layers):
        if one is None:
            continue
        base = [layer + 0.4] * len(one.kept)
        most = max(a + b for a, b in zip(one.kept, one.removed, strict=True))
        for counts, colour in ((one.removed, REMOVED), (one.kept, KEPT)):
            base = _stacked(panel, base, [0.9 * count / most for count in counts], one.edges, colour)
        if one.cut is not None:
            panel.plot([one.cut] * 2, [layer + 0.45, layer - 0.45], color=INK, linewidth=1.1)
    if log:
        panel.set_xscale("log")
        panel.autoscale_view()
        low, high = panel.get_xlim()
        if high / low < 1e3:
            log_numbers(panel.xaxis)
    else:
        from matplotlib.ticker import MaxNLocator

        present = [one for one in layers if one is not None]
        tails = sorted(one.high for one in present)[(9 * len(present)) // 10 :]  # a few long tails would hide the rest
        panel.set_xlim(min(one.low for one in present), tails[0])
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))


def _stacked(panel: Any, base: list[float], heights: list[float], edges: list[float], colour: str) -> list[float]:
    """Bars on top of others, where there are any; the new tops."""
    tops = [low - height for low, height in zip(base, heights, strict=True)]
    there = [place for place, height in enumerate(heights) if height]
    if there:
        some = slice(there[0], there[-1] + 1)
        panel.stairs(tops[some], edges[there[0] : there[-1] + 2], baseline=base[some], fill=True, color=colour)
    return tops

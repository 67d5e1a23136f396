"""Perplexity on several texts as bars: one model, or two side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prunelit.report.figures.style import (
    DENSE,
    RECOVERED,
    add_legend,
    apply_style,
    clear_background,
    create_figure,
    make_notebook_figure,
)
from prunelit.report.format_numbers import format_perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_perplexity_bars(texts: Sequence[str], values: Mapping[str, Sequence[float]]) -> "Figure":
    """Draw a bar for each text and model; what exceeds a float has none.

    Args:
        texts: names of the texts.
        values: {model: perplexity on each text}, one or two models.

    Returns:
        A matplotlib figure, which notebooks show.

    Example:
        >>> figure = draw_perplexity_bars(["wiki"], {"against": [20.0], "model": [30.0]})
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [20.0, 30.0]
    """
    colours = (DENSE, RECOVERED) if len(values) > 1 else (RECOVERED,)
    height = 0.8 / max(1, len(values))
    with apply_style():
        figure = create_figure(0.9 + 0.35 * len(values) * len(texts))
        panel = clear_background(figure.subplots())
        for number, (column, colour) in enumerate(zip(values.values(), colours, strict=True)):
            places = [place + (number - (len(values) - 1) / 2) * height for place in range(len(texts))]
            widths = [value if math.isfinite(value) else 0.0 for value in column]
            bars = panel.barh(places, widths, height=0.9 * height, color=colour)
            panel.bar_label(bars, [f" {format_perplexity(value)}" for value in column])
        panel.set_yticks(range(len(texts)), texts)
        panel.set_ylim(len(texts) - 0.5, -0.5)
        panel.set_xlabel("perplexity")
        panel.margins(x=0.18)
        if len(values) > 1:
            add_legend(figure, list(zip(values, colours, strict=True)))
        return make_notebook_figure(figure)

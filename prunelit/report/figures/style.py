"""One look for all pictures, and how a figure becomes bytes.

Colours: those that colour-blind readers tell apart and that stand out on light and on dark; ink and grid are two greys
of their own, so that a page can put its own in their place (`INK`, `FAINT`). Figures are as wide as a phone; on a wide
page they stand side by side.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

INK, FAINT = "#20252b", "#8b929b"
KEPT, REMOVED, BLOCK = "#3a86c8", "#e08a2e", "#b5446e"
DENSE, PRUNED, RECOVERED = "#7d8590", "#e08a2e", "#2f9e77"
STATES = {"dense": DENSE, "pruned": PRUNED, "recovered": RECOVERED}
WIDTH = 4.3
"""Inches; 100 CSS pixels each in an SVG of 72 points an inch, times 4 / 3."""

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.hashsalt": "prunelit",  # equal numbers give equal files
    "svg.fonttype": "none",  # text stays text
}


def apply_style() -> Any:
    """The style, for the making of a figure and for its writing."""
    from matplotlib import rc_context

    return rc_context(_STYLE)  # type: ignore[arg-type]


def create_figure(height: float, width: float = WIDTH) -> Any:
    """An empty figure, `height` and `width` in inches, with no background of its own."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    made.patch.set_alpha(0.0)
    return made


def clear_background(panel: Any) -> Any:
    """A panel without background and with a grid behind what is drawn."""
    panel.patch.set_alpha(0.0)
    panel.set_axisbelow(True)
    return panel


def format_log_axis(axis: Any) -> None:
    """A logarithmic axis whose ticks are numbers, and few of them."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    near = low > 0 and high / low < 4
    axis.set_major_locator(MaxNLocator(5) if near else LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter(lambda value, place: format_tick(value))
    axis.set_minor_locator(NullLocator())


def format_tick(value: float) -> str:
    """A tick's number: 0.05, 2,500, 4e5, 1.2e-6."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].replace("+", ""), f"{value:.3g}")


def use_whole_number_ticks(axis: Any, most: int = 7) -> None:
    """Few ticks, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True))


def add_legend(made: Any, entries: Sequence[tuple[str, str]]) -> None:
    """Coloured squares with names, above the panels."""
    from matplotlib.patches import Patch

    made.legend(
        handles=[Patch(color=colour, label=name) for name, colour in entries],
        loc="outside upper left",
        ncols=len(entries),
        handlelength=0.9,
        handleheight=0.9,
        columnspacing=1.2,
        borderaxespad=0.0,
    )


def encode_png(made: Any, dots_per_inch: int = 160) -> bytes:
    """A figure as a PNG file on white."""
    buffer = io.BytesIO()
    with apply_style():
        made.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def encode_svg(made: Any) -> str:
    """A figure as an SVG document without background; equal figures give equal text."""
    buffer = io.StringIO()
    with apply_style():
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # A tenth of a point is enough, and half the size.
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(?<=\d\.\d)\d+", "", path[0]), buffer.getvalue())

"""The common style of all figures, and how a figure is written as PNG or SVG.

The colours can be told apart by colour-blind readers and stand out on light and dark backgrounds. Text (`INK`) and grid
lines (`FAINT`) have two greys that are used for nothing else, so that a page can replace them with its own colours.
A figure is as wide as a phone's screen; a wide page shows figures side by side.
"""

import io
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, FAINT = "#20252b", "#8b929b"
KEPT, REMOVED, BLOCK = "#3a86c8", "#e08a2e", "#b5446e"
DENSE, PRUNED, RECOVERED = "#7d8590", "#e08a2e", "#2f9e77"
STATES = {"dense": DENSE, "pruned": PRUNED, "recovered": RECOVERED}
WIDTH = 4.3
"""Inches. An SVG has 72 points per inch, and a browser shows a point as 4 / 3 CSS pixels."""

_STYLE: dict[str, str | float] = {
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


def apply_style() -> "AbstractContextManager[None]":
    """Return a context manager that applies the style; use it both to build and to write a figure.

    Example:
        >>> with apply_style():
        ...     figure = create_figure(height=2.0)
    """
    from matplotlib import rc_context

    return rc_context(_STYLE)  # type: ignore[arg-type]


def create_figure(height: float, width: float = WIDTH) -> "Figure":
    """Create an empty figure with a transparent background.

    Args:
        height: inches.
        width: inches.

    Example:
        >>> [float(size) for size in create_figure(height=2.0, width=3.0).get_size_inches()]
        [3.0, 2.0]
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure


def clear_background(panel: "Axes") -> "Axes":
    """Make a panel transparent and put its grid behind the data.

    Args:
        panel: axes of matplotlib; changed in place and returned.

    Example:
        >>> panel = clear_background(create_figure(2.0).subplots())
        >>> float(panel.patch.get_alpha())
        0.0
    """
    panel.patch.set_alpha(0.0)
    panel.set_axisbelow(True)
    return panel


def format_log_axis(axis: "Axis") -> None:
    """Put a few plainly written numbers at the ticks of a logarithmic axis. Call it after the data are drawn.

    Args:
        axis: an x or y axis of matplotlib with a logarithmic scale.

    Example: see `prunelit.report.figures.quality.draw_quality`.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    is_narrow = low > 0 and high / low < 4
    axis.set_major_locator(MaxNLocator(5) if is_narrow else LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter(lambda value, position: format_tick(value))
    axis.set_minor_locator(NullLocator())


def format_tick(value: float) -> str:
    """Write the number at a tick.

    Args:
        value: position of the tick.

    Example:
        >>> [format_tick(value) for value in (0.05, 2500, 4e5, 1.2e-6)]
        ['0.05', '2,500', '4e5', '1.2e-6']
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"
    return re.sub(r"e([+-])0*", lambda exponent: "e" + exponent[1].replace("+", ""), f"{value:.3g}")


def use_whole_number_ticks(axis: "Axis", most: int = 7) -> None:
    """Put at most `most` ticks on an axis, at whole numbers only.

    Args:
        axis: an x or y axis of matplotlib.
        most: number of ticks.

    Example:
        >>> panel = create_figure(2.0).subplots()
        >>> panel.set_xlim(0, 3)
        (0.0, 3.0)
        >>> use_whole_number_ticks(panel.xaxis)
        >>> [float(tick) for tick in panel.get_xticks()]
        [0.0, 1.0, 2.0, 3.0]
    """
    from matplotlib.ticker import MaxNLocator

    # A single value would get ticks between two whole numbers, which the locator does not know.
    low, high = sorted(axis.get_view_interval())
    if high - low < 1:
        axis.set_view_interval(low - 0.5, high + 0.5, ignore=True)
    axis.set_major_locator(MaxNLocator(most, integer=True))


def add_legend(figure: "Figure", entries: Sequence[tuple[str, str]]) -> None:
    """Add a legend of coloured squares above the panels.

    Args:
        figure: the figure.
        entries: (name, colour) of each square.

    Example:
        >>> figure = create_figure(2.0)
        >>> add_legend(figure, [("kept", KEPT), ("removed", REMOVED)])
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['kept', 'removed']
    """
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in entries],
        loc="outside upper left",
        ncols=len(entries),
        handlelength=0.9,
        handleheight=0.9,
        columnspacing=1.2,
        borderaxespad=0.0,
    )


def encode_png(figure: "Figure", dots_per_inch: int = 160) -> bytes:
    """Write a figure as a PNG file with a white background.

    Args:
        figure: a matplotlib figure.
        dots_per_inch: resolution.

    Returns:
        The file's bytes.

    Example:
        >>> encode_png(create_figure(1.0), dots_per_inch=20)[:4]
        b'\\x89PNG'
    """
    buffer = io.BytesIO()
    with apply_style():
        figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def make_notebook_figure(figure: "Figure") -> "Figure":
    """Let notebooks show a figure that is the last value of a cell, whether or not pyplot is imported.

    Args:
        figure: a matplotlib figure.

    Returns:
        The same figure.

    Example:
        >>> make_notebook_figure(create_figure(1.0))._repr_png_()[:4]
        b'\\x89PNG'
    """
    figure._repr_png_ = partial(encode_png, figure)  # type: ignore[attr-defined]
    return figure


def encode_svg(figure: "Figure") -> str:
    """Write a figure as an SVG document without background. Equal figures give equal text.

    Args:
        figure: a matplotlib figure.

    Example:
        >>> "<svg" in encode_svg(create_figure(1.0))
        True
    """
    buffer = io.StringIO()
    with apply_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # One decimal of a point is precise enough, and halves the size of the file.
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(?<=\d\.\d)\d+", "", path[0]), buffer.getvalue())

"""Figures of a run: each takes a `Record` and returns a matplotlib figure. Loggers and HTML pages show them.

A new figure needs a module of its own and one entry in `PICTURES`.

    for name in PICTURES:
        figure = draw_picture(name, record)
        if figure is not None:
            Path(f"{name}.png").write_bytes(encode_png(figure))
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from prunelit.report.figures import kept, quality, scores, search, stages, training
from prunelit.report.figures.style import apply_style, encode_png, encode_svg
from prunelit.report.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PICTURES", "Picture", "draw_picture", "encode_png", "encode_svg"]


class Picture(NamedTuple):
    """A kind of figure with its title and caption.

    Attributes:
        title: heading.
        caption: how to read the figure.
        draw: builds the figure from a record; returns None where the record holds nothing to draw.

    Example:
        >>> PICTURES["speed"].title
        'Training speed'
    """

    title: str
    caption: str
    draw: Callable[[Record], "Figure | None"]


PICTURES = {
    "kept": Picture(
        "Kept units",
        "A row is a layer, a cell a unit of the kind below; a bar is the share of channels that remains.",
        kept.draw_kept_units,
    ),
    "scores": Picture(
        "Scores",
        "A row is a layer: a histogram of its units' scores, which of them are removed, and the threshold.",
        scores.draw_scores,
    ),
    "search": Picture(
        "Block search",
        "Perplexity after each removed block, in order; below, every evaluation of the search.",
        search.draw_search,
    ),
    "quality": Picture(
        "Quality against size",
        "Perplexity against parameters: dense, pruned, recovered; lower and further left is better.",
        quality.draw_quality,
    ),
    "training": Picture(
        "Recovery",
        "Training loss, and validation perplexity from the pruned model's towards the dense model's (dashed).",
        training.draw_training,
    ),
    "speed": Picture(
        "Training speed",
        "Tokens per second of one process over the steps.",
        training.draw_training_speed,
    ),
    "stages": Picture(
        "Cost",
        "Seconds of every stage, and the peak memory of the process (or GPU) until its end.",
        stages.draw_stages,
    ),
}


def draw_picture(name: str, record: Record) -> "Figure | None":
    """Draw one of `PICTURES` in the common style.

    Args:
        name: a key of `PICTURES`.
        record: what happened in the run.

    Returns:
        The figure; None where the record holds nothing to draw.

    Example:
        >>> draw_picture("search", Record()) is None
        True
    """
    with apply_style():
        return PICTURES[name].draw(record)

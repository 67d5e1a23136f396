"""Recovery: loss, perplexity and speed over the training steps."""

import math
from typing import TYPE_CHECKING

from prunelit.report.figures.style import (
    DENSE,
    KEPT,
    PRUNED,
    RECOVERED,
    clear_background,
    create_figure,
    format_log_axis,
    use_whole_number_ticks,
)
from prunelit.report.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_DOTS = 60
_LOSSES = ("train_loss", "train_loss_step", "loss", "loss_step")


def draw_training(record: Record) -> "Figure | None":
    """Draw training loss (top) and validation perplexity (bottom) over the steps.

    The perplexity curve starts at the pruned model; the dense model's perplexity is a dashed line.

    Args:
        record: `record.training` holds the logged numbers.

    Returns:
        The figure; None where neither was logged.

    Example:
        >>> draw_training(Record()) is None
        True
    """
    loss = next((curve for name in _LOSSES if (curve := _read_curve(record, name))), [])
    perplexity = _read_curve(record, "val_perplexity") or [
        (step, math.exp(min(value, 50.0))) for step, value in _read_curve(record, "val_loss")
    ]
    has_panel = [bool(loss), bool(perplexity)]
    if not any(has_panel):
        return None
    figure = create_figure(0.5 + 1.7 * sum(has_panel))
    panels = list(figure.subplots(sum(has_panel), 1, squeeze=False, sharex=True)[:, 0])
    if loss:
        panel = clear_background(panels[0])
        panel.plot(*zip(*loss, strict=True), color=KEPT, linewidth=1.4, marker=_choose_marker(loss), markersize=3)
        panel.set_ylabel("training loss")
    if perplexity:
        _draw_perplexity(clear_background(panels[-1]), perplexity, record)
    for panel in panels:
        panel.grid(axis="y")
    panels[-1].set_xlabel("optimiser step")
    use_whole_number_ticks(panels[-1].xaxis)
    return figure


def draw_training_speed(record: Record) -> "Figure | None":
    """Draw tokens per second of one process, averaged between two log entries.

    Args:
        record: `record.training` holds the logged numbers.

    Returns:
        The figure; None where no speed was logged.

    Example:
        >>> record = Record(training=[{"step": 1, "tokens_per_second": 100.0}, {"step": 2, "tokens_per_second": 120.0}])
        >>> [float(speed) for speed in draw_training_speed(record).axes[0].lines[0].get_ydata()]
        [100.0, 120.0]
    """
    points = _read_curve(record, "tokens_per_second")
    if not points:
        return None
    figure = create_figure(1.9)
    panel = clear_background(figure.subplots())
    panel.plot(*zip(*points, strict=True), color=KEPT, linewidth=1.4, marker=_choose_marker(points), markersize=3)
    panel.set_ylim(0, 1.15 * max(speed for _, speed in points))
    panel.set_ylabel("tokens per second")
    panel.set_xlabel("optimiser step")
    panel.grid(axis="y")
    use_whole_number_ticks(panel.xaxis)
    return figure


def _draw_perplexity(panel: "Axes", points: list[tuple[int, float]], record: Record) -> None:
    pruned, dense = (record.measured.get(name, {}).get("perplexity") for name in ("pruned", "dense"))
    if pruned and math.isfinite(pruned):
        points = [(0, pruned), *points]
        panel.plot([0], [pruned], "o", color=PRUNED, markersize=6, label="pruned")
    marker = _choose_marker(points)
    panel.plot(
        *zip(*points, strict=True), label="recovery", color=RECOVERED, marker=marker, markersize=3, linewidth=1.6
    )
    if dense and math.isfinite(dense):
        panel.axhline(dense, color=DENSE, linestyle="--", linewidth=1.2, label="dense")
    panel.set_yscale("log")
    format_log_axis(panel.yaxis)
    panel.set_ylabel("perplexity")
    panel.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, handlelength=1.4, ncols=3)


def _choose_marker(points: list[tuple[int, float]]) -> str:
    """Return a dot for curves of few points, no marker for dense ones."""
    return "o" if len(points) <= _MOST_DOTS else ""


def _read_curve(record: Record, name: str) -> list[tuple[int, float]]:
    points = [(int(entry["step"]), entry[name]) for entry in record.training if name in entry]
    return [point for point in points if math.isfinite(point[1])]

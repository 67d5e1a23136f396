"""Cost of a run: seconds and peak memory of every stage."""

from typing import TYPE_CHECKING

from prunelit.report.figures.style import KEPT, clear_background, create_figure
from prunelit.report.format_numbers import format_duration
from prunelit.report.record import Record, Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_stages(record: Record) -> "Figure | None":
    """Draw one bar for each stage in the order in which the stages ended, with its seconds and the peak memory so far.

    Args:
        record: `record.stages` holds seconds and memory (MiB).

    Returns:
        The figure; None where no stage was recorded.

    Example:
        >>> record = Record(stages=[{"name": "score", "seconds": 2.0, "memory_mib": {"process": 512.0}}])
        >>> len(draw_stages(record).axes[0].patches)
        1
    """
    stages: dict[str, Stage] = {}
    for stage in record.stages:  # a stage that ran twice is one bar
        total = stages.setdefault(stage["name"], {"name": stage["name"], "seconds": 0.0, "memory_mib": {}})
        total["seconds"] += stage["seconds"]
        total["memory_mib"] = stage.get("memory_mib") or total["memory_mib"]
    if not stages:
        return None
    figure = create_figure(0.55 + 0.22 * len(stages))
    panel = clear_background(figure.subplots())
    names = [name.replace("_", " ") for name in stages]
    seconds = [stage["seconds"] for stage in stages.values()]
    bars = panel.barh(names, seconds, color=KEPT, height=0.7)
    panel.bar_label(bars, [_label_stage(stage) for stage in stages.values()], padding=3, fontsize=8.5)
    panel.invert_yaxis()
    panel.set_xlim(0, max(seconds) * 1.75 or 1)
    panel.set_xlabel("seconds; peak memory so far")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    return figure


def _label_stage(stage: Stage) -> str:
    memory = stage["memory_mib"].get("cuda") or stage["memory_mib"].get("process")
    seconds = format_duration(stage["seconds"])
    return seconds if memory is None else f"{seconds}, {memory / 1024:.2f} GiB"

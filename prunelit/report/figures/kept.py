"""Units that remain after pruning: a map of layers x KV groups, query heads, experts and channels."""

from typing import TYPE_CHECKING

from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.report.figures.style import (
    BLOCK,
    FAINT,
    KEPT,
    REMOVED,
    add_legend,
    clear_background,
    create_figure,
    use_whole_number_ticks,
)
from prunelit.report.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_kept_units(record: Record) -> "Figure | None":
    """Draw the map of the record's plan, see `draw_plan_map`.

    Args:
        record: `record.plan` is drawn.

    Returns:
        The figure; None where the record holds no plan.

    Example:
        >>> draw_kept_units(Record()) is None
        True
    """
    return None if record.plan is None else draw_plan_map(record.plan)


def draw_plan_map(plan: PruningPlan) -> "Figure":
    """Draw the units that a plan keeps.

    Each row is a layer, layer 0 on top. Each column is a unit; for the FFN, and for the experts of a mixture, a bar
    shows the share of channels that remain. Models without grouped queries have no panel of KV groups.

    Args:
        plan: the plan to draw.

    Returns:
        The figure.

    Example: see `prunelit.report.figures.draw_picture`.
    """
    shapes = plan.model.layers
    most_groups, most_heads, most_experts, most_channels = (
        max(getattr(shape, name) for shape in shapes)
        for name in ("kv_groups", "query_heads", "experts", "ffn_channels")
    )
    grids: list[tuple[str, list[list[int]]]] = []
    if most_groups and most_groups != most_heads:
        grids.append(("KV groups", _build_unit_grid(plan, "kv_groups", most_groups)))
    if most_heads:
        grids.append(("query heads", _build_unit_grid(plan, "query_heads", most_heads)))
    bars = []
    if most_experts:
        grids.append(("experts", _build_unit_grid(plan, "experts", most_experts)))
        bars.append(("channels of experts, %", "expert_channels"))
    if most_channels or not most_experts:
        bars.append(("FFN channels, %", "ffn_channels"))
    figure = create_figure(min(7.5, max(1.9, 0.6 + 0.085 * len(shapes))))
    widths = [max(0.35, min(1.0, len(grid[0]) / 16)) for _, grid in grids] + [1.0] * len(bars)
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    for panel, (name, grid) in zip(panels, grids, strict=False):
        _draw_unit_grid(clear_background(panel), name, grid)
    for panel, (label, kind) in zip(panels[len(grids) :], bars, strict=True):
        _draw_channel_shares(clear_background(panel), plan, label, kind)
    panels[0].set_ylabel("layer")
    panels[0].set_ylim(len(shapes) - 0.5, -0.5)
    use_whole_number_ticks(panels[0].yaxis)
    has_removed_block = any(kept.list_removed_blocks(shape) for kept, shape in _pair_layers(plan))
    add_legend(figure, [("kept", KEPT), ("removed", REMOVED), *[("whole block removed", BLOCK)] * has_removed_block])
    return figure


def _pair_layers(plan: PruningPlan) -> list[tuple[LayerPlan, LayerShape]]:
    return list(zip(plan.layers, plan.model.layers, strict=True))


def _build_unit_grid(plan: PruningPlan, kind: str, width: int) -> list[list[int]]:
    """Build a grid of codes [layers][width]: 0 no such unit, 1 kept, 2 removed, 3 removed with its block."""
    rows = []
    for kept, shape in _pair_layers(plan):
        block_removed = kept.mlp_removed if kind == "experts" else kept.attention_removed
        remaining, removed_code = set(getattr(kept, kind)), 3 if block_removed else 2
        dense_count = getattr(shape, kind)
        rows.append([1 if unit in remaining else removed_code if unit < dense_count else 0 for unit in range(width)])
    return rows


def _draw_unit_grid(panel: "Axes", name: str, grid: list[list[int]]) -> None:
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(["none", KEPT, REMOVED, BLOCK])
    panel.imshow(grid, cmap=colours, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
    if len(grid) * len(grid[0]) <= 2500:  # white gaps between cells would hide small cells
        panel.set_xticks([unit - 0.5 for unit in range(1, len(grid[0]))], minor=True)
        panel.set_yticks([layer - 0.5 for layer in range(1, len(grid))], minor=True)
        panel.grid(which="minor", color="white", linewidth=0.6, alpha=1.0)
        panel.tick_params(which="minor", length=0)
    panel.set_xlabel(name)
    use_whole_number_ticks(panel.xaxis, 4)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _draw_channel_shares(panel: "Axes", plan: PruningPlan, label: str, kind: str) -> None:
    """Draw the share of each dense layer's channels that remain."""
    for layer, (kept, shape) in enumerate(_pair_layers(plan)):
        if not getattr(shape, kind):
            continue
        share = 100 * len(getattr(kept, kind)) / getattr(shape, kind)
        panel.barh(layer, share, height=0.8, color=KEPT)
        panel.barh(layer, 100 - share, left=share, height=0.8, color=BLOCK if kept.mlp_removed else REMOVED)
    panel.set_xlim(0, 100)
    panel.set_xticks([0, 50, 100])
    panel.set_xlabel(label)
    panel.tick_params(axis="y", length=0)
    panel.axvline(50, color=FAINT, linewidth=0.5, alpha=0.6)

"""A plan as text: what remains in each layer, predicted speed, which programs serve it; how two plans differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.core.plan_diff import PlanDifference
from prunelit.core.plan_json import format_index_ranges
from prunelit.planning.overshoot import format_asked_share
from prunelit.planning.serving import list_serving_notes, list_serving_options
from prunelit.report.format_numbers import describe_other_parameters

_TOTALS = (
    *("parameters", "block_parameters", "active_parameters", "other_parameters"),
    *("macs_per_token", "kv_bytes_per_token"),
)
_UNITS = {"query_heads": "query heads", "kv_groups": "KV groups", "ffn_channels": "FFN channels"}
_EXPERT_UNITS = {"experts": "experts", "expert_channels": "channels of an expert"}


class MeasuredLatency(NamedTuple):
    """Latency of all decoder layers, dense and as planned.

    Attributes:
        dense: seconds of the dense layers.
        planned: seconds of the layers at the planned widths.
        record: how it was measured: mode, tokens, device, dtype (`prunelit.planning.latency.LatencyTable.record`).

    Example:
        >>> latency = MeasuredLatency(dense=0.2, planned=0.1, record={"mode": "prefill"})
        >>> latency.dense / latency.planned
        2.0
    """

    dense: float
    planned: float
    record: Mapping[str, object]


def render_plan_card(plan: PruningPlan, measured: MeasuredLatency | None = None) -> str:
    """Write a plan as text: totals against the dense model, time, the layers, and the serving table.

    Args:
        plan: the plan.
        measured: measured latency; None where only MACs are known.

    Returns:
        Text of several lines.

    Example: see `prunelit.cli.plan_files.run_plan_files`.
    """
    model = plan.model
    headline = f"{plan.method} on {model.name} ({model.model_type}, {len(model.layers)} layers), plan {plan.digest}"
    predicted = plan.predicted
    removed = (
        f"removed {predicted['ratio_of_block_parameters']:.2%}{format_asked_share(plan)} of block parameters, "
        f"{predicted['ratio_of_all_parameters']:.2%} of all; {describe_other_parameters(predicted)}"
    )
    parts = [
        headline,
        render_plan_totals({"dense": make_dense_plan(plan), "planned": plan}),
        removed,
        describe_coverage(plan),
        _describe_time(plan, measured),
        render_layer_table(plan),
        render_serving_table(plan),
    ]
    return "\n\n".join(filter(None, parts))


def list_unit_names(plan: PruningPlan) -> dict[str, str]:
    """List the kinds of units of a plan's model: {attribute of `LayerPlan`: name for people}.

    Args:
        plan: the plan; only one for a mixture of experts has experts.

    Example: see `list_layer_rows`.
    """
    return _UNITS | (_EXPERT_UNITS if plan.model.has_experts else {})


def describe_coverage(plan: PruningPlan) -> str:
    """Describe how many experts the calibration text did not reach; "" where the method did not count them.

    Args:
        plan: the plan.

    Example: see `render_plan_card`.
    """
    record = plan.calibration
    if not record.get("experts"):
        return ""
    unreached = record.get("experts_without_tokens", 0)
    advice = "; their scores are 0: raise windows or seqlen, or add text of other kinds" if unreached else ""
    return f"coverage: no token of the text reached {unreached:,} of {record['experts']:,} experts{advice}"


def make_dense_plan(plan: PruningPlan) -> PruningPlan:
    """Make the plan that keeps every unit of the same model.

    Args:
        plan: the plan.

    Example:
        >>> from prunelit.core.plan import ModelShape
        >>> shape = LayerShape(2, 2, 4, 8, 3, 32, 32, 24, 128, 192)
        >>> model = ModelShape("llama", "tiny", 8, 1000, 0, 4, "0" * 16, (shape,))
        >>> make_dense_plan(PruningPlan("flap", model, (LayerPlan((0,), (0,), (0,)),))).layers[0].widths
        (2, 2, 8)
    """
    return replace(plan, layers=tuple(map(LayerPlan.dense, plan.model.layers)))


def render_plan_totals(plans: dict[str, PruningPlan]) -> str:
    """Write parameters, MACs and KV-cache bytes of two plans as a table, with the ratio of the second to the first.

    Args:
        plans: {column title: plan}, two of them.

    Returns:
        Text of several lines.

    Example: see `render_plan_card`.
    """
    values = [plan.predicted for plan in plans.values()]
    for predicted in values:
        predicted["other_parameters"] = predicted["parameters"] - predicted["block_parameters"]
    rows = [["", *plans, "ratio"]]
    for name in [name for name in _TOTALS if name in values[0]]:
        first_total, second_total = (int(predicted[name]) for predicted in values)
        ratio = f"{second_total / first_total:.3f}" if first_total else "-"
        rows.append([name.replace("_", " "), f"{first_total:,}", f"{second_total:,}", ratio])
    return align_columns(rows, right=(1, 2, 3))


def render_layer_table(plan: PruningPlan) -> str:
    """Write what remains in the layers as a table; neighbouring layers of one shape share a line.

    Args:
        plan: the plan.

    Example: see `list_layer_rows`.
    """
    return align_columns(list_layer_rows(plan), right=range(1, 1 + len(list_unit_names(plan))))


def list_layer_rows(plan: PruningPlan) -> list[list[str]]:
    """List the cells of `render_layer_table`.

    Args:
        plan: the plan.

    Returns:
        Rows of cells; the first row is the head.

    Example:
        >>> from prunelit.core.plan import ModelShape
        >>> shape = LayerShape(2, 2, 4, 8, 3, 32, 32, 24, 128, 192)
        >>> model = ModelShape("llama", "tiny", 8, 1000, 0, 4, "0" * 16, (shape,))
        >>> list_layer_rows(PruningPlan("flap", model, (LayerPlan((0,), (0,), (0, 1, 2, 3)),)))[1]
        ['0', '1/2', '1/2', '4/8', '']
    """
    units = list_unit_names(plan)
    rows = [["layers", *units.values(), ""]]
    numbered = enumerate(zip(plan.layers, plan.model.layers, strict=True))
    for cells, group in groupby(numbered, lambda item: _describe_layer_widths(list(units), *item[1])):
        indices = [index for index, _ in group]
        rows.append([format_index_ranges(indices), *cells])
    return rows


def _describe_layer_widths(units: Sequence[str], kept: LayerPlan, shape: LayerShape) -> tuple[str, ...]:
    pairs = [(len(getattr(kept, unit)), getattr(shape, unit)) for unit in units]
    counts = [f"{remaining}/{dense_count}" if remaining else "-" for remaining, dense_count in pairs]
    removed_blocks = ["FFN" if name == "mlp" else name for name in kept.list_removed_blocks(shape)]
    biased_blocks = [
        name for name, is_added in (("attention", kept.attention_bias), ("FFN", kept.mlp_bias)) if is_added
    ]
    removal = "layer gone" if kept.removed else f"{' and '.join(removed_blocks)} gone" if removed_blocks else ""
    mixer = "mixer stays" if kept.mixer else ""
    bias = f"bias added: {', '.join(biased_blocks)}" if biased_blocks else ""
    return *counts, "; ".join(filter(None, (mixer, removal, bias))) or (
        "whole" if kept == LayerPlan.dense(shape) else ""
    )


def _describe_time(plan: PruningPlan, measured: MeasuredLatency | None) -> str:
    dense, planned = (each.predicted["macs_per_token"] for each in (make_dense_plan(plan), plan))
    if measured is None:
        return f"time: MACs promise {dense / max(1, planned):.2f} times the speed; --latency true measures it here"
    head_macs = plan.model.head_macs
    promise = f"{(dense - head_macs) / max(1, planned - head_macs):.2f} by their MACs"
    conditions = "{mode} of {tokens} tokens, {device}, {dtype}".format(**measured.record)
    speed = f"{measured.dense / measured.planned:.2f} times the speed" if measured.planned else "nothing left to run"
    return (
        f"time: decoder layers, {conditions}, summed from a few measured widths: {measured.dense * 1e3:.1f} ms dense, "
        f"{measured.planned * 1e3:.1f} ms planned: {speed}; {promise}"
    )


def render_serving_table(plan: PruningPlan) -> str:
    """Write which programs can serve the pruned model as a table, with notes below.

    Args:
        plan: the plan.

    Example: see `render_plan_card`.
    """
    rows = [["will it serve?", "", "why", "option", "how known"]]
    rows += [[row.target, row.answer, row.why, row.option, row.known] for row in list_serving_options(plan)]
    return "\n".join([align_columns(rows), "", *list_serving_notes(plan)])


def render_plan_difference(
    first: PruningPlan, second: PruningPlan, differences: Sequence[PlanDifference], names: tuple[str, str]
) -> str:
    """Write how two plans of one model differ.

    Args:
        first, second: the plans.
        differences: at least one; see `prunelit.core.plan_diff`.
        names: what the two plans are called in the text.

    Returns:
        Totals of both plans, one line for each difference, and the number of layers that differ.

    Example: see `prunelit.cli.plan_files.run_plan_files`.
    """
    layer_count = len({difference.layer for difference in differences})
    count = f"{layer_count} of {len(first.layers)} layers differ"
    totals = render_plan_totals(dict(zip(names, (first, second), strict=True)))
    return "\n\n".join([totals, align_columns(list_difference_rows(differences, names)), count])


def list_difference_rows(differences: Sequence[PlanDifference], names: tuple[str, str]) -> list[list[str]]:
    """List the cells of a table of differences between two plans; the first row is the head.

    Args:
        differences: see `prunelit.core.plan_diff`.
        names: what the two plans are called in the text.

    Example:
        >>> list_difference_rows([PlanDifference(0, "ffn_channels", (0,), (2, 3), (1, 2))], ("A", "B"))[1]
        ['0', 'ffn channels', '1 -> 2', '0', '2-3']
    """
    rows = [["layer", "units", "kept", f"only in {names[0]}", f"only in {names[1]}"]]
    return rows + [
        [str(difference.layer), difference.kind.replace("_", " "), *_describe_difference(difference)]
        for difference in differences
    ]


def _describe_difference(difference: PlanDifference) -> Iterator[str]:
    width_before, width_after = (
        "added" if width is True else "none" if width is False else str(width) for width in difference.widths
    )
    yield f"{width_before} -> {width_after}"
    for units in (difference.only_first, difference.only_second):
        indices = format_index_ranges(units)
        yield indices if len(indices) <= 40 else f"{indices[:34].rpartition(',')[0]}, ... ({len(units)})"


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Align columns under a head line.

    Args:
        rows: of equal length; the first one is the head.
        right: indices of the columns that are flush right.

    Example:
        >>> print(align_columns([["a", "b"], ["1", "22"]], right=(1,)))
        a   b
        -----
        1  22
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def format_row(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if column_index in right else cell.ljust(width)
            for column_index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([format_row(rows[0]), "-" * (sum(widths) + 2 * len(widths) - 2), *map(format_row, rows[1:])])

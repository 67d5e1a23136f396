"""A plan as text: what it leaves, layer by layer, what it promises in time, what serves it; how two plans differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.core.plan_diff import PlanDifference
from prunelit.core.plan_json import format_index_ranges
from prunelit.planning.serving import list_serving_notes, list_serving_options

_TOTALS = ("parameters", "block_parameters", "macs_per_token", "kv_bytes_per_token")


class MeasuredLatency(NamedTuple):
    """Seconds of all decoder layers, dense and planned, and how they were measured (`latency.LatencyTable.record`)."""

    dense: float
    planned: float
    record: Mapping[str, Any]


def render_plan_card(plan: PruningPlan, measured: MeasuredLatency | None = None) -> str:
    """Totals against the dense model, time, the layers, and the serving table."""
    model = plan.model
    head = f"{plan.method} on {model.name} ({model.model_type}, {len(model.layers)} layers), plan {plan.digest}"
    predicted = plan.predicted
    removed = (
        f"removed {predicted['ratio_of_block_parameters']:.2%} of block parameters, "
        f"{predicted['ratio_of_all_parameters']:.2%} of all"
    )
    parts = [
        head,
        render_plan_totals({"dense": make_dense_plan(plan), "planned": plan}),
        removed,
        _describe_time(plan, measured),
    ]
    return "\n\n".join([*parts, render_layer_table(plan), render_serving_table(plan)])


def make_dense_plan(plan: PruningPlan) -> PruningPlan:
    """The plan that keeps everything."""
    return replace(plan, layers=tuple(map(LayerPlan.dense, plan.model.layers)))


def render_plan_totals(plans: dict[str, PruningPlan]) -> str:
    """What two plans leave, and the ratio of the second to the first."""
    values = [plan.predicted for plan in plans.values()]
    rows = [["", *plans, "ratio"]]
    for name in _TOTALS:
        first, second = (int(each[name]) for each in values)
        ratio = f"{second / first:.3f}" if first else "-"
        rows.append([name.replace("_", " "), f"{first:,}", f"{second:,}", ratio])
    return _align_columns(rows, right=(1, 2, 3))


def render_layer_table(plan: PruningPlan) -> str:
    """What the layers keep, neighbours of one shape in one line."""
    return _align_columns(list_layer_rows(plan), right=(1, 2, 3))


def list_layer_rows(plan: PruningPlan) -> list[list[str]]:
    """The same as rows of cells, the first one a head."""
    rows = [["layers", "query heads", "KV groups", "FFN channels", ""]]
    numbered = enumerate(zip(plan.layers, plan.model.layers, strict=True))
    for said, run in groupby(numbered, lambda item: _describe_layer_widths(*item[1])):
        indices = [index for index, _ in run]
        rows.append([format_index_ranges(indices), *said])
    return rows


def _describe_layer_widths(kept: LayerPlan, shape: LayerShape) -> tuple[str, ...]:
    pairs = zip(kept.widths, (shape.query_heads, shape.kv_groups, shape.ffn_channels), strict=True)
    said = [f"{here}/{there}" if here else "-" for here, there in pairs]
    gone = [name for name, removed in (("attention", kept.attention_removed), ("FFN", kept.mlp_removed)) if removed]
    biased = [name for name, added in (("attention", kept.attention_bias), ("FFN", kept.mlp_bias)) if added]
    what = "layer gone" if kept.removed else f"{gone[0]} gone" if gone else ""
    bias = f"bias added: {', '.join(biased)}" if biased else ""
    return *said, "; ".join(filter(None, (what, bias))) or ("whole" if kept == LayerPlan.dense(shape) else "")


def _describe_time(plan: PruningPlan, measured: MeasuredLatency | None) -> str:
    dense, planned = (each.predicted["macs_per_token"] for each in (make_dense_plan(plan), plan))
    if measured is None:
        return f"time: MACs promise {dense / max(1, planned):.2f} times the speed; --latency true measures it here"
    head = plan.model.head_macs
    promise = f"{(dense - head) / max(1, planned - head):.2f} by their MACs"
    how = "{mode} of {tokens} tokens, {device}, {dtype}".format(**measured.record)
    speed = f"{measured.dense / measured.planned:.2f} times the speed" if measured.planned else "nothing left to run"
    return (
        f"time: decoder layers, {how}, summed from a few measured widths: {measured.dense * 1e3:.1f} ms dense, "
        f"{measured.planned * 1e3:.1f} ms planned: {speed}; {promise}"
    )


def render_serving_table(plan: PruningPlan) -> str:
    """The serving table with its notes."""
    rows = [["will it serve?", "", "why", "option", "how known"]]
    rows += [[row.target, row.answer, row.why, row.option, row.known] for row in list_serving_options(plan)]
    return "\n".join([_align_columns(rows), "", *list_serving_notes(plan)])


def render_plan_difference(
    first: PruningPlan, second: PruningPlan, found: Sequence[PlanDifference], names: tuple[str, str]
) -> str:
    """Totals of both plans and a line for every difference; `found` is not empty."""
    rows = [["layer", "units", "kept", f"only in {names[0]}", f"only in {names[1]}"]]
    rows += [[str(each.layer), each.kind.replace("_", " "), *_describe_difference(each)] for each in found]
    layers = len({each.layer for each in found})
    count = f"{layers} of {len(first.layers)} layers differ"
    return "\n\n".join(
        [render_plan_totals(dict(zip(names, (first, second), strict=True))), _align_columns(rows), count]
    )


def _describe_difference(each: PlanDifference) -> Iterator[str]:
    first, second = ("added" if n is True else "none" if n is False else str(n) for n in each.widths)
    yield f"{first} -> {second}"
    for units in (each.only_first, each.only_second):
        said = format_index_ranges(units)
        yield said if len(said) <= 40 else f"{said[:34].rpartition(',')[0]}, ... ({len(units)})"


def _align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns under a head line; those in `right` are flush right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows[1:])])

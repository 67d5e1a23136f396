"""Each picture of a run in one sentence with its numbers: for those who do not see it, and as what to look for."""

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from prunelit.core.plan_json import format_index_ranges
from prunelit.report.record import Record
from prunelit.runtime.format_numbers import format_duration, format_perplexity


def summarize_picture(name: str, record: Record) -> str:
    """The sentence to one of `pictures.PICTURES` that has something to show."""
    return _SUMMARIES[name](record)


def _summarize_kept_units(record: Record) -> str:
    plan = record.plan
    assert plan is not None
    said = []
    for kind, what in (("kv_groups", "KV groups"), ("query_heads", "query heads"), ("ffn_channels", "FFN channels")):
        there = sum(getattr(shape, kind) for shape in plan.model.layers)
        left = sum(len(getattr(kept, kind)) for kept in plan.layers)
        if there:
            said.append(f"{left:,} of {there:,} {what}")
    pairs = list(zip(plan.layers, plan.model.layers, strict=True))
    attention = [n for n, (kept, shape) in enumerate(pairs) if kept.attention_removed and shape.kv_groups]
    ffn = [n for n, (kept, shape) in enumerate(pairs) if kept.mlp_removed and shape.ffn_channels]
    gone = [
        f"{what} of layers {format_index_ranges(of)}" for what, of in (("attention", attention), ("FFN", ffn)) if of
    ]
    whole = f"; no longer there: {', '.join(gone)}" if gone else ""
    return f"{', '.join(said)} stay in {len(plan.layers)} layers{whole}."


def _summarize_scores(record: Record) -> str:
    names = {"heads": "query heads", "channels": "FFN channels"}
    said = []
    for kind, layers in record.scores.items():
        found = [(sum(one.removed), sum(one.kept) + sum(one.removed)) for one in layers if one is not None]
        if found:
            goes, there = (sum(column) for column in zip(*found, strict=True))
            shares = [gone / of for gone, of in found]
            low, high = (f"{share:.0%}" for share in (min(shares), max(shares)))
            between = f", {low} of each layer" if low == high else f", {low} to {high} of a layer"
            said.append(f"{goes:,} of {there:,} {names[kind]} go{between if goes else ''}")
    return f"{'; '.join(said)}."


def _summarize_search(record: Record) -> str:
    first, last = record.decided[0], record.decided[-1]
    blocks = len(last["order"])
    tried = f" after {len(record.search):,} evaluations" if record.search else ""
    return (
        f"{blocks} block{'s' * (blocks != 1)} removed{tried}; perplexity {format_perplexity(first['perplexity'])} to "
        f"{format_perplexity(last['perplexity'])} on the calibration text."
    )


def _summarize_quality(record: Record) -> str:
    said = [
        f"{name} {format_perplexity(row['perplexity'])}"
        for name, row in record.measured.items()
        if row.get("perplexity")
    ]
    return f"Perplexity: {', '.join(said)}."


def _summarize_training(record: Record) -> str:
    said = []
    for names, what in ((("train_loss", "train_loss_step", "loss", "loss_step"), "loss"), (("val_perplexity",), "")):
        found = _read_training_curve(record, names)
        if found:
            what = what or "validation perplexity"
            said.append(
                f"{what} {format_perplexity(found[0][1])} at step {found[0][0]}, {format_perplexity(found[-1][1])} at {found[-1][0]}"
            )
    return f"{'; '.join(said)}.".capitalize() if said else "Validation over the steps of training."


def _summarize_speed(record: Record) -> str:
    speeds = [value for _, value in _read_training_curve(record, ("tokens_per_second",))]
    return f"Median {median(speeds):,.0f} tokens per second, {min(speeds):,.0f} to {max(speeds):,.0f}."


def _summarize_stages(record: Record) -> str:
    seconds: dict[str, float] = {}
    for stage in record.stages:
        seconds[stage["name"]] = seconds.get(stage["name"], 0.0) + stage["seconds"]
    longest = max(seconds, key=lambda name: seconds[name])
    said = f"{format_duration(sum(seconds.values()))} in all; longest: {longest.replace('_', ' ')}, {format_duration(seconds[longest])}"
    return f"{said}{_describe_peak_memory(record.stages)}."


def _describe_peak_memory(stages: Iterable[dict[str, Any]]) -> str:
    found = [memory for stage in stages if (memory := stage.get("memory_mib"))]
    place = "cuda" if any("cuda" in memory for memory in found) else "process"
    most = max((memory.get(place, 0.0) for memory in found), default=0.0)
    where = {"cuda": "GPU memory", "process": "memory of the process"}[place]
    return f"; peak {where} {most / 1024:.2f} GiB" if most else ""


def _read_training_curve(record: Record, names: Iterable[str]) -> list[tuple[int, float]]:
    for name in names:
        found = [(e["step"], e[name]) for e in record.training if name in e and math.isfinite(e[name])]
        if found:
            return found
    return []


_SUMMARIES: dict[str, Callable[[Record], str]] = {
    "kept": _summarize_kept_units,
    "scores": _summarize_scores,
    "search": _summarize_search,
    "quality": _summarize_quality,
    "training": _summarize_training,
    "speed": _summarize_speed,
    "stages": _summarize_stages,
}

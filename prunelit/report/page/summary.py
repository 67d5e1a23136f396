"""Each figure of a run in one sentence with its numbers: a caption, and a description for screen readers."""

import math
from collections.abc import Callable, Iterable
from statistics import median

from prunelit.core.plan_json import format_index_ranges
from prunelit.report.format_numbers import format_duration, format_perplexity
from prunelit.report.record import Record, Stage


def summarize_picture(name: str, record: Record) -> str:
    """Describe a figure of a run in one sentence.

    Args:
        name: a key of `prunelit.report.figures.PICTURES`; the record must hold what that figure draws.
        record: the run.

    Example:
        >>> record = Record(measured={"dense": {"perplexity": 22.9}, "pruned": {"perplexity": 37.5}})
        >>> summarize_picture("quality", record)
        'Perplexity: dense 22.9, pruned 37.5.'
    """
    return _SUMMARIES[name](record)


def _summarize_kept_units(record: Record) -> str:
    plan = record.plan
    assert plan is not None
    counts = []
    for kind, unit_name in (
        ("kv_groups", "KV groups"),
        ("query_heads", "query heads"),
        ("ffn_channels", "FFN channels"),
        ("experts", "experts"),
        ("expert_channels", "channels of experts"),
    ):
        dense_count = sum(getattr(shape, kind) for shape in plan.model.layers)
        kept_count = sum(len(getattr(kept, kind)) for kept in plan.layers)
        if dense_count:
            counts.append(f"{kept_count:,} of {dense_count:,} {unit_name}")
    pairs = list(zip(plan.layers, plan.model.layers, strict=True))
    removed_blocks = [
        f"{block_name} of layers {format_index_ranges(indices)}"
        for kind, block_name in (("attention", "attention"), ("mixer", "mixer"), ("mlp", "FFN"))
        if (indices := [i for i, (kept, shape) in enumerate(pairs) if kind in kept.list_removed_blocks(shape)])
    ]
    removal_note = f"; removed: {', '.join(removed_blocks)}" if removed_blocks else ""
    return f"{', '.join(counts)} remain in {len(plan.layers)} layers{removal_note}."


def _summarize_scores(record: Record) -> str:
    names = {
        "heads": "query heads",
        "channels": "FFN channels",
        "experts": "experts",
        "expert_channels": "channels of experts",
    }
    clauses = []
    for kind, layers in record.scores.items():
        counts = [
            (sum(histogram.removed), sum(histogram.kept) + sum(histogram.removed))
            for histogram in layers
            if histogram is not None
        ]
        if counts:
            removed, total = (sum(column) for column in zip(*counts, strict=True))
            shares = [removed_count / unit_count for removed_count, unit_count in counts]
            low, high = (f"{share:.0%}" for share in (min(shares), max(shares)))
            share_note = f", {low} of each layer" if low == high else f", {low} to {high} of a layer"
            clauses.append(f"{removed:,} of {total:,} {names[kind]} removed{share_note if removed else ''}")
    return f"{'; '.join(clauses)}."


def _summarize_search(record: Record) -> str:
    dense_step, last_step = record.decided[0], record.decided[-1]
    blocks = len(last_step["order"])
    evaluation_note = f" after {len(record.search):,} evaluations" if record.search else ""
    return (
        f"{blocks} block{'s' * (blocks != 1)} removed{evaluation_note}; perplexity "
        f"{format_perplexity(dense_step['perplexity'])} to {format_perplexity(last_step['perplexity'])} "
        "on the calibration text."
    )


def _summarize_quality(record: Record) -> str:
    values = [
        f"{name} {format_perplexity(row['perplexity'])}"
        for name, row in record.measured.items()
        if row.get("perplexity")
    ]
    return f"Perplexity: {', '.join(values)}."


def _summarize_training(record: Record) -> str:
    clauses = []
    for names, quantity in (
        (("train_loss", "train_loss_step", "loss", "loss_step"), "loss"),
        (("val_perplexity",), ""),
    ):
        points = _read_training_curve(record, names)
        if points:
            quantity = quantity or "validation perplexity"
            (first_step, first_value), (last_step, last_value) = points[0], points[-1]
            end = f", {format_perplexity(last_value)} at {last_step}" if last_step > first_step else ""
            clauses.append(f"{quantity} {format_perplexity(first_value)} at step {first_step}{end}")
    return f"{'; '.join(clauses)}.".capitalize() if clauses else "Validation over the steps of training."


def _summarize_speed(record: Record) -> str:
    speeds = [value for _, value in _read_training_curve(record, ("tokens_per_second",))]
    return f"Median {median(speeds):,.0f} tokens per second, {min(speeds):,.0f} to {max(speeds):,.0f}."


def _summarize_stages(record: Record) -> str:
    seconds: dict[str, float] = {}
    for stage in record.stages:
        seconds[stage["name"]] = seconds.get(stage["name"], 0.0) + stage["seconds"]
    longest = max(seconds, key=lambda name: seconds[name])
    total, longest_time = format_duration(sum(seconds.values())), format_duration(seconds[longest])
    peak = _describe_peak_memory(record.stages)
    return f"{total} in all; longest: {longest.replace('_', ' ')}, {longest_time}{peak}."


def _describe_peak_memory(stages: Iterable[Stage]) -> str:
    memories = [memory for stage in stages if (memory := stage.get("memory_mib"))]
    kind = "cuda" if any("cuda" in memory for memory in memories) else "process"
    peak = max((memory.get(kind, 0.0) for memory in memories), default=0.0)
    label = {"cuda": "GPU memory", "process": "memory of the process"}[kind]
    return f"; peak {label} {peak / 1024:.2f} GiB" if peak else ""


def _read_training_curve(record: Record, names: Iterable[str]) -> list[tuple[int, float]]:
    for name in names:
        points = [
            (int(entry["step"]), entry[name])
            for entry in record.training
            if name in entry and math.isfinite(entry[name])
        ]
        if points:
            return points
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

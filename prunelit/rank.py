"""Scores -> kept units: the budget, its scope, rounding and protection. Pure functions on tensors.

The budget is a promise: at least `ratio` of the decoder layers' parameters goes, and giving back any one rounding step
would break it.

Legend: Q query heads, G KV groups, F FFN channels. A *step* is the smallest cut that keeps a layer legal: one KV group,
or one query head from every group, or the channels down to the next multiple of `align`.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunelit.errors import BadOption, InfeasibleBudget, NonFinite
from prunelit.plan import LayerPlan, LayerShape

Scope = Literal["layer", "global", "layer_mean"]
Budget = Literal["parameters", "macs", "kv_bytes", "latency"]
Unit = Literal["kv_group", "query_head"]


@dataclass(frozen=True)
class LayerScores:
    """Importance of one layer's units, larger = keep. None: this kind is not scored and stays whole.

    Attributes:
        heads: [Q]; the score of a KV group is the sum over its query heads.
        channels: [F].
    """

    heads: Tensor | None = None
    channels: Tensor | None = None


@dataclass(frozen=True)
class _Step:
    score: float
    cost: int  # parameters
    units: tuple[int, ...]  # KV groups, query heads or channels that go


@dataclass(frozen=True)
class _Ladder:
    """The steps of one kind in one layer, cheapest loss first; they can only be taken in order."""

    layer: int
    kind: Literal["attention", "ffn"]
    units: int  # steps plus the one that must stay (attention); FFN channels
    steps: tuple[_Step, ...]


def select(
    shapes: Sequence[LayerShape],
    scores: Sequence[LayerScores],
    ratio: float,
    scope: Scope = "layer",
    unit: Unit = "kv_group",
    align: int = 64,
    protect: Collection[int] = (),
    *,
    budget: Budget = "parameters",
    min_kept: float = 0.0,
    standardise: bool = True,
    joint: bool = True,
) -> tuple[LayerPlan, ...]:
    """Choose the units that stay.

    Args:
        shapes: one per layer.
        scores: one per layer.
        ratio: share of the decoder layers' parameters to remove, in (0, 1).
        scope: "layer" cuts the same number of units from every layer (floor(ratio * groups) KV groups, the FFN takes
            the rest), so the layers stay alike; "global" ranks the units of all layers together after standardising
            each layer's scores, so layers come to differ.
        unit: attention is cut by whole KV groups, or by the same number of query heads from every group.
        align: kept FFN widths are multiples of this.
        protect: layers left whole; negative numbers count from the end.

    Returns:
        One `LayerPlan` per layer; at least one KV group (or query head per group) and `align` channels stay in each.

    Raises:
        BadOption: an option outside its range.
        NonFinite: a score is NaN or infinite.
        InfeasibleBudget: the layers that may be cut do not hold that many removable parameters.
    """
    check_options(ratio, scope, unit, align, protect, len(shapes))
    whole = {layer % len(shapes) for layer in protect}
    ladders: list[_Ladder] = []
    for index, (shape, score) in enumerate(zip(shapes, scores, strict=True)):
        if index not in whole:
            ladders += _ladders(index, shape, score, unit, align, standardise=scope == "global")
    dense = sum(shape.parameters for shape in shapes)
    target = ratio * dense
    most = sum(step.cost for ladder in ladders for step in ladder.steps)
    if most < target:
        raise InfeasibleBudget(
            f"ratio {ratio}: expected at most {most / dense:.4f} with one {unit} and {align} channels kept in each of "
            f"{len(shapes) - len(whole)} unprotected layers; lower ratio or align, or protect fewer layers"
        )
    taken = _uniform(ladders, ratio, target) if scope == "layer" else _global(ladders, target)
    return _plans(shapes, ladders, taken, unit)


def check_options(
    ratio: float,
    scope: str,
    unit: str,
    align: int,
    protect: Collection[int],
    layers: int | None = None,
    *,
    budget: str = "parameters",
    min_kept: float = 0.0,
) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        BadOption: with the option's name, what was expected and what came.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise BadOption(f"ratio: expected a number between 0 and 1 (both excluded), got {ratio!r}")
    for name, value, allowed in (("scope", scope, ("layer", "global")), ("unit", unit, ("kv_group", "query_head"))):
        if value not in allowed:
            raise BadOption(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    if isinstance(align, bool) or not isinstance(align, int) or align < 1:
        raise BadOption(f"align: expected a positive integer number of channels, got {align!r}")
    for layer in protect:
        if isinstance(layer, bool) or not isinstance(layer, int) or (layers and not -layers <= layer < layers):
            raise BadOption(f"protect: expected layer numbers in [{-(layers or 0)}, {layers}), got {layer!r}")


def _ladders(
    index: int, shape: LayerShape, score: LayerScores, unit: Unit, align: int, standardise: bool
) -> list[_Ladder]:
    found = []
    if score.heads is not None and shape.kv_groups and shape.heads_prunable:
        heads = _checked(index, "head", score.heads, shape.query_heads, standardise)
        by_group = heads.view(shape.kv_groups, shape.group_size)
        if unit == "kv_group":
            groups = by_group.sum(1)
            cost = shape.group_size * shape.query_head_cost + shape.kv_head_cost
            order = torch.argsort(groups, stable=True).tolist()
            # Standardised scores of different kinds are compared, so a group counts as the mean of its heads there.
            value = by_group.mean(1) if standardise else groups
            steps = [_Step(value[g].item(), cost, (g,)) for g in order[:-1]]
        else:
            order_in_group = torch.argsort(by_group, dim=1, stable=True)  # [G, Q / G]
            cost = shape.kv_groups * shape.query_head_cost
            steps = []
            for rank in range(shape.group_size - 1):
                members = [g * shape.group_size + int(order_in_group[g, rank]) for g in range(shape.kv_groups)]
                mean = max(heads[members].mean().item(), steps[-1].score if steps else -math.inf)
                steps.append(_Step(mean, cost, tuple(members)))
        found.append(_Ladder(index, "attention", len(steps) + 1, tuple(steps)))
    if score.channels is not None and shape.ffn_channels:
        channels = _checked(index, "channel", score.channels, shape.ffn_channels, standardise)
        ascending = torch.argsort(channels, stable=True)
        width, start, steps = shape.ffn_channels, 0, []
        while width > align:
            narrower = (width - 1) // align * align
            units = ascending[start : start + width - narrower]
            # Means of equal scores may differ in the last bit; steps are taken in order all the same.
            mean = max(channels[units].mean().item(), steps[-1].score if steps else -math.inf)
            steps.append(_Step(mean, len(units) * shape.channel_cost, tuple(units.tolist())))
            start, width = start + len(units), narrower
        found.append(_Ladder(index, "ffn", shape.ffn_channels, tuple(steps)))
    return found


def _checked(index: int, kind: str, score: Tensor, size: int, standardise: bool) -> Tensor:
    """The scores in float64 on the CPU, finite, [size]; mean 0 and deviation 1 if asked."""
    values = score.detach().to("cpu", torch.float64).flatten()
    if len(values) != size:
        raise BadOption(f"layer {index}: expected {size} {kind} scores, got {len(values)}")
    if not torch.isfinite(values).all():
        raise NonFinite(
            f"layer {index}: {kind} scores hold NaN or infinity; expected finite numbers: check the weights, the "
            "calibration text and the dtype"
        )
    if standardise:
        values = values - values.mean()
        deviation = values.square().mean().sqrt()
        values = values / deviation if deviation > 0 else values
    return values


def _uniform(ladders: list[_Ladder], ratio: float, target: float) -> list[int]:
    """Steps taken per ladder: the same number in every layer."""
    attention = [ladder for ladder in ladders if ladder.kind == "attention"]
    ffn = [ladder for ladder in ladders if ladder.kind == "ffn"]
    longest = max((len(ladder.steps) for ladder in ffn), default=0)
    # floor(ratio * groups) first; more only where the FFN alone can not carry the rest.
    for extra in range(max((len(ladder.steps) for ladder in attention), default=0) + 1):
        taken = {id(a): min(int(ratio * a.units) + extra, len(a.steps)) for a in attention}
        for count in range(longest + 1):
            taken |= {id(f): min(count, len(f.steps)) for f in ffn}
            steps = [taken[id(ladder)] for ladder in ladders]
            if _cost(ladders, steps) >= target:
                return steps
    raise AssertionError("unreachable: select() checked that the budget can be met")


def _global(ladders: list[_Ladder], target: float) -> list[int]:
    """Steps taken per ladder: lowest standardised score first, over all layers and kinds."""
    queue = sorted(
        (step.score, number, position)
        for number, ladder in enumerate(ladders)
        for position, step in enumerate(ladder.steps)
    )
    taken, cut = [0] * len(ladders), 0.0
    for _, number, position in queue:
        if cut >= target:
            break
        cut += ladders[number].steps[position].cost
        taken[number] = position + 1
    for _, number, position in reversed(queue):  # the last step overshoots: give back what the budget does not need
        cost = ladders[number].steps[position].cost
        if taken[number] == position + 1 and cut - cost >= target:
            cut -= cost
            taken[number] = position
    return taken


def _cost(ladders: list[_Ladder], taken: list[int]) -> int:
    return sum(step.cost for ladder, count in zip(ladders, taken, strict=True) for step in ladder.steps[:count])


def _plans(shapes: Sequence[LayerShape], ladders: list[_Ladder], taken: list[int], unit: Unit) -> tuple[LayerPlan, ...]:
    cut: dict[tuple[int, str], set[int]] = {}
    for ladder, count in zip(ladders, taken, strict=True):
        cut[ladder.layer, ladder.kind] = {item for step in ladder.steps[:count] for item in step.units}
    plans = []
    for index, shape in enumerate(shapes):
        attention = cut.get((index, "attention"), set())
        ffn = cut.get((index, "ffn"), set())
        groups = [g for g in range(shape.kv_groups) if unit != "kv_group" or g not in attention]
        heads = [
            head
            for head in range(shape.query_heads)
            if head // shape.group_size in groups and (unit == "kv_group" or head not in attention)
        ]
        channels = [channel for channel in range(shape.ffn_channels) if channel not in ffn]
        plans.append(LayerPlan(tuple(heads), tuple(groups), tuple(channels)))
    return tuple(plans)

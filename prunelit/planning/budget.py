"""Scores -> kept units: the budget, its scope, rounding and protection. Pure functions on tensors.

The budget is a promise: at least `ratio` of what the decoder layers cost goes, and giving back any one rounding step
would break it.

A step is the smallest cut that keeps a layer legal, see `prunelit.planning.removal_steps`.
"""

import bisect
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Literal, get_args

import torch

from prunelit.core.plan import LayerPlan, LayerShape
from prunelit.core.scores import Cost, LayerScores, Unit
from prunelit.planning.removal_steps import RemovalSequence, build_removal_sequences, standardize_scores, tie_sequences
from prunelit.runtime.errors import BadOption, InfeasibleBudget

Scope = Literal["layer", "global", "layer_mean"]
Budget = Literal["parameters", "macs", "kv_bytes", "latency"]

_COST_FUNCTIONS: dict[str, Cost] = {
    "parameters": LayerShape.parameters_at,
    # Per unit of hidden size, and per byte of an element: factors that all layers share do not change a ratio.
    "macs": lambda shape, heads, groups, channels: shape.macs_at(1, heads, groups, channels),
    "kv_bytes": lambda shape, heads, groups, channels: shape.kv_elements_at(groups),
}
_KINDS = ("attention", "ffn")
_SHARE_PER_DEVIATION = (
    0.25  # of `ratio`: how far one deviation of a layer's mean importance moves its share, scope "layer_mean"
)


def select_units(
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
    uniform_heads: bool = False,
    standardise: bool = True,
    joint: bool = True,
    cost: Cost | None = None,
) -> tuple[LayerPlan, ...]:
    """Choose the units that stay.

    Args:
        shapes: one per layer.
        scores: one per layer.
        ratio: share of the decoder layers' budget to remove, in (0, 1).
        scope: "layer" cuts the same number of units from every layer (floor(ratio * groups) KV groups, the FFN takes
            the rest), so the layers stay alike; "global" ranks the units of all layers together, so layers come to
            differ; "layer_mean" cuts from each kind in each layer the share `ratio - ratio / 4 * z`, all shares moved
            alike to meet the budget, with z the layer's mean raw score, standardised over the layers.
        unit: attention is cut by whole KV groups, or by the same number of query heads from every group.
        align: kept FFN widths are multiples of this.
        protect: layers left whole; negative numbers count from the end.
        budget: what `ratio` counts, see `Budget`: parameters, MACs per token, bytes of KV cache per token, seconds.
        min_kept: least share of each layer's KV groups (or query heads per group) and channels that stays, in [0, 1);
            rounded up.
        uniform_heads: every layer loses the same number of KV groups (or query heads per group), whatever the scope;
            none where a layer is protected. FFN widths may differ.
        standardise: scope "global" gives each layer's scores of a kind mean 0 and deviation 1 first; False takes them
            as they are.
        joint: scope "global" ranks heads and channels in one list; False ranks each kind by itself, heads to at most
            `ratio` of their own cost, and channels take the rest.
        cost: what a layer costs at given widths, in place of the budget's own count; "latency" needs one
            (`prunelit.planning.latency`).

    Returns:
        One `LayerPlan` per layer; at least one KV group (or query head per group) and `align` channels stay in each.

    Raises:
        BadOption: an option outside its range.
        NonFinite: a score is NaN or infinite.
        InfeasibleBudget: the layers that may be cut do not hold that much of the budget.
    """
    check_budget_options(
        *(ratio, scope, unit, align, protect, len(shapes)),
        budget=budget,
        min_kept=min_kept,
        uniform_heads=uniform_heads,
    )
    price = cost or _COST_FUNCTIONS.get(budget)
    if price is None:
        raise BadOption(
            f"budget: expected a measured cost for {budget!r}, got none; see prunelit.planning.latency.measure_latency_table"
        )
    whole = {layer % len(shapes) for layer in protect}
    if shapes and len(whole) == len(shapes):
        raise InfeasibleBudget(
            f"ratio {ratio} of {budget}: expected a layer that may be cut, got all {len(shapes)} layers protected; "
            "protect fewer layers"
        )
    compared = scope == "global"
    ladders: list[RemovalSequence] = []
    for index, (shape, score) in enumerate(zip(shapes, scores, strict=True)):
        if index not in whole:
            ladders += build_removal_sequences(
                index, shape, score, price, unit, align, min_kept, compared, compared and standardise
            )
    found, members = ladders, [[number] for number in range(len(ladders))]
    if uniform_heads:
        ladders, members = _tie_heads(shapes, found)
    dense = sum(price(shape, shape.query_heads, shape.kv_groups, shape.ffn_channels) for shape in shapes)
    target = ratio * dense
    most = sum(ladder.accumulate_savings()[-1] for ladder in ladders)
    if most < target or not dense:
        least = f"{min_kept:g} of the units and one {unit}" if min_kept else f"one {unit}"
        if uniform_heads:
            least += " (uniform_heads: as many as any other layer keeps)"
        raise InfeasibleBudget(
            f"ratio {ratio} of {budget}: expected at most {most / dense if dense else 0:.4f} with {least} and {align} "
            f"channels kept in each of {len(shapes) - len(whole)} unprotected layers; lower ratio, align or min_kept, "
            "or protect fewer layers"
        )
    if scope == "layer":
        taken = _take_uniformly(ladders, ratio, target)
    elif scope == "layer_mean":
        taken = _take_in_order(ladders, _order_by_layer_mean(ladders, ratio), target)
    elif joint:
        taken = _take_in_order(ladders, _order_by_score(ladders, _KINDS), target)
    else:
        heads = dense - sum(price(shape, 0, 0, shape.ffn_channels) for shape in shapes)
        taken = _take_in_order(ladders, _order_kinds_apart(ladders, ratio * heads), target)
    gone = [0] * len(found)
    for ladder, count, group in zip(ladders, taken, members, strict=True):
        rung = ladder.steps[count - 1].removed_after if count else 0
        for number in group:
            gone[number] = sum(step.removed_after <= rung for step in found[number].steps)
    return _build_layer_plans(shapes, found, gone, unit)


def check_budget_options(
    ratio: float,
    scope: str,
    unit: str,
    align: int,
    protect: Collection[int],
    layers: int | None = None,
    *,
    budget: str = "parameters",
    min_kept: float = 0.0,
    uniform_heads: bool = False,
) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        BadOption: with the option's name, what was expected and what came.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise BadOption(f"ratio: expected a number between 0 and 1 (both excluded), got {ratio!r}")
    if isinstance(min_kept, bool) or not isinstance(min_kept, int | float) or not 0 <= min_kept < 1:
        raise BadOption(f"min_kept: expected a number from 0 to below 1, got {min_kept!r}")
    for name, value, allowed in (("scope", scope, Scope), ("unit", unit, Unit), ("budget", budget, Budget)):
        if value not in get_args(allowed):
            raise BadOption(f"{name}: expected one of {', '.join(get_args(allowed))}, got {value!r}")
    if not isinstance(uniform_heads, bool):
        raise BadOption(f"uniform_heads: expected true or false, got {uniform_heads!r}")
    if budget == "kv_bytes" and unit == "query_head":
        raise BadOption("budget: 'kv_bytes' counts KV groups; expected unit 'kv_group' with it, got 'query_head'")
    if isinstance(align, bool) or not isinstance(align, int) or align < 1:
        raise BadOption(f"align: expected a positive integer number of channels, got {align!r}")
    if isinstance(protect, str) or not isinstance(protect, Collection):
        raise BadOption(f"protect: expected a list of layer numbers, as [0, -1], got {protect!r}")
    for layer in protect:
        if isinstance(layer, bool) or not isinstance(layer, int) or (layers and not -layers <= layer < layers):
            raise BadOption(f"protect: expected layer numbers in [{-(layers or 0)}, {layers}), got {layer!r}")


def _tie_heads(
    shapes: Sequence[LayerShape], ladders: list[RemovalSequence]
) -> tuple[list[RemovalSequence], list[list[int]]]:
    """The ladders with those of heads as one, or none where a layer with heads has no ladder; and what each stands for.

    The second list holds, for every ladder of the first, the numbers of the ladders that it moves.
    """
    heads = [number for number, ladder in enumerate(ladders) if ladder.kind == "attention"]
    channels = [number for number, ladder in enumerate(ladders) if ladder.kind == "ffn"]
    together = bool(heads) and len(heads) == sum(shape.kv_groups > 0 for shape in shapes)
    first = [(tie_sequences([ladders[number] for number in heads]), heads)] if together else []
    both = first + [(ladders[number], [number]) for number in channels]
    return [ladder for ladder, _ in both], [members for _, members in both]


_StepQueue = list[tuple[int, int]]  # (ladder, position of the step in it), first to go first


def _take_uniformly(ladders: list[RemovalSequence], ratio: float, target: float) -> list[int]:
    """Steps taken per ladder: the same number in every layer."""
    saves = [ladder.accumulate_savings() for ladder in ladders]
    longest = {kind: max((len(each.steps) for each in ladders if each.kind == kind), default=0) for kind in _KINDS}
    share = [sum(step.removed_after <= int(ratio * ladder.unit_count) for step in ladder.steps) for ladder in ladders]

    def taken(extra: int, channels: int) -> list[int]:
        wanted = [share[i] + extra if each.kind == "attention" else channels for i, each in enumerate(ladders)]
        return [min(count, len(each.steps)) for count, each in zip(wanted, ladders, strict=True)]

    def saved(extra: int, channels: int) -> float:
        return sum(saves[number][count] for number, count in enumerate(taken(extra, channels)))

    # floor(ratio * groups) first; more only where the FFN alone can not carry the rest.
    counts = range(longest["ffn"] + 1)
    for extra in range(longest["attention"] + 1):
        channels = bisect.bisect_left(counts, target, key=partial(saved, extra))
        if channels < len(counts):
            return taken(extra, channels)
    raise AssertionError("unreachable: select() checked that the budget can be met")


def _order_by_score(ladders: list[RemovalSequence], kinds: Collection[str]) -> _StepQueue:
    """Lowest score first, over all layers and the given kinds."""
    return _sort_step_queue(
        (step.score, number, position)
        for number, ladder in enumerate(ladders)
        for position, step in enumerate(ladder.steps)
        if ladder.kind in kinds
    )


def _order_kinds_apart(ladders: list[RemovalSequence], limit: float) -> _StepQueue:
    """Heads that save at most `limit` together, then channels, then what is left of the heads."""
    heads = _order_by_score(ladders, ("attention",))
    saved = accumulate(ladders[number].steps[position].saving for number, position in heads)
    within = sum(each <= limit for each in saved)
    return heads[:within] + _order_by_score(ladders, ("ffn",)) + heads[within:]


def _order_by_layer_mean(ladders: list[RemovalSequence], ratio: float) -> _StepQueue:
    """Steps in the order in which a growing common shift of all shares takes them.

    A step is taken once the layer's share, `ratio - spread * z + shift`, passes the middle of the step: shares are
    rounded to the nearest step, and stop by themselves at nothing and at all that may go.
    """
    shift = []
    for kind in _KINDS:
        chosen = [(number, ladder) for number, ladder in enumerate(ladders) if ladder.kind == kind]
        if not chosen:
            continue
        means = torch.tensor([ladder.mean_score for _, ladder in chosen], dtype=torch.float64)
        # Scores that were standardised before have means of rounding errors, which say nothing.
        says = means.std(correction=0) > 1e-9 * max(ladder.mean_magnitude for _, ladder in chosen)
        z = standardize_scores(means) if says else torch.zeros_like(means)
        for (number, ladder), deviation in zip(chosen, z.tolist(), strict=True):
            share = ratio - _SHARE_PER_DEVIATION * ratio * deviation
            for position, step in enumerate(ladder.steps):
                shift.append(
                    ((step.removed_before + step.removed_after) / 2 / ladder.unit_count - share, number, position)
                )
    return _sort_step_queue(shift)


def _sort_step_queue(queue: Iterable[tuple[float, int, int]]) -> _StepQueue:
    return [(number, position) for _, number, position in sorted(queue)]


def _take_in_order(ladders: list[RemovalSequence], queue: _StepQueue, target: float) -> list[int]:
    """Steps taken per ladder: as the queue says until the target is met."""
    taken, cut = [0] * len(ladders), 0.0
    for number, position in queue:
        if cut >= target:
            break
        cut += ladders[number].steps[position].saving
        taken[number] = position + 1
    for number, position in reversed(queue):  # the last step overshoots: give back what the budget does not need
        cost = ladders[number].steps[position].saving
        if taken[number] == position + 1 and cut - cost >= target:
            cut -= cost
            taken[number] = position
    return taken


def _build_layer_plans(
    shapes: Sequence[LayerShape], ladders: list[RemovalSequence], taken: list[int], unit: Unit
) -> tuple[LayerPlan, ...]:
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

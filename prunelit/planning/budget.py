"""Chooses the remaining units from their scores: the budget, its scope, rounding and protected layers.

At least `ratio` of what the decoder layers cost is removed, and no step (with scope "layer": no step of all layers)
could be given back without missing that budget; with rounding "below" at most `ratio`, and no step could be added. A
step is the smallest cut that keeps a layer legal, see
`prunelit.planning.removal_steps`. All functions are pure functions on tensors.
"""

import bisect
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Literal, get_args

import torch

from prunelit.core.plan import LayerPlan, LayerShape
from prunelit.core.scores import EXPERT_KINDS, Cost, LayerScores, Unit
from prunelit.planning.layer_costs import get_budget_cost
from prunelit.planning.removal_steps import (
    RemovalSequence,
    StepKind,
    build_removal_sequences,
    standardize_scores,
    tie_sequences,
)
from prunelit.runtime.errors import BadOption, InfeasibleBudget

Scope = Literal["layer", "global", "layer_mean"]
Budget = Literal["parameters", "active_parameters", "macs", "kv_bytes", "latency"]
Rounding = Literal["above", "below"]

_KINDS: tuple[StepKind, ...] = get_args(StepKind)
_SHARE_PER_DEVIATION = 0.25
"""Scope "layer_mean": a layer's share moves by this much of `ratio` for one deviation of its mean importance."""


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
    rounding: Rounding = "above",
) -> tuple[LayerPlan, ...]:
    """Choose the units that remain, from their scores.

    Args:
        shapes: one per layer.
        scores: one per layer.
        ratio: share of the decoder layers' budget to remove (the sparsity), in (0, 1).
        scope: "layer" removes the same number of units from every layer (floor(ratio * groups) KV groups, and as many
            channels as the rest takes), so the layers stay alike; where experts or their channels have scores, these
            take the rest, and FFN channels lose floor(ratio * channels). "global" ranks the units of all layers
            together, so layers come to differ. "layer_mean" removes the share `ratio - ratio / 4 * z` of each kind in
            each layer, where z is the layer's mean raw score, standardised over the layers; all shares are shifted by
            the same amount to meet the budget.
        unit: attention is pruned by whole KV groups, or by the same number of query heads from every group.
        align: the remaining FFN widths are multiples of this.
        protect: layers that are not pruned; negative numbers count from the end.
        budget: what `ratio` is a share of, see `Budget`: parameters, those that a token passes (of a mixture, the
            experts that the router chooses), MACs per token, bytes of KV cache per token, or seconds.
        min_kept: least share of each layer's KV groups (or query heads per group) and channels that remains, in [0, 1);
            rounded up.
        uniform_heads: every layer loses the same number of KV groups (or query heads per group), whatever the scope;
            none if a layer is protected. FFN widths may differ.
        standardise: scope "global" first scales each layer's scores of a kind to mean 0 and deviation 1; False takes
            the scores as they are.
        joint: scope "global" ranks heads and channels in one list. False ranks each kind by itself: heads are removed
            up to `ratio` of their own cost, and channels take the rest.
        cost: cost of a layer at given widths, in place of the budget's own count; budget "latency" needs one, see
            `prunelit.planning.latency`.
        rounding: "above" removes at least `ratio`, with no step that could be given back; "below" removes at most
            `ratio`, with no step that could be added.

    Returns:
        One `LayerPlan` per layer; at least one KV group (or query head per group), `align` channels and as many experts
        as the router needs remain in each.

    Raises:
        BadOption: an option is out of range, or experts and their channels have scores in one layer.
        NonFinite: a score is NaN or infinite.
        InfeasibleBudget: the layers that may be pruned do not hold that much of the budget, or with rounding "below"
            no cut is as small as `ratio`.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> scores = LayerScores(heads=torch.arange(4.0), channels=torch.arange(32.0))
        >>> [plan.widths for plan in select_units([layer] * 2, [scores] * 2, ratio=0.2, align=8)]
        [(4, 2, 16), (4, 2, 16)]
        >>> [plan.widths for plan in select_units([layer] * 2, [scores] * 2, ratio=0.5, align=8)]
        [(2, 1, 8), (2, 1, 8)]
    """
    check_budget_options(
        *(ratio, scope, unit, align, protect, len(shapes)),
        budget=budget,
        min_kept=min_kept,
        uniform_heads=uniform_heads,
        rounding=rounding,
    )
    removal = prepare_removal(
        *(shapes, scores, scope, unit, align, protect),
        budget=budget,
        min_kept=min_kept,
        uniform_heads=uniform_heads,
        standardise=standardise,
        joint=joint,
        cost=cost,
    )
    return removal.build_layer_plans(removal.choose_steps(ratio, rounding))


class PreparedRemoval:
    """The steps in which the units of a model can be removed, and the choice among them for any ratio.

    Attributes:
        dense_cost: of all decoder layers.
        largest_share: share of it that all steps together save.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> scores = LayerScores(channels=torch.arange(32.0))
        >>> removal = prepare_removal([layer] * 2, [scores] * 2, align=8)
        >>> [round(removal.compute_share(removal.choose_steps(0.2, rounding)), 3) for rounding in ("above", "below")]
        [0.247, 0.124]
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        layer_sequences: list[RemovalSequence],
        cost: Cost,
        *,
        scope: Scope,
        unit: Unit,
        joint: bool,
        uniform_heads: bool,
        budget: str,
        limits: str,  # what has to remain, for the message; "" where every layer is protected
    ):
        self._shapes, self._layer_sequences = shapes, layer_sequences
        self._scope, self._unit, self._joint = scope, unit, joint
        self._budget, self._limits, self._cost = budget, limits, cost
        # The choice is made on `sequences`; each stands for one or, with tied heads, several of `layer_sequences`.
        self._sequences, self._members = layer_sequences, [[number] for number in range(len(layer_sequences))]
        if uniform_heads:
            self._sequences, self._members = _tie_heads(shapes, layer_sequences)
        self._savings = [sequence.accumulate_savings() for sequence in self._sequences]
        self.dense_cost = sum(cost(shape, shape.query_heads, shape.kv_groups, shape.ffn_channels) for shape in shapes)
        self.largest_share = sum(each[-1] for each in self._savings) / self.dense_cost if self.dense_cost else 0.0

    def choose_steps(self, ratio: float, rounding: Rounding = "above") -> list[int]:
        """Choose how many steps are taken from each sequence.

        Args:
            ratio: share of the dense cost to save, in (0, 1).
            rounding: see `select_units`.

        Raises:
            InfeasibleBudget: all steps together save less; or with rounding "below", the first one saves more.
        """
        target, sequences = ratio * self.dense_cost, self._sequences
        if sum(each[-1] for each in self._savings) < target or not self.dense_cost:
            if not self._limits:
                raise InfeasibleBudget(
                    f"ratio {ratio:.4g} of {self._budget}: expected a layer that may be cut, got all "
                    f"{len(self._shapes)} layers protected; protect fewer layers",
                    0.0,
                )
            raise InfeasibleBudget(
                f"ratio {ratio:.4g} of {self._budget}: expected at most {self.largest_share:.4f} with {self._limits}; "
                "lower ratio, align or min_kept, or protect fewer layers",
                self.largest_share,
            )
        if self._scope == "layer":
            counts = _take_uniformly(sequences, ratio, target, rounding)
        elif self._scope == "layer_mean":
            counts = _take_in_order(sequences, _order_by_layer_mean(sequences, ratio), target, rounding)
        elif self._joint:
            counts = _take_in_order(sequences, _order_by_score(sequences, _KINDS), target, rounding)
        else:
            headless = sum(self._cost(shape, 0, 0, shape.ffn_channels) for shape in self._shapes)
            order = _order_kinds_apart(sequences, ratio * (self.dense_cost - headless))
            counts = _take_in_order(sequences, order, target, rounding)
        if not any(counts):
            raise InfeasibleBudget(
                f"ratio {ratio:.4g} of {self._budget}: no cut is that small, and rounding below allows no larger one; "
                "raise ratio, lower align, or leave rounding out"
            )
        return counts

    def compute_share(self, step_counts: Sequence[int]) -> float:
        """Compute the share of the dense cost that so many steps of each sequence save."""
        saved = sum(each[count] for each, count in zip(self._savings, step_counts, strict=True))
        return saved / self.dense_cost

    def build_layer_plans(self, step_counts: Sequence[int]) -> tuple[LayerPlan, ...]:
        """Build the plan of every layer for so many steps of each sequence."""
        layer_step_counts = [0] * len(self._layer_sequences)
        for sequence, count, numbers in zip(self._sequences, step_counts, self._members, strict=True):
            removed = sequence.steps[count - 1].removed_after if count else 0
            for number in numbers:
                steps = self._layer_sequences[number].steps
                layer_step_counts[number] = sum(step.removed_after <= removed for step in steps)
        return _build_layer_plans(self._shapes, self._layer_sequences, layer_step_counts, self._unit)


def prepare_removal(
    shapes: Sequence[LayerShape],
    scores: Sequence[LayerScores],
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
) -> PreparedRemoval:
    """Prepare the choice of units for any ratio, see `select_units`, whose options these are.

    Layers of one shape that share one `LayerScores` object are worked out once.

    Args:
        shapes, scores, scope, unit, align, protect: see `select_units`.
        budget, min_kept, uniform_heads, standardise, joint, cost: see `select_units`.

    Raises:
        BadOption, NonFinite: see `select_units`.

    Example: see `PreparedRemoval`.
    """
    layer_cost = cost or get_budget_cost(budget)
    if layer_cost is None:
        raise BadOption(
            f"budget: expected a measured cost for {budget!r}, got none; "
            "see prunelit.planning.latency.measure_latency_table"
        )
    protected = {layer % len(shapes) for layer in protect}
    compared = scope == "global"
    layer_sequences: list[RemovalSequence] = []
    built: dict[tuple[LayerShape, int], list[RemovalSequence]] = {}
    for index, (shape, score) in enumerate(zip(shapes, scores, strict=True)):
        if score.experts is not None and score.expert_channels is not None:
            raise BadOption(
                f"layer {index}: expected scores of experts or of their channels, got both; they save parameters of "
                "each other, so cut one kind after the other"
            )
        if index in protected:
            continue
        key = shape, id(score)
        if key in built:
            layer_sequences += [replace(sequence, layer=index) for sequence in built[key]]
            continue
        built[key] = build_removal_sequences(
            index, shape, score, layer_cost, unit, align, min_kept, compared, compared and standardise
        )
        layer_sequences += built[key]
    least = f"{min_kept:g} of the units and one {unit}" if min_kept else f"one {unit}"
    if any(sequence.kind == "experts" for sequence in layer_sequences):
        least += f", {max(shape.least_experts for shape in shapes)} experts"
    if uniform_heads:
        least += " (uniform_heads: as many as any other layer keeps)"
    limits = f"{least} and {align} channels kept in each of {len(shapes) - len(protected)} unprotected layers"
    if shapes and len(protected) == len(shapes):
        limits = ""
    return PreparedRemoval(
        *(shapes, layer_sequences, layer_cost),
        scope=scope,
        unit=unit,
        joint=joint,
        uniform_heads=uniform_heads,
        budget=budget,
        limits=limits,
    )


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
    rounding: str = "above",
) -> None:
    """Check the options of `select_units`, also before a model is loaded.

    Args:
        ratio: see `select_units`, as are all arguments but `layers`.
        scope: one of `Scope`.
        unit: one of `Unit`.
        align: at least 1.
        protect: layer numbers.
        layers: number of the model's layers; None if it is not known yet.
        budget: one of `Budget`.
        min_kept: in [0, 1).
        uniform_heads: true or false.
        rounding: one of `Rounding`.

    Raises:
        BadOption: names the option, what was expected and what it got.

    Example:
        >>> check_budget_options(0.2, "global", "kv_group", 64, [0, -1])
        >>> check_budget_options(20, "global", "kv_group", 64, [])
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: ratio: expected a number between 0 and 1 (both excluded), got 20
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise BadOption(f"ratio: expected a number between 0 and 1 (both excluded), got {ratio!r}")
    if isinstance(min_kept, bool) or not isinstance(min_kept, int | float) or not 0 <= min_kept < 1:
        raise BadOption(f"min_kept: expected a number from 0 to below 1, got {min_kept!r}")
    choices = (
        ("scope", scope, Scope),
        ("unit", unit, Unit),
        ("budget", budget, Budget),
        ("rounding", rounding, Rounding),
    )
    for name, value, allowed in choices:
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
    shapes: Sequence[LayerShape], sequences: list[RemovalSequence]
) -> tuple[list[RemovalSequence], list[list[int]]]:
    """Tie the attention sequences of all layers into one; drop them if a layer with attention has none.

    Returns:
        The tied sequence, if any, and the sequences of the other kinds; and for each of these, the numbers of the
        sequences in the given list that it stands for.
    """
    attention = [number for number, sequence in enumerate(sequences) if sequence.kind == "attention"]
    others = [number for number, sequence in enumerate(sequences) if sequence.kind != "attention"]
    complete = bool(attention) and len(attention) == sum(shape.kv_groups > 0 for shape in shapes)
    tied = [(tie_sequences([sequences[number] for number in attention]), attention)] if complete else []
    entries = tied + [(sequences[number], [number]) for number in others]
    return [sequence for sequence, _ in entries], [members for _, members in entries]


_StepQueue = list[tuple[int, int]]
"""(number of the sequence, position of the step in it), first to be removed first."""


def _take_uniformly(sequences: list[RemovalSequence], ratio: float, target: float, rounding: Rounding) -> list[int]:
    """Number of steps to take from each sequence, the same number in every layer.

    Every kind loses floor(ratio * units) first, but for the one that takes the rest; the other kinds lose more only
    where that one cannot hold the rest.
    """
    savings = [sequence.accumulate_savings() for sequence in sequences]
    mixture_kinds = [sequence.kind for sequence in sequences if sequence.kind in EXPERT_KINDS]
    rest_kind = mixture_kinds[0] if mixture_kinds else "ffn"
    longest = [
        max((len(each.steps) for each in sequences if (each.kind == rest_kind) == takes_rest), default=0)
        for takes_rest in (True, False)
    ]
    least_steps = [
        sum(step.removed_after <= int(ratio * sequence.unit_count) for step in sequence.steps) for sequence in sequences
    ]

    def count_steps(extra: int, rest_steps: int) -> list[int]:
        counts = [
            rest_steps if sequence.kind == rest_kind else least_steps[number] + extra
            for number, sequence in enumerate(sequences)
        ]
        return [min(count, len(sequence.steps)) for count, sequence in zip(counts, sequences, strict=True)]

    def sum_savings(extra: int, rest_steps: int) -> float:
        return sum(savings[number][count] for number, count in enumerate(count_steps(extra, rest_steps)))

    choices = range(longest[0] + 1)
    if rounding == "below":
        below = [0] * len(sequences)
        for extra in range(longest[1] + 1):
            rest_steps = bisect.bisect_right(choices, target, key=partial(sum_savings, extra)) - 1
            if rest_steps < 0:
                break
            below = count_steps(extra, rest_steps)
            if rest_steps < longest[0]:  # what takes the rest has more to give, so no other kind loses more
                break
        return below
    for extra in range(longest[1] + 1):
        rest_steps = bisect.bisect_left(choices, target, key=partial(sum_savings, extra))
        if rest_steps < len(choices):
            return count_steps(extra, rest_steps)
    raise AssertionError("unreachable: select_units() checked that the budget can be met")


def _order_by_score(sequences: list[RemovalSequence], kinds: Collection[str]) -> _StepQueue:
    """Order the steps of these kinds over all layers, lowest score first."""
    return _sort_step_queue(
        (step.score, number, position)
        for number, sequence in enumerate(sequences)
        for position, step in enumerate(sequence.steps)
        if sequence.kind in kinds
    )


def _order_kinds_apart(sequences: list[RemovalSequence], limit: float) -> _StepQueue:
    """Order the steps: heads that save at most `limit` together, then the other kinds, then the remaining heads."""
    heads = _order_by_score(sequences, ("attention",))
    others = _order_by_score(sequences, [kind for kind in _KINDS if kind != "attention"])
    savings = accumulate(sequences[number].steps[position].saving for number, position in heads)
    within = sum(saving <= limit for saving in savings)
    return heads[:within] + others + heads[within:]


def _order_by_layer_mean(sequences: list[RemovalSequence], ratio: float) -> _StepQueue:
    """Order the steps as scope "layer_mean" takes them while the common shift of all shares grows.

    A step is taken once the layer's share, `ratio - _SHARE_PER_DEVIATION * ratio * z + shift`, passes the middle of the
    step. So shares are rounded to the nearest step, and stay between nothing and all that may be removed.
    """
    shifts = []
    for kind in _KINDS:
        of_kind = [(number, sequence) for number, sequence in enumerate(sequences) if sequence.kind == kind]
        if not of_kind:
            continue
        means = torch.tensor([sequence.mean_score for _, sequence in of_kind], dtype=torch.float64)
        # If the scores were standardised before, the means are rounding errors and must not order the layers.
        informative = means.std(correction=0) > 1e-9 * max(sequence.mean_magnitude for _, sequence in of_kind)
        z = standardize_scores(means) if informative else torch.zeros_like(means)
        for (number, sequence), deviation in zip(of_kind, z.tolist(), strict=True):
            share = ratio - _SHARE_PER_DEVIATION * ratio * deviation
            for position, step in enumerate(sequence.steps):
                middle = (step.removed_before + step.removed_after) / 2 / sequence.unit_count
                shifts.append((middle - share, number, position))
    return _sort_step_queue(shifts)


def _sort_step_queue(queue: Iterable[tuple[float, int, int]]) -> _StepQueue:
    return [(number, position) for _, number, position in sorted(queue)]


def _take_in_order(sequences: list[RemovalSequence], queue: _StepQueue, target: float, rounding: Rounding) -> list[int]:
    """Number of steps to take from each sequence, in the order of the queue until the target is met."""
    counts, total = [0] * len(sequences), 0.0
    if rounding == "below":
        for number, position in queue:
            saving = sequences[number].steps[position].saving
            if counts[number] == position and total + saving <= target:  # later steps need all earlier ones
                total += saving
                counts[number] = position + 1
        return counts
    for number, position in queue:
        if total >= target:
            break
        total += sequences[number].steps[position].saving
        counts[number] = position + 1
    # The last step overshoots the target: give back every step that the budget does not need.
    for number, position in reversed(queue):
        saving = sequences[number].steps[position].saving
        if counts[number] == position + 1 and total - saving >= target:
            total -= saving
            counts[number] = position
    return counts


def _build_layer_plans(
    shapes: Sequence[LayerShape], sequences: list[RemovalSequence], step_counts: list[int], unit: Unit
) -> tuple[LayerPlan, ...]:
    removed: dict[tuple[int, str], set[int]] = {}
    for sequence, count in zip(sequences, step_counts, strict=True):
        removed[sequence.layer, sequence.kind] = {item for step in sequence.steps[:count] for item in step.units}
    plans = []
    for index, shape in enumerate(shapes):
        removed_of = {kind: removed.get((index, kind), set()) for kind in _KINDS}
        attention = removed_of["attention"]
        groups = [group for group in range(shape.kv_groups) if unit != "kv_group" or group not in attention]
        heads = [
            head
            for head in range(shape.query_heads)
            if head // shape.group_size in groups and (unit == "kv_group" or head not in attention)
        ]
        channels, experts, expert_channels = (
            tuple(number for number in range(count) if number not in removed_of[kind])
            for kind, count in zip(_KINDS[1:], (shape.ffn_channels, shape.experts, shape.expert_channels), strict=True)
        )
        plans.append(
            LayerPlan(
                *(tuple(heads), tuple(groups), channels),
                mixer=shape.has_mixer,
                experts=experts,
                expert_channels=expert_channels,
            )
        )
    return tuple(plans)

"""Turns the scores of one layer into removal sequences: steps in which its units can be removed.

A *step* is the smallest cut that keeps a layer legal and saves something: one KV group, or one query head from every
group, or the channels down to the next multiple of `align`, or one expert from every group of experts. A *sequence*
holds the steps of one kind in one layer.

Legend: Q query heads, G KV groups, F FFN channels, E experts, C channels of an expert.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from prunelit.core.plan import LayerShape
from prunelit.core.scores import Cost, LayerScores, Unit
from prunelit.runtime.errors import BadOption, NonFinite

EXPERT_ALIGN = 8
"""Channels of experts remain in multiples of it, whatever `align`: the kernels that multiply all experts at once refuse
rows that are no multiple of 16 bytes."""
StepKind = Literal["attention", "ffn", "experts", "expert_channels"]


@dataclass(frozen=True)
class RemovalStep:
    """One step of a removal sequence.

    Attributes:
        score: mean score of the units that the step removes.
        saving: how much of the budget the step saves.
        units: indices of the KV groups, query heads, channels or experts that the step removes.
        removed_before: units of the sequence that are removed before the step (see `RemovalSequence.unit_count`).
        removed_after: units of the sequence that are removed after the step.

    Example: `RemovalStep` is used further down in this module.
    """

    score: float
    saving: float
    units: tuple[int, ...]
    removed_before: int
    removed_after: int


@dataclass(frozen=True)
class RemovalSequence:
    """The steps of one kind in one layer, lowest score first; they can be taken in this order only.

    Attributes:
        layer: index of the layer; -1 for a sequence that spans several layers.
        kind: of the units.
        unit_count: KV groups, query heads per group, channels, or experts per group of the dense layer, also those that
            must remain.
        mean_score: mean of the raw scores.
        mean_magnitude: mean absolute value of the raw scores.
        steps: in order.

    Example:
        >>> steps = (RemovalStep(0.1, 8.0, (2,), 0, 1), RemovalStep(0.4, 8.0, (0,), 1, 2))
        >>> sequence = RemovalSequence(0, "attention", 3, 0.5, 0.5, steps)
        >>> sequence.units
        (2, 0)
        >>> sequence.accumulate_savings()
        [0, 8.0, 16.0]
    """

    layer: int
    kind: StepKind
    unit_count: int
    mean_score: float
    mean_magnitude: float
    steps: tuple[RemovalStep, ...]

    @property
    def units(self) -> tuple[int, ...]:
        """All units that can be removed, lowest score first."""
        return tuple(unit for step in self.steps for unit in step.units)

    def accumulate_savings(self) -> list[float]:
        """Sum what is saved after 0, 1, ... steps."""
        return list(accumulate((step.saving for step in self.steps), initial=0))


def build_removal_sequences(
    index: int,
    shape: LayerShape,
    scores: LayerScores,
    cost: Cost,
    unit: Unit,
    align: int,
    min_kept: float,
    compared: bool,
    standardise: bool,
) -> list[RemovalSequence]:
    """Build the removal sequences of one layer: attention, FFN, experts, channels of the experts.

    A kind that has no scores, or that cannot be pruned, has no sequence.

    Args:
        index: number of the layer.
        shape: size and cost of the dense layer.
        scores: of the layer's units: heads [Q], channels [F], experts [E], expert_channels [C].
        cost: gives the layer's cost at other widths.
        unit: see `prunelit.planning.budget.select_units`.
        align: see `prunelit.planning.budget.select_units`.
        min_kept: see `prunelit.planning.budget.select_units`.
        compared: steps of attention and FFN will be compared, so a KV group counts as the mean of its heads, not their
            sum.
        standardise: scale the scores of each kind to mean 0 and deviation 1 first.

    Raises:
        BadOption: the number of scores is not the number of units.
        NonFinite: a score is NaN or infinite.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> scores = LayerScores(heads=torch.tensor([3.0, 4.0, 1.0, 2.0]))
        >>> cost = LayerShape.parameters_at
        >>> (sequence,) = build_removal_sequences(0, layer, scores, cost, "kv_group", 8, 0.0, False, False)
        >>> sequence.steps
        (RemovalStep(score=3.0, saving=768, units=(1,), removed_before=0, removed_after=1),)
    """
    sequences: list[RemovalSequence] = []
    heads_and_groups = shape.query_heads, shape.kv_groups
    if scores.heads is not None and shape.kv_groups and shape.heads_prunable:
        raw = _check_scores(index, "head", scores.heads, shape.query_heads)
        by_group = (standardize_scores(raw) if standardise else raw).view(shape.kv_groups, shape.group_size)
        if unit == "kv_group":
            group_scores = by_group.mean(1) if compared else by_group.sum(1)
            order = torch.argsort(by_group.sum(1), stable=True).tolist()
            cuts = [([group], group_scores[group].item()) for group in order]
            unit_count, heads_per_cut, groups_per_cut = shape.kv_groups, shape.group_size, 1
        else:
            order_in_group = torch.argsort(by_group, dim=1, stable=True)  # [G, Q / G]
            heads = order_in_group + torch.arange(shape.kv_groups)[:, None] * shape.group_size
            rank_scores = by_group.gather(1, order_in_group).mean(0)
            cuts = [(heads[:, rank].tolist(), rank_scores[rank].item()) for rank in range(shape.group_size)]
            unit_count, heads_per_cut, groups_per_cut = shape.group_size, shape.kv_groups, 0
        least = max(1, _round_up_share(min_kept * unit_count))
        costs = [
            cost(
                shape,
                shape.query_heads - removed * heads_per_cut,
                shape.kv_groups - removed * groups_per_cut,
                shape.ffn_channels,
            )
            for removed in range(unit_count - least + 1)
        ]
        sequences.append(_build_sequence(index, "attention", unit_count, raw, cuts, list(range(unit_count)), costs))
    if scores.channels is not None and shape.ffn_channels:
        raw = _check_scores(index, "channel", scores.channels, shape.ffn_channels)

        def cost_of_channels(count: int) -> float:
            return cost(shape, *heads_and_groups, count)

        sequences.append(_build_channel_sequence(index, "ffn", raw, align, min_kept, standardise, cost_of_channels))
    if scores.experts is not None and shape.experts:
        raw = _check_scores(index, "expert", scores.experts, shape.experts)
        size, groups = shape.experts // shape.expert_groups, shape.expert_groups
        by_group = (standardize_scores(raw) if standardise else raw).view(groups, size)
        order_in_group = torch.argsort(by_group, dim=1, stable=True)
        experts = order_in_group + torch.arange(groups)[:, None] * size
        rank_scores = by_group.gather(1, order_in_group).mean(0)
        cuts = [(experts[:, rank].tolist(), rank_scores[rank].item()) for rank in range(size)]
        least = max(shape.least_experts // groups, _round_up_share(min_kept * size))
        costs = [
            cost(shape, *heads_and_groups, shape.ffn_channels, experts=shape.experts - removed * groups)
            for removed in range(size - least + 1)
        ]
        sequences.append(_build_sequence(index, "experts", size, raw, cuts, list(range(size)), costs))
    if scores.expert_channels is not None and shape.experts:
        raw = _check_scores(index, "expert channel", scores.expert_channels, shape.expert_channels)

        def cost_of_expert_channels(count: int) -> float:
            return cost(shape, *heads_and_groups, shape.ffn_channels, expert_channels=count)

        sequences.append(
            _build_channel_sequence(
                *(index, "expert_channels", raw, math.lcm(align, EXPERT_ALIGN)),
                *(min_kept, standardise, cost_of_expert_channels),
            )
        )
    return sequences


def _build_channel_sequence(
    index: int,
    kind: StepKind,
    raw: Tensor,
    align: int,
    min_kept: float,
    standardise: bool,
    cost_of_width: Callable[[int], float],
) -> RemovalSequence:
    """Build the sequence of a layer's channels, whose steps end at multiples of `align`."""
    dense_width = len(raw)
    values = standardize_scores(raw) if standardise else raw
    ascending = torch.argsort(values, stable=True)
    channels, ordered_scores = ascending.tolist(), values[ascending].tolist()
    least = max(align, -(-_round_up_share(min_kept * dense_width) // align) * align)
    narrower_widths = range((dense_width - 1) // align * align, least - 1, -align)
    removed_counts = [0, *(dense_width - width for width in narrower_widths)]
    spans = [slice(start, stop) for start, stop in pairwise(removed_counts)]
    # fsum is exact, so the means do not depend on the order in which the channels are summed.
    cuts = [(channels[span], math.fsum(ordered_scores[span]) / (span.stop - span.start)) for span in spans]
    costs = [cost_of_width(dense_width - removed) for removed in removed_counts]
    return _build_sequence(index, kind, dense_width, raw, cuts, removed_counts, costs)


def _build_sequence(
    index: int,
    kind: StepKind,
    unit_count: int,
    raw: Tensor,
    cuts: Sequence[tuple[list[int], float]],
    removed_counts: Sequence[int],
    costs: Sequence[float],
) -> RemovalSequence:
    """Build a sequence from cuts; cuts that save nothing are merged into the next one that does.

    Args:
        index: number of the layer.
        kind: of the units.
        unit_count: see `RemovalSequence`.
        raw: the scores as the method gave them.
        cuts: units and mean score of each cut.
        removed_counts: units that are removed after 0, 1, ... cuts.
        costs: cost of the layer after 0, 1, ... cuts.
    """
    steps: list[RemovalStep] = []
    start = 0
    for position in range(1, len(costs)):
        saving = costs[start] - costs[position]
        if saving <= 0:
            continue
        units = [unit for cut_units, _ in cuts[start:position] for unit in cut_units]
        mean = sum(score * (len(cut_units) / len(units)) for cut_units, score in cuts[start:position])
        # Rounding can make means of equal scores differ in the last bit, so the order is enforced here.
        score = max(mean, steps[-1].score if steps else -math.inf)
        steps.append(RemovalStep(score, saving, tuple(units), removed_counts[start], removed_counts[position]))
        start = position
    return RemovalSequence(index, kind, unit_count, raw.mean().item(), raw.abs().mean().item(), tuple(steps))


def tie_sequences(sequences: Sequence[RemovalSequence]) -> RemovalSequence:
    """Tie sequences of several layers into one, whose steps remove the same number of units from every layer.

    A step of the tied sequence has the mean score and the summed saving of the steps it stands for. It ends only where
    a step ends in every layer. Its `units` are empty.

    Args:
        sequences: of one kind, in different layers.

    Example:
        >>> steps = (RemovalStep(0.1, 8.0, (2,), 0, 1), RemovalStep(0.4, 8.0, (0,), 1, 2))
        >>> sequences = [RemovalSequence(layer, "attention", 3, 0.5, 0.5, steps) for layer in range(2)]
        >>> tie_sequences(sequences).accumulate_savings()
        [0, 16.0, 32.0]
    """
    savings_by_removed = [
        dict(zip([0, *(step.removed_after for step in each.steps)], each.accumulate_savings(), strict=True))
        for each in sequences
    ]
    steps: list[RemovalStep] = []
    for before, after in pairwise(sorted(set.intersection(*map(set, savings_by_removed)))):
        saving = math.fsum(savings[after] - savings[before] for savings in savings_by_removed)
        inside = [step for each in sequences for step in each.steps if before < step.removed_after <= after]
        weights = [step.removed_after - step.removed_before for step in inside]
        mean = math.fsum(step.score * weight for step, weight in zip(inside, weights, strict=True)) / sum(weights)
        steps.append(RemovalStep(max(mean, steps[-1].score if steps else -math.inf), saving, (), before, after))
    return RemovalSequence(
        layer=-1,
        kind=sequences[0].kind,
        unit_count=min(each.unit_count for each in sequences),
        mean_score=math.fsum(each.mean_score for each in sequences) / len(sequences),
        mean_magnitude=math.fsum(each.mean_magnitude for each in sequences) / len(sequences),
        steps=tuple(steps),
    )


def _round_up_share(share: float) -> int:
    return math.ceil(share - 1e-9)  # 0.55 * 100 is 55.00000000000001 in floating point


def _check_scores(index: int, kind: str, scores: Tensor, size: int) -> Tensor:
    """Check that the scores are finite and `size` in number; return them in float64 on the CPU, [size]."""
    values = scores.detach().to("cpu", torch.float64).flatten()
    if len(values) != size:
        raise BadOption(f"layer {index}: expected {size} {kind} scores, got {len(values)}")
    if not torch.isfinite(values).all():
        raise NonFinite(
            f"layer {index}: {kind} scores hold NaN or infinity; expected finite numbers: check the weights, the "
            "calibration text and the dtype"
        )
    return values


def standardize_scores(values: Tensor) -> Tensor:
    """Scale values to mean 0 and deviation 1; all zeros where the values are equal.

    Example:
        >>> standardize_scores(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])
    """
    values = values - values.mean()
    deviation = values.square().mean().sqrt()
    return values / deviation if deviation > 0 else values

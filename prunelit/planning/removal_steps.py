"""Scores of one layer -> ladders: the steps in which its heads and channels may go, with what each saves and costs.

Legend: Q query heads, G KV groups, F FFN channels. A *step* is the smallest cut that keeps a layer legal and saves
something: one KV group, or one query head from every group, or the channels down to the next multiple of `align`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from prunelit.core.plan import LayerShape
from prunelit.core.scores import Cost, LayerScores, Unit
from prunelit.runtime.errors import BadOption, NonFinite

StepKind = Literal["attention", "ffn"]


@dataclass(frozen=True)
class RemovalStep:
    """One step of a ladder."""

    score: float
    saving: float  # what it saves of the budget
    units: tuple[int, ...]  # KV groups, query heads or channels that go
    removed_before: int  # rungs of the ladder that are gone before and after the step
    removed_after: int


@dataclass(frozen=True)
class RemovalSequence:
    """The steps of one kind in one layer, cheapest loss first; they can only be taken in order."""

    layer: int
    kind: StepKind
    unit_count: int  # KV groups, query heads per group, or channels, those that must stay included
    mean_score: float  # of the kind's raw scores
    mean_magnitude: float  # of the kind's raw scores: mean magnitude
    steps: tuple[RemovalStep, ...]

    @property
    def units(self) -> tuple[int, ...]:
        """All that may go, those of lowest score first."""
        return tuple(unit for step in self.steps for unit in step.units)

    def accumulate_savings(self) -> list[float]:
        """Saved after 0, 1, ... steps."""
        return list(accumulate((step.saving for step in self.steps), initial=0))


def build_removal_sequences(
    index: int,
    shape: LayerShape,
    score: LayerScores,
    price: Cost,
    unit: Unit,
    align: int,
    min_kept: float,
    compared: bool,
    standardise: bool,
) -> list[RemovalSequence]:
    """The ladders of one layer, heads first; none for a kind that is not scored or can not be cut.

    Args:
        index: of the layer.
        shape: of the layer.
        score: of its units.
        price: what the layer costs at given widths.
        unit, align, min_kept: see `prunelit.planning.budget.select_units`.
        compared: the steps of different kinds are to be compared, so a KV group counts as the mean of its heads.
        standardise: give the scores of each kind mean 0 and deviation 1 first.

    Raises:
        BadOption: another number of scores than units.
        NonFinite: a score is NaN or infinite.
    """
    found = []
    if score.heads is not None and shape.kv_groups and shape.heads_prunable:
        raw = _check_scores(index, "head", score.heads, shape.query_heads)
        by_group = (standardize_scores(raw) if standardise else raw).view(shape.kv_groups, shape.group_size)
        if unit == "kv_group":
            values = by_group.mean(1) if compared else by_group.sum(1)
            order = torch.argsort(by_group.sum(1), stable=True).tolist()
            cuts = [([group], values[group].item()) for group in order]
            rungs, heads, groups = shape.kv_groups, shape.group_size, 1
        else:
            order_in_group = torch.argsort(by_group, dim=1, stable=True)  # [G, Q / G]
            members = order_in_group + torch.arange(shape.kv_groups)[:, None] * shape.group_size
            values = by_group.gather(1, order_in_group).mean(0)
            cuts = [(members[:, rank].tolist(), values[rank].item()) for rank in range(shape.group_size)]
            rungs, heads, groups = shape.group_size, shape.kv_groups, 0
        stay = max(1, _round_up_share(min_kept * rungs))
        widths = [(shape.query_heads - gone * heads, shape.kv_groups - gone * groups) for gone in range(rungs)]
        costs = [price(shape, *width, shape.ffn_channels) for width in widths[: rungs - stay + 1]]
        found.append(_build_sequence(index, "attention", rungs, raw, cuts, list(range(rungs)), costs))
    if score.channels is not None and shape.ffn_channels:
        raw = _check_scores(index, "channel", score.channels, shape.ffn_channels)
        channels = standardize_scores(raw) if standardise else raw
        ascending = torch.argsort(channels, stable=True)
        units, ordered = ascending.tolist(), channels[ascending].tolist()
        least = max(align, -(-_round_up_share(min_kept * shape.ffn_channels) // align) * align)
        narrower = range((shape.ffn_channels - 1) // align * align, least - 1, -align)
        gone = [0, *(shape.ffn_channels - width for width in narrower)]
        spans = [slice(start, stop) for start, stop in pairwise(gone)]
        cuts = [(units[span], math.fsum(ordered[span]) / (span.stop - span.start)) for span in spans]
        costs = [price(shape, shape.query_heads, shape.kv_groups, shape.ffn_channels - number) for number in gone]
        found.append(_build_sequence(index, "ffn", shape.ffn_channels, raw, cuts, gone, costs))
    return found


def _build_sequence(
    index: int,
    kind: StepKind,
    rungs: int,
    raw: Tensor,
    cuts: Sequence[tuple[list[int], float]],
    gone: Sequence[int],
    costs: Sequence[float],
) -> RemovalSequence:
    """Steps from cuts: (units, mean score) of each, rungs gone and cost of the layer after 0, 1, ... of them."""
    steps: list[RemovalStep] = []
    start = 0
    for position in range(1, len(costs)):
        saved = costs[start] - costs[position]
        if saved <= 0:  # a cut that saves nothing goes with the next one that does, or not at all
            continue
        units = [unit for members, _ in cuts[start:position] for unit in members]
        mean = sum(score * (len(members) / len(units)) for members, score in cuts[start:position])
        # Means of equal scores may differ in the last bit; steps are taken in order all the same.
        score = max(mean, steps[-1].score if steps else -math.inf)
        steps.append(RemovalStep(score, saved, tuple(units), gone[start], gone[position]))
        start = position
    return RemovalSequence(index, kind, rungs, raw.mean().item(), raw.abs().mean().item(), tuple(steps))


def tie_sequences(ladders: Sequence[RemovalSequence]) -> RemovalSequence:
    """One ladder whose steps are those of several, taken together: rung by rung, at their mean score.

    Args:
        ladders: of one kind, in different layers; a rung that is no step in all of them is none here.
    """
    gains = [
        dict(zip([0, *(step.removed_after for step in each.steps)], each.accumulate_savings(), strict=True))
        for each in ladders
    ]
    steps: list[RemovalStep] = []
    for before, after in pairwise(sorted(set.intersection(*map(set, gains)))):
        cost = math.fsum(gain[after] - gain[before] for gain in gains)
        inside = [step for each in ladders for step in each.steps if before < step.removed_after <= after]
        weights = [step.removed_after - step.removed_before for step in inside]
        mean = math.fsum(step.score * weight for step, weight in zip(inside, weights, strict=True)) / sum(weights)
        steps.append(RemovalStep(max(mean, steps[-1].score if steps else -math.inf), cost, (), before, after))
    mean, size = (
        math.fsum(getattr(each, name) for each in ladders) / len(ladders) for name in ("mean_score", "mean_magnitude")
    )
    return RemovalSequence(-1, ladders[0].kind, min(each.unit_count for each in ladders), mean, size, tuple(steps))


def _round_up_share(share: float) -> int:
    return math.ceil(share - 1e-9)  # 0.55 * 100 is a little more than 55


def _check_scores(index: int, kind: str, score: Tensor, size: int) -> Tensor:
    """The scores in float64 on the CPU, finite, [size]."""
    values = score.detach().to("cpu", torch.float64).flatten()
    if len(values) != size:
        raise BadOption(f"layer {index}: expected {size} {kind} scores, got {len(values)}")
    if not torch.isfinite(values).all():
        raise NonFinite(
            f"layer {index}: {kind} scores hold NaN or infinity; expected finite numbers: check the weights, the "
            "calibration text and the dtype"
        )
    return values


def standardize_scores(values: Tensor) -> Tensor:
    """Values with mean 0 and deviation 1; zeros where all are equal."""
    values = values - values.mean()
    deviation = values.square().mean().sqrt()
    return values / deviation if deviation > 0 else values

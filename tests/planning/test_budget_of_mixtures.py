"""The budget on mixtures of experts: legal for any shapes and scores, never undercut, never wasted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelit.core.plan import LayerPlan, LayerShape, ModelShape, PruningPlan
from prunelit.core.scores import LayerScores
from prunelit.planning.budget import select_units
from prunelit.runtime.errors import BadOption, InfeasibleBudget

ROW, CHANNEL = 11, 30  # a row of the router, a channel of an expert


def mixture(
    experts: int = 8,
    groups: int = 1,
    chosen: int = 2,
    chosen_groups: int = 1,
    channels: int = 16,
    shared: int = 0,
    attention: bool = True,
) -> LayerShape:
    """A layer with odd costs: 4 query heads in 2 KV groups, and a mixture of experts, beside it an FFN or none."""
    dense = LayerShape(*((4, 2) if attention else (0, 0)), 8, shared, 3, 70, 50, 30, 387 * attention, 30 * shared, 5)
    expert = CHANNEL * channels + ROW
    return replace(
        dense,
        experts=experts,
        experts_per_token=chosen,
        expert_channels=channels,
        expert_channel_cost=CHANNEL,
        expert_cost=expert,
        router_row_cost=ROW,
        mixture_cost=experts * expert + 7,
        expert_groups=groups,
        groups_per_token=chosen_groups,
    )


DENSE = replace(LayerShape(4, 2, 8, 32, 3, 70, 50, 30, 387, 967, 5))


def plan_of(shapes: Sequence[LayerShape], layers: Sequence[LayerPlan]) -> PruningPlan:
    """A plan is refused where a layer is not legal."""
    return PruningPlan("test", ModelShape("test", "test", 64, 10**7, 0, 4, "", tuple(shapes)), tuple(layers))


def cost_of(shape: LayerShape, kept: LayerPlan, budget: str) -> float:
    """Counted here once more, from the counts of the layer."""
    attention = 70 * len(kept.query_heads) + 50 * len(kept.kv_groups) + 7 if kept.query_heads else 0
    ffn = shape.mlp_cost - 30 * (shape.ffn_channels - len(kept.ffn_channels)) if shape.ffn_channels else 0
    used = len(kept.experts)
    if budget != "parameters":
        used = min(used, shape.experts_per_token)
    experts = ROW * len(kept.experts) + CHANNEL * len(kept.expert_channels) * used + 7 * bool(shape.experts)
    if budget == "macs":
        heads = 8 * (2 * len(kept.query_heads) + 2 * len(kept.kv_groups))
        return heads + 3 * len(kept.ffn_channels) + experts
    return attention + ffn + experts + 5


@dataclass(frozen=True)
class Case:
    """Arguments of `select_units`."""

    shapes: tuple[LayerShape, ...]
    scores: tuple[LayerScores, ...]
    ratio: float
    budget: Any
    scope: Any


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    chosen_groups = draw(st.integers(1, groups))
    in_group = draw(st.integers(3 if groups > 1 else 1, 6))
    chosen = draw(st.integers(1, max(1, min(chosen_groups * (in_group - 1), groups * in_group))))
    shared = draw(st.sampled_from([0, 16]))
    shape = mixture(groups * in_group, groups, chosen, chosen_groups, draw(st.sampled_from([16, 24, 40])), shared)
    shapes = [shape] * draw(st.integers(1, 3)) + [DENSE] * draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["experts", "expert_channels", None]))
    others = draw(st.booleans()) or kind is None

    def rand(count: int) -> torch.Tensor | None:
        return torch.rand(count, generator=generator) if count else None

    scores = [
        LayerScores(
            heads=rand(each.query_heads) if others else None,
            channels=rand(each.ffn_channels) if others else None,
            **({kind: rand(getattr(each, kind))} if kind else {}),
        )
        for each in shapes
    ]
    budget = draw(st.sampled_from(["parameters", "active_parameters", "macs"]))
    scope = draw(st.sampled_from(["layer", "global", "layer_mean"]))
    return Case(tuple(shapes), tuple(scores), draw(st.floats(0.01, 0.6)), budget, scope)


@given(cases())
def test_plans_are_legal_and_keep_the_budget(case: Case) -> None:
    dense = [LayerPlan.dense(shape) for shape in case.shapes]
    whole = sum(cost_of(shape, kept, case.budget) for shape, kept in zip(case.shapes, dense, strict=True))
    try:
        layers = select_units(case.shapes, case.scores, case.ratio, case.scope, align=8, budget=case.budget)
    except InfeasibleBudget:
        least = [strip(shape, score) for shape, score in zip(case.shapes, case.scores, strict=True)]
        left = sum(cost_of(shape, kept, case.budget) for shape, kept in zip(case.shapes, least, strict=True))
        assert whole - left < case.ratio * whole
        return
    plan_of(case.shapes, layers)  # raises where a layer is not legal
    left = sum(cost_of(shape, kept, case.budget) for shape, kept in zip(case.shapes, layers, strict=True))
    assert whole - left >= case.ratio * whole * (1 - 1e-12)
    for shape, kept, score in zip(case.shapes, layers, case.scores, strict=True):
        for name, field in (("heads", "query_heads"), ("experts", "experts"), ("expert_channels", "expert_channels")):
            if getattr(score, name) is None:
                assert len(getattr(kept, field)) == getattr(shape, field)
        assert len(kept.expert_channels) % 8 == 0
        if case.scope != "layer" and score.experts is not None and kept.experts != LayerPlan.dense(shape).experts:
            returned = shape.expert_groups * (CHANNEL * shape.expert_channels + ROW)
            if case.budget == "parameters":  # one more expert of every group would miss it
                assert whole - left - returned < case.ratio * whole
    if case.scope == "layer":
        counts = {len(kept.experts) for kept, shape in zip(layers, case.shapes, strict=True) if shape.experts}
        assert len(counts) <= 1


def strip(shape: LayerShape, score: LayerScores) -> LayerPlan:
    """The least that may remain."""
    kept = LayerPlan.dense(shape)
    if score.heads is not None and shape.kv_groups:
        kept = replace(kept, kv_groups=(0,), query_heads=(0, 1))
    if score.channels is not None and shape.ffn_channels:
        kept = replace(kept, ffn_channels=tuple(range(8)))
    if score.experts is not None:
        kept = replace(kept, experts=tuple(range(shape.least_experts)))
    if score.expert_channels is not None:
        kept = replace(kept, expert_channels=tuple(range(8)))
    return kept


@pytest.mark.parametrize(
    ("groups", "chosen", "chosen_groups", "least"),
    [(1, 2, 1, 2), (1, 5, 1, 5), (2, 2, 1, 4), (2, 3, 1, 6), (2, 4, 2, 4), (4, 8, 2, 16), (4, 1, 3, 8)],
)
def test_the_least_number_of_experts(groups: int, chosen: int, chosen_groups: int, least: int) -> None:
    """As many as a token gets, two in every group, and enough in the groups that are chosen."""
    shape = mixture(16, groups, chosen, chosen_groups)
    assert shape.least_experts == least
    scores = LayerScores(experts=torch.arange(16.0))
    dense, most = shape.parameters, (16 - least) * (16 * CHANNEL + ROW)
    kept = select_units([shape], [scores], most / dense - 1e-9 if most else 0.5) if most else None
    assert kept is None or len(kept[0].experts) == least
    with pytest.raises(InfeasibleBudget, match=f"{least} experts"):
        select_units([shape], [scores], most / dense + 0.01)


def test_one_expert_of_every_group_goes_at_a_time() -> None:
    """The lowest of each group; which group is the weakest as a whole does not matter."""
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    shape = mixture(8, groups=2, chosen=2, chosen_groups=1)
    (kept,) = select_units([shape], [LayerScores(experts=scores)], 0.15)
    assert kept.experts == (0, 1, 2, 5, 6, 7)
    (kept,) = select_units([shape], [LayerScores(experts=scores)], 0.3)
    assert kept.experts == (0, 1, 6, 7)


def test_without_groups_the_lowest_experts_of_all_go() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    (kept,) = select_units([mixture()], [LayerScores(experts=scores)], 0.3)
    assert kept.experts == (0, 1, 2, 3, 7)


def test_scope_layer_takes_the_floor_of_heads_and_channels_and_the_rest_of_experts() -> None:
    shapes = [mixture(shared=32), mixture(shared=32), DENSE]
    scores = [
        LayerScores(
            heads=torch.arange(4.0),
            channels=torch.arange(32.0),
            experts=torch.arange(8.0) if shape.experts else None,
        )
        for shape in shapes
    ]
    layers = select_units(shapes, scores, 0.3, align=8)
    assert [kept.widths for kept in layers] == [(4, 2, 24)] * 3  # floor(0.3 * 2) groups, floor(0.3 * 32 / 8) steps
    fewer = len(layers[0].experts)
    assert [len(kept.experts) for kept in layers] == [fewer, fewer, 0]
    whole = sum(shape.parameters for shape in shapes)
    cut = whole - plan_of(shapes, layers).kept_block_parameters
    assert cut >= 0.3 * whole > cut - 2 * (16 * CHANNEL + ROW)


def test_scope_global_lets_layers_keep_other_numbers_of_experts() -> None:
    scores = [LayerScores(experts=torch.arange(8.0)), LayerScores(experts=torch.arange(8.0) + 10)]
    layers = select_units([mixture()] * 2, scores, 0.25, "global", standardise=False)
    assert [len(kept.experts) for kept in layers] == [3, 8]


def test_experts_save_no_active_parameters_but_rows_of_the_router() -> None:
    shape, scores = mixture(), LayerScores(experts=torch.arange(8.0))
    active = shape.parameters_at(4, 2, 0, active=True)
    (kept,) = select_units([shape], [scores], 2 * ROW / active, budget="active_parameters")
    assert len(kept.experts) == 6
    with pytest.raises(InfeasibleBudget, match=f"at most {6 * ROW / active:.4f}"):
        select_units([shape], [scores], 0.2, budget="active_parameters")


@pytest.mark.parametrize("budget", ["active_parameters", "macs"])
def test_channels_of_experts_save_active_parameters(budget: Any) -> None:
    scores = LayerScores(expert_channels=torch.arange(16.0))
    (kept,) = select_units([mixture()], [scores], 0.1, budget=budget, align=1)
    assert kept.expert_channels == tuple(range(8, 16)) and len(kept.experts) == 8


@pytest.mark.parametrize(("align", "remain"), [(1, 32), (8, 32), (12, 24), (16, 32)])
def test_channels_of_experts_remain_in_multiples_of_eight(align: int, remain: int) -> None:
    """The kernels of transformers refuse others."""
    scores = LayerScores(expert_channels=torch.arange(40.0))
    (kept,) = select_units([mixture(channels=40)], [scores], 0.05, align=align)
    assert len(kept.expert_channels) == remain


def test_heads_that_are_tied_leave_experts_free() -> None:
    """uniform_heads ties attention alone; experts are cut as without it."""
    scores = [LayerScores(heads=torch.arange(4.0), experts=torch.arange(8.0) + 10 * number) for number in range(2)]
    options: dict[str, Any] = {"standardise": False, "uniform_heads": True}
    layers = select_units([mixture()] * 2, scores, 0.4, "global", **options)
    assert len({len(kept.query_heads) for kept in layers}) == 1
    assert sum(len(kept.experts) for kept in layers) < 16


def test_experts_and_their_channels_together_are_refused() -> None:
    scores = LayerScores(experts=torch.arange(8.0), expert_channels=torch.arange(16.0))
    with pytest.raises(BadOption, match="scores of experts or of their channels, got both"):
        select_units([mixture()], [scores], 0.1)


def test_protected_layers_keep_their_experts() -> None:
    scores = [LayerScores(experts=torch.arange(8.0))] * 3
    layers = select_units([mixture()] * 3, scores, 0.2, protect=(0, -1))
    assert [len(kept.experts) for kept in layers] == [8, 2, 8]  # 2596 of 12981 parameters, 491 an expert


def test_min_kept_is_a_share_of_the_experts() -> None:
    scores = [LayerScores(experts=torch.arange(8.0))]
    (kept,) = select_units([mixture()], scores, 0.3, min_kept=0.6)
    assert len(kept.experts) == 5
    with pytest.raises(InfeasibleBudget):
        select_units([mixture()], scores, 0.5, min_kept=0.6)

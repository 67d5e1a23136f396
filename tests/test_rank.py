"""The budget is a promise: kept for any shapes, scores and options, never undercut in silence, never wasted."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from prunelit.errors import BadOption, InfeasibleBudget, NonFinite
from prunelit.plan import LayerPlan, LayerShape, ModelShape, PruningPlan
from prunelit.rank import LayerScores, check_options, select


def layer_shape(groups: int = 4, group_size: int = 2, channels: int = 32, prunable: bool = True) -> LayerShape:
    """A layer with odd costs: a query head 70, a key and a value head 50, a channel 30, norms and biases 7 a block."""
    heads = groups * group_size
    attention = 70 * heads + 50 * groups + 7 if groups else 0
    mlp = 30 * channels + 7 if channels else 0
    return LayerShape(heads, groups, 8, channels, 3, 70, 50, 30, attention, mlp, 5, prunable)


def scores_of(shape: LayerShape, generator: torch.Generator | None = None) -> LayerScores:
    return LayerScores(
        torch.rand(shape.query_heads, generator=generator), torch.rand(shape.ffn_channels, generator=generator)
    )


@dataclass(frozen=True)
class Case:
    """Arguments of `select`."""

    shapes: tuple[LayerShape, ...]
    heads: tuple[tuple[float, ...], ...]
    channels: tuple[tuple[float, ...], ...]
    ratio: float
    unit: Any = "kv_group"
    align: int = 8
    protect: tuple[int, ...] = ()

    @property
    def scores(self) -> list[LayerScores]:
        pairs = zip(self.heads, self.channels, strict=True)
        return [LayerScores(torch.tensor(h), torch.tensor(c, dtype=torch.float64)) for h, c in pairs]

    @property
    def target(self) -> float:
        return self.ratio * sum(shape.parameters for shape in self.shapes)

    @property
    def removable(self) -> int:
        """Parameters that may go at most, counted here once more."""
        return sum(
            self.attention_step(shape) * ((shape.kv_groups if self.unit == "kv_group" else shape.group_size) - 1)
            + shape.ffn_channels * 30
            - min(self.align, shape.ffn_channels) * 30
            for index, shape in enumerate(self.shapes)
            if index not in self.whole
        )

    @property
    def whole(self) -> set[int]:
        return {index % len(self.shapes) for index in self.protect}

    def attention_step(self, shape: LayerShape) -> int:
        if not shape.heads_prunable or not shape.kv_groups:
            return 0
        return 70 * shape.group_size + 50 if self.unit == "kv_group" else 70 * shape.kv_groups

    def select(self, scope: Any) -> tuple[LayerPlan, ...]:
        return select(self.shapes, self.scores, self.ratio, scope, self.unit, self.align, self.protect)

    def cut(self, layers: Sequence[LayerPlan]) -> int:
        model = ModelShape("test", "test", 64, 10**6, 0, 4, "", self.shapes)
        return model.block_parameters - PruningPlan("test", model, tuple(layers)).kept_block_parameters

    def given_back(self, shape: LayerShape, kept: LayerPlan) -> list[int]:
        """Cost of each step that a layer could give back."""
        steps = [self.attention_step(shape)] if len(kept.query_heads) < shape.query_heads else []
        if (width := len(kept.ffn_channels)) < shape.ffn_channels:
            steps.append(30 * (min(shape.ffn_channels, width + self.align) - width))
        return steps


@st.composite
def cases(draw: st.DrawFn, alike: bool = False) -> Case:
    shape = st.builds(
        layer_shape,
        st.sampled_from([1, 2, 4, 0]),
        st.integers(1, 3),
        st.integers(0, 40),
        st.sampled_from([True, False]),
    )
    number = draw(st.integers(1, 4))
    shapes = tuple([draw(shape)] * number) if alike else tuple(draw(st.lists(shape, min_size=number, max_size=number)))
    assume(any(each.kv_groups for each in shapes))
    chance = random.Random(draw(st.integers(0, 9999)))
    few = draw(st.booleans())  # ties are where ranking goes wrong

    def scores(number: int) -> tuple[float, ...]:
        return tuple(chance.choice((0.0, 0.3, 1.0)) if few else chance.uniform(-9, 9) for _ in range(number))

    return Case(
        shapes,
        tuple(scores(each.query_heads) for each in shapes),
        tuple(scores(each.ffn_channels) for each in shapes),
        draw(st.floats(0.01, 0.9)),
        draw(st.sampled_from(["kv_group", "query_head"])),
        draw(st.integers(1, 16)),
        tuple(draw(st.lists(st.integers(-number, number - 1), max_size=1))),
    )


def check_layers(case: Case, layers: Sequence[LayerPlan]) -> None:
    """What holds in any scope: alignment, protection, what must stay, and the lowest scores going first."""
    for index, (shape, kept, scores) in enumerate(zip(case.shapes, layers, case.scores, strict=True)):
        width = len(kept.ffn_channels)
        if index in case.whole:
            assert kept == LayerPlan.dense(shape)
        if width < shape.ffn_channels:
            assert width % case.align == 0
        assert width >= min(case.align, shape.ffn_channels)
        assert len(kept.kv_groups) >= min(1, shape.kv_groups)
        if not shape.heads_prunable:
            assert len(kept.query_heads) == shape.query_heads
        check_order(scores.channels, kept.ffn_channels)
        by_group = scores.heads.double().view(shape.kv_groups, -1) if shape.kv_groups else torch.zeros(0, 0)
        if case.unit == "kv_group":
            check_order(by_group.sum(1), kept.kv_groups)
            continue
        for group, values in enumerate(by_group):
            heads = [head % shape.group_size for head in kept.query_heads if head // shape.group_size == group]
            check_order(values, heads)


def check_order(scores: torch.Tensor, kept: Sequence[int]) -> None:
    """No unit that went had a higher score than one that stayed."""
    gone = [index for index in range(len(scores)) if index not in kept]
    if gone and kept:
        assert scores[gone].max() <= scores[list(kept)].min() + 1e-9


# Seven dead channels of eleven: the first step has 3 of them (11 -> 8), the next 4, and their means round differently.
DEAD_CHANNELS = Case((layer_shape(1, 1, 11),), ((1.0,),), ((0.0,) * 7 + (3.0,) * 4,), ratio=0.3, align=4)


@given(cases())
@example(DEAD_CHANNELS)
def test_global_budget_is_kept_and_not_wasted(case: Case) -> None:
    if case.removable < case.target:
        with pytest.raises(InfeasibleBudget, match="ratio"):
            case.select("global")
        return
    layers = case.select("global")
    cut = case.cut(layers)
    assert cut >= case.target
    for shape, kept in zip(case.shapes, layers, strict=True):
        assert all(cut - step < case.target for step in case.given_back(shape, kept))
    check_layers(case, layers)


@given(cases(alike=True))
def test_layer_budget_is_kept_alike_in_every_layer(case: Case) -> None:
    if case.removable < case.target:
        with pytest.raises(InfeasibleBudget, match="ratio"):
            case.select("layer")
        return
    layers = case.select("layer")
    cut = case.cut(layers)
    assert cut >= case.target
    check_layers(case, layers)
    changed = [kept for index, kept in enumerate(layers) if index not in case.whole]
    widths = {(len(kept.query_heads), len(kept.kv_groups), len(kept.ffn_channels)) for kept in changed}
    assert len(widths) <= 1
    shape, kept = case.shapes[0], changed[0]
    units = shape.kv_groups if case.unit == "kv_group" else shape.group_size
    if shape.heads_prunable and units:
        left = len(kept.kv_groups) if case.unit == "kv_group" else len(kept.query_heads) // len(kept.kv_groups)
        assert units - left >= min(int(case.ratio * units), units - 1)
    if len(kept.ffn_channels) < shape.ffn_channels:  # one step less everywhere would break the promise
        assert cut - case.given_back(shape, kept)[-1] * len(changed) < case.target


@given(cases())
def test_layer_budget_is_kept_where_layers_differ(case: Case) -> None:
    if case.removable >= case.target:
        layers = case.select("layer")
        assert case.cut(layers) >= case.target
        check_layers(case, layers)


@given(st.permutations(range(32)), st.permutations(range(32)), st.floats(0.02, 0.9))
def test_global_takes_the_lowest_standardised_scores_of_all_layers(
    first: list[int], second: list[int], ratio: float
) -> None:
    """Against brute force, where every step costs the same."""
    values = [torch.tensor(first).double() ** 2, torch.tensor(second).double() ** 3]
    shapes = (layer_shape(1, 1, 32),) * 2
    number = math.ceil(ratio * sum(shape.parameters for shape in shapes) / 30)
    assume(number <= 62)
    plans = select(shapes, [LayerScores(None, v) for v in values], ratio, "global", align=1)
    table = [
        (score, layer, channel)
        for layer, v in enumerate(values)
        for channel, score in enumerate(((v - v.mean()) / v.std(correction=0)).tolist())
        if v[channel] < v.max()  # one channel of each layer stays
    ]
    gone = {(layer, channel) for _, layer, channel in sorted(table)[:number]}
    assert gone == {(i, c) for i, plan in enumerate(plans) for c in range(32) if c not in plan.ffn_channels}


@given(cases(), st.lists(st.sampled_from([0.25, 0.5, 2.0, 1024.0]), min_size=4, max_size=4))
def test_units_of_a_layers_scores_do_not_matter(case: Case, factors: list[float]) -> None:
    assume(case.removable >= case.target)
    pairs = zip(case.scores, factors, strict=False)
    scaled = [LayerScores(scores.heads * factor, scores.channels * factor) for scores, factor in pairs]
    again = select(case.shapes, scaled, case.ratio, "global", case.unit, case.align, case.protect)
    assert again == case.select("global")


# Single facts ---------------------------------------------------------------------------------------------------------


def test_what_is_not_scored_stays() -> None:
    shapes = (layer_shape(),) * 2
    only_heads = [LayerScores(heads=torch.rand(8)) for _ in shapes]
    only_channels = [LayerScores(channels=torch.rand(32)) for _ in shapes]
    for plan in select(shapes, only_heads, 0.2):
        assert len(plan.ffn_channels) == 32 and len(plan.kv_groups) < 4
    for plan in select(shapes, only_channels, 0.2, align=8):
        assert len(plan.ffn_channels) < 32 and len(plan.query_heads) == 8
    with pytest.raises(InfeasibleBudget):
        select(shapes, [LayerScores()] * 2, 0.01)


def test_group_is_worth_the_sum_of_its_heads() -> None:
    heads = torch.tensor([5.0, 5.0, 9.0, 0.0, 7.0, 7.0, 6.0, 6.0])  # sums 10, 9, 14, 12
    (plan,) = select((layer_shape(channels=0),), [LayerScores(heads)], 0.2)
    assert plan.kv_groups == (0, 2, 3) and plan.query_heads == (0, 1, 4, 5, 6, 7)


def test_query_heads_go_one_from_every_group() -> None:
    heads = torch.tensor([9.0, 0.0, 1.0, 4.0, 7.0, 6.0, 5.0, 8.0])
    (plan,) = select((layer_shape(channels=0),), [LayerScores(heads)], 0.2, unit="query_head")
    assert plan.query_heads == (0, 3, 4, 7) and plan.kv_groups == (0, 1, 2, 3)


def test_global_scope_lets_layers_differ() -> None:
    flat, steep = torch.linspace(1, 2, 64), torch.linspace(0, 1, 64) ** 9  # most of the steep one lies below its mean
    shapes = (layer_shape(channels=64),) * 2
    first, second = select(shapes, [LayerScores(None, flat), LayerScores(None, steep)], 0.2, "global", align=8)
    assert len(first.ffn_channels) != len(second.ffn_channels)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["heads", "channels"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_that_are_not_finite_are_refused(value: float, kind: str, scope: Any) -> None:
    shapes = (layer_shape(),) * 2
    scores = [scores_of(shape) for shape in shapes]
    broken = getattr(scores[1], kind).clone()
    broken[3] = value
    scores[1] = replace(scores[1], **{kind: broken})
    with pytest.raises(NonFinite, match=f"layer 1: {kind[:-1]} scores"):
        select(shapes, scores, 0.2, scope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_any_dtype_of_scores(dtype: torch.dtype) -> None:
    scores = LayerScores(channels=torch.arange(32).to(dtype))
    (plan,) = select((layer_shape(),), [scores], 0.2, align=8)
    assert plan.ffn_channels == tuple(range(16, 32))


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": 25}, "ratio"),
        ({"ratio": math.nan}, "ratio"),
        ({"ratio": "0.2"}, "ratio"),
        ({"ratio": True}, "ratio"),
        ({"scope": "model"}, "scope.*layer, global"),
        ({"unit": "head"}, "unit.*kv_group, query_head"),
        ({"align": 0}, "align"),
        ({"align": 8.0}, "align"),
        ({"align": True}, "align"),
        ({"protect": (2,)}, r"protect.*\[-2, 2\).*2"),
        ({"protect": (-3,)}, "protect"),
        ({"protect": ("0",)}, "protect"),
        ({"protect": (True,)}, "protect"),
    ],
    ids=str,
)
def test_bad_option_is_named(option: dict[str, Any], named: str) -> None:
    shapes = (layer_shape(),) * 2
    with pytest.raises(BadOption, match=named):
        select(shapes, [scores_of(shape) for shape in shapes], **{"ratio": 0.2, **option})


def test_options_are_checked_before_the_layers_are_known() -> None:
    check_options(0.2, "layer", "kv_group", 64, (0, -1, 99))


def test_wrong_number_of_scores_is_refused() -> None:
    with pytest.raises(BadOption, match="layer 0: expected 32 channel scores, got 31"):
        select((layer_shape(),), [LayerScores(channels=torch.rand(31))], 0.2)


def test_infeasible_budget_says_what_is_possible() -> None:
    shapes = (layer_shape(groups=1, group_size=1),) * 2  # 1,099 parameters each, of which 24 channels of 30 may go
    scores = [scores_of(shape) for shape in shapes]
    with pytest.raises(InfeasibleBudget, match=r"ratio 0\.7.*at most 0\.6551"):
        select(shapes, scores, 0.7, align=8)
    with pytest.raises(InfeasibleBudget, match="1 unprotected"):
        select(shapes, scores, 0.5, align=8, protect=(-1,))

"""The budget is a promise: kept for any shapes, scores and options, never undercut in silence, never wasted."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from prunelit.core.plan import LayerPlan, LayerShape, ModelShape, PruningPlan
from prunelit.core.scores import LayerScores
from prunelit.planning.budget import check_budget_options, select_units
from prunelit.planning.removal_steps import RemovalSequence, RemovalStep, tie_sequences
from prunelit.runtime.errors import BadOption, InfeasibleBudget, NonFinite


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
    """Arguments of `select_units`."""

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
        return select_units(self.shapes, self.scores, self.ratio, scope, self.unit, self.align, self.protect)

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
    plans = select_units(shapes, [LayerScores(None, v) for v in values], ratio, "global", align=1)
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
    again = select_units(case.shapes, scaled, case.ratio, "global", case.unit, case.align, case.protect)
    assert again == case.select("global")


# Single facts ---------------------------------------------------------------------------------------------------------


def test_what_is_not_scored_stays() -> None:
    shapes = (layer_shape(),) * 2
    only_heads = [LayerScores(heads=torch.rand(8)) for _ in shapes]
    only_channels = [LayerScores(channels=torch.rand(32)) for _ in shapes]
    for plan in select_units(shapes, only_heads, 0.2):
        assert len(plan.ffn_channels) == 32 and len(plan.kv_groups) < 4
    for plan in select_units(shapes, only_channels, 0.2, align=8):
        assert len(plan.ffn_channels) < 32 and len(plan.query_heads) == 8
    with pytest.raises(InfeasibleBudget):
        select_units(shapes, [LayerScores()] * 2, 0.01)


def test_group_is_worth_the_sum_of_its_heads() -> None:
    heads = torch.tensor([5.0, 5.0, 9.0, 0.0, 7.0, 7.0, 6.0, 6.0])  # sums 10, 9, 14, 12
    (plan,) = select_units((layer_shape(channels=0),), [LayerScores(heads)], 0.2)
    assert plan.kv_groups == (0, 2, 3) and plan.query_heads == (0, 1, 4, 5, 6, 7)


def test_query_heads_go_one_from_every_group() -> None:
    heads = torch.tensor([9.0, 0.0, 1.0, 4.0, 7.0, 6.0, 5.0, 8.0])
    (plan,) = select_units((layer_shape(channels=0),), [LayerScores(heads)], 0.2, unit="query_head")
    assert plan.query_heads == (0, 3, 4, 7) and plan.kv_groups == (0, 1, 2, 3)


def test_global_scope_lets_layers_differ() -> None:
    flat, steep = torch.linspace(1, 2, 64), torch.linspace(0, 1, 64) ** 9  # most of the steep one lies below its mean
    shapes = (layer_shape(channels=64),) * 2
    first, second = select_units(shapes, [LayerScores(None, flat), LayerScores(None, steep)], 0.2, "global", align=8)
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
        select_units(shapes, scores, 0.2, scope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_any_dtype_of_scores(dtype: torch.dtype) -> None:
    scores = LayerScores(channels=torch.arange(32).to(dtype))
    (plan,) = select_units((layer_shape(),), [scores], 0.2, align=8)
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
        select_units(shapes, [scores_of(shape) for shape in shapes], **{"ratio": 0.2, **option})


def test_options_are_checked_before_the_layers_are_known() -> None:
    check_budget_options(0.2, "layer", "kv_group", 64, (0, -1, 99))


def test_wrong_number_of_scores_is_refused() -> None:
    with pytest.raises(BadOption, match="layer 0: expected 32 channel scores, got 31"):
        select_units((layer_shape(),), [LayerScores(channels=torch.rand(31))], 0.2)


def test_scores_of_too_few_layers_leave_none_uncut_in_silence() -> None:
    shapes = (layer_shape(),) * 2
    with pytest.raises(ValueError, match="shorter"):
        select_units(shapes, [scores_of(shapes[0])], 0.2, align=8)


def test_infeasible_budget_says_what_is_possible() -> None:
    shapes = (layer_shape(groups=1, group_size=1),) * 2  # 1,099 parameters each, of which 24 channels of 30 may go
    scores = [scores_of(shape) for shape in shapes]
    with pytest.raises(InfeasibleBudget, match=r"ratio 0\.7.*at most 0\.6551"):
        select_units(shapes, scores, 0.7, align=8)
    with pytest.raises(InfeasibleBudget, match="1 unprotected"):
        select_units(shapes, scores, 0.5, align=8, protect=(-1,))
    with pytest.raises(InfeasibleBudget, match=r"^ratio 0\.5 of parameters: .*, got all 2 layers protected;"):
        select_units(shapes, scores, 0.5, align=8, protect=(0, -1))


# Other budgets, scopes and limits ------------------------------------------------------------------------------------

BUDGETS = ("parameters", "macs", "kv_bytes", "latency")


def seconds(shape: LayerShape, heads: int, groups: int, channels: int) -> float:
    """A machine that computes heads in pairs and channels in blocks of 12: many cuts save nothing."""
    return 0.25 * -(-heads // 2) + 0.0625 * -(-channels // 12)


@dataclass(frozen=True)
class Choice:
    """A case under any budget, with everything counted here once more."""

    case: Case
    budget: Any
    min_kept: float

    def cost(self, heads: int, groups: int, channels: int) -> float:
        match self.budget:
            case "parameters":
                return 70 * heads + 50 * groups + 7 * bool(groups) + 30 * channels + 7 * bool(channels) + 5
            case "macs":
                return 2 * 8 * (heads + groups) + 3 * channels
            case "kv_bytes":
                return groups
        return seconds(None, heads, groups, channels)  # type: ignore[arg-type]

    def rungs(self, shape: LayerShape) -> tuple[list[tuple[int, int]], list[int]]:
        """All legal (heads, groups) and all legal widths of a layer, widest first."""
        size, case = shape.group_size, self.case
        if case.unit == "kv_group":
            least = max(1, math.ceil(round(self.min_kept * shape.kv_groups, 6)))
            heads = [(groups * size, groups) for groups in range(shape.kv_groups, least - 1, -1)]
        else:
            least = max(1, math.ceil(round(self.min_kept * size, 6)))
            heads = [(each * shape.kv_groups, shape.kv_groups) for each in range(size, least - 1, -1)]
        least = max(1, math.ceil(round(self.min_kept * shape.ffn_channels, 6)))
        widths = [w for w in range(shape.ffn_channels - 1, least - 1, -1) if w % case.align == 0 and w]
        whole = [(shape.query_heads, shape.kv_groups)]
        return heads if shape.heads_prunable and shape.kv_groups else whole, [shape.ffn_channels, *widths]

    @property
    def target(self) -> float:
        return self.case.ratio * sum(self.cost(s.query_heads, s.kv_groups, s.ffn_channels) for s in self.case.shapes)

    @property
    def removable(self) -> float:
        total = 0.0
        for index, shape in enumerate(self.case.shapes):
            if index not in self.case.whole:
                heads, widths = self.rungs(shape)
                total += self.cost(*heads[0], widths[0]) - self.cost(*heads[-1], widths[-1])
        return total

    def select(self, scope: Any, **options: Any) -> tuple[LayerPlan, ...]:
        case = self.case
        return select_units(
            case.shapes,
            case.scores,
            case.ratio,
            scope,
            case.unit,
            case.align,
            case.protect,
            budget=self.budget,
            min_kept=self.min_kept,
            cost=seconds if self.budget == "latency" else None,
            **options,
        )

    def cut(self, layers: Sequence[LayerPlan]) -> float:
        pairs = zip(self.case.shapes, layers, strict=True)
        return sum(self.cost(s.query_heads, s.kv_groups, s.ffn_channels) - self.cost(*k.widths) for s, k in pairs)

    def given_back(self, shape: LayerShape, kept: LayerPlan) -> list[float]:
        """What each kind of a layer would cost again, one rung up."""
        heads, widths = self.rungs(shape)
        number, position = heads.index(kept.widths[:2]), widths.index(kept.widths[2])
        now = self.cost(*kept.widths)
        steps = [self.cost(*heads[number - 1], widths[position]) - now] if number else []
        return steps + ([self.cost(*heads[number], widths[position - 1]) - now] if position else [])


@st.composite
def choices(draw: st.DrawFn, alike: bool = False) -> Choice:
    case, budget = draw(cases(alike)), draw(st.sampled_from(BUDGETS))
    assume(all(shape.kv_groups or shape.ffn_channels for shape in case.shapes))
    if budget == "kv_bytes":
        case = replace(case, unit="kv_group")
    return Choice(case, budget, draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7])))


def check_choice(choice: Choice, layers: Sequence[LayerPlan]) -> None:
    """What holds under any budget: the promise, what must stay, the order, and that nothing goes for nothing."""
    assert choice.cut(layers) >= choice.target * (1 - 1e-12)
    check_layers(choice.case, layers)
    for shape, kept in zip(choice.case.shapes, layers, strict=True):
        heads, widths = choice.rungs(shape)
        assert kept.widths[:2] in heads and kept.widths[2] in widths  # alignment, min_kept, whole groups
        assert all(step > 0 for step in choice.given_back(shape, kept))


@given(choices(), st.sampled_from(["global", "layer_mean"]), st.booleans(), st.booleans())
def test_any_budget_is_kept_and_not_wasted(choice: Choice, scope: Any, standardise: bool, joint: bool) -> None:
    if choice.removable < choice.target * (1 - 1e-12):
        with pytest.raises(InfeasibleBudget, match=f"ratio .* of {choice.budget}:"):
            choice.select(scope, standardise=standardise, joint=joint)
        return
    assume(choice.removable > choice.target * (1 + 1e-12))
    layers = choice.select(scope, standardise=standardise, joint=joint)
    check_choice(choice, layers)
    cut = choice.cut(layers)
    for shape, kept in zip(choice.case.shapes, layers, strict=True):
        assert all(cut - step < choice.target * (1 + 1e-12) for step in choice.given_back(shape, kept))


@given(choices(alike=True))
def test_any_budget_is_kept_alike_in_every_layer(choice: Choice) -> None:
    if choice.removable < choice.target * (1 - 1e-12):
        with pytest.raises(InfeasibleBudget, match=f"ratio .* of {choice.budget}:"):
            choice.select("layer")
        return
    assume(choice.removable > choice.target * (1 + 1e-12))
    layers = choice.select("layer")
    check_choice(choice, layers)
    changed = [kept for index, kept in enumerate(layers) if index not in choice.case.whole]
    assert len({kept.widths for kept in changed}) == 1
    _, widths = choice.rungs(choice.case.shapes[0])
    if (position := widths.index(changed[0].widths[2])) > 0:  # one step less everywhere would break the promise
        back = choice.cost(*changed[0].widths[:2], widths[position - 1]) - choice.cost(*changed[0].widths)
        assert choice.cut(layers) - back * len(changed) < choice.target * (1 + 1e-12)


def test_channels_hold_no_cache() -> None:
    shapes = (layer_shape(channels=64),) * 3
    scores = [scores_of(shape) for shape in shapes]
    for scope in ("layer", "global", "layer_mean"):
        plans = select_units(shapes, scores, 0.3, scope, align=8, budget="kv_bytes")
        assert all(len(plan.ffn_channels) == 64 for plan in plans)
        assert sum(len(plan.kv_groups) for plan in plans) == (6 if scope == "layer" else 8)  # of 12, at least 3.6 go
    with pytest.raises(InfeasibleBudget, match=r"ratio 0\.3 of kv_bytes: expected at most 0\.0000"):
        select_units(shapes, [LayerScores(channels=torch.rand(64)) for _ in shapes], 0.3, budget="kv_bytes")


def test_a_step_that_saves_nothing_goes_with_the_next() -> None:
    """Widths of 9 to 16 cost the same: 16 or 8 channels stay, never 12."""
    shape = layer_shape(0, 1, 16)
    scores = LayerScores(channels=torch.arange(16))

    def blocks(shape: LayerShape, heads: int, groups: int, channels: int) -> float:
        return -(-channels // 8)

    (plan,) = select_units((shape,), [scores], 0.1, "global", align=4, cost=blocks)
    assert plan.ffn_channels == tuple(range(8, 16))
    with pytest.raises(InfeasibleBudget, match=r"at most 0\.5"):
        select_units((shape,), [scores], 0.6, "global", align=4, cost=blocks)


@given(st.integers(1, 6), st.integers(1, 80), st.integers(1, 16), st.sampled_from([0.1, 0.3, 0.5, 0.55, 0.9]))
def test_least_share_stays_where_the_ratio_asks_for_more(groups: int, width: int, align: int, share: float) -> None:
    """The largest ratio that can be met leaves exactly the least: a share rounded up, to whole groups and `align`."""
    shapes = (layer_shape(groups, 2, width), layer_shape(8, 2, 640))
    scores = [scores_of(shape) for shape in shapes]
    with pytest.raises(InfeasibleBudget) as refused:
        select_units(shapes, scores, 0.9999, align=align, min_kept=share)
    most = float(str(refused.value).split("at most ")[1].split(" ")[0])
    assume(0.001 < most < 0.9999)
    plan, _ = select_units(shapes, scores, most - 1e-4, "global", align=align, min_kept=share)
    exact = math.ceil(round(share * width, 6))
    assert len(plan.kv_groups) >= math.ceil(round(share * groups, 6))
    assert len(plan.ffn_channels) >= min(width, -(-exact // align) * align)


def test_heads_that_save_nothing_stay_in_every_layer() -> None:
    """A floor of ratio * groups is 2 of 5; on this machine 5 and 4 heads differ, 4 and 3 do not."""
    shapes = (layer_shape(5, 1, 120),) * 2
    scores = [scores_of(shape) for shape in shapes]
    plans = select_units(shapes, scores, 0.4, "layer", align=8, budget="latency", cost=seconds)
    assert all(len(plan.kv_groups) == 4 for plan in plans)


def test_min_kept_is_reached_and_not_passed() -> None:
    shape = layer_shape(0, 1, 100)
    (plan,) = select_units((shape,), [scores_of(shape)], 0.445, align=1, min_kept=0.55)
    assert len(plan.ffn_channels) == 55  # 0.55 * 100 is a little more than 55 in floating point
    shape = layer_shape(10, 1, 100)
    (plan,) = select_units((shape,), [scores_of(shape)], 0.42, align=8, min_kept=0.55)
    assert len(plan.kv_groups) == 6 and len(plan.ffn_channels) == 56
    with pytest.raises(InfeasibleBudget, match=r"0\.55 of the units and one kv_group and 8 channels"):
        select_units((shape,), [scores_of(shape)], 0.5, align=8, min_kept=0.55)
    (plan,) = select_units(
        (layer_shape(2, 10, 0),), [LayerScores(torch.rand(20))], 0.3, unit="query_head", min_kept=0.55
    )
    assert len(plan.query_heads) == 12


@given(st.permutations(range(32)), st.permutations(range(32)), st.floats(0.02, 0.9))
def test_raw_scores_are_ranked_as_they_are(first: list[int], second: list[int], ratio: float) -> None:
    """Against brute force, where every step costs the same: a layer of small scores goes first."""
    values = [torch.tensor(first).double() * 2, torch.tensor(second).double() * 3 + 1]
    shapes = (layer_shape(1, 1, 32),) * 2
    number = math.ceil(ratio * sum(shape.parameters for shape in shapes) / 30)
    assume(number <= 62)
    scores = [LayerScores(None, v) for v in values]
    plans = select_units(shapes, scores, ratio, "global", align=1, standardise=False)
    table = [(s, i, c) for i, v in enumerate(values) for c, s in enumerate(v.tolist()) if v[c] < v.max()]
    gone = {(layer, channel) for _, layer, channel in sorted(table)[:number]}
    assert gone == {(i, c) for i, plan in enumerate(plans) for c in range(32) if c not in plan.ffn_channels}


def test_a_group_counts_as_the_mean_of_its_heads_beside_channels() -> None:
    shape = layer_shape(2, 2, 8)
    heads = torch.tensor([3.0, 5.0, 9.0, 9.0])  # means 4 and 9
    for channel, group_goes in ((4.5, True), (3.5, False)):
        channels = torch.full((8,), 100.0)
        channels[:7] = channel
        scores = [LayerScores(heads, channels)]
        (plan,) = select_units((shape,), scores, 0.2, "global", align=1, standardise=False)
        assert (len(plan.kv_groups) == 1) is group_goes


@given(cases(), st.sampled_from([2.0**-10, 2.0**10]))
def test_kinds_apart_do_not_see_each_others_scores(case: Case, factor: float) -> None:
    assume(case.removable >= case.target)
    options: Any = {"standardise": False, "joint": False}
    scaled = [LayerScores(scores.heads.double() * factor, scores.channels) for scores in case.scores]
    arguments = (case.ratio, "global", case.unit, case.align, case.protect)
    plain = select_units(case.shapes, case.scores, *arguments, **options)
    assert select_units(case.shapes, scaled, *arguments, **options) == plain


def test_kinds_apart_go_to_the_same_ratio_of_their_own_cost() -> None:
    shapes = (layer_shape(16, 1, 320),) * 4  # heads of 120, channels of 30
    generator = torch.Generator().manual_seed(0)
    scores = [scores_of(shape, generator) for shape in shapes]
    tiny_heads = [LayerScores(each.heads * 1e-6, each.channels) for each in scores]
    plans = select_units(shapes, tiny_heads, 0.3, "global", align=1, standardise=False, joint=False)
    heads, channels = (sum(len(getattr(p, name)) for p in plans) for name in ("query_heads", "ffn_channels"))
    assert 64 - heads == math.floor(0.3 * 4 * (16 * 120 + 7) / 120) == 19
    assert abs((1280 - channels) / 1280 - 0.3) < 0.01
    assert len({len(plan.ffn_channels) for plan in plans}) > 1  # and layers differ
    joint = select_units(shapes, tiny_heads, 0.3, "global", align=1, standardise=False)
    assert sum(len(plan.query_heads) for plan in joint) == 4  # all but the last of each layer went first


def test_one_kind_carries_what_the_other_can_not() -> None:
    shapes = (layer_shape(8, 1, 8), layer_shape(8, 1, 8))
    scores = [scores_of(shape) for shape in shapes]
    plans = select_units(shapes, scores, 0.5, "global", align=8, standardise=False, joint=False)
    assert all(len(plan.ffn_channels) == 8 for plan in plans)
    assert sum(len(plan.kv_groups) for plan in plans) == 5  # 11 * 120 of 2 * 1219 parameters are half
    tied = (layer_shape(8, 1, 80, prunable=False),) * 2
    plans = select_units(
        tied, [scores_of(shape) for shape in tied], 0.5, "global", align=8, standardise=False, joint=False
    )
    assert all(len(plan.kv_groups) == 8 for plan in plans)


@given(
    st.lists(st.floats(0.1, 10), min_size=2, max_size=6),
    st.floats(0.05, 0.85),
    st.integers(20, 60),
)
def test_layer_means_move_the_shares(means: list[float], ratio: float, width: int) -> None:
    """Against a bisection on the common shift, where only channels are cut, one by one."""
    assume(max(means) - min(means) > 1e-3)
    shapes = (layer_shape(1, 1, width),) * len(means)
    within = torch.linspace(-0.05, 0.05, width).double()
    scores = [LayerScores(channels=mean + within) for mean in means]
    number = math.ceil(ratio * sum(shape.parameters for shape in shapes) / 30)
    assume(number < len(means) * (width - 1))
    middle = sum(means) / len(means)
    deviation = (sum((mean - middle) ** 2 for mean in means) / len(means)) ** 0.5

    def counts(shift: float) -> list[int]:
        shares = [ratio - ratio / 4 * (mean - middle) / deviation + shift for mean in means]
        return [math.floor(min(max(share, 0), 1) * width + 0.5) for share in shares]

    low, high = -2.0, 2.0
    for _ in range(60):
        shift = (low + high) / 2
        low, high = (low, shift) if sum(min(c, width - 1) for c in counts(shift)) >= number else (shift, high)
    expected = [min(count, width - 1) for count in counts(high)]
    assume(sum(expected) == number)  # two layers that pass a step at the same shift: either may take it
    plans = select_units(shapes, scores, ratio, "layer_mean", align=1)
    assert [width - len(plan.ffn_channels) for plan in plans] == expected


def test_the_less_important_layer_loses_more_of_each_kind() -> None:
    shapes = (layer_shape(16, 1, 320),) * 3
    generator = torch.Generator().manual_seed(0)
    weights = ((3.0, 1.0), (2.0, 2.0), (1.0, 3.0))  # of heads, of channels
    scores = [
        LayerScores(h * (torch.rand(16, generator=generator) + 9), c * (torch.rand(320, generator=generator) + 9))
        for h, c in weights
    ]
    plans = select_units(shapes, scores, 0.4, "layer_mean", align=1)
    heads, channels = [len(p.query_heads) for p in plans], [len(p.ffn_channels) for p in plans]
    # z is 1.2247, 0, -1.2247: shares of 0.2775, 0.4, 0.5225.
    for head, channel, share in zip(heads, reversed(channels), (0.2775, 0.4, 0.5225), strict=True):
        assert abs((16 - head) / 16 - share) < 1 / 16 and abs((320 - channel) / 320 - share) < 0.01
    again = [LayerScores(each.heads * 7, each.channels * 0.01) for each in scores]
    assert select_units(shapes, again, 0.4, "layer_mean", align=1) == plans


def test_shares_are_rounded_to_the_nearest_step() -> None:
    shapes = (layer_shape(4, 1, 320),) * 3
    for ratio, groups in ((0.3, 1), (0.4, 2), (0.6, 2), (0.65, 3)):  # 1.2, 1.6, 2.4 and 2.6 of 4
        plans = select_units(shapes, [LayerScores(torch.ones(4), torch.ones(320))] * 3, ratio, "layer_mean", align=1)
        assert [4 - len(plan.kv_groups) for plan in plans] == [groups] * 3


def test_standardised_scores_say_nothing_about_layers() -> None:
    """Their means are rounding errors, and rounding errors do not decide."""
    shapes = (layer_shape(4, 1, 320),) * 3
    scores = []
    for _ in shapes:
        values = torch.rand(320).double() ** 5
        scores.append(LayerScores(channels=(values - values.mean()) / values.std()))
    plans = select_units(shapes, scores, 0.3, "layer_mean", align=1)
    widths = [len(plan.ffn_channels) for plan in plans]
    assert max(widths) - min(widths) <= 1


def test_protected_layers_do_not_move_the_mean() -> None:
    shapes = (layer_shape(4, 1, 320),) * 3
    scores = [LayerScores(channels=torch.rand(320) + mean) for mean in (1, 2, 1000)]
    first, second, third = select_units(shapes, scores, 0.2, "layer_mean", align=1, protect=(-1,))
    assert third == LayerPlan.dense(shapes[2])
    assert len(second.ffn_channels) - len(first.ffn_channels) > 20


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"budget": "flops"}, "budget.*parameters, macs, kv_bytes, latency"),
        ({"min_kept": 1}, "min_kept"),
        ({"min_kept": -0.1}, "min_kept"),
        ({"min_kept": math.nan}, "min_kept"),
        ({"min_kept": "0.5"}, "min_kept"),
        ({"min_kept": True}, "min_kept"),
        ({"budget": "kv_bytes", "unit": "query_head"}, "kv_bytes.*kv_group"),
        ({"budget": "latency"}, "measured cost"),
        ({"scope": "layers"}, "scope.*layer, global, layer_mean"),
    ],
    ids=str,
)
def test_bad_new_option_is_named(option: dict[str, Any], named: str) -> None:
    shapes = (layer_shape(),) * 2
    with pytest.raises(BadOption, match=named):
        select_units(shapes, [scores_of(shape) for shape in shapes], **{"ratio": 0.2, **option})


def test_many_channels_are_cut_one_by_one_in_good_time() -> None:
    shapes = (layer_shape(8, 4, 11008),) * 4
    scores = [scores_of(shape) for shape in shapes]
    start = time.process_time()
    select_units(shapes, scores, 0.3, "layer", align=1)
    assert time.process_time() - start < 30  # quadratic, it takes minutes


# uniform_heads --------------------------------------------------------------------------------------------------------


def head_counts(layers: Sequence[LayerPlan]) -> set[tuple[int, int]]:
    return {(len(kept.query_heads), len(kept.kv_groups)) for kept in layers}


@given(cases(alike=True), st.sampled_from(["global", "layer_mean", "layer"]), st.booleans(), st.booleans())
def test_uniform_heads_keeps_as_many_in_every_layer(case: Case, scope: Any, standardise: bool, joint: bool) -> None:
    dense = {(case.shapes[0].query_heads, case.shapes[0].kv_groups)}
    try:
        layers = select_units(
            *(case.shapes, case.scores, case.ratio, scope, case.unit, case.align, case.protect),
            uniform_heads=True,
            standardise=standardise,
            joint=joint,
        )
    except InfeasibleBudget:
        free = len(case.shapes) - len(case.whole)
        heads = case.attention_step(case.shapes[0]) if not case.whole else 0
        rungs = case.shapes[0].kv_groups if case.unit == "kv_group" else case.shapes[0].group_size
        width = case.shapes[0].ffn_channels
        most = free * (heads * (rungs - 1) + 30 * (width - min(case.align, width)))
        assert most < case.target
        return
    assert case.cut(layers) >= case.target
    assert len(head_counts(layers)) == 1
    if case.whole:
        assert head_counts(layers) == dense
    check_layers(case, layers)
    if scope != "layer":  # one step less of the FFN of one layer, or of the heads of all, would break the promise
        spare = case.cut(layers) - case.target
        for shape, kept in zip(case.shapes, layers, strict=True):
            if (width := len(kept.ffn_channels)) < shape.ffn_channels:
                assert spare < 30 * (min(shape.ffn_channels, width + case.align) - width)
        if head_counts(layers) != dense:
            assert spare < case.attention_step(case.shapes[0]) * len(case.shapes)


def test_uniform_heads_stay_where_one_layer_has_to_keep_its_own() -> None:
    """No group may go in the first layer, which is protected, so none goes anywhere; channels do."""
    shapes, channels = [layer_shape(2, 1, 32)] * 3, torch.arange(32.0)
    scores = [LayerScores(torch.tensor([0.0, 0.1]), channels + 9)] * 3
    options: dict[str, Any] = {"standardise": False, "uniform_heads": True}
    layers = select_units(shapes, scores, 0.2, "global", "kv_group", 1, [0], **options)
    assert head_counts(layers) == {(2, 2)}
    assert len(layers[1].ffn_channels) < 32


def test_tied_steps_have_the_mean_score_of_their_own_units_alone() -> None:
    scores = [(1.0, 5.0, 9.0), (3.0, 7.0, 11.0)]
    sequences = [
        RemovalSequence(
            layer, "attention", 4, 0.5, 0.5, tuple(RemovalStep(x, 8.0, (i,), i, i + 1) for i, x in enumerate(each))
        )
        for layer, each in enumerate(scores)
    ]
    assert [step.score for step in tie_sequences(sequences).steps] == [2.0, 6.0, 10.0]


def test_uniform_heads_go_by_their_mean_over_layers() -> None:
    """A cheap group beside a dear one in the other layer: on average both are dear, so channels go instead."""
    shapes, channels = [layer_shape(2, 1, 32)] * 2, torch.arange(32.0)
    heads = (torch.tensor([0.0, 0.1]), torch.tensor([500.0, 900.0]))
    scores = [LayerScores(heads[0], channels), LayerScores(heads[1], 100 + channels)]
    free, tied = (
        select_units(shapes, scores, 0.3, "global", align=8, standardise=False, uniform_heads=uniform)
        for uniform in (False, True)
    )
    assert [len(kept.kv_groups) for kept in free] == [1, 2]
    assert head_counts(tied) == {(2, 2)}
    assert len(tied[0].ffn_channels) < len(tied[1].ffn_channels)


def test_uniform_heads_says_why_a_budget_can_not_be_met() -> None:
    shapes = [layer_shape()] * 2
    scores = [scores_of(shape) for shape in shapes]
    with pytest.raises(InfeasibleBudget, match="uniform_heads"):
        select_units(shapes, scores, 0.45, align=8, protect=[0], uniform_heads=True)
    with pytest.raises(BadOption, match="uniform_heads: expected true or false"):
        check_budget_options(0.2, "layer", "kv_group", 1, (), uniform_heads="yes")


@pytest.mark.parametrize("between", [(), (layer_shape(0, 1, 8),)], ids=["alike", "one without attention"])
def test_layers_with_one_group_lose_the_same_number_of_heads(between: tuple[LayerShape, ...]) -> None:
    """For 228 parameters one head of 70 in both attentions is too little, and two are enough."""
    attentive = layer_shape(1, 4, 0)
    shapes = (attentive, *between, attentive)
    scores = [LayerScores(heads=torch.arange(float(shape.query_heads))) for shape in shapes]
    ratio = 228 / sum(shape.parameters for shape in shapes)
    for scope in ("layer", "global"):
        plans = select_units(shapes, scores, ratio, scope, "query_head", uniform_heads=True)
        assert [plan.query_heads for plan in plans] == [(2, 3) if shape.kv_groups else () for shape in shapes]


def test_tied_sequences_have_the_means_of_their_layers() -> None:
    """The first layer takes two units in two steps, the second in one, so the tied sequence has one step of two."""
    first = RemovalSequence(
        *(0, "attention", 3, 2.0, 3.0),
        steps=(RemovalStep(1.0, 10.0, (2,), 0, 1), RemovalStep(3.0, 10.0, (0,), 1, 2)),
    )
    second = RemovalSequence(1, "attention", 4, 6.0, 8.0, (RemovalStep(5.0, 30.0, (0, 1), 0, 2),))
    tied = tie_sequences([first, second])
    assert (tied.mean_score, tied.mean_magnitude, tied.unit_count) == (4.0, 5.5, 3)
    assert tied.steps == (RemovalStep((1.0 + 3.0 + 2 * 5.0) / 4, 50.0, (), 0, 2),)


# Below ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global", "layer_mean"])
@pytest.mark.parametrize("uniform_heads", [False, True])
def test_below_removes_at_most_the_ratio_and_wastes_no_step(scope: Any, uniform_heads: bool) -> None:
    shapes = (layer_shape(channels=64),) * 3
    scores = [scores_of(shape) for shape in shapes]
    dense = sum(shape.parameters for shape in shapes)

    def removed(ratio: float, rounding: Any) -> float:
        options: dict[str, Any] = {"align": 8, "uniform_heads": uniform_heads, "rounding": rounding}
        plans = select_units(shapes, scores, ratio, scope, **options)
        return 1 - sum(shape.parameters_at(**kept.counts) for shape, kept in zip(shapes, plans, strict=True)) / dense

    for ratio in (0.2, 0.37, 0.6):
        below, above = removed(ratio, "below"), removed(ratio, "above")
        assert below <= ratio <= above
        if scope != "layer_mean":  # whose order depends on the ratio
            assert removed(below * (1 + 1e-9), "below") == pytest.approx(below)
        assert removed(below * (1 - 1e-6), "below") < below
        step = max(shapes[0].channel_cost * 8, 2 * shapes[0].query_head_cost + shapes[0].kv_head_cost) * 3
        assert ratio - below < step / dense
    with pytest.raises(InfeasibleBudget, match="no cut is that small, and rounding below allows no larger one"):
        removed(1e-6, "below")

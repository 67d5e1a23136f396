"""Methods that score heads and channels score experts, and channels of all experts of a layer, by the same formulas."""

from typing import Any

import pytest
import torch

from prunelit.calibration.per_sample_gradients import visit_sample_gradients
from prunelit.callbacks.llm_bip import LLMBIP
from prunelit.callbacks.magnitude import Magnitude
from prunelit.callbacks.random import Random
from prunelit.callbacks.taylor import Taylor
from prunelit.callbacks.wanda_sp import WandaSp
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption
from tests.observed import batches_for
from tests.routed import ROUTED, block_of, count_experts, visits_at
from tests.tiny import tiny, tokens

TRANSPOSED = ("gpt_oss", "llama4_text")
IDS = torch.randint(3, 96, (4, 8), generator=torch.Generator().manual_seed(1))


def score(method: Any, model: Any, batches: Any = ()) -> list[LayerScores]:
    found: list[LayerScores] = method.score(PruningContext(Decoder(model), batches))
    return found


def last_weight(family: str, model: Any, index: int, expert: int) -> torch.Tensor:
    """[H, C]: the columns carry the output of the channels."""
    weight = block_of(family, model.model.layers[index]).experts.down_proj[expert].detach().double()
    return weight.T if family in TRANSPOSED else weight


def check(found: LayerScores, by_channel: list[torch.Tensor], rtol: float = 1e-4) -> None:
    """Experts are sums over their channels, channels sums over the experts, of scores [C] of each expert."""
    assert found.experts is not None and found.expert_channels is not None
    each = torch.stack(by_channel)
    torch.testing.assert_close(found.experts.double(), each.sum(1), rtol=rtol, atol=1e-9)
    torch.testing.assert_close(found.expert_channels.double(), each.sum(0), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("family", ROUTED)
def test_magnitude_sums_column_norms(family: str) -> None:
    model = tiny(family)
    for index, found in enumerate(score(Magnitude(0.3), model)):
        experts = range(count_experts(family, model, index))
        if not experts:
            assert found.experts is None and found.expert_channels is None
            continue
        columns = [last_weight(family, model, index, expert).T for expert in experts]
        check(found, [torch.stack([column.square().sum().sqrt() for column in each]) for each in columns])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ROUTED)
def test_wanda_sp_weights_inputs_by_the_router(family: str, padded: bool) -> None:
    model = tiny(family)
    batches = batches_for(model, padded)
    count = 37 if padded else 40
    for index, found in enumerate(score(WandaSp(0.3), model, batches)):
        experts = range(count_experts(family, model, index))
        visits = visits_at(family, model, index, batches)
        by_channel = []
        for expert in experts:
            inputs = [visit.gate * visit.channels for visit in visits if visit.expert == expert]
            squares = sum((x.square() for x in inputs), torch.zeros(1, dtype=torch.float64)) / count
            weight = last_weight(family, model, index, expert)
            by_channel.append(weight.abs().mean(0) * squares.sqrt())
        if by_channel:
            check(found, by_channel)
        else:
            assert found.experts is None and found.expert_channels is None


def test_random_draws_experts_after_heads_and_channels() -> None:
    model = tiny("qwen2_moe")
    generator = torch.Generator().manual_seed(7)
    for found, shape in zip(score(Random(0.3, seed=7), model), Decoder(model).shape.layers, strict=True):
        counts = (shape.query_heads, shape.ffn_channels, shape.experts, shape.expert_channels)
        names = ("heads", "channels", "experts", "expert_channels")
        for name, count in zip(names, counts, strict=True):
            draws = torch.rand(count, generator=generator) if count else None
            scores = getattr(found, name)
            assert scores is None if draws is None and name != "channels" else torch.equal(scores, draws)


# Taylor, against the gradient of the whole model ------------------------------------------------------------------


def salience(model: Any, form: str) -> dict[str, torch.Tensor]:
    """LLM-Pruner's salience of every weight, by name of the parameter, before it is summed."""

    def gradients(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    each = [gradients(ids[None]) for ids in IDS]
    model.zero_grad()
    found = {}
    for name in each[0]:
        weight = model.get_parameter(name).detach().double()
        mean = sum(gradient[name] for gradient in each) / len(each)
        square = sum(gradient[name].square() for gradient in each) / len(each)
        found[name] = {
            "vector": weight * mean,
            "first": (weight * mean).abs(),
            "second": weight.square() * square,
            "mixed": (weight * mean - weight.square() * square / 2).abs(),
        }[form]
    return found


def sum_slices(values: torch.Tensor, form: str, dims: tuple[int, ...]) -> torch.Tensor:
    """Sum the elements of slices; a slice is what one channel of one expert has in a tensor."""
    total = values.sum(dims)
    return total.abs() if form == "vector" else total


@pytest.mark.parametrize("form", ["vector", "first", "second", "mixed"])
def test_taylor_sums_the_slices_of_an_expert_and_its_row_of_the_router(form: str) -> None:
    model = tiny("mixtral")
    found = score(Taylor(0.3, form=form), model, [{"input_ids": IDS}])[1]
    values = {name.partition("layers.1.mlp.")[2]: value for name, value in salience(model, form).items()}
    gate, up = (sum_slices(half, form, (2,)) for half in values["experts.gate_up_proj"].chunk(2, dim=1))
    by_channel = gate + up + sum_slices(values["experts.down_proj"], form, (1,))  # [E, C]
    row = sum_slices(values["gate.weight"], form, (1,))
    assert found.experts is not None and found.expert_channels is not None
    torch.testing.assert_close(found.experts, by_channel.sum(1) + row, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(found.expert_channels, by_channel.sum(0), rtol=1e-3, atol=1e-12)


def test_taylor_adds_biases_to_their_rows() -> None:
    """gpt-oss: transposed tensors, gates and ups in turn, biases; the router has one too."""
    model = tiny("gpt_oss")
    found = score(Taylor(0.3, form="first"), model, [{"input_ids": IDS}])[1]
    values = {name.partition("layers.1.mlp.")[2]: value for name, value in salience(model, "first").items()}
    rows = values["experts.gate_up_proj"].sum(1) + values["experts.gate_up_proj_bias"]  # [E, 2 C]
    by_channel = rows[:, 0::2] + rows[:, 1::2] + values["experts.down_proj"].sum(2)
    row = values["router.weight"].sum(1) + values["router.bias"]
    assert found.experts is not None and found.expert_channels is not None
    torch.testing.assert_close(found.experts, by_channel.sum(1) + row, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(found.expert_channels, by_channel.sum(0), rtol=1e-3, atol=1e-12)


def test_taylor_is_the_derivative_by_a_switch_on_every_channel() -> None:
    """Of the last linear alone: the sum of its slices over the layer is the derivative by the switches."""
    model = tiny("deepseek_v3")
    name = "model.layers.1.mlp.experts.down_proj"
    dense = model.get_parameter(name).detach()
    switch = torch.ones(dense.shape[0], 1, dense.shape[2], requires_grad=True)
    losses = [
        torch.func.functional_call(
            model, {name: dense * switch}, (), {"input_ids": ids[None], "labels": ids[None]}
        ).loss
        for ids in IDS
    ]
    (derivative,) = torch.autograd.grad(torch.stack(losses).mean(), switch)
    visited: list[torch.Tensor] = []

    def visit(sample: int, slices: Any, p: torch.Tensor) -> None:
        if slices.weight is model.get_parameter(name):
            visited.append(p.sum(1).view(dense.shape[0], dense.shape[2]))

    visit_sample_gradients(Decoder(model), [{"input_ids": IDS}], visit, experts=True)
    assert len(visited) == len(IDS)
    torch.testing.assert_close(torch.stack(visited).mean(0), derivative[:, 0], rtol=1e-3, atol=1e-9)


# Kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Magnitude, WandaSp, Taylor])
@pytest.mark.parametrize(
    ("kinds", "changed"),
    [
        (None, {"experts", "heads", "channels"}),
        (["experts"], {"experts"}),
        (["expert_channels"], {"expert_channels"}),
        (["heads", "channels"], {"heads", "channels"}),
        (["channels", "expert_channels"], {"channels", "expert_channels"}),
    ],
)
def test_kinds_are_what_is_cut(method: Any, kinds: list[str] | None, changed: set[str]) -> None:
    plan = method(0.3, scope="global", kinds=kinds, align=8).plan_model(tiny("qwen2_moe"), [{"input_ids": IDS}])
    pairs = list(zip(plan.layers, plan.model.layers, strict=True))
    fields = {
        "heads": "query_heads",
        "channels": "ffn_channels",
        "experts": "experts",
        "expert_channels": "expert_channels",
    }
    cut = {kind for kind, name in fields.items() if any(len(getattr(k, name)) < getattr(s, name) for k, s in pairs)}
    assert cut == changed


def test_a_method_without_experts_cuts_the_rest_where_it_is_asked() -> None:
    batches = [{"input_ids": tokens(4, 12)}]
    with pytest.raises(BadOption, match=r"llm_bip says nothing of experts.*such as reap, or kinds heads and channels"):
        LLMBIP(0.1, align=8).plan_model(tiny("mixtral"), batches)
    plan = LLMBIP(0.1, align=8, kinds=["heads", "channels"]).plan_model(tiny("qwen2_moe"), batches)
    assert plan.predicted["ratio_of_block_parameters"] >= 0.1
    assert all(len(kept.experts) == shape.experts for kept, shape in zip(plan.layers, plan.model.layers, strict=True))


@pytest.mark.parametrize("kinds", ["experts", [], ["experts", "expert_channels"], ["rows"]])
def test_bad_kinds_are_named(kinds: Any) -> None:
    with pytest.raises(BadOption, match="kinds: expected"):
        Magnitude(0.3, kinds=kinds)


def test_a_sequential_plan_of_a_mixture_is_refused() -> None:
    with pytest.raises(BadOption, match="sequential: expected false for a mixture of experts"):
        WandaSp(0.1, sequential=True).plan_model(tiny("mixtral"), [{"input_ids": tokens()}])

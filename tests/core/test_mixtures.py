"""Mixtures of experts: what the contract of all families does not ask."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import BadPlan
from tests.tiny import MIXTURES, cut, tiny, tokens

GROUPED = ("deepseek_v3", "glm4_moe")


@torch.no_grad()
def compute_logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


def replace_experts(model: Any, index: int, experts: tuple[int, ...]) -> PruningPlan:
    shape = Decoder(model).shape
    layers = [LayerPlan.dense(layer) for layer in shape.layers]
    layers[index] = replace(layers[index], experts=experts)
    return PruningPlan("test", shape, tuple(layers))


@pytest.mark.parametrize("family", MIXTURES)
def test_active_parameters_are_those_of_a_model_with_as_many_experts_as_it_chooses(family: str) -> None:
    model = tiny(family)
    plan = cut(model, "expert_channel")
    surgery.apply(model, plan)
    parameters = active = sum(parameter.numel() for parameter in model.parameters())
    for layer in Decoder(model):
        if (experts := layer.experts) is not None:
            unused = experts.count - experts.per_token
            active -= unused * sum(t.value[0].numel() for t in experts.tensors if t.owner is experts.module)
    assert plan.predicted["active_parameters"] == active < parameters


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_reach_the_router_and_every_expert_that_got_a_token(family: str) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "expert"))
    chosen: dict[int, set[int]] = {}
    for layer in Decoder(model):
        if layer.experts is not None and not layer.experts.names.scales_input:
            layer.experts.module.register_forward_pre_hook(
                lambda module, args, index=layer.index: chosen.setdefault(index, set()).update(
                    args[1].flatten().tolist()
                )
            )
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for layer in Decoder(model):
        if layer.experts is None:
            continue
        assert layer.experts.router.weight.grad.abs().sum() > 0
        per_expert = layer.experts.down.grad.flatten(1).abs().sum(1)
        with_gradient = set(per_expert.nonzero().flatten().tolist())
        if layer.index in chosen:
            assert with_gradient == chosen[layer.index]
        else:
            assert with_gradient


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", [family for family in MIXTURES if family != "llama4_text"])
def test_expert_kernels_agree_after_a_cut(family: str, kernel: str) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "expert"))
    expected = compute_logits(model)
    model.set_experts_implementation(kernel)
    torch.testing.assert_close(compute_logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_outputs_of_experts_are_those_of_the_model(family: str) -> None:
    """The weights that `Experts` hands out compute what the module computes, gate by gate."""
    model = tiny(family)
    layer = next(layer for layer in Decoder(model) if layer.experts is not None)
    experts, x = layer.experts, torch.randn(5, model.config.hidden_size)
    assert experts is not None
    with torch.no_grad():
        for expert in range(experts.count):
            weights = experts.get_weights(expert)
            found = experts.compute_output(weights, experts.compute_channels(weights, x))
            if experts.names.scales_input:
                inputs = torch.zeros(experts.count, *x.shape)
                inputs[expert] = x
                expected = experts.module(inputs.flatten(0, 1)).view(experts.count, *x.shape)[expert]
            else:
                index = torch.full((len(x), 1), expert)
                expected = experts.module(x, index, torch.ones(len(x), 1))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# What a router cannot work with is refused ----------------------------------------------------------------------------


def test_fewer_experts_than_the_router_chooses_are_refused() -> None:
    with pytest.raises(BadPlan, match=r"layer 0: experts: expected at least 2, .*chooses 2 for each token, got 1"):
        replace_experts(tiny("mixtral"), 0, (3,))


@pytest.mark.parametrize("family", GROUPED)
def test_uneven_groups_are_refused(family: str) -> None:
    with pytest.raises(BadPlan, match=r"expected as many in each of the 2 groups of the router, got \[4, 3\]"):
        replace_experts(tiny(family), 1, (0, 1, 2, 3, 4, 5, 6))


@pytest.mark.parametrize("family", GROUPED)
def test_one_expert_of_a_group_is_refused(family: str) -> None:
    with pytest.raises(BadPlan, match="expected at least 4"):
        replace_experts(tiny(family), 1, (0, 4))


def test_groups_too_small_for_the_choice_are_refused() -> None:
    """One group is chosen, and three experts in it: two in each group are too few."""
    with pytest.raises(BadPlan, match="expected at least 6"):
        replace_experts(tiny("glm4_moe", num_experts_per_tok=3), 1, (0, 1, 4, 5))


def test_shared_expert_goes_with_the_mixture_only() -> None:
    model = tiny("qwen2_moe")
    plan = replace_experts(model, 1, tuple(range(6)))
    with pytest.raises(BadPlan, match="one block; expected experts, expert_channels, ffn_channels to remain, or none"):
        plan.replace_layer(1, ffn_channels=[])
    removed = plan.replace_layer(1, experts=[]).layers[1]
    assert removed.mlp_removed and not removed.removed
    fewer = plan.replace_layer(1, experts=[0, 1, 2, 3, 4]).layers[1]
    assert fewer.experts == (0, 1, 2, 3, 4) and fewer.ffn_channels == plan.layers[1].ffn_channels


def test_shared_experts_and_dense_layers_have_widths_of_their_own() -> None:
    """The mixtures come first, and the dense FFN in the last layer is of another width than their shared one."""
    model = tiny("qwen2_moe", mlp_only_layers=[2])
    shape = Decoder(model).shape
    layers = tuple(
        replace(LayerPlan.dense(layer), ffn_channels=tuple(range(32 if layer.experts else 64)))
        for layer in shape.layers
    )
    surgery.apply(model, PruningPlan("test", shape, layers))
    assert (model.config.intermediate_size, model.config.shared_expert_intermediate_size) == (64, 32)
    built = type(model)(model.config)
    assert [parameter.shape for parameter in built.parameters()] == [
        parameter.shape for parameter in model.parameters()
    ]


@pytest.mark.parametrize("kind", ["expert", "expert_channel", "mlp", "mixed"])
def test_plan_reads_back_equal(kind: str) -> None:
    plan = cut(tiny("qwen2_moe"), kind)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan and again.digest == plan.digest

"""Merging experts: channels are matched, weights averaged, groups made as REAM says."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from prunelit.callbacks.reap import REAP
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model.decoder import Decoder
from prunelit.repair.merge_experts import GROUP_SIZE, apply_merge, group_experts, merge_group
from prunelit.runtime.errors import BadOption
from tests.tiny import MIXTURES, tiny, tokens

BATCHES = [{"input_ids": tokens(2, 30)}, {"input_ids": tokens(1, 16)}]


def plan_experts(model: Any, kept: tuple[int, ...]) -> PruningPlan:
    shape = Decoder(model).shape
    layers = [replace(LayerPlan.dense(s), experts=kept) if s.experts else LayerPlan.dense(s) for s in shape.layers]
    return PruningPlan("test", shape, tuple(layers))


@torch.no_grad()
def permute_channels(experts: Any, source: int, target: int, order: torch.Tensor) -> None:
    """Make expert `target` a copy of `source` whose channels are in another order."""
    rows = experts.index_rows()
    for tensor in experts.tensors:
        if tensor.owner is not experts.module:
            continue
        values = tensor.value[source].clone()
        if tensor.axis is not None:
            entries = order
            if tensor.per_channel > 1:
                entries = torch.empty(rows.numel(), dtype=torch.long)
                entries[rows.flatten()] = rows[order].flatten()
            values = values.index_select(tensor.axis - 1, entries)
        tensor.value[target] = values


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "qwen2_moe", "deepseek_v3"])
def test_copies_with_other_orders_of_channels_merge_to_the_expert_itself(family: str) -> None:
    model = tiny(family)
    layer = next(layer for layer in Decoder(model) if layer.experts is not None)
    experts = layer.experts
    order = torch.randperm(experts.channels, generator=torch.Generator().manual_seed(1))
    permute_channels(experts, 0, 1, order)
    x = torch.randn(40, experts.hidden_size)
    with torch.no_grad():
        computed = [experts.compute_channels(experts.get_weights(e), x) for e in range(experts.count)]
        expected = experts.compute_output(experts.get_weights(0), computed[0])
        channels = torch.stack([each.T for each in computed])
        merge_group(experts, [0, 1], torch.ones(experts.count, dtype=torch.float64), channels)
        weights = experts.get_weights(0)
        found = experts.compute_output(weights, experts.compute_channels(weights, x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_shares_are_those_of_the_scores() -> None:
    model = tiny("mixtral")
    experts = Decoder(model).layers[0].experts
    before = experts.down.detach().clone()
    # Activations and weights that match channel by channel: the order stays.
    channels = torch.eye(experts.channels).expand(experts.count, -1, -1) * 100
    with torch.no_grad():
        experts.gate_up.copy_(experts.gate_up[:1].expand_as(experts.gate_up))
        merge_group(experts, [2, 4], torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64), channels)
    torch.testing.assert_close(experts.down[2], before[2] * 0.75 + before[4] * 0.25, rtol=0, atol=1e-6)
    assert torch.equal(experts.down[4], before[4])


def test_centroids_with_larger_scores_choose_first() -> None:
    count = 2 * GROUP_SIZE
    similarity = torch.zeros(count, count)
    scores = torch.ones(count)
    scores[1] = 5.0
    similarity[0] = similarity[1] = torch.linspace(0, 1, count)  # both prefer the experts with the largest numbers
    groups = group_experts(scores, similarity, [0, 1])
    assert groups[1] == [1, *range(count - 1, GROUP_SIZE, -1)]
    assert sorted(groups[0] + groups[1]) == list(range(count)) and groups[0][0] == 0


def test_every_expert_finds_a_group_where_few_remain() -> None:
    groups = group_experts(torch.ones(128), torch.ones(128, 128), [3, 77])
    assert sorted(expert for group in groups for expert in group) == list(range(128))


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "gpt_oss", "llama4_text", "granitemoe"])
def test_merged_models_have_the_shapes_of_the_plan(family: str) -> None:
    model = tiny(family)
    kept = (0, 1, 4, 5) if MIXTURES[family].config.get("n_group") else (1, 4)
    plan = plan_experts(model, kept)
    groups = apply_merge(model, plan, BATCHES)
    assert [layer.shape.experts for layer in Decoder(model)] == [len(each.experts) for each in plan.layers]
    for of_layer, shape in zip(groups, plan.model.layers, strict=True):
        assert sorted(expert for group in of_layer for expert in group) == list(range(shape.experts))
        assert [group[0] for group in of_layer] == (list(kept) if shape.experts else [])
    with torch.no_grad():
        assert model(input_ids=tokens()).logits.isfinite().all()


def test_nothing_to_merge_is_the_cut_alone() -> None:
    model, expected = tiny("qwen3_moe"), tiny("qwen3_moe")
    plan = plan_experts(model, tuple(range(6)))
    apply_merge(model, plan, BATCHES)
    for (name, found), (_, value) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(found, value), name


def test_reap_merges_on_request() -> None:
    dropped, merged = tiny("mixtral"), tiny("mixtral")
    batches = [{"input_ids": tokens(8, 40)}]  # enough that every expert gets a token
    plan = REAP(ratio=0.4).prune(dropped, batches)
    assert REAP(ratio=0.4, repair="merge").prune(merged, batches).layers == plan.layers
    first, second = (model.model.layers[0].mlp.experts.down_proj for model in (dropped, merged))
    assert first.shape == second.shape and not torch.equal(first, second)
    routers = [model.model.layers[0].mlp.gate.weight for model in (dropped, merged)]
    assert torch.equal(*routers)


def test_biases_cannot_hold_experts() -> None:
    with pytest.raises(BadOption, match=r"repair: expected none or least_squares or merge, got 'bias'"):
        REAP(ratio=0.4, repair="bias")

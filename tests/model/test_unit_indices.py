"""Who owns which row: the slices of every unit are what surgery drops with it."""

import pytest
import torch

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, get_weight_out_in
from prunelit.model.unit_indices import collect_expert_slices, collect_layer_slices
from tests.tiny import EXPERT_KINDS, FAMILIES, MIXTURES, cut, keep, tiny, tokens

FFN = 96  # channels of the tiny models


def tiny_layer(family):
    return Decoder(tiny(family)).layers[0]


def rows_gone(model, plan):
    """{linear's path: (indices of rows, of columns) that surgery drops}, found by comparing weights."""
    # Entries of single heads, such as gates, are no slices of the linears that are cut.
    left_out = ("norm", *(name.removesuffix(".weight") for name in Decoder(model).architecture.per_head))
    dense = {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "weight") and not any(name in path for name in left_out)
    }
    before = {path: get_weight_out_in(m).detach().clone() for path, m in dense.items() if m.weight.dim() == 2}
    surgery.apply(model, plan)
    found = {}
    for path, old in before.items():
        new = get_weight_out_in(model.get_submodule(path)).detach()
        for axis, name in ((0, "rows"), (1, "columns")):
            if new.shape[axis] < old.shape[axis]:
                kept = {tuple(line.tolist()) for line in (new if axis == 0 else new.T)}
                lines = old if axis == 0 else old.T
                found[path, name] = {i for i, line in enumerate(lines) if tuple(line.tolist()) not in kept}
    return found


@pytest.mark.parametrize("kind", ["kv_group", "query_head", "channel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_surgery_drops_the_slices_of_the_units_it_cuts(family, kind):
    """For all families and layouts: cut some units of one layer, and see which rows and columns are gone."""
    model = tiny(family)
    decoder = Decoder(model)
    if kind in FAMILIES[family].lacks:
        pytest.skip("a kind of cut that this family lacks")
    shape, layers = decoder.shape, [LayerPlan.dense(layer) for layer in decoder.shape.layers]
    has_units = [layer.ffn_channels if kind == "channel" else layer.kv_groups for layer in shape.layers]
    number = next(index for index in range(1, len(layers)) if has_units[index])
    shape_there = shape.layers[number]
    size = shape_there.group_size
    if kind == "kv_group":
        gone = {"query": {h for h in range(shape_there.query_heads) if h // size == 1}, "kv": {1}}
        layers[number] = keep(shape.layers[number], groups=tuple(g for g in range(shape_there.kv_groups) if g != 1))
    elif kind == "query_head":
        gone = {"query": {h for h in range(shape_there.query_heads) if h % size == 1}}
        layers[number] = keep(shape_there, heads_in_group=tuple(r for r in range(size) if r != 1))
    else:
        gone = {"channel": {0, 7, 95}}
        layers[number] = keep(shape_there, channels=tuple(c for c in range(FFN) if c not in gone["channel"]))
    paths = {module: path for path, module in model.named_modules()}
    expected = {}
    for of in collect_layer_slices(decoder.layers[number]):
        owned = {i for kind, units in of.owners.items() for unit in gone.get(kind, ()) for i in units[unit].tolist()}
        if owned:
            expected[paths[of.linear], "columns" if of.columns else "rows"] = owned
    assert rows_gone(model, PruningPlan("test", shape, tuple(layers))) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_what_is_cut_has_one_owner(family):
    for layer in Decoder(tiny(family)):
        for of in collect_layer_slices(layer):
            owned = torch.cat([units.flatten() for units in of.owners.values()]).tolist()
            assert sorted(owned) == list(range(len(of.arrange_by_slice(of.linear.weight))))


def test_a_gated_query_head_owns_its_query_and_its_gate():
    """Against the gradient: the output of a head depends on no other rows of q."""
    model = tiny("qwen3_5_text")
    layer = next(layer for layer in Decoder(model) if layer.has_attention)
    outputs = []
    layer.output.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    model(input_ids=tokens())
    query, _, _, output, *_ = collect_layer_slices(layer)
    assert query.linear is layer.qkv[0] and output.linear is layer.output
    for owned, columns in zip(query.owners["query"], output.owners["query"], strict=True):
        of_head = outputs[0][..., columns].sum()
        (gradient,) = torch.autograd.grad(of_head, query.weight, retain_graph=True)
        assert gradient.abs().sum(1).nonzero().flatten().tolist() == owned.tolist()


def test_heads_that_can_not_be_pruned_have_no_slices():
    model, whole = tiny("llama"), tiny_layer("olmo2")
    surgery.apply(model, cut(model, "attention"))
    without_attention = Decoder(model).layers[0]
    assert not without_attention.has_attention and not whole.shape.heads_prunable
    for layer in (without_attention, whole):
        assert [list(of.owners) for of in collect_layer_slices(layer)] == [["channel"]] * 3


# Mixtures of experts --------------------------------------------------------------------------------------------------


def arrange_experts(model):
    """For each layer, the slices of its mixture, and their values."""
    return [
        [(of, of.arrange_by_slice(*(p.detach() for p in of.parameters))) for of in collect_expert_slices(layer)]
        for layer in Decoder(model)
    ]


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("family", MIXTURES)
def test_surgery_leaves_the_slices_of_the_experts_and_channels_that_stay(family, kind):
    model = tiny(family)
    plan, dense = cut(model, kind), arrange_experts(model)
    surgery.apply(model, plan)
    assert any(dense)
    for kept, before, after in zip(plan.layers, dense, arrange_experts(model), strict=True):
        units = kept.experts if kind == "expert" else kept.expert_channels
        for (of, values), (_, remaining) in zip(before, after, strict=True):
            gone = [] if kind not in of.owners else [unit for unit in range(len(of.owners[kind])) if unit not in units]
            owned = {int(i) for unit in gone for i in of.owners[kind][unit]}
            assert torch.equal(remaining, values[[i for i in range(len(values)) if i not in owned]])


def test_biases_of_experts_belong_to_the_rows_they_are_added_to():
    """Those of the last linear belong to no channel."""
    layer = tiny_layer("gpt_oss")
    names = {id(parameter): name for name, parameter in layer.experts.block.named_parameters()}
    assert [[names[id(parameter)] for parameter in of.parameters] for of in collect_expert_slices(layer)] == [
        ["experts.gate_up_proj", "experts.gate_up_proj_bias"],
        ["experts.down_proj"],
        ["router.weight", "router.bias"],
    ]
    assert collect_expert_slices(tiny_layer("llama")) == []

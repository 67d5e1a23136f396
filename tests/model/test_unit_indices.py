"""Who owns which row: the slices of every unit are what surgery drops with it."""

import pytest
import torch

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, get_weight_out_in
from prunelit.model.unit_indices import collect_layer_slices
from tests.tiny import FAMILIES, keep, tiny

FFN = 96  # channels of the tiny models


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

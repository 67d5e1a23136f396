"""GreedyOutput: what it cuts, by which threshold, and the two steps against a slow second implementation."""

import copy
import math

import pytest
import torch

from prunelit.calibration import metrics
from prunelit.callbacks.greedy_output import attention_similarity, two_step
from prunelit.callbacks.greedy_output.callback import GreedyOutput
from prunelit.callbacks.magnitude import Magnitude
from prunelit.core.plan import PruningPlan
from prunelit.model.decoder import Decoder, get_weight_out_in
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption
from tests.observed import rows_at
from tests.repair.test_reconstruct import add, output_error, ridge_by_lstsq, text
from tests.tiny import cut, tiny

FOUR = ("llama", "gpt2", "phi3", "gpt_neox")  # GQA; Conv1D and biases; fused; parallel and fused by group


def pruned(model, ratio=0.35, batches=None, **options):
    return GreedyOutput(ratio, **{"align": 8, **options}).prune(model, batches or text())


def alike(model, first, second, factor=3.0):
    """Let two heads attend alike everywhere and, so that second moments would keep them, speak up."""
    with torch.no_grad():
        for layer in Decoder(model):
            for linear in layer.qkv[:2]:
                weight = linear.weight.view(layer.shape.query_heads, layer.head_dim, -1)
                weight[first] = weight[second]
            columns = layer.output.weight.view(-1, layer.shape.query_heads, layer.head_dim)
            columns[:, [first, second]] *= factor


# What goes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOUR)
def test_second_moments_alone_cut_what_adds_least(family):
    dense, batches = tiny(family), text()
    plan = pruned(copy.deepcopy(dense), criterion_heads="second_moment")
    for layer, kept in zip(Decoder(dense), plan.layers, strict=True):
        shares = {}
        for block, linear in (("heads", layer.output), ("channels", layer.down)):
            x = rows_at(dense, linear, batches, "input")
            columns = get_weight_out_in(linear).detach().double()
            shares[block] = torch.stack(
                [(x[:, j, None] * columns[:, j]).square().sum(1).mean() for j in range(x.shape[1])]
            )
        groups = shares["heads"].view(layer.shape.kv_groups, -1).sum(1).argsort()[-len(kept.kv_groups) :]
        assert kept.kv_groups == tuple(sorted(groups.tolist())) and len(groups) < layer.shape.kv_groups
        channels = shares["channels"].argsort()[-len(kept.ffn_channels) :]
        assert kept.ffn_channels == tuple(sorted(channels.tolist()))


@pytest.mark.parametrize("criterion", ["both", "similarity"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_of_two_heads_that_attend_alike_the_earlier_goes_first(scope, criterion):
    dense = tiny("llama-mha")
    alike(dense, 4, 7)
    options = {"ratio": 0.15, "scope": scope}  # one of nine heads in each layer, or four of all 27
    plan = pruned(copy.deepcopy(dense), criterion_heads=criterion, **options)
    gone = [set(range(9)) - set(layer.kv_groups) for layer in plan.layers]
    assert all(4 in of_layer and 7 not in of_layer for of_layer in gone)
    assert sum(map(len, gone)) == (3 if scope == "layer" else 4)
    other = pruned(copy.deepcopy(dense), criterion_heads="second_moment", **options)
    assert all({4, 7} <= set(layer.kv_groups) for layer in other.layers)


def test_above_the_largest_tau_second_moments_decide():
    """Random heads attend alike, so nothing is left to second moments; sharpened, they are far apart."""
    dense, batches = tiny("llama-mha"), text()
    with torch.no_grad():
        for layer in Decoder(dense):
            layer.qkv[0].weight *= 400
    apart = attention_similarity.measure_head_divergence(Decoder(dense), batches)
    assert all(float(found[~torch.eye(9, dtype=torch.bool)].min()) > 0.2 for found in apart)
    plans = {
        name: pruned(copy.deepcopy(dense), criterion_heads=name) for name in ("both", "similarity", "second_moment")
    }
    assert plans["both"].layers == plans["second_moment"].layers != plans["similarity"].layers


@pytest.mark.parametrize("family", ["llama-mha", "gpt2", "phi"])
def test_globally_one_threshold_says_which_heads_go(family):
    dense, batches = tiny(family), text()
    plan = pruned(copy.deepcopy(dense), scope="global", criterion_heads="similarity", ratio=0.3)
    gone = [
        set(range(shape.kv_groups)) - set(kept.kv_groups)
        for shape, kept in zip(plan.model.layers, plan.layers, strict=True)
    ]
    divergences = attention_similarity.measure_head_divergence(Decoder(dense), batches)
    size = plan.model.layers[0].group_size
    matrices = [attention_similarity.compute_group_divergence(matrix, size).tolist() for matrix in divergences]
    values = sorted({value for matrix in matrices for row in matrix for value in row if value})
    taus = [value * (1 + 1e-9) for value in values]
    explained = [
        [set(attention_similarity.find_candidates(matrix, tau)) for matrix in matrices] == gone for tau in taus
    ]
    assert any(explained) and sum(map(len, gone)) > 0
    assert 0.3 <= plan.predicted["ratio_of_block_parameters"] < 0.4
    # The number of heads is that of the ratio, whichever go.
    other = pruned(copy.deepcopy(dense), scope="global", criterion_heads="second_moment", ratio=0.3)
    assert sum(len(layer.kv_groups) for layer in other.layers) == sum(len(layer.kv_groups) for layer in plan.layers)


def test_an_explicit_threshold_says_how_many_heads_go_and_channels_make_up_the_rest():
    dense, batches = tiny("llama-mha"), text()
    alike(dense, 4, 7)
    matrices = [matrix.tolist() for matrix in attention_similarity.measure_head_divergence(Decoder(dense), batches)]
    for tau, ratio in ((1e-5, 0.1), (1e-5, 0.5), (1.0, 0.6)):
        plan = pruned(copy.deepcopy(dense), ratio=ratio, scope="global", tau=tau)
        gone = [set(range(9)) - set(layer.kv_groups) for layer in plan.layers]
        assert gone == [set(attention_similarity.find_candidates(matrix, tau)) for matrix in matrices]
        assert gone == [{4}] * 3 if tau < 1 else [set(range(8))] * 3
        assert ratio <= plan.predicted["ratio_of_block_parameters"] < ratio + 0.02
    # Channels cannot go all the way, nor may heads: what is similar goes first, as far as the ratio asks.
    few = pruned(copy.deepcopy(dense), ratio=0.05, scope="global", tau=1.0)
    assert all(len(layer.ffn_channels) == 96 for layer in few.layers)
    assert 0.05 <= few.predicted["ratio_of_block_parameters"] < 0.08


@pytest.mark.parametrize("criterion", ["both", "similarity"])
def test_uniform_heads_cuts_as_many_heads_as_without_similarity_those_that_attend_alike(criterion):
    dense = tiny("llama-mha")
    alike(dense, 4, 7)
    options = {"ratio": 0.35, "scope": "global", "uniform_heads": True}
    plain = pruned(copy.deepcopy(dense), criterion_heads="second_moment", **options)
    plan = pruned(copy.deepcopy(dense), criterion_heads=criterion, **options)
    assert [len(layer.kv_groups) for layer in plan.layers] == [len(layer.kv_groups) for layer in plain.layers]
    assert len(plan.layers[0].kv_groups) < 9
    assert all(4 not in layer.kv_groups and 7 in layer.kv_groups for layer in plan.layers)
    assert [layer.ffn_channels for layer in plan.layers] == [layer.ffn_channels for layer in plain.layers]


def test_min_kept_and_protect_hold_for_similar_heads_too():
    dense = tiny("llama-mha")
    plan = pruned(dense, ratio=0.25, scope="global", tau=1.0, min_kept=0.5, protect=[1])
    assert [len(layer.kv_groups) for layer in plan.layers] == [5, 9, 5]
    assert len(plan.layers[1].ffn_channels) == 96


def test_min_kept_holds_where_a_threshold_is_sought():
    """All heads of a layer are alike, so nothing but `min_kept` keeps any."""
    dense = tiny("llama-mha")
    with torch.no_grad():
        for layer in Decoder(dense):
            for linear in layer.qkv[:2]:
                weight = linear.weight.view(9, layer.head_dim, -1)
                weight.copy_(weight[:1].expand_as(weight))
    plan = pruned(dense, ratio=0.5, scope="global", min_kept=0.4)
    assert min(len(layer.kv_groups) for layer in plan.layers) == 4


def test_query_heads_compete_within_their_group():
    dense = tiny("llama")
    with torch.no_grad():
        for layer in Decoder(dense):
            weight = layer.qkv[0].weight.view(9, layer.head_dim, -1)
            for head, twin in ((0, 2), (4, 5), (6, 7)):
                weight[head] = weight[twin]
            layer.output.weight.view(-1, 9, layer.head_dim)[:, [0, 4, 6]] *= 5
    plan = pruned(dense, ratio=0.4, unit="query_head")
    assert all(layer.query_heads == (1, 2, 3, 5, 7, 8) for layer in plan.layers)


def test_hidden_probabilities_leave_it_to_second_moments():
    dense = tiny("llama-mha")
    plain = pruned(copy.deepcopy(dense), criterion_heads="second_moment")
    for layer in Decoder(dense):
        layer.attention.register_forward_hook(lambda m, args, output: (output[0], None))
    with pytest.warns(UserWarning, match="probabilities"):
        assert pruned(dense).layers == plain.layers


@pytest.mark.parametrize("moment", ["paper", "code"])
def test_other_forms_of_the_moment_cut_something_else(moment):
    plans = [pruned(tiny("llama"), moment=name, criterion_heads="second_moment") for name in ("empirical", moment)]
    assert plans[0].layers != plans[1].layers and plans[0].predicted == plans[1].predicted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion_heads": "cosine"}, "criterion_heads"),
        ({"moment": "third"}, "moment"),
        ({"repair": "three_step"}, "repair.*two_step"),
        ({"tau": 0.0, "scope": "global"}, "tau.*positive"),
        ({"tau": math.nan, "scope": "global"}, "tau.*positive"),
        ({"tau": True, "scope": "global"}, "tau.*positive"),
        ({"tau": 0.1}, "scope 'global'"),
        ({"tau": 0.1, "scope": "global", "unit": "query_head"}, "unit 'kv_group'"),
        ({"tau": 0.1, "scope": "global", "uniform_heads": True}, "no uniform_heads"),
        ({"tau": 0.1, "scope": "global", "criterion_heads": "second_moment"}, "similarity"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_runs(options, message):
    with pytest.raises(BadOption, match=message):
        GreedyOutput(0.3, **options)


def test_two_step_belongs_to_this_method():
    with pytest.raises(BadOption, match="repair"):
        Magnitude(0.3, repair="two_step")


# Two steps -----------------------------------------------------------------------------------------------------------


def two_steps_slowly(model, widths, batches, ridge, refit_kept):
    """Algorithms 1, 3 and 4 of the paper on two whole models: whole passes, a QR per linear, zeroed columns.

    What goes is chosen by fresh second moments, as many as `widths` says. Returns the masked model and what it keeps.
    """
    dense, masked, kept = copy.deepcopy(model), copy.deepcopy(model), []
    for old, new, wanted in zip(Decoder(dense), Decoder(masked), widths.layers, strict=True):
        kept.append([])
        for block in ("attention", "mlp"):
            pairs = (
                zip(old.qkv, new.qkv, strict=True) if block == "attention" else zip(old.ffn_in, new.ffn_in, strict=True)
            )
            changes = []
            for before, after in pairs:  # level 1
                x = rows_at(masked, after, batches, "input")
                error = rows_at(dense, before, batches) - rows_at(masked, after, batches)
                changes.append((after, ridge_by_lstsq(x, error, ridge, after.bias is not None)))
            for linear, change in changes:
                add(linear, change)
            before, after = (old.output, new.output) if block == "attention" else (old.down, new.down)
            y, x = rows_at(dense, before, batches), rows_at(masked, after, batches, "input")  # level 2
            biased = after.bias is not None
            add(after, ridge_by_lstsq(x, y - rows_at(masked, after, batches), ridge, biased))
            weight = get_weight_out_in(after).detach()
            score = weight.double().square().sum(0) * x.square().mean(0)
            if block == "attention":
                size = old.shape.group_size * old.head_dim
                units = score.view(-1, size).sum(1).argsort()[-len(wanted.kv_groups) :]
                columns = (units[:, None] * size + torch.arange(size)).flatten()
            else:
                size, units = 1, score.argsort()[-len(wanted.ffn_channels) :]
                columns = units
            kept[-1].append(tuple(sorted(units.tolist())))
            gone = torch.ones(len(score), dtype=torch.bool)
            gone[columns] = False
            weight[:, gone] = 0
            if refit_kept:
                error = y - rows_at(masked, after, batches)
                change, offset = ridge_by_lstsq(x[:, columns], error, ridge, biased)
                weight[:, columns] += change.float()
                if biased:
                    after.bias.detach().add_(offset.float())
    return masked, kept


@pytest.mark.parametrize("refit_kept", [False, True])
@pytest.mark.parametrize("family", FOUR)
def test_two_steps_are_those_of_a_slow_second_implementation(family, refit_kept):
    dense, batches = tiny(family), text()
    found = copy.deepcopy(dense)
    plan = pruned(found, repair="two_step", criterion_heads="second_moment", refit_kept=refit_kept)
    expected, kept = two_steps_slowly(dense, plan, batches, 1e-4, refit_kept)
    assert [[layer.kv_groups, layer.ffn_channels] for layer in plan.layers] == kept
    for batch in batches[:2]:
        torch.testing.assert_close(found(**batch).logits, expected(**batch).logits, rtol=5e-3, atol=5e-3)
    plain = GreedyOutput(0.35, align=8, criterion_heads="second_moment").plan(PruningContext(Decoder(dense), batches))
    assert plan.predicted == plain.predicted and plan.layers != plain.layers  # as many, but scored afresh


@pytest.mark.parametrize("family", [*FOUR, "gemma2", "olmo2", "opt", "falcon"])
def test_refitting_what_stays_brings_the_model_closer(family):
    dense, batches = tiny(family), text()
    errors = []
    for options in ({}, {"repair": "two_step"}, {"repair": "two_step", "refit_kept": True}):
        model = copy.deepcopy(dense)
        plan = pruned(model, **options)
        found = metrics.measure_model_size(model)
        assert found == {key: plan.predicted[key] for key in found}
        errors.append(output_error(model, dense, batches))
    assert errors[2] < errors[1] and errors[2] < errors[0]


@pytest.mark.parametrize("family", FOUR)
def test_with_a_dense_prefix_nothing_is_fitted(family):
    """Acceptance: on inputs that are dense, the least-squares weights are the weights."""
    dense = tiny(family)
    model = copy.deepcopy(dense)
    plan = pruned(
        model, repair="two_step", ratio=0.05
    )  # few channels, no heads: attention of layer 0 sees dense inputs
    old, new = Decoder(dense).layers[0], Decoder(model).layers[0]
    for before, after in zip([*old.qkv, old.output], [*new.qkv, new.output], strict=True):
        assert torch.equal(before.weight, after.weight)
    rows = torch.tensor(plan.layers[0].ffn_channels)
    assert len(rows) < 96
    assert torch.equal(get_weight_out_in(old.down)[:, rows], get_weight_out_in(new.down))
    changed = zip(Decoder(dense).layers[1].qkv, Decoder(model).layers[1].qkv, strict=True)
    assert not any(torch.equal(before.weight, after.weight) for before, after in changed)


def test_the_last_layer_is_not_run_once_more_when_it_is_fitted():
    model, batches, calls = tiny("llama"), text(), [0, 0, 0]
    for index, layer in enumerate(Decoder(model)):
        layer.down.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    two_step.reconstruct_two_step(Decoder(model), cut(model, "channel").layers, batches)
    probe = 1  # two tokens, to see what layers return
    on_to_the_next = probe + 3 * len(batches)  # dense targets; fit of the output projection; on to the next layer
    assert calls == [on_to_the_next, on_to_the_next, probe + 2 * len(batches)]


@pytest.mark.parametrize("criterion", ["both", "second_moment"])
@pytest.mark.parametrize("scope", ["layer", "global", "layer_mean"])
def test_a_replayed_plan_gives_the_same_weights(scope, criterion, tmp_path):
    options = {"repair": "two_step", "criterion_heads": criterion, "scope": scope, "align": 8}
    first, second, batches = tiny("llama-mha"), tiny("llama-mha"), text()
    plan = GreedyOutput(0.3, **options).prune(first, batches)
    plan.save(tmp_path / "plan.json")
    replay = GreedyOutput(0.3, plan_file=str(tmp_path / "plan.json"), **options)
    assert replay.needs_text() and replay.prune(second, batches).layers == plan.layers
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "stablelm-qk_layernorm"])
def test_planning_leaves_the_model_dense(family):
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    method = GreedyOutput(0.35, align=8, repair="two_step", refit_kept=True)
    method.plan(PruningContext(Decoder(model), text()))
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_cut_layers_share_the_models_config():
    model = tiny("phi3")
    pruned(model, repair="two_step")
    model.config._attn_implementation = "eager"
    shown = model(**text()[0], output_attentions=True).attentions
    assert [each.shape[1] for each in shown] == [layer.shape.query_heads for layer in Decoder(model)]


@pytest.mark.parametrize("repair", ["two_step", "least_squares"])
def test_a_model_that_lost_blocks_is_pruned_and_repaired(repair):
    from prunelit.model import surgery

    model = tiny("llama")
    surgery.apply(model, cut(model, "mixed"))
    plan = pruned(model, ratio=0.2, repair=repair)
    assert plan.layers[0].attention_removed and plan.layers[2].mlp_removed
    assert torch.isfinite(model(**text()[2]).logits).all()


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"repair": "two_step"}, {"repair": "least_squares"}])
@pytest.mark.parametrize("ratio", [0.01, 0.6])
def test_extreme_ratios_and_a_single_layer(ratio, options):
    model = tiny("llama", num_hidden_layers=1).bfloat16()
    plan = pruned(model, ratio=ratio, **options)
    assert isinstance(plan, PruningPlan) and plan.predicted["ratio_of_block_parameters"] >= ratio
    assert torch.isfinite(model(**text()[0]).logits).all()
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.parameters())

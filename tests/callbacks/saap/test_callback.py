"""SAAP's fusion is the minimum of the loss by which the noises are learned; its search trades within the candidates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelit.callbacks.saap.callback import SAAP, compute_volatility, fuse_importances
from prunelit.callbacks.saap.stability import trade_scores
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption, InfeasibleBudget
from tests.tiny import cut, tiny

IDS = torch.randint(3, 96, (5, 8), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}]


def grains_of(seed=0, layers=3, samples=4, units=6):
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.rand(2, samples, units, generator=generator, dtype=torch.float64) + 0.01 for i in range(layers)}


# Fusion --------------------------------------------------------------------------------------------------------------


def test_learned_noises_converge_to_the_closed_form():
    grains = grains_of()
    grains = {layer: x * torch.tensor([3.0, 0.02])[:, None, None] for layer, x in grains.items()}
    vector, element = torch.cat(list(grains.values()), dim=2)
    log_square = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # log s1^2, log s2^2
    optimizer = torch.optim.Adam([log_square], lr=0.1)
    for _ in range(1500):
        optimizer.zero_grad()
        first, second = log_square.exp()
        loss = vector / (2 * first) + element / (2 * second) + log_square.sum() / 2  # log(s1 s2)
        loss.mean().backward()
        optimizer.step()
    first, second = log_square.detach().exp()
    torch.testing.assert_close(
        torch.stack([first, second]), torch.stack([vector.mean(), element.mean()]), rtol=1e-4, atol=0
    )
    for layer, found in fuse_importances(grains).items():
        learned = grains[layer][0] / (2 * first) + grains[layer][1] / (2 * second)
        torch.testing.assert_close(found, learned, rtol=1e-4, atol=0)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.integers(0, 50))
def test_rescaling_an_importance_does_not_change_what_is_fused(first, second, seed):
    grains = grains_of(seed)
    scaled = {
        layer: x * torch.tensor([first, second], dtype=torch.float64)[:, None, None] for layer, x in grains.items()
    }
    for layer, found in fuse_importances(scaled).items():
        torch.testing.assert_close(found, fuse_importances(grains)[layer], rtol=1e-9, atol=0)
    factor = math.sqrt(first * second)
    for layer, found in fuse_importances(scaled, "geometric").items():  # all by the same factor, so in the same order
        torch.testing.assert_close(found, factor * fuse_importances(grains, "geometric")[layer], rtol=1e-9, atol=0)


def test_geometric_fusion_is_the_order_of_noises_of_each_unit():
    """At s1^2 = Iv and s2^2 = Ie, the minimum for a unit by itself, the loss is 1 + log(Iv Ie) / 2."""
    grains = grains_of(samples=1)
    for layer, found in fuse_importances(grains, "geometric").items():
        loss = 1 + grains[layer].log().sum(0) / 2
        assert found.argsort().tolist() == loss.argsort().tolist()


def test_units_without_importance_stay_at_nothing():
    grains = {0: torch.zeros(2, 3, 4, dtype=torch.float64)}
    for fusion in ("uncertainty", "geometric"):
        assert (fuse_importances(grains, fusion)[0] == 0).all()
    assert (compute_volatility(torch.zeros(3, 4, dtype=torch.float64)) == 0).all() and fuse_importances({}) == {}


# Stability -----------------------------------------------------------------------------------------------------------


def test_volatility_is_the_coefficient_of_variation():
    samples = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 20.0]], dtype=torch.float64)
    deviation = [math.sqrt(((a - (a + b) / 2) ** 2 + (b - (a + b) / 2) ** 2) / 1) for a, b in ((1, 3), (5, 5), (2, 20))]
    expected = [d / m for d, m in zip(deviation, (2, 5, 11), strict=True)]
    assert compute_volatility(samples).tolist() == pytest.approx(expected)
    torch.testing.assert_close(compute_volatility(samples * 1e-9), compute_volatility(samples))
    assert compute_volatility(samples[:1]).tolist() == [0, 0, 0]  # one sample says nothing about stability


def test_candidates_trade_and_the_rest_keep_their_scores():
    key = ("channels", 0)
    scores = {key: torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 9.0])}
    asi = {key: torch.tensor([9.0, 0.1, 0.2, 0.5, 0.9, 0.3])}
    trade_scores(scores, asi, {key: range(6)}, 3)  # candidates: 1, 3, 4, by ASI 4, 3, 1
    assert scores[key].tolist() == [5.0, 3.0, 4.0, 2.0, 1.0, 9.0]


def test_candidates_come_from_all_layers_but_not_from_outside_the_pools():
    a, b = ("channels", 0), ("channels", 2)
    scores = {a: torch.tensor([1.0, 2.0, 3.0]), b: torch.tensor([10.0, 2.5, 11.0])}
    asi = {a: torch.tensor([0.0, 0.1, 9.0]), b: torch.tensor([0.0, 0.5, 0.0])}
    trade_scores(
        scores, asi, {a: [0, 1], b: [1, 0, 2]}, 3
    )  # 1 and 2 of layer 0, 2.5 of layer 2; not the volatile third
    assert scores[a].tolist() == [2.5, 2.0, 3.0] and scores[b].tolist() == [10.0, 1.0, 11.0]
    scores = {a: torch.tensor([1.0, 2.0, 3.0]), b: torch.tensor([10.0, 5.0, 11.0])}
    trade_scores(scores, asi, {a: [0, 1], b: [1, 0, 2]}, 3)  # unit 0 of layer 0 gets more than the third had
    assert scores[a].tolist() == [5.0, 2.0, 8.0] and scores[b].tolist() == [10.0, 1.0, 11.0]


@given(st.integers(0, 1000), st.integers(0, 20))
def test_a_trade_moves_scores_and_invents_none(seed, count):
    generator = torch.Generator().manual_seed(seed)
    keys = [("heads", layer) for layer in range(3)]
    before = {key: torch.rand(6, generator=generator) for key in keys}
    asi = {key: torch.rand(6, generator=generator) for key in keys}
    after = {key: value.clone() for key, value in before.items()}
    trade_scores(after, asi, dict.fromkeys(keys, range(6)), count)
    old, new = torch.cat(list(before.values())), torch.cat(list(after.values()))
    assert sorted(old.tolist()) == sorted(new.tolist())
    lowest = old.argsort()[:count]
    untouched = [unit for unit in range(18) if unit not in lowest]
    assert torch.equal(old[untouched], new[untouched])
    volatile = torch.cat(list(asi.values()))[lowest]
    assert new[lowest][volatile.argsort(descending=True)].tolist() == sorted(old[lowest].tolist())


# The method ----------------------------------------------------------------------------------------------------------


def reference(model, second_order=True):
    """S [N, units] of each kind over all layers of a tiny Llama, sample by sample from autograd."""
    vector, element = ([{"heads": [], "channels": []} for _ in IDS] for _ in range(2))
    for n, ids in enumerate(IDS):
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for layer in model.model.layers:
            a, f = layer.self_attn, layer.mlp
            rows = {"heads": (a.q_proj, a.k_proj, a.v_proj), "channels": (f.gate_proj, f.up_proj)}
            columns = {"heads": a.o_proj, "channels": f.down_proj}
            for kind, units in (("heads", 3), ("channels", 96)):
                coarse, fine = torch.zeros(units), torch.zeros(units)
                for linear in (*rows[kind], columns[kind]):
                    p = (linear.weight * linear.weight.grad).detach()
                    p = p.T if linear is columns[kind] else p
                    coarse += p.sum(1).abs().view(units, -1).sum(1)
                    fine += (p - second_order * p * p / 2).abs().sum(1).view(units, -1).sum(1)
                vector[n][kind].append(coarse)
                element[n][kind].append(fine)
    model.zero_grad()
    fused = {}
    for kind in ("heads", "channels"):
        v, e = (torch.stack([torch.cat(sample[kind]) for sample in grain]) for grain in (vector, element))
        fused[kind] = v / (2 * v.mean()) + e / (2 * e.mean())
    return fused


@pytest.mark.parametrize("second_order", [True, False])
def test_scores_are_the_mean_of_the_fused_importances(second_order):
    model = tiny("llama")
    found = SAAP(0.3, second_order=second_order).score(PruningContext(Decoder(model), BATCHES))
    expected = {kind: fused.mean(0) for kind, fused in reference(model, second_order).items()}
    groups = torch.cat([scores.heads.view(3, 3).sum(1) for scores in found])
    torch.testing.assert_close(groups.float(), expected["heads"], rtol=1e-4, atol=0)
    torch.testing.assert_close(
        torch.cat([scores.channels for scores in found]).float(), expected["channels"], rtol=1e-4, atol=0
    )


def channels_gone(plan):
    return {
        layer * 96 + channel
        for layer, kept in enumerate(plan.layers)
        for channel in set(range(96)) - set(kept.ffn_channels)
    }


def pruned(ratio=0.3, **options):
    return SAAP(ratio, align=1, **options).prune(tiny("llama"), BATCHES)


def test_the_least_important_go_in_one_list_over_all_layers():
    fused = reference(tiny("llama"))["channels"].mean(0)
    gone = channels_gone(pruned(asi="none", min_kept=0))
    assert gone == set(fused.argsort()[: len(gone)].tolist())
    widths = {len(kept.ffn_channels) for kept in pruned(asi="none").layers}
    assert len(widths) > 1


def test_the_unstable_of_the_candidates_go():
    fused = reference(tiny("llama"))["channels"]
    asi = (fused.std(0) / fused.mean(0)).tolist()
    gone = channels_gone(pruned(kappa=1.5, min_kept=0))
    candidates = fused.mean(0).argsort()[: round(1.5 * len(gone))].tolist()
    assert gone == set(sorted(candidates, key=lambda unit: -asi[unit])[: len(gone)])
    assert gone != channels_gone(pruned(asi="none", min_kept=0))


def test_the_literal_reading_cuts_the_largest_asi():
    fused = reference(tiny("llama"))["channels"]
    asi = fused.std(0) / fused.mean(0)
    gone = channels_gone(pruned(asi="literal", min_kept=0))
    assert gone == set(asi.argsort(descending=True)[: len(gone)].tolist())


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("scope", ["global", "layer", "layer_mean"])
def test_kappa_one_is_plain_importance(scope, align):
    plans = [
        SAAP(0.4, scope=scope, align=align, **options).prune(tiny("llama"), BATCHES)
        for options in ({"kappa": 1.0}, {"asi": "none"}, {"kappa": 2.0})
    ]
    assert plans[0].digest == plans[1].digest != plans[2].digest


@pytest.mark.parametrize("scope", ["layer", "layer_mean"])
def test_the_search_stays_inside_a_layer_where_layers_have_their_shares(scope):
    plain, searched = pruned(0.4, scope=scope, asi="none"), pruned(0.4, scope=scope, kappa=1.5)
    assert [kept.widths for kept in plain.layers] == [kept.widths for kept in searched.layers]
    assert plain.digest != searched.digest


def lopsided():
    """Nothing in layer 1 seems to matter, so all of it that may go goes."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    return model


@pytest.mark.parametrize("asi", ["none", "candidate", "literal"])
def test_each_layer_keeps_its_share(asi):
    plan = SAAP(0.4, align=1, asi=asi).prune(lopsided(), BATCHES)
    assert all(len(kept.ffn_channels) >= 20 for kept in plan.layers)  # a fifth of 96, rounded up
    assert asi != "none" or len(plan.layers[1].ffn_channels) == 20
    with pytest.raises(InfeasibleBudget, match="min_kept"):
        SAAP(0.85, align=1, asi=asi).prune(lopsided(), BATCHES)
    plan = SAAP(0.85, align=1, asi=asi, min_kept=0).prune(lopsided(), BATCHES)
    assert plan.predicted["ratio_of_block_parameters"] >= 0.85


@pytest.mark.parametrize("align", [1, 8, 32, 64])
@pytest.mark.parametrize("kappa", [1.1, 2.0])
def test_what_may_not_go_is_no_candidate(kappa, align):
    """Else a layer at its least share would keep its stable units instead of its important ones."""
    scores = SAAP(0.4).score(PruningContext(Decoder(lopsided()), BATCHES))[1].channels
    plan = SAAP(0.4, align=align, kappa=kappa).prune(lopsided(), BATCHES)
    least = -(-20 // align) * align
    assert set(scores.argsort(descending=True)[:least].tolist()) <= set(plan.layers[1].ffn_channels)


@pytest.mark.parametrize("kappa", [1.1, 2.0])
def test_the_most_important_query_head_of_a_group_is_no_candidate(kappa):
    dense = tiny("llama")
    scores = SAAP(0.4, unit="query_head").score(PruningContext(Decoder(dense), BATCHES))
    plan = SAAP(0.4, unit="query_head", align=8, kappa=kappa).prune(dense, BATCHES)
    assert any(len(kept.query_heads) < 9 for kept in plan.layers)
    for of_layer, kept in zip(scores, plan.layers, strict=True):
        best = of_layer.heads.view(3, 3).argmax(1) + torch.arange(3) * 3
        assert set(best.tolist()) <= set(kept.query_heads)


@pytest.mark.parametrize("asi", ["none", "candidate", "literal"])
def test_protected_layers_are_neither_cut_nor_candidates(asi):
    plan = pruned(0.05, kappa=2.0, asi=asi, protect=[0, -1])
    assert len(plan.layers[0].ffn_channels) == len(plan.layers[2].ffn_channels) == 96
    fused = reference(tiny("llama"))["channels"][:, 96:192]
    mean, volatility = fused.mean(0), (fused.std(0) / fused.mean(0)).tolist()
    gone = set(range(96)) - set(plan.layers[1].ffn_channels)
    count = {"none": len(gone), "candidate": 2 * len(gone), "literal": 96}[asi]
    assert count > 0
    candidates = mean.argsort()[:count].tolist()
    assert gone == set(sorted(candidates, key=lambda unit: -volatility[unit])[: len(gone)])


def test_heads_and_channels_go_at_about_the_same_ratio():
    plan = SAAP(0.35, align=1).prune(tiny("llama-mha"), BATCHES)
    heads = sum(len(kept.query_heads) for kept in plan.layers) / 27
    channels = sum(len(kept.ffn_channels) for kept in plan.layers) / 288
    assert heads == pytest.approx(0.65, abs=1 / 27) and channels == pytest.approx(0.65, abs=0.03)


@pytest.mark.parametrize("family", ["llama", "phi3", "falcon"])
@pytest.mark.parametrize("asi", ["candidate", "literal"])
def test_query_heads_one_sample_and_one_layer(family, asi):
    model = tiny(family, num_hidden_layers=1)
    plan = SAAP(0.4, unit="query_head", align=8, asi=asi).prune(model, [{"input_ids": IDS[:1]}])
    assert plan.predicted["ratio_of_block_parameters"] >= 0.4
    assert torch.isfinite(model(input_ids=IDS).logits).all()


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_model_that_lost_blocks_is_cut_in_what_is_left(kind):
    model = tiny("llama")
    surgery.apply(model, cut(model, kind))
    SAAP(0.2, align=8).prune(model, BATCHES)
    assert torch.isfinite(model(input_ids=IDS).logits).all()


@pytest.mark.parametrize(
    ("name", "value"), [("fusion", "sum"), ("asi", "most"), ("kappa", 0.9), ("kappa", math.inf), ("kappa", math.nan)]
)
def test_options_are_checked_before_anything_runs(name, value):
    with pytest.raises(BadOption, match=f"{name}: expected") as error:
        SAAP(0.3, **{name: value})
    assert "\n" not in str(error.value)


def test_defaults_are_global_raw_lists_of_each_kind():
    method = SAAP(0.3)
    assert (method.scope, method.min_kept, method.standardise, method.joint) == ("global", 0.2, False, False)
    assert method.options["scope"] == "global" and method.options["min_kept"] == 0.2
    assert (method.fusion, method.asi, method.kappa, method.second_order) == ("uncertainty", "candidate", 1.1, True)

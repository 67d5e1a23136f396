"""FLAP's scores, its selection over all layers, and its compensation, each against the paper's code written again."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prunelit.calibration import metrics
from prunelit.callbacks.flap import FLAP
from prunelit.callbacks.magnitude import Magnitude
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, get_weight_out_in
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption
from tests.observed import batches_for, rows_at
from tests.tiny import cut, tiny, tokens

METRICS = ("WIFV", "IFV", "WIFN")


def metric_of(metric, linear, inputs):
    """The metric of every channel, one at a time."""
    weight, count = get_weight_out_in(linear).detach().double(), len(inputs)
    found = []
    for j in range(weight.shape[1]):
        values = [x[j].item() for x in inputs]
        mean = sum(values) / count
        variance = sum((value - mean) ** 2 for value in values) / count
        column = [w.item() for w in weight[:, j]]
        found.append(
            {
                "IFV": variance,
                "WIFV": variance * sum(w**2 for w in column),
                "WIFN": sum(abs(w) for w in column) / len(column) * (sum(v**2 for v in values) / count) ** 0.5,
            }[metric]
        )
    return torch.tensor(found, dtype=torch.float64)


def standard(x):
    return (x - x.mean()) / x.std()


def reference(metric, model, batches):
    """(heads [9], channels [96]) of every layer, as the paper's code makes them comparable."""
    found = []
    for layer in Decoder(model):
        attention = metric_of(metric, layer.output, rows_at(model, layer.output, batches, "input")) ** 2
        ffn = metric_of(metric, layer.down, rows_at(model, layer.down, batches, "input"))
        found.append((standard(attention).view(9, -1).mean(1), standard(ffn)))
    return found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_scores_equal_a_token_by_token_implementation(family, metric):
    model = tiny(family)
    batches = batches_for(model)
    expected = reference(metric, model, batches)
    for found, (heads, channels) in zip(
        FLAP(0.3, metric=metric).score(PruningContext(Decoder(model), batches)), expected, strict=True
    ):
        torch.testing.assert_close(found.heads.double(), heads, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.channels.double(), channels, rtol=1e-3, atol=1e-4)


def cumulative_cut(scores, budget, size):
    """AL-AM: one descending list, a KV group weighing its parameters in channels; what is past the threshold goes.

    Returns (layer, kind, unit) of what goes, ascending, until at least `budget` channels' worth is cut.
    """
    weight = (2 + 2 * size) * 8 * 72 / (3 * 72)
    units = []
    for index, (heads, channels) in enumerate(scores):
        units += [(value.item(), index, "group", g) for g, value in enumerate(heads.view(-1, size).mean(1))]
        units += [(value.item(), index, "channel", c) for c, value in enumerate(channels)]
    gone, cut = set(), 0.0
    for _, index, kind, unit in sorted(units):
        if cut >= budget:
            break
        gone.add((index, kind, unit))
        cut += weight if kind == "group" else 1
    return gone, cut


@pytest.mark.parametrize("ratio", [0.05, 0.17, 0.26, 0.4, 0.5])
@pytest.mark.parametrize("family", ["llama", "llama-mha"])
def test_the_selection_is_that_of_a_threshold_on_cumulative_cost(family, ratio):
    model = tiny(family)
    batches, shape = batches_for(model), Decoder(model).shape
    budget = ratio * shape.block_parameters / (3 * 72)
    size = shape.layers[0].group_size
    expected, worth = cumulative_cut(reference("WIFV", model, batches), budget, size)
    plan = FLAP(ratio, align=1, repair="none").prune(model, batches)
    gone = set()
    for index, kept in enumerate(plan.layers):
        gone |= {(index, "group", g) for g in range(shape.layers[index].kv_groups) if g not in kept.kv_groups}
        gone |= {(index, "channel", c) for c in range(96) if c not in kept.ffn_channels}
    # A group that went last may cut more than asked; then channels that went before it come back.
    assert gone <= expected
    assert len(expected - gone) == int(worth - budget)
    assert all(kind == "channel" for _, kind, _ in expected - gone)
    assert {kind for _, kind, _ in gone} == {"group", "channel"} or ratio < 0.4
    assert len({len(kept.ffn_channels) for kept in plan.layers}) > 1


def test_one_layer_alike_is_the_order_within_the_layer():
    """UL-UM: the same numbers from every layer, lowest metric first."""
    model = tiny("llama")
    batches = batches_for(model)
    expected = reference("WIFV", model, batches)
    plan = FLAP(0.4, scope="layer", align=8).prune(model, batches)
    assert len({kept.widths for kept in plan.layers}) == 1
    for kept, (heads, channels) in zip(plan.layers, expected, strict=True):
        groups = heads.view(3, 3).mean(1).argsort(descending=True)[: len(kept.kv_groups)]
        best = channels.argsort(descending=True)[: len(kept.ffn_channels)]
        assert set(kept.kv_groups) == set(groups.tolist()) and set(kept.ffn_channels) == set(best.tolist())


def test_layer_means_are_of_the_metrics_themselves():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3)
    batches = batches_for(model)
    raw = FLAP(0.3, scope="layer_mean").score(PruningContext(Decoder(model), batches))
    inputs = rows_at(model, Decoder(model).layers[1].down, batches, "input")
    expected = metric_of("WIFV", Decoder(model).layers[1].down, inputs)
    torch.testing.assert_close(raw[1].channels.double(), expected, rtol=1e-3, atol=1e-12)
    plan = FLAP(0.3, scope="layer_mean", align=8).prune(model, batches)
    widths = [len(kept.ffn_channels) for kept in plan.layers]
    assert widths[1] > max(widths[0], widths[2])


# Numerics -------------------------------------------------------------------------------------------------------------


def test_means_far_from_zero_do_not_swallow_the_variance():
    model = tiny("gpt2")
    batches = [{"input_ids": tokens(4, 16)[:, start : start + 4]} for start in (0, 4, 8)]
    with torch.no_grad():  # channels that are large and nearly constant
        model.transformer.h[0].mlp.c_fc.bias.add_(1000.0)
    scores = FLAP(0.3, metric="IFV", scope="layer_mean").score(PruningContext(Decoder(model), batches))[0].channels
    inputs = rows_at(model, Decoder(model).layers[0].down, batches, "input")
    expected = inputs.var(0, correction=0)
    assert (inputs.mean(0) ** 2 / expected).min() > 1e5
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=0)


def test_the_batch_split_does_not_matter():
    model, ids = tiny("llama"), tokens(8, 12)
    runs = [
        FLAP(0.3).score(PruningContext(Decoder(model), [{"input_ids": part} for part in ids.split(size)]))
        for size in (8, 3)
    ]
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one.heads, other.heads, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.channels, other.channels, rtol=1e-4, atol=1e-6)


def test_channels_that_are_all_alike_score_zero():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    scores = FLAP(0.3).score(PruningContext(Decoder(model), batches_for(model)))[1]
    assert not scores.heads.any() and not scores.channels.any()
    assert FLAP(0.3, align=8).prune(model, batches_for(model)).predicted["ratio_of_block_parameters"] >= 0.3


@pytest.mark.parametrize("width", [1, 2])
def test_the_fewest_channels_are_made_comparable_too(width):
    """Two values lie half the square root of two, their deviation, from their mean; one value does not deviate."""
    model = tiny("llama", intermediate_size=width)
    batches = batches_for(model)
    for layer, scores in zip(Decoder(model), FLAP(0.3).score(PruningContext(Decoder(model), batches)), strict=True):
        raw = metric_of("WIFV", layer.down, rows_at(model, layer.down, batches, "input")).tolist()
        expected = [0.0] if width == 1 else [math.copysign(0.5**0.5, x - y) for x, y in (raw, raw[::-1])]
        assert scores.channels.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("kind", "lost", "left"), [("attention", "heads", "channels"), ("mlp", "channels", "heads")])
def test_a_model_that_lost_blocks_is_scored_on_what_is_left(kind, lost, left):
    model = tiny("llama")
    surgery.apply(model, cut(model, kind))
    scores = FLAP(0.15).score(PruningContext(Decoder(model), batches_for(model)))
    assert [getattr(score, lost) is None for score in scores] == [True, False, True]
    assert all(getattr(score, left) is not None for score in scores)
    plan = FLAP(0.15, align=8).prune(model, batches_for(model))
    assert metrics.measure_model_size(model)["parameters"] == plan.predicted["parameters"]


# The whole method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.003, 0.3, 0.7])
def test_the_budget_is_kept_with_the_biases_counted(ratio):
    model = tiny("llama")
    dense = metrics.measure_model_size(model)["block_parameters"]
    plan = FLAP(ratio, align=1).prune(model, batches_for(model))
    assert (
        metrics.measure_model_size(model)["block_parameters"]
        == plan.predicted["block_parameters"]
        <= (1 - ratio) * dense
    )
    assert any(kept.mlp_bias for kept in plan.layers)
    assert plan.options["repair"] == "bias" and plan.options["scope"] == "global" and plan.options["metric"] == "WIFV"


def test_compensation_brings_the_logits_closer():
    def shifted():
        model = tiny("gpt2")
        with torch.no_grad():  # a random model's channels have no means to speak of
            for block in model.transformer.h:
                block.mlp.c_fc.bias.add_(torch.randn(96, generator=torch.Generator().manual_seed(3)))
        return model

    batches, errors = batches_for(shifted(), padded=False), {}
    expected = torch.cat([shifted()(**batch).logits for batch in batches])
    for repair in ("none", "bias"):
        model = shifted()
        FLAP(0.3, align=8, repair=repair).prune(model, batches)
        found = torch.cat([model(**batch).logits for batch in batches])
        errors[repair] = (found - expected).square().mean().item()
    assert errors["bias"] < 0.7 * errors["none"]


def test_the_text_is_read_once_for_scores_and_biases():
    model, passes = tiny("llama"), []
    handle = model.model.layers[0].register_forward_hook(lambda *args: passes.append(1))
    FLAP(0.3, align=8).prune(model, batches_for(model))
    handle.remove()
    assert len(passes) == 2  # two batches


def test_a_replayed_plan_gives_the_same_model(tmp_path):
    model, again = tiny("llama"), tiny("llama")
    batches = batches_for(model)
    method = FLAP(0.3, align=8)
    plan = method.prune(model, batches)
    plan.save(tmp_path / "plan.json")
    assert FLAP(0.3, plan_file=str(tmp_path / "plan.json")).prune(again, batches) == plan
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys() and any(name.endswith(".bias") for name in states[0])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-8)
    # The means of another model's scoring are not taken for this one's.
    other, expected = tiny("llama", rms_norm_eps=0.5), tiny("llama", rms_norm_eps=0.5)
    method.score(PruningContext(Decoder(tiny("llama")), batches))
    method.prune(other, batches, given_plan=plan)
    FLAP(0.3).prune(expected, batches, given_plan=plan)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_replayed_without_the_repair_it_adds_no_biases():
    model, again = tiny("llama"), tiny("llama")
    plan = FLAP(0.3, align=8).prune(model, batches_for(model))
    replayed = Magnitude(0.3).prune(again, given_plan=plan)
    assert not any(kept.attention_bias or kept.mlp_bias for kept in replayed.layers)
    assert (
        metrics.measure_model_size(again)["parameters"]
        == replayed.predicted["parameters"]
        < plan.predicted["parameters"]
    )


def test_an_unknown_metric_is_refused_before_anything_runs():
    with pytest.raises(BadOption, match=r"metric.*WIFV, IFV, WIFN"):
        FLAP(0.3, metric="variance")


def rank_plans(rank, folder, runs):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    models = [tiny("llama") for _ in runs]
    plans = [FLAP(0.3, align=8).prune(model, batches) for model, batches in zip(models, runs, strict=True)]
    torch.save(([plan.digest for plan in plans], [model.state_dict() for model in models]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_make_the_model_of_one(tmp_path):
    """A rank without a batch of its own takes part too."""
    first, second = batches_for(tiny("llama"))
    runs = [[first, second, first], [second]]
    mp.spawn(rank_plans, (str(tmp_path), runs), nprocs=2)
    for number, batches in enumerate(runs):
        model = tiny("llama")
        plan = FLAP(0.3, align=8).prune(model, batches)
        for rank in (0, 1):
            digests, states = torch.load(tmp_path / f"{rank}.pt")
            assert digests[number] == plan.digest
            for name, value in model.state_dict().items():
                torch.testing.assert_close(states[number][name], value, rtol=1e-5, atol=1e-7)

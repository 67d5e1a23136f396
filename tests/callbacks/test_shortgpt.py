"""ShortGPT's scores are one minus a mean cosine, and the layers with the lowest go."""

import math
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prunelit.calibration import metrics
from prunelit.callbacks.shortgpt import ShortGPT
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption, InfeasibleBudget
from tests.callbacks.test_llm_bip import batches_for
from tests.tiny import FAMILIES, cut, tiny


def influence_of(model, batches):
    """Token by token, from the hidden states that transformers returns; the last one is read before the final norm."""
    norm = next(m for m in reversed(list(model.base_model.children())) if "Norm" in type(m).__name__)
    layers, before_norm = len(Decoder(model).layers), []
    handle = norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    sums, tokens = [0.0] * layers, 0
    with torch.no_grad():
        for batch in batches:
            states = list(model(**batch, output_hidden_states=True, use_cache=False).hidden_states)
            states[layers] = before_norm.pop()
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            for row, place in real.nonzero().tolist():
                tokens += 1
                for index in range(layers):
                    x, y = (states[index + side][row, place].double().tolist() for side in (0, 1))
                    dot = sum(a * b for a, b in zip(x, y, strict=True))
                    sums[index] += dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    handle.remove()
    return [1 - total / tokens for total in sums]


def gone(plan):
    pairs = zip(plan.layers, plan.model.layers, strict=True)
    assert all(layer.removed or not layer.list_removed_blocks(shape) for layer, shape in pairs)
    return [index for index, layer in enumerate(plan.layers) if layer.removed]


def with_influence(influence, **options):
    """A method whose scores are given."""
    method = ShortGPT(**options)
    method.measure_influence = lambda context: list(influence)
    return method


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2", "cohere", "falcon", "granite"])
def test_influence_is_one_minus_the_mean_cosine(family):
    model = tiny(family)
    batches = batches_for(model, padded=True)
    found = ShortGPT(count=1).measure_influence(PruningContext(Decoder(model), batches))
    assert found == pytest.approx(influence_of(model, batches), rel=1e-5)
    order = sorted(range(3), key=lambda index: found[index])
    assert len(set(found)) == 3
    for count in (1, 2):
        model = tiny(family)
        plan = ShortGPT(count=count).prune(model, batches)
        assert gone(plan) == sorted(order[:count])
        assert plan.calibration["block_influence"] == found


def test_a_bfloat16_model_is_scored_in_float32():
    model = tiny("llama").bfloat16()
    batches = batches_for(model, 4, 4, 16)
    found = ShortGPT(count=1).measure_influence(PruningContext(Decoder(model), batches))
    assert found == pytest.approx(influence_of(model, batches), rel=1e-4)


def test_scores_do_not_depend_on_the_batch_split():
    model = tiny("llama")
    ids = batches_for(model, 1, 8, 12)[0]["input_ids"]
    together = ShortGPT(count=1).measure_influence(PruningContext(Decoder(model), [{"input_ids": ids}]))
    split = ShortGPT(count=1).measure_influence(
        PruningContext(Decoder(model), [{"input_ids": part} for part in ids.split(3)])
    )
    assert together == pytest.approx(split, rel=1e-5)


def test_a_layer_that_changes_nothing_goes_first():
    for idle in range(3):
        model = tiny("llama")
        with torch.no_grad():
            layer = Decoder(model).layers[idle]
            layer.output.weight.zero_()
            layer.down.weight.zero_()
        wanted = model(**batches_for(model)[0]).logits
        plan = ShortGPT(count=1).prune(model, batches_for(model))
        assert gone(plan) == [idle] and abs(plan.calibration["block_influence"][idle]) < 1e-6
        torch.testing.assert_close(model(**batches_for(model)[0]).logits, wanted)


@pytest.mark.parametrize(("ratio", "layers"), [(0.01, 1), (0.2, 1), (0.201, 2), (0.4, 2), (0.5, 3), (0.79, 4)])
def test_a_ratio_takes_the_least_number_of_layers(ratio, layers):
    model = tiny("llama", num_hidden_layers=5)
    plan = with_influence([0.3, 0.1, 0.5, 0.2, 0.4], ratio=ratio).prune(model, batches_for(model))
    assert gone(plan) == sorted([1, 3, 0, 4, 2][:layers])
    assert plan.predicted["ratio_of_block_parameters"] == pytest.approx(layers / 5) and plan.options["ratio"] == ratio


def test_of_equal_layers_the_first_goes_and_protected_ones_stay():
    model = tiny("llama", num_hidden_layers=5)
    plan = with_influence([0.1] * 5, count=2, protect=(0, -4)).prune(model, batches_for(model))
    assert gone(plan) == [2, 3]
    with pytest.raises(BadOption, match=r"protect: expected layer numbers in \[-3, 3\), got 3"):
        ShortGPT(count=1, protect=(3,)).prune(tiny("llama"), batches_for(model))


INFEASIBLE = [{"count": 3}, {"count": 2, "protect": (0, 1)}, {"ratio": 0.9}]


@pytest.mark.parametrize("options", [*INFEASIBLE, {"ratio": 0.7}], ids=str)  # two of three layers are 0.67
def test_what_can_not_be_met_is_refused_and_nothing_is_cut(options, monkeypatch):
    monkeypatch.setattr(ShortGPT, "check_size_target", lambda self, shape: None)  # as of a model without a known shape
    model = tiny("llama")
    with pytest.raises(InfeasibleBudget, match="expected at most"):
        ShortGPT(**options).prune(model, batches_for(model))
    assert metrics.measure_model_size(model) == metrics.measure_model_size(tiny("llama"))


@pytest.mark.parametrize("options", [*INFEASIBLE, {"ratio": 0.4, "protect": (0, 1)}], ids=str)
def test_what_can_not_be_met_is_refused_from_the_shape_alone(options, tmp_path):
    model, plan_file = tiny("llama"), str(tmp_path / "plan.json")
    shape = Decoder(model).shape
    with pytest.raises(InfeasibleBudget, match="expected at most"):
        ShortGPT(**options).check_size_target(shape)
    ShortGPT(**options).check_size_target(None)  # no model is at hand yet
    ShortGPT(count=2).check_size_target(shape)  # all but the last attention
    ShortGPT(count=2, protect=(0,)).check_size_target(shape)
    ShortGPT(count=1).plan_model(model, batches_for(model)).save(plan_file)
    ShortGPT(**options, plan_file=plan_file).check_size_target(shape)  # the plan decides what goes


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_layers_that_lack_a_block_go_whole_and_the_last_attention_stays(kind):
    model = tiny("llama")
    surgery.apply(model, cut(model, kind))  # layers 0 and 2 lack it
    batches = batches_for(model)
    plan = with_influence([0.3, 0.1, 0.2], count=2).prune(model, batches)
    left = Decoder(model).shape.layers
    if kind == "attention":  # layer 1 holds the only one
        assert plan.layers[1].kv_groups and not plan.layers[1].removed and len(left) == 1 and left[0].kv_groups
    else:
        assert plan.layers[1].removed and plan.layers[2].removed and len(left) == 1
    assert torch.isfinite(model(**batches[0]).logits).all()


def test_a_small_layer_that_the_budget_does_not_need_comes_back():
    model = tiny("llama")
    surgery.apply(model, cut(model, "mlp"))  # 0 and 2 hold an attention only, 1 holds more than half of it all
    shape = Decoder(model).shape
    assert shape.layers[0].parameters < 0.5 * shape.block_parameters < shape.layers[1].parameters
    plan = with_influence([0.1, 0.2, 0.3], ratio=0.5).prune(model, batches_for(model))
    assert [layer.removed for layer in plan.layers] == [False, True, False]


@pytest.mark.parametrize("budget", ["macs", "kv_bytes"])
def test_other_budgets(budget):
    model = tiny("llama")
    plan = with_influence([0.3, 0.1, 0.2], ratio=0.34, budget=budget).prune(model, batches_for(model))
    assert gone(plan) == [1, 2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "ratio, count"),
        ({"ratio": 0.2, "count": 1}, "ratio, count"),
        ({"count": -1}, "count"),
        ({"ratio": 0.3, "min_kept": 0.1}, "min_kept"),
        ({"ratio": 0.3, "scope": "layer_mean"}, "scope"),
        ({"ratio": 0.3, "unit": "query_head"}, "unit"),
        ({"ratio": 0.3, "uniform_heads": True}, "uniform_heads"),
        ({"ratio": 0.3, "repair": "bias"}, "repair"),
        ({"ratio": 0.3, "budget": "latency"}, "budget"),
        ({"ratio": 0.3, "seqlen": 1}, "seqlen"),
    ],
)
def test_options_are_checked_before_a_model_is_there(options, named):
    with pytest.raises(BadOption, match=f"^{named}: expected"):
        ShortGPT(**options)


def test_every_family_loses_a_layer():
    with_layers = sorted(family for family, row in FAMILIES.items() if "layer" not in row.lacks)
    for family in random.Random(0).sample(with_layers, 8):
        model = tiny(family)
        layers = len(Decoder(model).layers)
        plan = ShortGPT(count=1).prune(model, batches_for(model, padded=True))
        assert len(gone(plan)) == 1 and len(Decoder(model).layers) == layers - 1


def rank_plans(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for count in (1, 3):  # one batch: the second rank has none of its own
        model = tiny("llama")
        plan = ShortGPT(ratio=0.3).prune(model, batches_for(model, count, padded=True))
        found.append((plan.digest, plan.calibration["block_influence"]))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_the_batches_and_make_the_plan_of_one(tmp_path):
    mp.spawn(rank_plans, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    for count, (digest, influence) in zip((1, 3), first, strict=True):
        model = tiny("llama")
        plan = ShortGPT(ratio=0.3).prune(model, batches_for(model, count, padded=True))
        assert plan.digest == digest and influence == pytest.approx(plan.calibration["block_influence"], rel=1e-12)

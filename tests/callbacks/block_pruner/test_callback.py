"""BlockPruner removes the blocks that a search finds, meets its budget, and says what it did."""

import json
import logging
import math

import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import AutoModelForCausalLM, LlamaConfig

from prunelit.calibration import metrics
from prunelit.callbacks.block_pruner.callback import BlockPruner
from prunelit.core.plan import LayerPlan, ModelShape, PruningPlan
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import BadOption, InfeasibleBudget, SourceNotFound
from tests.callbacks.test_llm_bip import batches_for
from tests.tiny import tiny


def removed(plan):
    attention = [f"A{i}" for i, layer in enumerate(plan.layers) if layer.attention_removed]
    return attention + [f"M{i}" for i, layer in enumerate(plan.layers) if layer.mlp_removed]


def test_twelve_attention_and_five_ffn_blocks_of_llama_2_7b_are_the_papers_ratio():
    """The released removal order on 64 samples, cut at 17 blocks: 21.99% in the paper's table."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = tuple(layer.shape for layer in Decoder(model))
    shape = ModelShape("llama", "Llama-2-7b", 4096, 6_738_415_616, 32000 * 4096, 2, "none", layers)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    attention, ffn = {25, 27, 24, 23, 28, 29, 8, 19, 30, 21, 18, 12}, {7, 22, 27, 21, 11}
    assert (len(attention), len(ffn)) == (12, 5)
    kept = []
    for index, layer in enumerate(layers):
        dense = LayerPlan.dense(layer)
        heads = () if index in attention else dense.query_heads
        kept.append(LayerPlan(heads, heads, () if index in ffn else dense.ffn_channels))
    ratio = PruningPlan("block_pruner", shape, tuple(kept)).predicted["ratio_of_all_parameters"]
    by_hand = (12 * (4 * 4096**2 + 4096) + 5 * (3 * 4096 * 11008 + 4096)) / 6_738_415_616
    assert ratio == pytest.approx(by_hand, rel=1e-12) and f"{ratio:.3%}" == "21.989%"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_one_block_is_the_one_whose_loss_costs_least(family):
    """Brute force with the other measure of perplexity: windows of one length, where both means agree."""
    windows = batches_for(tiny(family), count=1, rows=4)[0]["input_ids"]
    found = {}
    for name in ("A0", "A1", "A2", "M0", "M1", "M2"):
        model = tiny(family)
        shape = Decoder(model).shape
        dense = [LayerPlan.dense(layer) for layer in shape.layers]
        layer = dense[int(name[1])]
        dense[int(name[1])] = (
            LayerPlan((), (), layer.ffn_channels)
            if name[0] == "A"
            else LayerPlan(layer.query_heads, layer.kv_groups, ())
        )
        replay = PruningPlan("test", shape, tuple(dense))
        BlockPruner(count=1).prune(model, given_plan=replay)
        found[name] = metrics.perplexity(model, windows)["perplexity"]
    plan = BlockPruner(count=1).prune(tiny(family), [{"input_ids": part} for part in windows.split(2)])
    assert removed(plan) == plan.calibration["search"]["order"] == [min(found, key=found.get)]
    assert plan.calibration["search"]["perplexity"][1] == pytest.approx(min(found.values()), rel=1e-5)


@pytest.mark.parametrize("search", ["lazy", "greedy", "beam", "swap"])
def test_the_plan_holds_the_order_and_the_work_and_json_keeps_them(search):
    model = tiny("llama")
    plan = BlockPruner(count=3, search=search, beam_width=2, align=8).prune(model, batches_for(model))
    record = plan.calibration["search"]
    assert sorted(record["order"]) == removed(plan) and len(record["perplexity"]) >= 4
    assert all(math.isfinite(value) for value in record["perplexity"])
    assert 0 < record["evaluations"] <= record["evaluations_full"]
    assert 0 < record["layer_runs"] < record["layer_runs_full"]
    assert plan.options["count"] == 3 and plan.options["ratio"] is None and plan.options["search"] == search
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan and again.calibration["search"] == record
    assert metrics.measure_model_size(model)["parameters"] == plan.predicted["parameters"]


@pytest.mark.parametrize("budget", ["parameters", "macs", "kv_bytes"])
def test_a_ratio_counts_what_the_budget_says(budget):
    model = tiny("llama")
    dense = metrics.measure_model_size(model)
    BlockPruner(ratio=0.3, budget=budget).prune(model, batches_for(model))
    cut = metrics.measure_model_size(model)
    if budget == "parameters":
        assert 1 - cut["block_parameters"] / dense["block_parameters"] >= 0.3
    elif budget == "macs":
        head = model.lm_head.weight.numel()
        assert 1 - (cut["macs_per_token"] - head) / (dense["macs_per_token"] - head) >= 0.3
    else:
        assert 1 - cut["kv_bytes_per_token"] / dense["kv_bytes_per_token"] == pytest.approx(1 / 3)


def test_a_small_ratio_takes_one_block_and_a_large_one_is_refused():
    model = tiny("llama")
    assert len(removed(BlockPruner(ratio=1e-6).prune(model, batches_for(model)))) == 1
    model = tiny("llama")
    with pytest.raises(InfeasibleBudget, match=r"ratio 0.99: expected at most 0.8"):
        BlockPruner(ratio=0.99).prune(model, batches_for(model))
    assert metrics.measure_model_size(model) == metrics.measure_model_size(tiny("llama"))


def test_protected_layers_keep_their_blocks_and_one_kind_may_be_all_that_goes():
    model = tiny("llama", num_hidden_layers=4)
    plan = BlockPruner(count=3, protect=(0, -1)).prune(model, batches_for(model))
    assert set(removed(plan)) < {"A1", "A2", "M1", "M2"}
    model = tiny("llama", num_hidden_layers=4)
    plan = BlockPruner(count=4, blocks="mlp").prune(model, batches_for(model))
    assert removed(plan) == ["M0", "M1", "M2", "M3"]


def test_the_same_callback_searches_the_next_model_anew():
    """A cut model goes on being cut; what was recorded for the first plan stays."""
    model, method = tiny("llama"), BlockPruner(count=1)
    first = method.prune(model, batches_for(model))
    before = json.dumps(dict(first.calibration))
    second = method.prune(model, batches_for(model))
    assert json.dumps(dict(first.calibration)) == before
    assert second.calibration["search"]["order"] != first.calibration["search"]["order"]
    left = Decoder(model).shape.layers
    assert sum((layer.kv_groups > 0) + (layer.ffn_channels > 0) for layer in left) == 4


def test_a_journal_is_used_and_kept_in_the_record(tmp_path):
    path = str(tmp_path / "search.jsonl")
    plans = []
    for _ in range(2):
        model = tiny("llama")
        plans.append(BlockPruner(count=2, journal=path).prune(model, batches_for(model)))
    assert plans[0].digest == plans[1].digest and plans[1].options["journal"] == path
    assert plans[1].calibration["search"]["evaluations"] == 0
    assert plans[1].calibration["search"]["recalled"] == plans[0].calibration["search"]["evaluations"]
    model = tiny("gpt2")
    with pytest.raises(BadOption, match="another model"):
        BlockPruner(count=2, journal=path).prune(model, batches_for(model))


def test_the_work_saved_is_said_in_the_log(caplog):
    model = tiny("llama")
    with caplog.at_level(logging.INFO, "prunelit"):
        record = BlockPruner(count=2).prune(model, batches_for(model)).calibration["search"]
    said = next(line for line in caplog.messages if line.startswith("search: removed"))
    assert f"{record['evaluations']} evaluations" in said and " ".join(record["order"]) in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "ratio, count"),
        ({"ratio": 0.2, "count": 3}, "ratio, count"),
        ({"ratio": 1.5}, "ratio"),
        ({"count": 0}, "count"),
        ({"count": 1, "blocks": "heads"}, "blocks"),
        ({"count": 1, "search": "annealing"}, "search"),
        ({"count": 1, "beam_width": 0}, "beam_width"),
        ({"count": 1, "search_windows": 0}, "search_windows"),
        ({"count": 1, "cache_gib": -1}, "cache_gib"),
        ({"count": 1, "cache_gib": math.nan}, "cache_gib"),
        ({"ratio": 0.2, "budget": "latency"}, "budget"),
        ({"ratio": 0.2, "min_kept": 0.5}, "min_kept"),
        ({"ratio": 0.2, "scope": "global"}, "scope"),
        ({"ratio": 0.2, "uniform_heads": True}, "uniform_heads"),
        ({"ratio": 0.2, "repair": "bias"}, "repair"),
        ({"count": 1, "windows": 0}, "windows"),
    ],
)
def test_options_are_checked_before_a_model_is_there(options, named):
    with pytest.raises(BadOption, match=f"^{named}: expected"):
        BlockPruner(**options)


def test_other_options_of_the_base_are_checked_too():
    with pytest.raises(SourceNotFound):
        BlockPruner(count=1, calibration="/nowhere/text.parquet")


def test_the_command_line_offers_the_options_of_the_method_and_of_the_base():
    parser = ArgumentParser()
    parser.add_class_arguments(BlockPruner, None)
    found = parser.parse_args(["--count=5", "--search=beam", "--journal=a.jsonl", "--windows=8", "--protect=[0]"])
    assert (found.ratio, found.count, found.search, found.windows, found.protect) == (None, 5, "beam", 8, [0])


def test_the_search_may_read_less_text_than_there_is():
    model = tiny("llama")
    batches = batches_for(model)
    some = BlockPruner(count=2, search_windows=3).prune(tiny("llama"), batches)
    fewer = [batches[0], {name: x[:1] for name, x in batches[1].items()}]
    assert some.layers == BlockPruner(count=2).prune(tiny("llama"), fewer).layers
    found = some.calibration["search"]["perplexity"]
    assert found == BlockPruner(count=2).prune(tiny("llama"), fewer).calibration["search"]["perplexity"]
    assert found != BlockPruner(count=2).prune(tiny("llama"), batches).calibration["search"]["perplexity"]

"""Masking a block is cutting it, the searches find what brute force finds, and a killed search goes on where it was."""

import copy
import functools
import itertools
import json
import math
import os
import random
import signal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from prunelit.callbacks.block_pruner.evaluator import BlockEvaluator
from prunelit.callbacks.block_pruner.journal import JOURNAL_FORMAT, SetLoss
from prunelit.callbacks.block_pruner.search import search_blocks
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.model.per_layer import shares_keys
from prunelit.planning.block_sets import (
    Block,
    RemovalGoal,
    can_remove_blocks,
    list_blocks,
    plan_without_blocks,
    sum_block_costs,
)
from prunelit.runtime.errors import BadOption, InfeasibleBudget, NoCalibration, NonFinite, OutputNotWritable
from tests.tiny import FAMILIES, VOCABULARY, cut, tiny, tokens


def batches_for(model, count=2, rows=2, length=10, padded=True):
    """Random ids; with `padded` the first batch ends in padding, the second begins with it."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, length + number), generator=generator)
        mask = torch.ones_like(ids)
        if number % 2:
            mask[0, :3] = 0
        else:
            mask[-1, -4:] = 0
        found.append({"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids})
    return found


def blocks(*names):
    return frozenset(Block.parse(name) for name in names)


def names(removed):
    return [str(block) for block in removed]


@torch.no_grad()
def mean_nll(model, batches):
    """The measure in plain loops: mean over sequences of the mean over their predicted tokens, in float64."""
    means = []
    for batch in batches:
        likelihoods = model(**batch, use_cache=False).logits.double().log_softmax(-1)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for row, ids in enumerate(batch["input_ids"].tolist()):
            losses = [
                -likelihoods[row, place, ids[place + 1]].item()
                for place in range(len(ids) - 1)
                if real[row, place] and real[row, place + 1]
            ]
            if losses:
                means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def nll_after_surgery(model, removed, batches):
    other = copy.deepcopy(model)
    shape = Decoder(other).shape
    layers = [
        LayerPlan(
            () if (i, "attention") in removed else tuple(range(layer.query_heads)),
            () if (i, "attention") in removed else tuple(range(layer.kv_groups)),
            () if (i, "mlp") in removed else tuple(range(layer.ffn_channels)),
            mixer=layer.has_mixer and (i, "mixer") not in removed,
        )
        for i, layer in enumerate(shape.layers)
    ]
    surgery.apply(other, PruningPlan("test", shape, tuple(layers)))
    return mean_nll(other, batches)


def brute_force(model, batches, count, kinds=("attention", "mlp")):
    """The paper's search: a fresh copy is cut for every candidate of every step."""
    layers, order = len(Decoder(model).layers), []
    for _ in range(count):
        best = None
        for kind in kinds:
            for index in range(layers):
                block = Block(index, kind)
                if block in order or (
                    kind == "attention" and sum(other.kind == "attention" for other in order) == layers - 1
                ):
                    continue
                value = nll_after_surgery(model, {*order, block}, batches)
                if best is None or value < best[0]:
                    best = value, block
        order.append(best[1])
    return names(order)


# Masking is cutting --------------------------------------------------------------------------------------------------

SETS = (("A1",), ("M0",), ("A2", "M2"), ("A0", "M0", "A1", "M2"), ("X0",), ("A1", "X2"), ("M1", "X1"))


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_of_a_masked_model_is_that_of_the_cut_one(family):
    model = tiny(family)
    batches = batches_for(model)
    before = model(**batches[0]).logits
    evaluator = BlockEvaluator(Decoder(model), batches)
    if shares_keys(Decoder(model).config):
        with pytest.raises(BadOption, match="use the keys and values of earlier ones"):
            evaluator.measure_perplexity()
        return
    dense = evaluator.measure_perplexity()
    assert dense == pytest.approx(math.exp(mean_nll(model, batches)), rel=1e-5)
    shape = Decoder(model).shape
    sets = [each for each in (blocks(*some) for some in SETS) if each <= set(list_blocks(shape))]
    sets = [each for each in sets if can_remove_blocks(shape, each)]
    assert sets
    found = evaluator.evaluate_sets(sets, base=frozenset())
    for removed, value in zip(sets, found, strict=True):
        assert value.exact
        assert value.nll == pytest.approx(nll_after_surgery(model, removed, batches), rel=1e-5)
    evaluator.known_values.clear()  # the kept streams are not spoilt by what ran on them
    assert evaluator.evaluate_sets(sets, base=frozenset()) == found
    assert torch.equal(model(**batches[0]).logits, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "falcon"])
@pytest.mark.parametrize("kind", ["attention", "mlp", "mixed"])
def test_a_model_that_lost_blocks_is_searched_on_what_is_left(family, kind):
    model = tiny(family)
    surgery.apply(model, cut(model, kind))
    batches = batches_for(model)
    shape = Decoder(model).shape
    candidates = list_blocks(shape)
    assert len(candidates) == sum((layer.kv_groups > 0) + (layer.ffn_channels > 0) for layer in shape.layers) < 6
    evaluator = BlockEvaluator(Decoder(model), batches)
    for block in candidates:
        if can_remove_blocks(shape, {block}):
            found = math.log(evaluator.measure_perplexity([block]))
            assert found == pytest.approx(nll_after_surgery(model, {block}, batches), rel=1e-5)


def test_bfloat16_losses_are_summed_in_float32_or_better():
    model = tiny("llama").bfloat16()
    batches = batches_for(model, count=4, rows=4)
    found = BlockEvaluator(Decoder(model), batches).evaluate_sets([blocks("A1")])[0].nll
    assert found == pytest.approx(nll_after_surgery(model, blocks("A1"), batches), rel=1e-5)


def test_sequences_count_alike_whatever_their_length():
    model = tiny("llama")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 3:] = 0
    evaluator = BlockEvaluator(Decoder(model), [{"input_ids": ids, "attention_mask": mask}])
    each = [mean_nll(model, [{"input_ids": ids[:1]}]), mean_nll(model, [{"input_ids": ids[1:, :3]}])]
    assert evaluator.evaluate_sets([frozenset()])[0].nll == pytest.approx(sum(each) / 2, rel=1e-5)
    assert evaluator.sequence_count == 2


@pytest.mark.parametrize("length", [1, 8])
def test_text_without_a_token_to_predict_is_refused(length):
    ids = torch.full((2, length), 5)
    mask = torch.zeros_like(ids)
    mask[:, 0] = 1
    with pytest.raises(NoCalibration, match="two tokens"):
        BlockEvaluator(Decoder(tiny("llama")), [{"input_ids": ids, "attention_mask": mask}])


def test_a_failing_evaluation_leaves_the_blocks_in_their_places():
    model = tiny("opt")
    batches = batches_for(model)
    modules = dict(model.named_modules())
    evaluator = BlockEvaluator(Decoder(model), batches)
    evaluator.on_batch = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluator.measure_perplexity(blocks("A1", "M2"))
    assert dict(model.named_modules()) == modules


# The kept streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "gpt2"])
def test_less_memory_for_streams_changes_no_bit(family):
    model = tiny(family, **({"n_layer": 5} if family == "gpt2" else {}))
    batches = batches_for(model)
    candidates = [frozenset({block}) | blocks("A1") for block in list_blocks(Decoder(model).shape)]
    found, spacings = [], []
    for cache in (2.0, 2.5 * 42 * 72 * 4 / 2**30, 1e-9, 0.0):
        evaluator = BlockEvaluator(Decoder(model), batches, cache_gib=cache)
        found.append(evaluator.evaluate_sets(candidates, base=blocks("A1")))
        spacings.append(evaluator.spacing)
        held = sum(
            stream.numel() * stream.element_size() for _, part in evaluator._cached_streams.values() for stream in part
        )
        assert held <= cache * 2**30
    assert all(values == found[0] for values in found)
    layers = len(Decoder(model).layers)
    assert spacings == [1, math.ceil(layers / 3), layers, layers]


def test_another_base_renews_only_the_streams_it_changes():
    model = tiny("llama", num_hidden_layers=6)
    evaluator = BlockEvaluator(Decoder(model), batches_for(model))
    runs = []
    for base, last in (((), "M5"), (("M4",), "M5"), (("M4", "A1"), "A5"), (("A1", "M3"), "A2")):
        before = evaluator.layer_runs
        evaluator.evaluate_sets([blocks(*base, last)], base=blocks(*base))
        runs.append(evaluator.layer_runs - before)
    # 5 layers below layer 5 and layer 5; layer 4 and 5; layers 1 to 4 and 5; nothing below layer 2, and 2 to 5
    assert runs == [6, 2, 5, 4]


def test_layer_runs_are_what_really_ran():
    model = tiny("llama", num_hidden_layers=5)
    batches = batches_for(model, count=3)
    ran = []
    for layer in Decoder(model):  # an attention runs in every layer run, as only FFNs go
        layer.attention.register_forward_hook(lambda *_: ran.append(1))
    evaluator = BlockEvaluator(Decoder(model), batches)
    evaluator.measure_perplexity(blocks("M1", "M3"))
    ran.clear()  # of the probe for tuples, and of what was measured before the search
    record = search_blocks(evaluator, RemovalGoal(count=3), "mlp", "greedy").record
    assert record["layer_runs"] == pytest.approx(len(ran) / 3, abs=0.01)
    assert record["layer_runs_full"] == 5 * (1 + 5 + 4 + 3) and record["evaluations_full"] == 1 + 5 + 4 + 3


def test_a_layer_without_blocks_is_no_layer_run():
    model = tiny("llama")
    evaluator = BlockEvaluator(Decoder(model), batches_for(model), cache_gib=0)
    for removed, expected in ((("A1",), 3), (("A1", "M1"), 2), (("A1", "M1", "M2", "A2"), 1)):
        before = evaluator.layer_runs
        evaluator.measure_perplexity(blocks(*removed))
        assert evaluator.layer_runs - before == expected == evaluator.count_layers(blocks(*removed))


# The searches on real models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Six layers trained for a moment on a chain of tokens: blocks differ in worth, as in a real model."""
    model = tiny("llama", num_hidden_layers=6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        follows = torch.randint(3, VOCABULARY, (VOCABULARY, 3))
        ids = torch.full((512, 16), 5)
        for place in range(1, 16):
            ids[:, place] = follows[ids[:, place - 1], torch.randint(0, 3, (512,))]
            ids[:, place] = torch.where(torch.rand(512) < 0.1, torch.randint(3, VOCABULARY, (512,)), ids[:, place])
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for part in ids[:480].split(12):
            model(input_ids=part, labels=part).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert mean_nll(model, [{"input_ids": ids[480:]}]) < 3.5
    return model, [{"input_ids": part} for part in ids[480:].split(16)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "cohere", "olmo2"])
@pytest.mark.parametrize("method", ["lazy", "greedy"])
def test_the_removal_order_is_that_of_brute_force(family, method):
    model = tiny(family)
    batches = batches_for(model)
    found = search_blocks(BlockEvaluator(Decoder(model), batches), RemovalGoal(count=3), method=method)
    assert names(found.removed) == found.record["order"] == brute_force(model, batches, 3)
    for step in range(4):
        expected = nll_after_surgery(model, found.removed[:step], batches)
        assert found.nll[step] == pytest.approx(expected, rel=1e-5)
        assert found.record["perplexity"][step] == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_one_kind_of_block(kind):
    model = tiny("llama")
    batches = batches_for(model)
    found = search_blocks(BlockEvaluator(Decoder(model), batches), RemovalGoal(count=2), kind)
    assert names(found.removed) == brute_force(model, batches, 2, (kind,))


@pytest.mark.slow
def test_lazy_removes_in_the_order_of_the_full_search_on_a_trained_model(trained):
    model, batches = trained
    full, lazy = (
        search_blocks(BlockEvaluator(Decoder(model), batches), RemovalGoal(count=5), method=method)
        for method in ("greedy", "lazy")
    )
    assert lazy.removed == full.removed and lazy.nll == full.nll
    assert names(full.removed[:2]) == brute_force(model, batches, 2)
    assert lazy.record["evaluations"] < lazy.record["evaluations_full"] == full.record["evaluations_full"]
    assert lazy.record["layer_runs"] < 0.6 * lazy.record["layer_runs_full"]


@pytest.mark.parametrize("family", ["falcon", "gpt2", "opt", "phi3", "qwen2"])
def test_lazy_removes_in_the_order_of_the_full_search_on_random_models(family):
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = tiny(family, **{layers: 6})
    batches = batches_for(model, 1)
    full, lazy = (
        search_blocks(BlockEvaluator(Decoder(model), batches), RemovalGoal(count=4), method=method)
        for method in ("greedy", "lazy")
    )
    assert lazy.removed == full.removed and lazy.nll == full.nll


def test_greedy_stops_evaluations_that_can_not_win_and_misses_nothing(trained):
    model, batches = trained
    batches = [{"input_ids": row} for row in batches[0]["input_ids"][:6].split(1)]
    evaluator = BlockEvaluator(Decoder(model), batches)
    found = search_blocks(evaluator, RemovalGoal(count=3), method="greedy")
    stopped = {removed: value for removed, value in evaluator.known_values.items() if not value.exact}
    assert stopped
    for removed, bound in stopped.items():
        assert found.nll[len(removed)] < bound.nll < nll_after_surgery(model, removed, batches)
    patient = BlockEvaluator(Decoder(model), batches)
    for step in range(3):
        base = frozenset(found.removed[:step])
        sets = [base | {block} for block in list_blocks(Decoder(model).shape) if block not in base]
        values = patient.evaluate_sets(sets, base)
        best = min(range(len(sets)), key=lambda place: values[place].nll)
        assert sets[best] == frozenset(found.removed[: step + 1]) and values[best].nll == found.nll[step + 1]
    assert evaluator.layer_runs < patient.layer_runs


@pytest.mark.parametrize("method", ["greedy", "lazy", "beam", "swap"])
def test_of_equal_candidates_the_first_goes(method):
    """Attention first, then FFNs, each by layer; blocks that add nothing are equal to the last bit."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in Decoder(model):
            layer.output.weight.zero_()
            layer.down.weight.zero_()
    evaluator = BlockEvaluator(Decoder(model), batches_for(model))
    found = search_blocks(evaluator, RemovalGoal(count=4), method=method, beam_width=1)
    assert names(found.removed) == ["A0", "A1", "M0", "M1"] and len(set(found.nll)) == 1


# The searches on made landscapes -------------------------------------------------------------------------------------


@functools.cache
def decoder_of(layers):
    return Decoder(tiny("llama", num_hidden_layers=layers))


class Landscape(BlockEvaluator):
    """An evaluator whose values come from a function of the removed blocks; with `runs`, its model runs as well."""

    def __init__(self, value, layers=6, runs=False):
        super().__init__(decoder_of(layers), [{"input_ids": tokens(1, 2)}])
        self.value, self.runs = value, runs

    def _evaluate(self, removed, base, limit):
        if self.runs:
            super()._evaluate(removed, base, math.inf)
        return SetLoss(self.value(removed))


def landscape(seed, layers, interaction, noise=0.0):
    """Losses of single blocks, of pairs, and noise per set: monotone where noise is 0."""
    chance = random.Random(seed)
    single = {Block(i, kind): chance.expovariate(8) for kind in ("attention", "mlp") for i in range(layers)}
    pair = {frozenset(two): chance.expovariate(1) * interaction for two in itertools.combinations(single, 2)}

    def value(removed):
        loss = 3 + sum(single[b] for b in removed) + sum(pair[frozenset(p)] for p in itertools.combinations(removed, 2))
        return loss + noise * random.Random(f"{seed} {sorted(removed)}").random()

    return value


def greedy_on(value, layers, count):
    order = []
    for _ in range(count):
        left = [Block(i, k) for k in ("attention", "mlp") for i in range(layers) if (i, k) not in order]
        attention = [block for block in left if block.kind == "attention"]
        left = [block for block in left if len(attention) > 1 or block.kind == "mlp"]
        order.append(min(left, key=lambda block: value(frozenset({*order, block}))))
    return order


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 0.1, 1.0]), st.integers(1, 9))
def test_lazy_is_exact_where_no_removal_makes_up_for_another(seed, interaction, count):
    value = landscape(seed, 5, interaction)
    found = search_blocks(Landscape(value, 5), RemovalGoal(count=count))
    assert found.removed == greedy_on(value, 5, count)
    # Skipped ones are above the best of their step, by values that only rose since.
    assert found.nll[-1] == pytest.approx(value(frozenset(found.removed)))


def test_the_margin_follows_what_removals_make_up_for():
    same = 0
    for seed in range(30):
        value = landscape(seed, 6, 0.02, noise=0.05)
        same += search_blocks(Landscape(value, 6), RemovalGoal(count=6)).removed == greedy_on(value, 6, 6)
    assert same >= 28


def table(values, other):
    """Losses of some sets, by the names of their blocks in order; all others have the same."""
    return lambda removed: values.get(" ".join(sorted(names(removed))), other)


def test_a_candidate_within_the_margin_is_evaluated_and_may_win():
    """Eight candidates are evaluated first; M4 was 0.001 worse than the best of them, and is 0.001 better now."""
    first = ["A1", "A2", "A3", "A4", "M0", "M1", "M2", "M3"]
    values = {"": 3, "A0": 3.1, "M4": 3.501, "A0 M4": 3.499}
    values |= dict.fromkeys(first, 3.2) | {f"A0 {name}": 3.5 for name in first}
    evaluator = Landscape(table(values, other=9.0), 6)
    found = search_blocks(evaluator, RemovalGoal(count=2))
    assert names(found.removed) == ["A0", "M4"]
    assert found.record["evaluations"] == 1 + 12 + 9  # A5 and M5 were far off


def test_a_set_that_was_far_off_is_not_asked_for_on_another_way_to_it():
    """A0 and A1 are the best alone and bad together; the beam comes to both of them from either."""
    singles = [f"{kind}{index}" for kind in "AM" for index in range(6)]
    values = {"": 3, "A0": 3.1, "A1": 3.11, "A0 A1": 9} | dict.fromkeys(singles[2:], 3.2)
    evaluator = Landscape(table(values, other=3.3), 6)
    record = search_blocks(evaluator, RemovalGoal(count=2), method="beam", beam_width=2).record
    assert record["recalled"] == 0 and record["evaluations"] == 1 + 12 + 11 + 10


def test_thirty_layers_and_four_blocks_take_a_fourth_of_the_layer_runs():
    value = landscape(0, 30, 0.01)
    evaluator = Landscape(value, 30, runs=True)
    found = search_blocks(evaluator, RemovalGoal(count=4))
    assert found.removed == greedy_on(value, 30, 4)
    record = found.record
    assert record["evaluations_full"] == 1 + 60 + 59 + 58 + 57 and record["recalled"] == 0
    assert record["evaluations"] <= 100 and record["layer_runs_full"] >= 4 * record["layer_runs"]


def test_no_set_is_evaluated_twice():
    for method in ("lazy", "beam", "swap"):
        asked = []
        value = landscape(1, 5, 0.1)

        def note(removed, asked=asked, value=value):
            asked.append(removed)
            return value(removed)

        search_blocks(Landscape(note, 5), RemovalGoal(count=4), method=method)
        assert len(asked) == len(set(asked))


def test_a_wide_beam_finds_the_best_set_and_a_beam_of_one_is_the_greedy_search():
    better = 0
    for seed in range(6):
        value = landscape(seed, 4, 0.3)
        greedy = search_blocks(Landscape(value, 4), RemovalGoal(count=3))
        narrow = search_blocks(Landscape(value, 4), RemovalGoal(count=3), method="beam", beam_width=1)
        assert (narrow.removed, narrow.nll) == (greedy.removed, greedy.nll)
        wide = search_blocks(Landscape(value, 4), RemovalGoal(count=3), method="beam", beam_width=40)
        everything = [Block(i, kind) for kind in ("attention", "mlp") for i in range(4)]
        best = min(itertools.combinations(everything, 3), key=lambda three: value(frozenset(three)))
        assert set(wide.removed) == set(best)
        assert wide.nll[-1] == pytest.approx(value(frozenset(best)))
        better += wide.nll[-1] < greedy.nll[-1]
    assert better


def test_swap_ends_where_no_exchange_helps():
    better = 0
    for seed in range(8):
        value = landscape(seed, 5, 0.3)
        greedy, swap = (
            search_blocks(Landscape(value, 5), RemovalGoal(count=4), method=method) for method in ("lazy", "swap")
        )
        removed = set(swap.removed)
        for out in removed:
            for block in list_blocks(decoder_of(5).shape):
                assert block in removed or value(frozenset(removed - {out} | {block})) >= swap.nll[-1]
        assert swap.nll[-1] <= greedy.nll[-1] and len(removed) == 4
        better += swap.nll[-1] < greedy.nll[-1]
    assert better


# What may go, and how much -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_the_plan(family):
    shape = Decoder(tiny(family)).shape
    everything = list_blocks(shape)
    attentions = {block for block in everything if block.kind == "attention"}
    is_restricted = any(layer.fixed or not layer.attention_removable for layer in shape.layers)
    if not any(layer.has_mixer or not layer.ffn_channels for layer in shape.layers):
        assert names(everything) == [f"{kind}{index}" for kind in "AM" for index in range(len(shape.layers))]
    dense = PruningPlan("test", shape, tuple(plan_without_blocks(shape, ()))).predicted
    chance = random.Random(0)
    for size in range(1, len(everything)):
        removed = set(chance.sample(everything, size))
        if not can_remove_blocks(shape, removed):
            assert is_restricted or (attentions and attentions <= removed)
            continue
        left = PruningPlan("test", shape, tuple(plan_without_blocks(shape, removed))).predicted
        assert sum_block_costs(shape, removed) == dense["parameters"] - left["parameters"]
        assert sum_block_costs(shape, removed, "macs") == dense["macs_per_token"] - left["macs_per_token"]
        kv = dense["kv_bytes_per_token"] - left["kv_bytes_per_token"]
        assert sum_block_costs(shape, removed, "kv_bytes") * shape.bytes_per_element == kv


@pytest.mark.parametrize("budget", ["parameters", "macs", "kv_bytes"])
@pytest.mark.parametrize("method", ["lazy", "greedy", "beam", "swap"])
@pytest.mark.parametrize("ratio", [0.001, 0.2, 0.45])
def test_a_ratio_is_met_and_nothing_can_be_given_back(ratio, method, budget):
    for seed in range(3):
        evaluator = Landscape(landscape(seed, 5, 0.05), 5)
        shape = evaluator.decoder.shape
        found = search_blocks(evaluator, RemovalGoal(ratio=ratio, budget=budget), method=method)
        whole = sum_block_costs(shape, list_blocks(shape), budget)
        assert sum_block_costs(shape, found.removed, budget) >= ratio * whole
        for block in found.removed:
            assert sum_block_costs(shape, set(found.removed) - {block}, budget) < ratio * whole


def test_given_back_is_the_block_whose_return_helps_most():
    """Two attentions and an FFN are more than the ratio needs; the FFN was the last to go, an attention comes back."""
    loss = {"A0": 0.2, "A1": 0.1, "A2": 5, "M0": 0.3, "M1": 5, "M2": 5}
    evaluator = Landscape(lambda removed: 3 + sum(loss[str(block)] for block in removed), 3)
    found = search_blocks(evaluator, RemovalGoal(ratio=0.3))
    assert names(found.removed) == ["A1", "M0"]
    assert found.record["perplexity"] == pytest.approx([math.exp(3 + x) for x in (0, 0.1, 0.3, 0.6, 0.4)])


def test_after_an_exchange_for_a_larger_block_what_is_spare_comes_back():
    """Two attentions are needed; A1 with M0 loses less than with A0, and then M0 is enough alone."""
    single = {"A0": 0.10, "A1": 0.105, "M0": 0.11}
    pair = {("A0", "A1"): 0.15, ("A1", "M0"): 0.12}

    def value(removed):
        found = sorted(names(removed))
        return 3 + pair.get(tuple(found), sum(single.get(name, 5) for name in found))

    found = search_blocks(Landscape(value, 3), RemovalGoal(ratio=0.19), method="swap")
    assert names(found.removed) == ["M0"]


def test_the_last_attention_stays():
    evaluator = Landscape(lambda removed: 3.0, 3)
    assert names(search_blocks(evaluator, RemovalGoal(count=5)).removed) == ["A0", "A1", "M0", "M1", "M2"]
    assert names(search_blocks(evaluator, RemovalGoal(count=2), "attention").removed) == ["A0", "A1"]
    with pytest.raises(InfeasibleBudget, match=r"count 3: expected at most 2"):
        search_blocks(evaluator, RemovalGoal(count=3), "attention")
    assert evaluator.decoder.shape.layers[0].kv_groups  # nothing is cut by a search


@pytest.mark.parametrize(
    ("goal", "kinds", "protect"),
    [
        (RemovalGoal(count=6), "mix", ()),
        (RemovalGoal(count=4), "mlp", ()),
        (RemovalGoal(count=3), "mix", (0, -1)),
        (RemovalGoal(ratio=0.999), "mix", ()),
        (RemovalGoal(ratio=0.7), "mlp", ()),
        (RemovalGoal(ratio=0.5), "mix", (0, 2)),
        (RemovalGoal(ratio=0.01, budget="kv_bytes"), "mlp", ()),
        (RemovalGoal(count=1), "mix", (0, 1, 2)),
    ],
)
def test_what_can_not_be_met_is_refused_before_anything_runs(goal, kinds, protect):
    evaluator = Landscape(lambda removed: 3.0, 3)
    with pytest.raises(InfeasibleBudget, match="expected at most"):
        search_blocks(evaluator, goal, kinds, protect=protect)
    assert evaluator.evaluations == 0


def test_a_model_of_one_layer_keeps_its_attention():
    model = tiny("llama", num_hidden_layers=1)
    evaluator = BlockEvaluator(Decoder(model), batches_for(model))
    assert names(search_blocks(evaluator, RemovalGoal(count=1)).removed) == ["M0"]
    with pytest.raises(InfeasibleBudget):
        search_blocks(evaluator, RemovalGoal(count=2))


def test_protected_layers_are_left_alone():
    evaluator = Landscape(landscape(0, 5, 0.1), 5)
    found = search_blocks(evaluator, RemovalGoal(count=6), protect=(0, -1))
    assert {block.layer for block in found.removed} == {1, 2, 3}
    with pytest.raises(BadOption, match=r"protect: expected layer numbers in \[-5, 5\), got 5"):
        search_blocks(evaluator, RemovalGoal(count=1), protect=(5,))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "ratio, count"),
        ({"ratio": 0.2, "count": 2}, "ratio, count"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": 0}, "ratio"),
        ({"ratio": True}, "ratio"),
        ({"count": 0}, "count"),
        ({"count": 2.0}, "count"),
        ({"count": True}, "count"),
        ({"ratio": 0.2, "budget": "latency"}, "budget"),
    ],
)
def test_a_goal_that_makes_no_sense_is_refused(options, named):
    with pytest.raises(BadOption, match=f"^{named}: expected"):
        RemovalGoal(**options)


def test_values_that_are_no_numbers_stop_the_search():
    with pytest.raises(NonFinite, match="whole model"):
        search_blocks(Landscape(lambda removed: math.inf, 3), RemovalGoal(count=1))
    with pytest.raises(NonFinite, match="without"):
        search_blocks(Landscape(lambda removed: math.inf if removed else 3.0, 3), RemovalGoal(count=1))
    odd = Landscape(lambda removed: math.inf if blocks("A0") <= removed else 3.0 + len(removed), 3)
    assert "A0" not in names(search_blocks(odd, RemovalGoal(count=3)).removed)
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    with pytest.raises(NonFinite, match="whole model"):
        search_blocks(BlockEvaluator(Decoder(model), batches_for(model)), RemovalGoal(count=1))


# The journal ---------------------------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["lazy", "greedy", "beam", "swap"])
def test_a_stopped_search_goes_on_where_it_was(method, tmp_path):
    model = tiny("llama")
    batches = batches_for(model)
    options = {"goal": RemovalGoal(count=3), "method": method, "beam_width": 2}
    straight = search_blocks(BlockEvaluator(Decoder(model), batches), **options)
    total = straight.record["evaluations"]
    for stop in (1, 4, 9, total - 1):
        path = tmp_path / f"{stop}.jsonl"
        evaluator = BlockEvaluator(Decoder(model), batches, str(path))
        run = evaluator._evaluate

        def fail(*args, evaluator=evaluator, run=run, stop=stop):
            if evaluator.evaluations == stop:
                raise KeyboardInterrupt
            return run(*args)

        evaluator._evaluate = fail
        with pytest.raises(KeyboardInterrupt):
            search_blocks(evaluator, **options)
        assert len(lines_of(path)) == 1 + stop
        with path.open("a") as file:
            file.write('{"removed": ["A1"], "candidate": ["M')  # a line that the kill tore
        again = search_blocks(BlockEvaluator(Decoder(model), batches, str(path)), **options)
        assert (again.removed, again.nll) == (straight.removed, straight.nll)
        assert again.record["evaluations"] == total - stop
        assert len(lines_of(path)) == 1 + total
        assert search_blocks(BlockEvaluator(Decoder(model), batches, str(path)), **options).record["evaluations"] == 0


def test_a_line_holds_what_was_removed_the_candidate_and_its_value(tmp_path):
    model = tiny("llama")
    batches = batches_for(model)
    path = tmp_path / "made" / "search.jsonl"
    found = search_blocks(BlockEvaluator(Decoder(model), batches, str(path)), RemovalGoal(count=2), method="greedy")
    header, dense, *rest = lines_of(path)
    assert header["format"] == JOURNAL_FORMAT and dense["removed"] == dense["candidate"] == []
    assert [line["candidate"] for line in rest[:6]] == [["A0"], ["A1"], ["A2"], ["M0"], ["M1"], ["M2"]]
    second = rest[6:]
    assert len(second) == 5 and all(line["removed"] == names(found.removed[:1]) for line in second)
    best = min(second, key=lambda line: line["nll"])
    assert best["candidate"] == names(found.removed[1:]) and best["exact"]
    assert best["perplexity"] == pytest.approx(math.exp(best["nll"]))


def test_a_longer_search_goes_on_from_the_journal_of_a_shorter_one(tmp_path):
    model = tiny("llama")
    batches = batches_for(model)
    path = str(tmp_path / "search.jsonl")
    first = search_blocks(BlockEvaluator(Decoder(model), batches, path), RemovalGoal(count=2))
    longer = search_blocks(BlockEvaluator(Decoder(model), batches, path), RemovalGoal(count=4), method="greedy")
    assert longer.removed[:2] == first.removed
    assert longer.record["recalled"] >= first.record["evaluations"]


def test_a_journal_of_another_model_text_or_dtype_is_refused_and_left_alone(tmp_path):
    model = tiny("llama")
    batches = batches_for(model)
    path = tmp_path / "search.jsonl"
    BlockEvaluator(Decoder(model), batches, str(path)).measure_perplexity()
    content = path.read_bytes()
    tuned = tiny("llama")
    with torch.no_grad():  # the same signs
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    others = [
        (tuned, batches),
        (tiny("llama").bfloat16(), batches),
        (model, batches[:1]),
        (model, batches_for(model, 3)),
    ]
    unmasked = [{"input_ids": batch["input_ids"]} for batch in batches]
    for other, text in [*others, (model, unmasked)]:
        with pytest.raises(BadOption, match="another model or text"):
            BlockEvaluator(Decoder(other), text, str(path))
    assert path.read_bytes() == content
    BlockEvaluator(Decoder(model), batches, str(path))


@pytest.mark.parametrize("content", [b"my notes\n", b"my notes", b"\xff\xfe\x00", b"{}\n{}\n"])
def test_a_file_that_is_no_journal_is_not_overwritten(content, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(BadOption, match="no journal"):
        BlockEvaluator(Decoder(tiny("llama")), batches_for(None), str(path))
    assert path.read_bytes() == content


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_header_that_was_torn_is_written_again(kept, tmp_path):
    model, path = tiny("llama"), tmp_path / "search.jsonl"
    BlockEvaluator(Decoder(model), batches_for(model), str(path))
    header = path.read_text()
    path.write_text(header[:kept])
    BlockEvaluator(Decoder(model), batches_for(model), str(path)).measure_perplexity()
    assert path.read_text().startswith(header) and len(lines_of(path)) == 2


@pytest.mark.parametrize("bad", ["", "\0\0\0", "[]", '{"removed": [], "candidate": ["Z1"], "nll": 1, "exact": true}'])
def test_lines_from_the_first_unreadable_one_on_are_evaluated_again(bad, tmp_path):
    model, path = tiny("llama"), tmp_path / "search.jsonl"
    evaluator = BlockEvaluator(Decoder(model), batches_for(model), str(path))
    evaluator.evaluate_sets([blocks("A0"), blocks("A1"), blocks("A2")])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], bad, *lines[2:]]) + "\n")
    again = BlockEvaluator(Decoder(model), batches_for(model), str(path))
    assert list(again.known_values) == [blocks("A0")] and path.read_text().splitlines() == lines[:2]


def test_a_journal_that_can_not_be_written_is_said_so(tmp_path):
    with pytest.raises(OutputNotWritable, match="journal"):
        BlockEvaluator(Decoder(tiny("llama")), batches_for(None), str(tmp_path))


def killed(path):
    model = tiny("llama")
    evaluator = BlockEvaluator(Decoder(model), batches_for(model), path)
    run = evaluator._evaluate

    def die(*args):
        if evaluator.evaluations == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args)

    evaluator._evaluate = die
    search_blocks(evaluator, RemovalGoal(count=3))


@pytest.mark.slow
def test_killed_with_signal_nine_and_resumed(tmp_path):
    path = tmp_path / "search.jsonl"
    process = mp.get_context("spawn").Process(target=killed, args=(str(path),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(lines_of(path)) == 1 + 8
    model = tiny("llama")
    again = search_blocks(BlockEvaluator(Decoder(model), batches_for(model), str(path)), RemovalGoal(count=3))
    straight = search_blocks(BlockEvaluator(Decoder(model), batches_for(model)), RemovalGoal(count=3))
    assert (again.removed, again.nll) == (straight.removed, straight.nll)
    assert again.record["evaluations"] == straight.record["evaluations"] - 8


# Several ranks -------------------------------------------------------------------------------------------------------

TASKS = [
    {"method": method, "goal": goal}
    for method in ("lazy", "greedy", "swap")
    for goal in (RemovalGoal(3 / 10), RemovalGoal(None, 3))
]


def rank_searches(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, found = tiny("llama"), []
    for number, task in enumerate(TASKS):
        evaluator = BlockEvaluator(Decoder(model), batches_for(model), f"{folder}/{number}.jsonl")
        result = search_blocks(evaluator, **task)
        found.append((result.removed, result.nll, result.record["evaluations"]))
    try:
        BlockEvaluator(Decoder(model), batches_for(model, 1), f"{folder}/0.jsonl")
    except BadOption as error:
        found.append(str(error))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_the_candidates_and_agree_with_one(tmp_path):
    mp.spawn(rank_searches, (str(tmp_path),), nprocs=2)
    model = tiny("llama")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first == second and "another model or text" in first.pop()
    for number, (task, found) in enumerate(zip(TASKS, first, strict=True)):
        alone = search_blocks(BlockEvaluator(Decoder(model), batches_for(model)), **task)
        assert found == (alone.removed, alone.nll, alone.record["evaluations"])
        assert len(lines_of(tmp_path / f"{number}.jsonl")) == 1 + found[2]

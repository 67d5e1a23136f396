"""Wanda-sp's scores are mean weight magnitude times activation norm; in sequence, on what cut layers let through."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prunelit.callbacks.wanda_sp import WandaSp
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, get_weight_out_in
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption, InfeasibleBudget, NoCalibration
from tests.observed import batches_for, rows_at
from tests.tiny import cut, tiny, tokens

DIVERSE = ("llama", "phi3", "gpt2", "gpt_neox", "opt", "olmo2", "gemma2", "cohere", "falcon")


def channel_scores(linear, inputs):
    """The equation, channel by channel and token by token."""
    weight = get_weight_out_in(linear).detach().double()
    found = []
    for j in range(weight.shape[1]):
        norm = sum(x[j] ** 2 for x in inputs).sqrt()
        found.append((sum(weight[i, j].abs() for i in range(weight.shape[0])) / weight.shape[0] * norm).item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "gemma2"])
def test_scores_equal_a_token_by_token_implementation(family):
    model = tiny(family)
    batches = batches_for(model)
    scores = WandaSp(0.3).score(PruningContext(Decoder(model), batches))
    layer = Decoder(model).layers[1]
    heads, channels = rows_at(model, layer.output, batches, "input"), rows_at(model, layer.down, batches, "input")
    assert len(heads) == len(channels) == 37  # three of forty tokens are padding
    expected = channel_scores(layer.output, heads) / 37**0.5
    by_head = torch.stack([expected[h * 8 : h * 8 + 8].sum() for h in range(9)])
    torch.testing.assert_close(scores[1].heads.double(), by_head, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        scores[1].channels.double(), channel_scores(layer.down, channels) / 37**0.5, rtol=1e-4, atol=1e-9
    )


def test_the_batch_split_does_not_matter():
    model = tiny("llama")
    ids = tokens(8, 12)
    together, split = ([{"input_ids": part} for part in ids.split(size)] for size in (8, 3))
    for one, other in zip(
        *(WandaSp(0.3).score(PruningContext(Decoder(model), each)) for each in (together, split)), strict=True
    ):
        torch.testing.assert_close(one.heads, other.heads, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.channels, other.channels, rtol=1e-5, atol=0)


def test_bfloat16_squares_are_summed_in_float32_or_better():
    model = tiny("llama").bfloat16()
    batches = [{"input_ids": tokens(4, 32)}] * 8
    scores = WandaSp(0.3).score(PruningContext(Decoder(model), batches))[0]
    layer = Decoder(model).layers[0]
    inputs = rows_at(model, layer.down, batches[:1], "input")
    expected = layer.down.weight.detach().double().abs().mean(0) * inputs.square().mean(0).sqrt()
    torch.testing.assert_close(scores.channels.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "lost", "left"), [("attention", "heads", "channels"), ("mlp", "channels", "heads")])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_that_lost_blocks_is_scored_on_what_is_left(kind, lost, left, sequential):
    model = tiny("llama")
    surgery.apply(model, cut(model, kind))
    method, batches = WandaSp(0.15, align=8, sequential=sequential), batches_for(model)
    scores = method.score(PruningContext(Decoder(model), batches))
    assert [getattr(score, lost) is None for score in scores] == [True, False, True]
    assert all(getattr(score, left) is not None for score in scores)
    assert method.prune(model, batches).predicted["ratio_of_block_parameters"] >= 0.15


# In sequence ----------------------------------------------------------------------------------------------------------


def layer_by_layer(model, batches, ratio, **options):
    """Cut layer 0, forward through the whole model, score layer 1, ...: L models in place of a stream."""
    dense = Decoder(model).shape
    kept = [LayerPlan.dense(shape) for shape in dense.layers]
    for index in range(len(kept)):
        partly = copy_with(model, PruningPlan("test", dense, tuple(kept)))
        layer = Decoder(partly).layers[index]
        heads = channel_scores(layer.output, rows_at(partly, layer.output, batches, "input")).view(9, 8).sum(1)
        channels = channel_scores(layer.down, rows_at(partly, layer.down, batches, "input"))
        groups, count = WandaSp(ratio, **options).prune(tiny_like(model), batches).layers[index].widths[1:]
        best = heads.view(-1, dense.layers[index].group_size).sum(1).argsort(descending=True)[:groups]
        size = dense.layers[index].group_size
        kept[index] = LayerPlan(
            tuple(sorted(g * size + h for g in best.tolist() for h in range(size))),
            tuple(sorted(best.tolist())),
            tuple(sorted(channels.argsort(descending=True)[:count].tolist())),
        )
    return tuple(kept)


def copy_with(model, plan):
    other = tiny_like(model)
    surgery.mask_pruned_units(other, plan)
    return other


def tiny_like(model):
    other = tiny(FAMILY[model.config.model_type])
    other.load_state_dict(model.state_dict())
    return other


FAMILY = {"llama": "llama", "gpt2": "gpt2", "phi3": "phi3", "gemma2": "gemma2"}


@pytest.mark.parametrize("family", FAMILY)
def test_in_sequence_each_layer_sees_what_the_cut_ones_let_through(family):
    model = tiny(family)
    batches = batches_for(model)
    expected = layer_by_layer(model, batches, 0.4, align=8)
    dense = WandaSp(0.4, align=8).prune(tiny(family), batches)
    plan = WandaSp(0.4, align=8, sequential=True).prune(model, batches)
    assert plan.layers == expected
    assert plan.layers[0] == dense.layers[0] and plan.layers != dense.layers


@pytest.mark.parametrize("family", DIVERSE)
def test_in_sequence_the_budget_is_the_same_and_the_model_is_left_alone(family):
    model = tiny(family).bfloat16().train()
    model.get_input_embeddings().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    method = WandaSp(0.3, align=8, protect=(1,), sequential=True)
    plan = method.plan(PruningContext(Decoder(model), batches_for(model)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    dense = WandaSp(0.3, align=8, protect=(1,)).plan(PruningContext(Decoder(model), batches_for(model)))
    assert [kept.widths for kept in plan.layers] == [kept.widths for kept in dense.layers]


def test_in_sequence_padding_does_not_count():
    model, ids = tiny("llama"), tokens(1, 6)
    padded = {"input_ids": torch.cat([ids, tokens(1, 4)], 1), "attention_mask": torch.tensor([[1] * 6 + [0] * 4])}
    plans = [
        WandaSp(0.4, align=8, sequential=True).plan(PruningContext(Decoder(model), [batch]))
        for batch in ({"input_ids": ids}, padded)
    ]
    assert plans[0].layers == plans[1].layers


@pytest.mark.parametrize("batches", [[], [{"input_ids": tokens(), "attention_mask": torch.zeros(2, 10)}]], ids=str)
@pytest.mark.parametrize("sequential", [False, True])
def test_no_text_is_refused(batches, sequential):
    model = tiny("llama")
    with pytest.raises(NoCalibration):
        WandaSp(0.3, align=8, sequential=sequential).prune(model, batches)
    assert Decoder(model).shape.layers == Decoder(tiny("llama")).shape.layers


def test_in_sequence_an_impossible_budget_leaves_no_hook_behind():
    model = tiny("llama")
    with pytest.raises(InfeasibleBudget):
        WandaSp(0.9, align=8, min_kept=0.5, sequential=True).prune(model, batches_for(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("scope", ["global", "layer_mean"])
def test_in_sequence_the_scope_is_the_layer(scope):
    with pytest.raises(BadOption, match=r"sequential.*'layer'"):
        WandaSp(0.3, scope=scope, sequential=True)


def rank_plans(rank, folder, runs):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for batches in runs:
        for sequential in (False, True):
            plan = WandaSp(0.4, align=8, sequential=sequential).plan(PruningContext(Decoder(tiny("llama")), batches))
            found.append(plan.digest)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_make_the_plan_of_one(tmp_path):
    """A rank without a batch of its own takes part too."""
    first, second = batches_for(tiny("llama"))
    runs = [[first, second, first], [second]]
    mp.spawn(rank_plans, (str(tmp_path), runs), nprocs=2)
    expected = [
        WandaSp(0.4, align=8, sequential=sequential).plan(PruningContext(Decoder(tiny("llama")), batches)).digest
        for batches in runs
        for sequential in (False, True)
    ]
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == expected

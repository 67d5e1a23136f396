"""What is cut leaves its mean behind: dense mean outputs, in models that measure, save, load, train and cut again."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.recovery.lora import add_lora
from prunelit.recovery.merge import merge_adapters
from prunelit.repair import bias
from prunelit.runtime.errors import BadPlan, NoCalibration, NonFinite
from tests.tiny import FAMILIES, cut, keep, tiny, tokens

BARE = ("llama", "phi3", "falcon", "gemma2", "cohere", "qwen2", "olmo2")  # no biases on the output projections
BIASED = ("gpt2", "opt", "gpt_neox", "llama-biases", "phi")


def batches_for(model: Any, padded: bool = True) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, model.config.vocab_size, (4, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:]} | ({"attention_mask": mask[2:]} if padded else {})]


@torch.no_grad()
def rows_at(model: Any, module: nn.Module, batches: list[dict[str, Tensor]], side: str) -> Tensor:
    """What enters or leaves a linear at the tokens that count, float64 [T, width]."""
    found: list[Tensor] = []

    def keep(m: nn.Module, args: Any, output: Tensor) -> None:
        rows = (args[0] if side == "in" else output).clone()  # Falcon goes on to add to it in place
        found.append(rows.reshape(-1, rows.shape[-1])[mask.flatten()])

    handle = module.register_forward_hook(keep)
    with use_eval_mode(model):
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            model(**batch, use_cache=False)
    handle.remove()
    return torch.cat(found).double()


def linears(model: Any, index: int) -> list[nn.Module]:
    layer = Decoder(model).layers[index]
    return [layer.output, layer.down]


def first_linear(model: Any, kind: str) -> nn.Module:
    """The last linear of the model's first attention that is cut by heads, or of its first FFN."""
    layers = list(Decoder(model))
    if kind == "kv_group":
        return next(layer.output for layer in layers if layer.has_attention)
    return next(layer.down for layer in layers if layer.has_mlp)


def compensated(model: Any, plan: PruningPlan, batches: list[dict[str, Tensor]]) -> PruningPlan:
    stated = bias.declare_biases(Decoder(model), plan, True)
    bias.apply_bias_compensation(model, stated, batches)
    return stated


# The equation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kv_group", "channel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mean_output_of_the_first_cut_block_is_the_dense_mean(family: str, kind: str) -> None:
    model = tiny(family)
    batches, plan = batches_for(model), cut(model, kind)
    if kind == "kv_group" and not any(shape.kv_groups for shape in plan.model.layers):
        pytest.skip("a family whose attentions stay whole")
    dense = rows_at(model, first_linear(model, kind), batches, "out").mean(0)  # it reads what it read: no cut before it
    without = tiny(family)
    surgery.apply(without, plan)
    compensated(model, plan, batches)
    found = rows_at(model, first_linear(model, kind), batches, "out").mean(0)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=2e-6)
    if kind not in FAMILIES[family].lacks:
        plain = rows_at(without, first_linear(without, kind), batches, "out").mean(0)
        assert (plain - dense).abs().max() > 20 * (found - dense).abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_every_layer_keeps_its_mean_on_dense_inputs(family: str) -> None:
    model = tiny(family)
    batches, plan = batches_for(model), cut(model, "channel")
    dense = [
        [
            (rows_at(model, linear, batches, "in"), rows_at(model, linear, batches, "out"))
            for linear in linears(model, i)
        ]
        for i in range(3)
    ]
    compensated(model, plan, batches)
    for index, kept in enumerate(plan.layers):
        inputs, outputs = dense[index][1]
        found = linears(model, index)[1](inputs[:, list(kept.ffn_channels)].float())
        torch.testing.assert_close(found.double().mean(0), outputs.mean(0), rtol=1e-4, atol=2e-6)


def test_bias_is_the_sum_over_what_went_of_weight_times_mean() -> None:
    model = tiny("llama")
    batches, plan = batches_for(model), cut(model, "mixed")
    layer, kept = 1, plan.layers[1]  # fewer KV groups and fewer channels
    output, down = linears(model, layer)
    expected = []
    for linear, stays in (
        (output, {head * 8 + d for head in kept.query_heads for d in range(8)}),
        (down, set(kept.ffn_channels)),
    ):
        weight, rows = linear.weight.detach().double(), rows_at(model, linear, batches, "in")
        assert len(rows) == 29  # of 32 tokens three are padding
        total = torch.zeros(72, dtype=torch.float64)
        for j in range(rows.shape[1]):
            if j not in stays:
                total += weight[:, j] * sum(row[j] for row in rows) / len(rows)
        expected.append(total)
    compensated(model, plan, batches)
    for linear, total in zip(linears(model, layer), expected, strict=True):
        torch.testing.assert_close(linear.bias.detach().double(), total, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", BIASED)
def test_a_bias_that_is_there_is_added_to(family: str) -> None:
    model, plan = tiny(family), cut(tiny(family), "channel")
    before = linears(model, 0)[1].bias.detach().clone()
    names = [name for name, _ in model.named_parameters()]
    stated = compensated(model, plan, batches_for(model))
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(kept.attention_bias or kept.mlp_bias for kept in stated.layers)
    assert not torch.equal(linears(model, 0)[1].bias, before)


def test_padding_does_not_count() -> None:
    ids, plan = tokens(1, 6), cut(tiny("llama"), "channel")
    padded = {"input_ids": torch.cat([ids, tokens(1, 4)], 1), "attention_mask": torch.tensor([[1] * 6 + [0] * 4])}
    found = []
    for batch in ({"input_ids": ids}, padded):
        model = tiny("llama")
        compensated(model, plan, [batch])
        found.append(linears(model, 2)[1].bias.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


# What the plan states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kv_group", "channel", "mixed", "layer"])
@pytest.mark.parametrize("family", [*BARE, *BIASED])
def test_the_plan_counts_the_biases(family: str, kind: str) -> None:
    model = tiny(family)
    stated = compensated(model, cut(model, kind), batches_for(model))
    found = metrics.measure_model_size(model)
    assert found == {name: stated.predicted[name] for name in found}
    assert torch.isfinite(model(input_ids=tokens()).logits).all()


def test_biases_are_stated_where_a_projection_stays_and_loses_inputs() -> None:
    model = tiny("llama")
    plan, decoder = cut(model, "mixed"), Decoder(model)
    stated = bias.declare_biases(decoder, plan, True)
    # Layer 0 has no attention and fewer channels, layer 1 fewer groups and channels, layer 2 fewer heads and no FFN.
    assert [(kept.attention_bias, kept.mlp_bias) for kept in stated.layers] == [
        (False, True),
        (True, True),
        (True, False),
    ]
    assert stated.digest != plan.digest
    assert bias.declare_biases(decoder, stated, False) == plan and bias.declare_biases(decoder, stated, True) == stated
    dense = PruningPlan("test", plan.model, tuple(LayerPlan.dense(shape) for shape in plan.model.layers))
    assert bias.declare_biases(decoder, dense, True) == dense


@pytest.mark.parametrize("family", [*BARE, *BIASED])
def test_the_budgets_cost_is_what_a_layer_then_holds(family: str) -> None:
    cost = bias.make_bias_cost(Decoder(tiny(family)))
    for kind in ("kv_group", "query_head", "channel"):
        model = tiny(family)
        plan = cut(model, kind)
        shapes, layers = plan.model.layers, Decoder(model).layers
        expected = [cost(shape, *kept.widths) for shape, kept in zip(shapes, plan.layers, strict=True)]
        compensated(model, plan, batches_for(model))
        assert [sum(p.numel() for p in layer.module.parameters()) for layer in layers] == expected
        assert cost(shapes[0], *LayerPlan.dense(shapes[0]).widths) == shapes[0].parameters


def test_the_budgets_cost_counts_biases_of_blocks_that_keep_one_unit() -> None:
    model = tiny("llama-mha")
    cost, shape = bias.make_bias_cost(Decoder(model)), Decoder(model).shape
    layers = (keep(shape.layers[0], groups=(2,)), keep(shape.layers[1], channels=(5,)), keep(shape.layers[2], ()))
    expected = [cost(layer, *kept.widths) for layer, kept in zip(shape.layers, layers, strict=True)]
    compensated(model, PruningPlan("test", shape, layers), batches_for(model))
    assert [sum(p.numel() for p in layer.module.parameters()) for layer in Decoder(model)] == expected
    assert linears(model, 0)[0].bias is not None and linears(model, 1)[1].bias is not None
    assert cost(shape.layers[0], 9, 9, 0) == shape.layers[0].parameters_at(9, 9, 0)  # a removed FFN needs no bias


@pytest.mark.parametrize("other", [{"num_hidden_layers": 2}, {"num_attention_heads": 12, "intermediate_size": 128}])
def test_another_models_plan_is_refused_before_anything_happens(other: dict[str, int]) -> None:
    model, plan = tiny("llama"), cut(tiny("llama", **other), "mixed" if len(other) > 1 else "channel")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert bias.declare_biases(Decoder(model), plan, True) is plan
    with pytest.raises(BadPlan, match="made for"):
        bias.apply_bias_compensation(model, plan, batches_for(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_fine_tuned_copy_is_warned_about_once() -> None:
    model, plan = tiny("llama"), cut(tiny("llama"), "channel")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        bias.apply_bias_compensation(model, plan, batches_for(model))
    assert len([each for each in seen if "was made for weights" in str(each.message)]) == 1


@pytest.mark.parametrize("batches", [[], [{"input_ids": tokens(), "attention_mask": torch.zeros(2, 10)}]], ids=str)
def test_no_text_is_refused_before_the_cut(batches: Any) -> None:
    model = tiny("llama")
    with pytest.raises(NoCalibration):
        bias.apply_bias_compensation(model, cut(model, "channel"), batches)
    assert Decoder(model).shape.layers == Decoder(tiny("llama")).shape.layers


def test_means_of_fewer_layers_are_refused_before_the_cut() -> None:
    model = tiny("llama")
    means = [{"channels": torch.zeros(96)}] * 2
    with pytest.raises(ValueError, match="shorter"):
        bias.apply_bias_compensation(model, cut(model, "channel"), [], means)
    assert Decoder(model).shape.layers == Decoder(tiny("llama")).shape.layers


def test_activations_that_are_not_finite_are_refused_before_the_cut() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(NonFinite):
        bias.apply_bias_compensation(model, cut(model, "channel"), batches_for(model))
    assert Decoder(model).shape.layers == Decoder(tiny("llama")).shape.layers


# A model with added biases --------------------------------------------------------------------------------------------


def test_new_biases_are_like_their_weights() -> None:
    model = tiny("llama").bfloat16().train()
    for layer in model.model.layers[:2]:
        layer.mlp.down_proj.weight.requires_grad = False
    compensated(model, cut(model, "channel"), batches_for(model))
    for index, layer in enumerate(model.model.layers):
        added = layer.mlp.down_proj.bias
        assert added.dtype is torch.bfloat16 and added.requires_grad is (index == 2) and added.grad is None
        assert layer.mlp.down_proj.weight.requires_grad is (index == 2)
        assert layer.self_attn.o_proj.bias is None
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "falcon", "phi3"])
def test_it_is_cut_again(family: str) -> None:
    model = tiny(family)
    compensated(model, cut(model, "kv_group"), batches_for(model))
    compensated(model, cut(model, "channel"), batches_for(model))
    again = cut(model, "channel")
    expected, found = model, tiny(family)
    compensated(found, cut(found, "kv_group"), batches_for(found))
    compensated(found, cut(found, "channel"), batches_for(found))
    surgery.mask_pruned_units(expected, again)
    surgery.apply(found, again)
    assert metrics.measure_model_size(found)["parameters"] == again.predicted["parameters"]
    torch.testing.assert_close(
        found(input_ids=tokens()).logits, expected(input_ids=tokens()).logits, rtol=1e-4, atol=1e-5
    )


def test_means_of_two_cuts_add_up() -> None:
    """Half of the channels at once, or a quarter and then another: the same first layer."""
    batches, shape = batches_for(tiny("llama")), Decoder(tiny("llama")).shape

    def keeps(*channels: int) -> list[LayerPlan]:
        dense = [LayerPlan.dense(layer) for layer in shape.layers]
        return [LayerPlan(dense[0].query_heads, dense[0].kv_groups, channels), *dense[1:]]

    once, twice = tiny("llama"), tiny("llama")
    compensated(once, PruningPlan("test", shape, tuple(keeps(*range(48)))), batches)
    compensated(twice, PruningPlan("test", shape, tuple(keeps(*range(72)))), batches)
    compensated(twice, PruningPlan("test", Decoder(twice).shape, tuple(keeps(*range(48)))), batches)
    torch.testing.assert_close(linears(twice, 0)[1].bias, linears(once, 0)[1].bias, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_adapters_are_added_and_merged(family: str) -> None:
    model = tiny(family)
    compensated(model, cut(model, "mixed"), batches_for(model))
    size, before = metrics.measure_model_size(model), linears(model, 1)[1].bias.detach().clone()
    adapted = add_lora(model, 4, 8, 0.0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    expected = adapted(input_ids=tokens()).logits
    whole = merge_adapters(adapted)
    torch.testing.assert_close(whole(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert metrics.measure_model_size(whole) == size and torch.equal(linears(whole, 1)[1].bias, before)


def rank_biases(rank: int, folder: str, runs: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for batches in runs:
        model = tiny("llama")
        compensated(model, cut(model, "mixed"), batches)
        found.append({name: p.detach() for name, p in model.named_parameters() if name.endswith("bias")})
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_add_what_one_adds(tmp_path: Any) -> None:
    """A rank without a batch of its own takes part too."""
    first, second = batches_for(tiny("llama"))
    runs = [[first, second, first], [second]]
    mp.spawn(rank_biases, (str(tmp_path), runs), nprocs=2)
    for number, batches in enumerate(runs):
        model = tiny("llama")
        compensated(model, cut(model, "mixed"), batches)
        expected = {name: p.detach() for name, p in model.named_parameters() if name.endswith("bias")}
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{rank}.pt")[number]
            assert found.keys() == expected.keys() and len(found) == 4
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)

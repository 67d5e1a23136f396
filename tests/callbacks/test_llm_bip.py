"""LLM-BIP's scores bound, or equal, what a removal does to a block's output, and follow the equations of the method."""

import pytest
import torch
from torch import nn

from prunelit.callbacks.llm_bip import LLMBIP, estimate_lipschitz
from prunelit.core.architectures import ARCHITECTURES
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, get_weight_out_in
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption
from tests.observed import rows_at
from tests.tiny import FAMILIES, cut, tiny

PARALLEL = ("cohere", "cohere2", "falcon", "falcon-multi_query", "gpt_neox", "gptj", "phi", "stablelm-parallel")
POST_NORM = tuple(family for family, row in FAMILIES.items() if ARCHITECTURES[row.model_type].mlp_post_norm)
# Families whose layer adds head and channel outputs to the residual as they are: removal is exact there.
PLAIN_RESIDUAL = tuple(family for family in FAMILIES if family not in POST_NORM)
SEQUENTIAL = ("llama", "llama-biases", "qwen2", "phi3", "gpt2", "opt", "gpt_neox-sequential", "granite")


def batches_for(model, count=2, rows=2, length=9, padded=False, seed=1):
    """Random ids; `padded` pads the second half of the rows' tails with other random ids, which must not count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[rows // 2 :, length - 4 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids})
    return found


def scored(model, batches, **options):
    return LLMBIP(0.3, **options).score(PruningContext(Decoder(model), batches))


def l1(change):
    """Mean over tokens of the l1 norm."""
    return change.abs().sum(-1).mean().item()


def change_without(model, linear, columns, module, batches, side="output"):
    """Mean l1 change at a module when columns of a linear are zeroed."""
    before = rows_at(model, module, batches, side)
    weight = get_weight_out_in(linear)
    kept = weight.detach()[:, columns].clone()
    with torch.no_grad():
        weight[:, columns] = 0
        after = rows_at(model, module, batches, side)
        weight[:, columns] = kept
    return l1(after - before)


# Acceptance tests of methods.md, section 6 ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "padded"), [(f, True) for f in PLAIN_RESIDUAL] + [("llama", False), ("gpt2", False)]
)
def test_channel_score_is_the_change_of_the_block_output(family, padded):
    model = tiny(family)
    batches = batches_for(model, padded=padded)
    layer = next(layer for layer in Decoder(model).layers[1:] if layer.has_mlp)
    scores = scored(model, batches)[layer.index].channels
    order = scores.argsort()
    assert scores[order[len(order) // 2]] > 0  # a ReLU may leave some channels dead, not half of them
    for channel in (order[0], order[len(order) // 2], order[-1]):
        true = change_without(model, layer.down, [channel], layer.module, batches)
        assert scores[channel].item() == pytest.approx(true, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_direct_term_bounds_the_change_after_attention(family):
    model = tiny(family)
    batches = batches_for(model, padded=True)
    layer = Decoder(model).layers[1]
    scores = scored(model, batches, propagate_ffn=False)[1].heads
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, layer.shape.query_heads // 2, layer.shape.query_heads):
        heads = torch.randperm(layer.shape.query_heads, generator=generator)[:size]
        columns = (heads[:, None] * layer.head_dim + torch.arange(layer.head_dim)).flatten()
        true = change_without(model, layer.output, columns, layer.get_norm("mlp_norm"), batches, side="input")
        bound = scores[heads].sum().item()
        assert true <= bound <= 20 * true, f"{size} heads: bound {bound}, change {true}"


def test_direct_term_is_exact_for_heads_of_one_channel():
    model = tiny("gpt2", n_embd=32, n_head=32)
    batches = batches_for(model)
    layer = Decoder(model).layers[1]
    scores = scored(model, batches, propagate_ffn=False)[1].heads
    for head in (0, 5, 31):
        true = change_without(model, layer.output, [head], layer.get_norm("mlp_norm"), batches, side="input")
        assert scores[head].item() == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize("form", ["mean_field", "exact"])
@pytest.mark.parametrize("family", SEQUENTIAL)
def test_full_form_bounds_the_change_of_the_block_output(family, form):
    model = tiny(family)
    batches = batches_for(model, padded=True)
    layer = Decoder(model).layers[1]
    full = scored(model, batches, form=form)[1].heads
    direct = scored(model, batches, form=form, propagate_ffn=False)[1].heads
    assert (full > direct).all()
    for head in (0, layer.shape.query_heads - 1):
        columns = torch.arange(head * layer.head_dim, (head + 1) * layer.head_dim)
        assert full[head].item() >= change_without(model, layer.output, columns, layer.module, batches) > 0


def test_kv_group_is_cut_by_the_sum_of_its_heads():
    model = tiny("llama")
    batches, shapes = batches_for(model), Decoder(model).shape.layers
    with torch.no_grad():
        for layer in Decoder(model):  # group 0 has the strongest head and the weakest sum
            layer.output.weight[:, : layer.head_dim] *= 2
            layer.output.weight[:, layer.head_dim : 3 * layer.head_dim] *= 1e-3
    scores = scored(model, batches)
    plan = LLMBIP(0.4, align=8).prune(model, batches)
    for score, shape, kept in zip(scores, shapes, plan.layers, strict=True):
        groups = [0.0] * shape.kv_groups
        for head, value in enumerate(score.heads.tolist()):
            groups[head // shape.group_size] += value
        assert score.heads.argmax() == 0 and groups[0] == min(groups)
        assert kept.kv_groups == (1, 2)


# Against a second implementation -------------------------------------------------------------------------------------


def channel_scores_token_by_token(model, ids, form):
    """BIP-H of every attention-output channel of a one-layer model: methods.md 1.2 in float64, one token at a time."""
    layer, batches = Decoder(model).layers[0], [{"input_ids": ids}]
    gated, scale = layer.architecture.gate is not None, getattr(model.config, "residual_multiplier", 1.0)

    def gain(role):
        norm = layer.get_norm(role)
        return 1.0 if norm is None else (norm.weight.detach().double() + layer.architecture.norm_offset).abs()

    def spread(role, token):
        norm = layer.get_norm(role)
        if norm is None:
            return 1.0
        centred = token - token.mean() if isinstance(norm, nn.LayerNorm) else token
        return (centred.square().mean() + (getattr(norm, "variance_epsilon", None) or norm.eps)).sqrt()

    def wide(linears):
        weights = [get_weight_out_in(linear).detach().double() for linear in linears]
        return weights[0].chunk(2) if gated and len(weights) == 1 else (weights[0], weights[-1])

    h, attention = rows_at(model, layer.output, batches, "input"), rows_at(model, layer.output, batches)
    y, n = (
        rows_at(model, layer.get_norm("mlp_norm"), batches, "input"),
        rows_at(model, layer.get_norm("mlp_norm"), batches),
    )
    ffn = rows_at(model, layer.down, batches)
    gate, up = wide(layer.ffn_in)
    out = (get_weight_out_in(layer.output).detach().double().T.abs() * scale * gain("attention_post_norm")).T
    column = (get_weight_out_in(layer.down).detach().double().T.abs() * scale * gain("mlp_post_norm")).sum(1)
    slope, after = estimate_lipschitz(layer.activation), [spread("mlp_post_norm", token) for token in ffn]
    ups = [(up @ token).abs() / after[t] for t, token in enumerate(n)]
    gates = [layer.activation(gate @ token).abs() / after[t] for t, token in enumerate(n)]
    if form == "mean_field":
        ups, gates = [sum(ups) / len(ups)] * len(ups), [sum(gates) / len(gates)] * len(gates)
    total = torch.zeros(out.shape[1], dtype=torch.float64)
    for t, token in enumerate(y):
        if gated:
            w = gain("mlp_norm") * ((slope * ups[t] * column) @ gate.abs() + (gates[t] * column) @ up.abs())
        else:
            w = gain("mlp_norm") * (slope * column @ up.abs())
            w = w + w.mean()
        kappa = 1 + w / spread("mlp_norm", token)
        for j in range(out.shape[1]):
            total[j] += h[t, j].abs() / spread("attention_post_norm", attention[t]) * (out[:, j] * kappa).sum()
    return total / len(y)


@pytest.mark.parametrize("form", ["mean_field", "exact"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "granite", "gemma2", "glm4"])
def test_head_scores_equal_a_token_by_token_implementation(family, form):
    layers = {"gpt2": {"n_layer": 1}, "gemma2": {"num_hidden_layers": 1, "layer_types": ["full_attention"]}}
    model = tiny(family, **layers.get(family, {"num_hidden_layers": 1}))
    ids = batches_for(model, 1, 2, 7)[0]["input_ids"]
    shape = Decoder(model).shape.layers[0]
    expected = channel_scores_token_by_token(model, ids, form).view(shape.query_heads, shape.head_dim).sum(1)
    found = scored(model, [{"input_ids": ids}], form=form)[0].heads
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_the_two_forms_differ_on_a_gated_ffn_and_agree_on_a_plain_one():
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    for model, differ in ((llama, True), (gpt2, False)):
        batches = batches_for(model, padded=True)
        mean, exact = (scored(model, batches, form=form)[2].heads for form in ("mean_field", "exact"))
        assert torch.allclose(mean, exact, rtol=1e-5, atol=0) is not differ


# Families ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mean_field", "exact"])
@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_block_has_no_ffn_term(family, form):
    model = tiny(family)
    batches = batches_for(model)
    for full, direct in zip(
        scored(model, batches, form=form), scored(model, batches, propagate_ffn=False), strict=True
    ):
        torch.testing.assert_close(full.heads, direct.heads, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", POST_NORM)
def test_post_norm_channel_score_is_exact_with_frozen_norm_statistics(family):
    model = tiny(family)
    batches = batches_for(model, padded=True)
    layer = Decoder(model).layers[1]
    norm = layer.get_norm("mlp_post_norm")
    if norm is None:
        pytest.skip("this variant of the family has no such norm")
    f, output = rows_at(model, layer.down, batches, "input"), rows_at(model, layer.down, batches)
    gain = norm.weight.detach().double() + layer.architecture.norm_offset
    gain *= getattr(model.config, "residual_multiplier", 1.0)
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    frozen = gain / (output.square().mean(-1, keepdim=True) + epsilon).sqrt()
    scores = scored(model, batches)[1].channels
    for channel in (0, 7, layer.shape.ffn_channels - 1):
        change = f[:, channel, None] * layer.down.weight.detach()[:, channel].double()
        assert scores[channel].item() == pytest.approx(l1(change * frozen), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_every_family_are_finite_and_not_negative(family):
    model = tiny(family)
    batches = batches_for(model, padded=True)
    for form in ("mean_field", "exact"):
        for score, layer in zip(scored(model, batches, form=form), Decoder(model), strict=True):
            assert (score.heads is not None, score.channels is not None) == (layer.has_attention, layer.has_mlp)
            if layer.has_attention:
                assert torch.isfinite(score.heads).all() and (score.heads > 0).all()
            if layer.has_mlp:
                assert torch.isfinite(score.channels).all() and (score.channels >= 0).all()


def test_residual_scale_scales_the_direct_term():
    whole, scaled = tiny("granite", residual_multiplier=1.0), tiny("granite", residual_multiplier=0.25)
    batches = batches_for(whole)
    first, second = (scored(model, batches, propagate_ffn=False)[0].heads for model in (whole, scaled))
    torch.testing.assert_close(second, first * 0.25, rtol=1e-5, atol=0)  # the first layer's input is the same


@pytest.mark.parametrize(("kind", "lost", "left"), [("attention", "heads", "channels"), ("mlp", "channels", "heads")])
def test_a_model_that_lost_blocks_is_scored_on_what_is_left(kind, lost, left):
    model = tiny("llama")
    surgery.apply(model, cut(model, kind))
    scores = scored(model, batches_for(model), form="exact")
    assert [getattr(score, lost) is None for score in scores] == [True, False, True]
    assert all(getattr(score, left) is not None for score in scores)


# Numerics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "slope"),
    [(nn.ReLU(), 1.0), (nn.SiLU(), 1.0998), (nn.GELU(), 1.1289), (nn.GELU(approximate="tanh"), 1.1290)],
)
def test_lipschitz_constants(activation, slope):
    assert estimate_lipschitz(activation) == pytest.approx(slope, rel=5e-4)


@pytest.mark.parametrize("form", ["mean_field", "exact"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_scores_do_not_depend_on_the_batch_split(family, form):
    model = tiny(family)
    ids = batches_for(model, 1, 8, 12)[0]["input_ids"]
    together = scored(model, [{"input_ids": ids}], form=form)
    split = scored(model, [{"input_ids": part} for part in ids.split(2)], form=form)
    for one, other in zip(together, split, strict=True):
        torch.testing.assert_close(one.heads, other.heads, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.channels, other.channels, rtol=1e-5, atol=0)


def test_bfloat16_model_is_summed_in_float32_or_better():
    model = tiny("llama").bfloat16()
    batches = batches_for(model, 8, 4, 32)
    layer = Decoder(model).layers[1]
    found = scored(model, batches)[1]
    assert found.heads.dtype in (torch.float32, torch.float64)
    f = rows_at(model, layer.down, batches, "input")
    expected = f.abs().mean(0) * layer.down.weight.detach().double().abs().sum(0)
    torch.testing.assert_close(found.channels.double(), expected, rtol=1e-5, atol=0)


def test_scoring_leaves_the_weights_alone():
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scored(model, batches_for(model), form="exact")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_form_is_refused_before_anything_runs():
    with pytest.raises(BadOption, match="form"):
        LLMBIP(0.3, form="exakt")

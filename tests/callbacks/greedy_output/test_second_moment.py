"""Second moments: the equations of the paper and of its code, from explicit matrices and attention probabilities."""

import pytest
import torch
from torch import nn

from prunelit.callbacks.greedy_output import second_moment
from prunelit.model.decoder import Decoder, get_weight_out_in
from tests.observed import rows_at
from tests.repair.test_reconstruct import text
from tests.tiny import FAMILIES, tiny


def inputs_of(model, linear, batches):
    """Second moment of a linear's input, with the constant input 1 where it has a bias, and the weights."""
    x = rows_at(model, linear, batches, "input")
    weight = get_weight_out_in(linear).detach().double()
    if linear.bias is not None:
        x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
        weight = torch.cat([weight, linear.bias.detach().double()[:, None]], 1)
    return x.T @ x / len(x), weight


@pytest.mark.parametrize(("family", "padded"), [("llama", False), ("llama-mha", True), ("gemma2", False)])
@torch.no_grad()
def test_head_scores_equal_equation_3_on_the_attention_mixed_input(family, padded):
    """Acceptance: |O_j|^2 E[h_j^2] = |O_j|^2 Wv_j S Wv_j^T, with S the second moment of softmax(...) n per head."""
    batches = text()[2:] if padded else text()[:1]
    model = tiny(family, attn_implementation="eager")
    layer = Decoder(model).layers[1]
    (batch,) = batches
    weights = model(**batch, output_attentions=True).attentions[1].double()  # [B, Q, S, S]
    n = []
    handle = layer.qkv[0].register_forward_pre_hook(lambda m, args: n.append(args[0].double()))
    model(**batch)
    handle.remove()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    output, value = layer.output.weight.double(), layer.qkv[2].weight.double()
    dim, expected = layer.head_dim, []
    for head in range(layer.shape.query_heads):
        mixed = (weights[:, head] @ n[0])[mask]  # [T, H]
        sigma = mixed.T @ mixed / len(mixed)
        score = 0.0
        for j in range(dim):
            row = value[head // layer.shape.group_size * dim + j]
            score += output[:, head * dim + j].square().sum() * (row @ sigma @ row)
        expected.append(float(score))
    for moment in ("empirical", "paper"):
        found = second_moment.score_second_moments(Decoder(model), batches, moment)[1].heads
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "family", ["llama", "llama-biases", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "phi", "glm4"]
)
def test_channel_and_code_scores_equal_their_matrix_forms(family):
    model, batches = tiny(family), text()
    layer = Decoder(model).layers[1]
    shape, names = layer.shape, layer.architecture
    down = get_weight_out_in(layer.down).detach().double()
    f = rows_at(model, layer.down, batches, "input")
    first = []
    for linear in layer.ffn_in:
        sigma, weight = inputs_of(model, linear, batches)
        first += [row @ sigma @ row for row in weight]
    gated = names.gate is not None
    gate, up = (first[: shape.ffn_channels], first[-shape.ffn_channels :]) if gated else (None, first)
    sigma, weight = inputs_of(model, layer.qkv[-1], batches)
    size, dim, groups = shape.group_size, shape.head_dim, shape.kv_groups
    o = get_weight_out_in(layer.output).detach().double()
    expected = {"empirical": [], "paper": [], "code": []}
    for j in range(shape.ffn_channels):
        norm = down[:, j].norm()
        expected["empirical"].append(norm**2 * f[:, j].square().mean())
        if gated:
            expected["paper"].append(norm**2 * gate[j] * norm**2 * up[j])
            expected["code"].append(norm * layer.activation(gate[j].float()) * up[j])
        else:
            expected["paper"].append(norm**2 * up[j])
            expected["code"].append(norm * layer.activation(up[j].float()))
    heads = []
    for head in range(shape.query_heads):
        group = head // size
        if not names.fused_qkv:
            start = group * dim
        elif names.qkv_layout == "concat":
            start = (shape.query_heads + groups + group) * dim
        else:
            start = (group * (size + 2) + size + 1) * dim
        rows = weight[start : start + dim]
        heads.append(sum(o[:, head * dim + j].norm() * (rows[j] @ sigma @ rows[j]) for j in range(dim)))
    for moment, channels in expected.items():
        found = second_moment.score_second_moments(Decoder(model), batches, moment)[1]
        torch.testing.assert_close(found.channels, torch.stack(channels).double(), rtol=1e-4, atol=1e-12)
        if moment == "code":
            torch.testing.assert_close(found.heads, torch.stack(heads), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_finite_scores_in_every_form(family):
    model = tiny(family).bfloat16()
    for moment in ("empirical", "paper", "code"):
        for score, layer in zip(
            second_moment.score_second_moments(Decoder(model), text(), moment), Decoder(model), strict=True
        ):
            assert (score.heads is not None, score.channels is not None) == (layer.has_attention, layer.has_mlp)
            if layer.has_attention:
                assert score.heads.shape == (layer.shape.query_heads,) and (score.heads > 0).all()
                assert score.heads.dtype == torch.float64
            if layer.has_mlp:
                assert score.channels.shape == (layer.shape.ffn_channels,) and torch.isfinite(score.channels).all()
                assert score.channels.dtype == torch.float64


def test_zero_columns_score_zero():
    model = tiny("llama")
    layer = Decoder(model).layers[0]
    nn.init.zeros_(layer.down.weight[:, 5:6])
    assert second_moment.score_second_moments(Decoder(model), text(), "empirical")[0].channels.argmin() == 5

"""Taylor importances against explicit loops over slices, written out by family."""

import pytest
import torch

from prunelit.calibration.taylor import TAYLOR_FORMS, score_each_sample, score_mean_loss
from prunelit.model.decoder import Decoder
from tests.calibration.test_per_sample_gradients import assert_same, batches_for, loss_of, rows_of
from tests.tiny import tiny

D, Q, F = 8, 9, 96  # of the tiny models; head size, query heads, FFN channels
LOOPED = ("llama", "llama-biases", "gpt2", "phi3", "gpt_neox", "opt")


def block(number):
    return list(range(number * D, (number + 1) * D))


def pieces(family, layer):
    """(linear, whether slices are its inputs, kind, indices of the slices of every unit), written out by family."""
    each = [[channel] for channel in range(F)]
    if family.startswith("llama"):
        attention, ffn = layer.self_attn, layer.mlp
        groups = [block(3 * g) + block(3 * g + 1) + block(3 * g + 2) for g in range(3)]
        yield attention.q_proj, False, "heads", groups
        yield attention.k_proj, False, "heads", [block(g) for g in range(3)]
        yield attention.v_proj, False, "heads", [block(g) for g in range(3)]
        yield attention.o_proj, True, "heads", groups
        yield from ((linear, False, "channels", each) for linear in (ffn.gate_proj, ffn.up_proj))
        yield ffn.down_proj, True, "channels", each
    elif family == "phi3":
        groups = [block(3 * g) + block(3 * g + 1) + block(3 * g + 2) for g in range(3)]
        fused = [groups[g] + block(9 + g) + block(12 + g) for g in range(3)]
        yield layer.self_attn.qkv_proj, False, "heads", fused
        yield layer.self_attn.o_proj, True, "heads", groups
        yield layer.mlp.gate_up_proj, False, "channels", [[channel, F + channel] for channel in range(F)]
        yield layer.mlp.down_proj, True, "channels", each
    elif family == "gpt2":
        yield layer.attn.c_attn, False, "heads", [block(h) + block(Q + h) + block(2 * Q + h) for h in range(Q)]
        yield layer.attn.c_proj, True, "heads", [block(h) for h in range(Q)]
        yield layer.mlp.c_fc, False, "channels", each
        yield layer.mlp.c_proj, True, "channels", each
    elif family == "gpt_neox":
        fused = [block(3 * h) + block(3 * h + 1) + block(3 * h + 2) for h in range(Q)]
        yield layer.attention.query_key_value, False, "heads", fused
        yield layer.attention.dense, True, "heads", [block(h) for h in range(Q)]
        yield layer.mlp.dense_h_to_4h, False, "channels", each
        yield layer.mlp.dense_4h_to_h, True, "channels", each
    else:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            yield linear, False, "heads", [block(h) for h in range(Q)]
        yield attention.out_proj, True, "heads", [block(h) for h in range(Q)]
        yield layer.fc1, False, "channels", each
        yield layer.fc2, True, "channels", each


def elements(linear, family, inputs, index, of):
    """Weights (of = "data") or gradients (of = "grad") of one slice, its bias entry last."""
    weight = getattr(linear.weight, of)
    if family == "gpt2":
        weight = weight.T
    if inputs:
        return weight[:, index]
    bias = [] if linear.bias is None else [getattr(linear.bias, of)[index : index + 1]]
    return torch.cat([weight[index], *bias])


def slice_importance(form, w, grads):
    """Of a slice with weights w and the gradients of all samples it is to be averaged over."""
    mean = sum(grads) / len(grads)
    fisher = sum(grad * grad for grad in grads) / len(grads)
    return {
        "vector": (w * mean).sum().abs(),
        "first": (w * mean).abs().sum(),
        "second": (w * w * fisher).sum(),
        "mixed": (w * mean - w * w * fisher / 2).abs().sum(),
    }[form]


def layers_of(family, model):
    paths = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
    return model.get_submodule(paths.get(family, "model.layers"))


def looped(family, model, rows, forms):
    """{form, layer, kind: importance of every unit}, of the mean loss of the rows."""
    slots, gradients = {}, []
    for ids in rows:
        model.zero_grad()
        loss_of(model, ids).backward()
        here = {}
        for index, layer in enumerate(layers_of(family, model)):
            for number, (linear, inputs, kind, units) in enumerate(pieces(family, layer)):
                for unit, indices in enumerate(units):
                    for i in indices:
                        key = (index, number, kind, unit, i)
                        slots[key] = elements(linear, family, inputs, i, "data")
                        here[key] = elements(linear, family, inputs, i, "grad").clone()
        gradients.append(here)
    model.zero_grad()
    found = {}
    for form in forms:
        for key, w in slots.items():
            index, _, kind, unit, _ = key
            values = found.setdefault((form, index, kind), {})
            values[unit] = values.get(unit, 0) + slice_importance(form, w, [here[key] for here in gradients])
    return {key: torch.stack([values[unit] for unit in range(len(values))]) for key, values in found.items()}


@pytest.mark.parametrize("family", LOOPED)
def test_importances_of_every_sample_equal_explicit_loops(family):
    model = tiny(family).double()
    batches, forms = batches_for(model)[1:], ("mixed", "vector")
    found = score_each_sample(Decoder(model), batches, forms)
    for sample, ids in enumerate(rows_of(batches)):
        expected = looped(family, model, [ids], forms)
        for number, form in enumerate(forms):
            for kind in ("heads", "channels"):
                for layer in range(3):
                    assert_same(found[kind][layer][number, sample], expected[form, layer, kind])


@pytest.mark.parametrize("family", LOOPED)
def test_importances_of_the_mean_loss_equal_explicit_loops(family):
    model = tiny(family).double()
    batches = batches_for(model)[:1]
    expected = looped(family, model, rows_of(batches), TAYLOR_FORMS)
    for form in TAYLOR_FORMS:
        for layer, scores in enumerate(score_mean_loss(Decoder(model), batches, form)):
            groups = Decoder(model).layers[layer].shape.kv_groups
            assert_same(scores.heads.view(groups, -1).sum(1), expected[form, layer, "heads"])
            assert_same(scores.channels, expected[form, layer, "channels"])


def test_mean_of_equal_sequences_is_the_loss_of_the_batch():
    model = tiny("llama")
    (batch, _) = batches_for(model, padded=False)
    model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
    down = model.model.layers[1].mlp.down_proj.weight
    up, gate = model.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.gate_proj.weight
    expected = sum((w.detach() * w.grad).abs().sum(axis) for w, axis in ((up, 1), (gate, 1), (down, 0)))
    model.zero_grad()
    found = score_mean_loss(Decoder(model), [batch], "first")[1].channels
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=0)


def test_heads_that_can_not_be_cut_are_left_out():
    assert score_each_sample(Decoder(model := tiny("olmo2")), batches_for(model), ("first",))["heads"] == {}
    assert all(scores.heads is None for scores in score_mean_loss(Decoder(model), batches_for(model), "first"))


def test_query_heads_share_what_their_group_owns_or_do_without():
    model = tiny("llama").double()
    batches, decoder = batches_for(model), Decoder(model)
    with_group, alone = (
        score_mean_loss(decoder, batches, "first", unit)[1].heads for unit in ("kv_group", "query_head")
    )
    share = (with_group - alone).view(3, 3)
    assert (share > 0).all()
    torch.testing.assert_close(share, share[:, :1].expand(3, 3), rtol=1e-9, atol=0)
    whole, heads = (
        score_each_sample(decoder, batches, ("first",), unit)["heads"][1] for unit in ("kv_group", "query_head")
    )
    assert whole.shape == (1, 5, 3) and heads.shape == (1, 5, 9)
    assert (whole > heads.view(1, 5, 3, 3).sum(-1)).all()

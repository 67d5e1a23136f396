"""Distillation towards the dense model's distributions."""

import copy

import pytest
import torch

from prunelit.callbacks.best.denoise import estimate_signal
from prunelit.callbacks.best.distill import distill_layers, record_dense_streams
from prunelit.model.decoder import Decoder
from prunelit.model.surgery import apply
from tests.tiny import cut, tiny, tokens


def divergence(model, dense, batch):
    """Mean KL(dense || model) per token that counts, written out."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        p, q = (m(**batch).logits.double().log_softmax(-1)[mask] for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def batches():
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    return [{"input_ids": tokens(3, 10)}, {"input_ids": tokens(2, 10) + 1, "attention_mask": mask}]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2"])
@pytest.mark.parametrize("kind", ["channel", "mixed"])
def test_the_cut_model_comes_closer_to_the_dense_one(family, kind):
    dense, model, text = tiny(family), tiny(family), batches()
    targets = record_dense_streams(Decoder(model), text)
    apply(model, cut(model, kind))
    before = [divergence(model, dense, batch) for batch in text]
    curve = distill_layers(Decoder(model), text, targets, epochs=12, learning_rate=3e-4)
    assert len(curve) == 12
    assert curve[-1] < curve[0]
    assert sum(divergence(model, dense, batch) for batch in text) < 0.8 * sum(before)


def test_the_first_divergence_is_that_of_the_model_as_it_came():
    dense, model, text = tiny("llama"), tiny("llama"), batches()[1:]
    targets = record_dense_streams(Decoder(model), text)
    apply(model, cut(model, "channel"))
    wanted = divergence(model, dense, text[0])
    (found,) = distill_layers(Decoder(model), text, targets, learning_rate=0.0)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_only_the_layers_move_and_all_else_is_as_it_was():
    model, text = tiny("llama").train(), batches()
    targets = record_dense_streams(Decoder(model), text)
    apply(model, cut(model, "channel"))
    model.model.norm.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    distill_layers(Decoder(model), text, targets, learning_rate=1e-3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".layers." in name}
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


def test_half_precision_weights_take_steps_smaller_than_their_rounding():
    text = batches()
    model = tiny("llama").bfloat16()
    targets = record_dense_streams(Decoder(model), text)
    apply(model, cut(model, "channel"))
    curve = distill_layers(Decoder(model), text, targets, epochs=20, learning_rate=1e-4)
    assert curve[-1] < curve[0]
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_out_of_the_change_is_kept(dtype):
    text = batches()

    def trained(denoise):
        model = tiny("llama").to(dtype)
        targets = record_dense_streams(Decoder(model), text)
        apply(model, cut(model, "channel"))
        came = copy.deepcopy(model.state_dict())
        curve = distill_layers(Decoder(model), text, targets, epochs=2, learning_rate=1e-2, denoise=denoise)
        return came, model.state_dict(), curve

    came, full, curve = trained(False)
    _, found, same = trained(True)
    assert same == curve
    # Of bfloat16 weights the change is that of their float32 copies.
    near, furthest = 1e-6 if dtype is torch.float32 else 2e-3, 0.0
    for name, start in came.items():
        if full[name].ndim == 2:
            expected = start.float() + estimate_signal(full[name].float() - start.float())
            furthest = max(furthest, float((expected - full[name].float()).abs().max()))
        else:
            expected = full[name].float()
        assert torch.allclose(found[name].float(), expected, rtol=0, atol=near)
    assert furthest > 5 * near


def test_no_passes_no_change():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    assert distill_layers(Decoder(model), [], [], epochs=0) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

"""Distillation towards the dense model's distributions."""

import copy
import math

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


def train_plainly(model, dense, text, epochs, learning_rate, seed):
    """The training in a loop over steps of two rows: mean divergence per token of every pass, norms of gradients."""
    ids, mask = (torch.cat([batch[name] for batch in text]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        dense_logs = dense(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    weights = list(model.model.layers.parameters())
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    steps, step, means, norms = epochs * math.ceil(len(ids) / 2), 0, [], []
    warmup, generator = max(1, steps // 20), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(ids), generator=generator).split(2):
            real = mask[rows].bool()
            p, q = dense_logs[rows], model(input_ids=ids[rows], attention_mask=mask[rows]).logits.log_softmax(-1)
            divergence = (p.exp() * (p - q)).sum(-1)[real].sum()
            gradients = torch.autograd.grad(divergence / real.sum(), weights)
            norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
            falling = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
            rate = learning_rate * ((step + 1) / warmup if step < warmup else falling)
            step, total = step + 1, total + divergence.item()
            for weight, (mean, square), gradient in zip(weights, moments, gradients, strict=True):
                clipped = gradient / max(1.0, norms[-1])
                mean.mul_(0.9).add_(0.1 * clipped)
                square.mul_(0.95).add_(0.05 * clipped.square())
                weight.data -= rate * mean / (1 - 0.9**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        means.append(total / int(mask.sum()))
    return means, norms


@pytest.mark.parametrize(("epochs", "options"), [(14, {}), (3, {"seed": 3})], ids=["default", "seed"])
def test_the_training_is_that_of_a_plain_loop(epochs, options):
    """Five rows, so the last step of a pass has one; of 42 steps two warm up, of 9 one."""
    dense, text = tiny("llama", num_hidden_layers=1), batches()
    text[0]["attention_mask"] = torch.ones_like(text[0]["input_ids"])
    with torch.no_grad():
        dense.lm_head.weight.mul_(4)
    expected, found, targets = copy.deepcopy(dense), copy.deepcopy(dense), record_dense_streams(Decoder(dense), text)
    for model in (expected, found):
        apply(model, cut(model, "channel"))
    curve = distill_layers(Decoder(found), text, targets, epochs, learning_rate=1e-3, **options)
    means, norms = train_plainly(expected, dense, text, epochs, 1e-3, options.get("seed", 0))
    assert max(norms) > 1 and (min(norms) < 1 or options)  # some are clipped, and later ones are not
    assert curve == pytest.approx(means, rel=1e-4)
    for (name, value), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "kind"), [("llama", "channel"), ("mixtral", "expert_channel")])
def test_what_stands_out_of_the_change_is_kept(family, kind, dtype):
    text = batches()

    def trained(denoise):
        model = tiny(family).to(dtype)
        targets = record_dense_streams(Decoder(model), text)
        apply(model, cut(model, kind))
        came = copy.deepcopy(model.state_dict())
        curve = distill_layers(Decoder(model), text, targets, epochs=2, learning_rate=1e-2, denoise=denoise)
        return came, model.state_dict(), curve

    came, full, curve = trained(False)
    _, found, same = trained(True)
    assert same == curve
    # Of bfloat16 weights the change is that of their float32 copies.
    near, furthest = 1e-6 if dtype is torch.float32 else 2e-3, 0.0
    for name, start in came.items():
        if full[name].ndim >= 2:
            change = full[name].float() - start.float()
            matrices = change if change.ndim == 3 else change[None]  # one of each expert
            kept = torch.stack([estimate_signal(matrix) for matrix in matrices]).view_as(change)
            expected = start.float() + kept
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

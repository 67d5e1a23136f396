"""Distillation towards the dense model's distributions."""

import copy
import math

import pytest
import torch

from prunelit.calibration.batches import select_rows
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


def train_by_hand(model, dense, rows, epochs, peak, rows_per_step, seed):
    """AdamW on the layers in a plain loop; returns the mean divergence per token of every pass."""
    layers = list(model.model.layers.parameters())
    optimizer = torch.optim.AdamW(layers, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    steps = -(-len(rows) // rows_per_step)
    warmup = max(1, int(0.05 * steps * epochs))
    order, means, taken = torch.Generator().manual_seed(seed), [], 0
    for _ in range(epochs):
        drawn = torch.randperm(len(rows), generator=order).tolist()
        divergences, tokens = [], 0
        for first in range(0, len(rows), rows_per_step):
            step_rows = [rows[i] for i in drawn[first : first + rows_per_step]]
            loss, count = 0.0, 0
            for row in step_rows:
                mask = row.get("attention_mask", torch.ones_like(row["input_ids"])).bool()
                with torch.no_grad():
                    p = dense(**row).logits.float().log_softmax(-1)[mask]
                q = model(**row).logits.float().log_softmax(-1)[mask]
                loss, count = loss + (p.exp() * (p - q)).sum(), count + len(p)
            model.zero_grad()
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(layers, 1.0)
            done, left = taken - warmup, epochs * steps - warmup
            share = (taken + 1) / warmup if taken < warmup else (1 + math.cos(math.pi * done / left)) / 2
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
            divergences.append(loss.item())
            tokens, taken = tokens + count, taken + 1
        means.append(sum(divergences) / tokens)
    return means


@pytest.mark.parametrize("rows_per_step", [2, 3])
def test_training_is_that_of_a_plain_loop(rows_per_step):
    dense, model, twin = (tiny("llama").eval() for _ in range(3))
    text = batches()
    targets = record_dense_streams(Decoder(model), text)
    for each in (model, twin):
        apply(each, cut(each, "mixed"))
    rows = [select_rows(batch, [i]) for batch in text for i in range(len(batch["input_ids"]))]
    wanted = train_by_hand(twin, dense, rows, epochs=14, peak=1e-3, rows_per_step=rows_per_step, seed=4)
    found = distill_layers(
        Decoder(model), text, targets, epochs=14, learning_rate=1e-3, rows_per_step=rows_per_step, seed=4
    )
    assert found == pytest.approx(wanted, rel=1e-3)
    for (name, weight), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


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


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("mixtral", torch.float32)]
)
def test_what_stands_out_of_the_change_is_kept(family, dtype):
    text = batches()

    def trained(denoise):
        model = tiny(family).to(dtype)
        targets = record_dense_streams(Decoder(model), text)
        if family == "llama":
            apply(model, cut(model, "channel"))
        else:  # no expert is missing, but all are a little off
            torch.manual_seed(0)
            for parameter in model.model.layers.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        came = copy.deepcopy(model.state_dict())
        curve = distill_layers(Decoder(model), text, targets, epochs=2, learning_rate=1e-2, denoise=denoise)
        return came, model.state_dict(), curve

    came, full, curve = trained(False)
    _, found, same = trained(True)
    assert same == curve
    # Of bfloat16 weights the change is that of their float32 copies.
    near, furthest, ranks = 1e-6 if dtype is torch.float32 else 2e-3, 0.0, set()
    for name, start in came.items():
        change = full[name].float() - start.float()
        if ".layers." in name and change.ndim > 1:
            matrices = change.flatten(0, -3) if change.ndim > 2 else change[None]  # one for each expert
            kept = torch.stack([estimate_signal(matrix) for matrix in matrices]).view_as(change)
            furthest = max(furthest, float((kept - change).abs().max()))
            ranks.add(change.ndim)
            change = kept
        assert torch.allclose(found[name].float(), start.float() + change, rtol=0, atol=near)
    assert furthest > 5 * near
    assert ranks == ({2, 3} if family == "mixtral" else {2})


def test_no_passes_no_change():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    assert distill_layers(Decoder(model), [], [], epochs=0) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

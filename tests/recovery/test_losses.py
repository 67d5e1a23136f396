"""The losses of recovery against their definitions."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from prunelit.recovery.losses import (
    compute_cross_entropy,
    compute_hidden_distance,
    compute_kl_divergence,
    derive_labels,
)
from tests.tiny import tiny, tokens


def logits(seed, rows=3, length=7, vocabulary=11):
    return torch.randn(rows, length, vocabulary, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([[1] * 7, [1, 1, 1, -100, -100, -100, -100], [-100, -100, 4, 5, 6, -100, -100]])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_divergence_is_the_mean_over_what_is_predicted(temperature, chunk, monkeypatch):
    monkeypatch.setattr("prunelit.recovery.losses._TOKENS_PER_CHUNK", chunk)
    student, teacher = logits(0).requires_grad_(), logits(1)
    found = compute_kl_divergence(student, teacher, LABELS, temperature)
    each = []
    for row in range(3):
        for place in range(6):
            if LABELS[row, place + 1] != -100:
                cut, dense = (log_softmax(x[row, place] / temperature, -1) for x in (student, teacher))
                each.append(kl_div(cut, dense, reduction="sum", log_target=True))
    wanted = torch.stack(each).mean() * temperature**2
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found, student, retain_graph=True)
    (expected,) = torch.autograd.grad(wanted, student)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_that_of_transformers(chunk, dtype, monkeypatch):
    monkeypatch.setattr("prunelit.recovery.losses._TOKENS_PER_CHUNK", chunk)
    model = tiny("llama").to(dtype)
    batch, labels = tokens()[:, :7], LABELS[:2]
    output = model(input_ids=batch, labels=labels)
    found = compute_cross_entropy(output.logits, labels)
    torch.testing.assert_close(found, output.loss.float())
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    (gradient,) = torch.autograd.grad(found, weight, retain_graph=True)
    (expected,) = torch.autograd.grad(output.loss, weight)
    torch.testing.assert_close(gradient, expected)


def test_divergence_of_equals_is_zero_and_nothing_predicted_is_zero():
    same = logits(0)
    assert compute_kl_divergence(same, same, LABELS).item() == pytest.approx(0, abs=1e-6)
    assert compute_kl_divergence(same, logits(1), torch.full((3, 7), -100)).item() == 0


def test_hidden_distance_is_relative_to_the_teacher():
    teacher = [logits(2), logits(3) * 100]
    student = [x * 1.1 for x in teacher]
    assert compute_hidden_distance(student, teacher, LABELS).item() == pytest.approx(0.01, rel=1e-4)
    spoilt = [x.clone() for x in teacher]
    spoilt[0][1, 3:] = 1e6  # padding
    assert compute_hidden_distance(spoilt, teacher, LABELS).item() == 0


def test_hidden_distance_of_one_small_token_is_relative_and_of_none_or_nothing_is_zero():
    teacher, labels = torch.full((1, 2, 4), 1e-3), torch.tensor([[3, -100]])
    assert compute_hidden_distance([0.5 * teacher], [teacher], labels).item() == pytest.approx(0.25)
    assert compute_hidden_distance([teacher], [teacher], torch.full((1, 2), -100)).item() == 0
    assert compute_hidden_distance([0 * teacher], [0 * teacher], labels).item() == 0


def test_labels_leave_padding_out():
    ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
    assert derive_labels({"input_ids": ids}).tolist() == [[5, 6, 0]]
    assert derive_labels({"input_ids": ids, "attention_mask": mask}).tolist() == [[5, 6, -100]]
    assert derive_labels({"input_ids": ids, "labels": mask, "attention_mask": mask}).tolist() == [[1, 1, 0]]

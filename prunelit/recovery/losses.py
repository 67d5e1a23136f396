"""Losses of recovery: next tokens, and the dense model's distributions and hidden states.

Source: Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531 (temperature, its square on the
gradient); hidden states as in Jiao et al., "TinyBERT", arXiv 1909.10351, without a projection: a cut model keeps the
hidden size.

Legend: B batch, S sequence, V vocabulary, H hidden, N tokens that count.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as nll
from torch.nn.functional import kl_div, log_softmax, pad

_TOKENS_PER_CHUNK = 128  # of logits, in float32 at a time


def select_model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model reads of a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def derive_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Token ids [B, S] with -100 where nothing is predicted: padding, or what the batch's own labels leave out."""
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" not in batch:
        return batch["input_ids"]
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def compute_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next tokens that are labelled, in nats; what transformers computes, in less
    memory.

    Args:
        logits: [B, S, V].
        labels: [B, S]; -100 where nothing is predicted.
    """
    return _average_over_labels(_sum_nll, labels, logits)


def compute_kl_divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) of the next-token distributions, in nats, times temperature squared.

    Args:
        student, teacher: logits [B, S, V].
        labels: [B, S]; a place counts if the token after it is predicted (not -100).
        temperature: logits are divided by it.
    """
    return _average_over_labels(partial(_sum_kl_divergence, temperature), labels, student, teacher) * temperature**2


def _average_over_labels(loss: Callable[..., Tensor], labels: Tensor, student: Tensor, *others: Tensor) -> Tensor:
    """Mean over the places whose next token is labelled.

    Args:
        loss: (next tokens [N], logits [N, V] of each model) -> summed loss, of the places that count.
        labels: [B, S].
        student: logits [B, S, V].
        others: logits of models that are not trained.
    """
    targets = pad(labels[:, 1:], (0, 1), value=-100)
    total = cast(Tensor, _ChunkedSumLoss.apply(loss, targets, student, *others))  # type: ignore[no-untyped-call]
    return total / (targets != -100).sum().clamp(min=1)


class _ChunkedSumLoss(torch.autograd.Function):
    """A summed loss, its gradient made in the same pass: nothing is computed twice, and beside the gradient (in the
    dtype of the logits) float32 exists for one chunk at a time."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], targets: Tensor, student: Tensor, *others: Tensor) -> Tensor:
        gradient, total = torch.zeros_like(student), student.new_zeros((), dtype=torch.float32)
        for row in range(len(targets)):
            for start in range(0, targets.shape[1], _TOKENS_PER_CHUNK):
                place = row, slice(start, start + _TOKENS_PER_CHUNK)
                counts = targets[place] != -100  # of instructions, few places do
                with torch.enable_grad():
                    logits = student[place][counts].detach().float().requires_grad_()
                    value = loss(targets[place][counts], logits, *(other[place][counts] for other in others))
                    gradient[place][counts] = torch.autograd.grad(value, logits)[0].to(gradient.dtype)
                total += value.detach()
        ctx.save_for_backward(gradient)
        ctx.others = len(others)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * outputs[0], *[None] * ctx.others


def _sum_nll(targets: Tensor, logits: Tensor) -> Tensor:
    return nll(logits.float(), targets, reduction="sum")


def _sum_kl_divergence(temperature: float, targets: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    cut, dense = (log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return kl_div(cut, dense, reduction="sum", log_target=True)


def compute_hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Mean over pairs of hidden states and tokens of the squared error relative to the teacher's squared norm.

    Args:
        student, teacher: hidden states [B, S, H], the same number of them, in pairs.
        labels: [B, S]; places that do not count here are those of padding and of unlabelled tokens.
    """
    counts = labels != -100
    total = student[0].new_zeros((), dtype=torch.float32)
    for cut, dense in zip(student, teacher, strict=True):
        wanted = dense[counts].float()
        error = (cut[counts].float() - wanted).square().sum(-1)
        # By token, so that the mean over a batch is the mean of those over its parts, on whatever rank.
        total = total + (error / wanted.square().sum(-1).clamp(min=1e-12)).sum()
    return total / (len(student) * counts.sum().clamp(min=1))

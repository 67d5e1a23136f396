"""Losses of recovery training: cross-entropy on the next token, and distillation from the dense model.

Sources: Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531 (the temperature, and its
square that keeps the gradient's size); Jiao et al., "TinyBERT", arXiv 1909.10351 (hidden states; no projection is
needed here, because a pruned model keeps the hidden size).

Legend: B batch, S sequence, V vocabulary, H hidden size, N labelled tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as nll
from torch.nn.functional import kl_div, log_softmax, pad

_TOKENS_PER_CHUNK = 128
"""Tokens whose logits are held in float32 at a time."""


def select_model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the entries of a batch that a causal LM takes as arguments.

    Args:
        batch: {"input_ids": [B, S], ...}, with "attention_mask" and "labels" where there are some.

    Returns:
        "input_ids", and "attention_mask" if the batch has one.

    Example:
        >>> ids = torch.tensor([[5, 6]])
        >>> list(select_model_inputs({"input_ids": ids, "labels": ids}))
        ['input_ids']
    """
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def derive_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Derive the labels of a batch: its own labels, or its token ids without the padding.

    Args:
        batch: {"input_ids": [B, S], ...}, with "attention_mask" and "labels" where there are some.

    Returns:
        Token ids [B, S], with -100 where nothing is predicted.

    Example:
        >>> derive_labels({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[   5,    6, -100]])
    """
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" not in batch:
        return batch["input_ids"]
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def compute_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of the labelled next tokens, in nats.

    The value is the one that transformers computes, with less memory.

    Args:
        logits: [B, S, V].
        labels: [B, S]; -100 where nothing is predicted.

    Returns:
        A scalar in float32.

    Example:
        >>> uniform_logits = torch.zeros(1, 3, 4)
        >>> compute_cross_entropy(uniform_logits, torch.tensor([[0, 1, 2]]))  # ln 4
        tensor(1.3863)
    """
    return _average_over_labels(_sum_nll, labels, logits)


def compute_kl_divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the mean KL(teacher || student) of the next-token distributions, in nats, times temperature squared.

    Args:
        student: logits [B, S, V] of the model that is trained.
        teacher: logits [B, S, V] of the dense model.
        labels: [B, S]; a position counts if the token after it is labelled (not -100).
        temperature: both models' logits are divided by it.

    Returns:
        A scalar in float32.

    Example:
        >>> logits, labels = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0, 1]])
        >>> compute_kl_divergence(logits, logits, labels)
        tensor(0.)
        >>> compute_kl_divergence(torch.zeros_like(logits), logits, labels)
        tensor(0.3278)
    """
    return _average_over_labels(partial(_sum_kl_divergence, temperature), labels, student, teacher) * temperature**2


def _average_over_labels(loss: Callable[..., Tensor], labels: Tensor, student: Tensor, *others: Tensor) -> Tensor:
    """Average a loss over the positions whose next token is labelled.

    Args:
        loss: (next tokens [N], logits [N, V] of each model) -> the sum of the loss over these N positions.
        labels: [B, S].
        student: logits [B, S, V].
        others: logits of models that are not trained.
    """
    targets = pad(labels[:, 1:], (0, 1), value=-100)
    total = cast(Tensor, _ChunkedSumLoss.apply(loss, targets, student, *others))  # type: ignore[no-untyped-call]
    return total / (targets != -100).sum().clamp(min=1)


class _ChunkedSumLoss(torch.autograd.Function):
    """A summed loss whose gradient is computed in the forward pass, chunk by chunk.

    Nothing is computed twice. Besides the gradient, which has the dtype of the logits, float32 values exist for one
    chunk at a time.
    """

    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], targets: Tensor, student: Tensor, *others: Tensor) -> Tensor:
        gradient, total = torch.zeros_like(student), student.new_zeros((), dtype=torch.float32)
        for row in range(len(targets)):
            for start in range(0, targets.shape[1], _TOKENS_PER_CHUNK):
                chunk = row, slice(start, start + _TOKENS_PER_CHUNK)
                labelled = targets[chunk] != -100  # instruction data labels the answers alone, often few positions
                # autograd.Function.forward runs without gradients; the chunk needs its own small graph.
                with torch.enable_grad():
                    logits = student[chunk][labelled].detach().float().requires_grad_()
                    value = loss(targets[chunk][labelled], logits, *(other[chunk][labelled] for other in others))
                    gradient[chunk][labelled] = torch.autograd.grad(value, logits)[0].to(gradient.dtype)
                total += value.detach()
        ctx.save_for_backward(gradient)
        ctx.others = len(others)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * outputs[0], *[None] * ctx.others


def _sum_nll(targets: Tensor, logits: Tensor) -> Tensor:
    """Sum the negative log-likelihoods of targets [N] under logits [N, V]."""
    return nll(logits.float(), targets, reduction="sum")


def _sum_kl_divergence(temperature: float, targets: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Sum KL(teacher || student) over N positions; `targets` is unused, it is part of the loss interface."""
    student_logprobs, teacher_logprobs = (
        log_softmax(logits.float() / temperature, -1) for logits in (student, teacher)
    )
    return kl_div(student_logprobs, teacher_logprobs, reduction="sum", log_target=True)


def compute_hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Compute the squared error of hidden states relative to the teacher's squared norm.

    The mean is taken over pairs of hidden states and over labelled tokens.

    Args:
        student: hidden states [B, S, H] of the pruned model, one per compared layer.
        teacher: hidden states [B, S, H] of the dense model, one for each of `student`.
        labels: [B, S]; padding and unlabelled tokens (-100) do not count.

    Returns:
        A scalar in float32.

    Example:
        >>> teacher, labels = torch.ones(1, 2, 4), torch.tensor([[3, 3]])
        >>> compute_hidden_distance([0.5 * teacher], [teacher], labels)
        tensor(0.2500)
    """
    labelled = labels != -100
    total = student[0].new_zeros((), dtype=torch.float32)
    for student_hidden, teacher_hidden in zip(student, teacher, strict=True):
        target = teacher_hidden[labelled].float()
        squared_error = (student_hidden[labelled].float() - target).square().sum(-1)
        # The ratio is taken per token: the mean over a batch then equals the mean over its parts on any rank.
        total = total + (squared_error / target.square().sum(-1).clamp(min=1e-12)).sum()
    return total / (len(student) * labelled.sum().clamp(min=1))

"""Losses of recovery: next tokens, and the dense model's distributions and hidden states.

Source: Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531 (temperature, its square on the
gradient); hidden states as in Jiao et al., "TinyBERT", arXiv 1909.10351, without a projection: a cut model keeps the
hidden size.

Legend: B batch, S sequence, V vocabulary, H hidden, N tokens that count.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

_TOKENS_PER_CHUNK = 512  # of logits, in float32 at a time


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model reads of a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Token ids [B, S] with -100 where nothing is predicted: padding, or what the batch's own labels leave out."""
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" not in batch:
        return batch["input_ids"]
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) of the next-token distributions, in nats, times temperature squared.

    Args:
        student, teacher: logits [B, S, V].
        labels: [B, S]; a place counts if the token after it is predicted (not -100).
        temperature: logits are divided by it.
    """
    counts = labels[:, 1:] != -100
    # Boolean indexing makes the copies in the logits' own dtype; float32 exists for one chunk at a time, in the
    # backward pass too.
    pieces = zip(
        student[:, :-1][counts].split(_TOKENS_PER_CHUNK),
        teacher[:, :-1][counts].split(_TOKENS_PER_CHUNK),
        strict=True,
    )
    total = student.new_zeros((), dtype=torch.float32)
    for some, wanted in pieces:
        total = total + checkpoint(_chunk, some, wanted, temperature, use_reentrant=False)
    return total * temperature**2 / counts.sum().clamp(min=1)


def _chunk(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Summed divergence of logits [N, V]."""
    cut, dense = (log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return kl_div(cut, dense, reduction="sum", log_target=True)


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> Tensor:
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

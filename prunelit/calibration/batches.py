"""Calibration batches: token ids and padding masks.

Legend: N sequences, B sequences of one batch, S tokens of a sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prunelit.runtime.errors import BadOption, NoCalibration

TOKENS_PER_BATCH = 2048
"""Tokens of one forward pass without gradients: enough to keep a machine busy, few enough to fit in its memory."""

Batch = Mapping[str, Tensor]
"""`input_ids` [B, S] and, where some tokens are padding, `attention_mask` [B, S] with 0 at the padding."""
BATCHES_HINT = "make them with method.make_batches(text, tokenizer)"
"""Advice in the error messages about missing or malformed batches."""


def check_calibration_batches(batches: Any, needed: bool) -> None:
    """Check the calibration batches that a caller passes.

    Args:
        batches: any object; a sequence of {"input_ids": [B, S], ...} is accepted.
        needed: whether at least one batch is required.

    Raises:
        BadOption: `batches` is not such a sequence.
        NoCalibration: `needed` is true and the sequence is empty.

    Example:
        >>> import torch
        >>> check_calibration_batches([{"input_ids": torch.zeros(2, 8, dtype=torch.long)}], needed=True)
        >>> check_calibration_batches("some text", needed=True)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.BadOption: batches: expected a list of {'input_ids': token ids [B, S]}, ...
    """
    problem: str | None = None
    if isinstance(batches, str):
        problem = repr(batches)[:60]
    elif not isinstance(batches, Sequence):
        problem = f"a {type(batches).__name__}"
    else:
        for batch in batches:
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if not isinstance(ids, Tensor) or ids.dim() != 2:
                problem = f"a {type(batch).__name__}{'' if ids is None else ' with other input_ids'} in the list"
    if problem is not None:
        raise BadOption(f"batches: expected a list of {{'input_ids': token ids [B, S]}}, got {problem}; {BATCHES_HINT}")
    if needed and not batches:
        raise NoCalibration(f"calibration: expected at least one batch, got none; {BATCHES_HINT}")


def get_padding_mask(batch: Batch) -> Tensor | None:
    """Return the padding mask of a batch [B, S], or None where no token is padding.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 0]])
        >>> get_padding_mask({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[1, 1, 0]])
        >>> get_padding_mask({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1]])}) is None
        True
    """
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask


def count_real_tokens(batch: Mapping[str, Any]) -> int:
    """Count the tokens of a batch that are not padding.

    Example:
        >>> import torch
        >>> count_real_tokens({"input_ids": torch.zeros(2, 8)})
        16
    """
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def split_into_batches(windows: Tensor) -> list[Batch]:
    """Split windows of token ids [N, S] into batches of about `TOKENS_PER_BATCH` tokens.

    Example:
        >>> import torch
        >>> [len(batch["input_ids"]) for batch in split_into_batches(torch.zeros(5, 1024))]
        [2, 2, 1]
    """
    return [{"input_ids": part} for part in windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))]


def take_sequences(batches: Sequence[Batch], sequences: int | None) -> list[Batch]:
    """Keep the first sequences of a list of batches.

    Args:
        batches: calibration batches.
        sequences: number of sequences to keep over all batches; None: all.

    Returns:
        The batches that hold these sequences; the last one may be shorter than it was.

    Example:
        >>> import torch
        >>> batches = split_into_batches(torch.zeros(5, 1024))
        >>> [len(batch["input_ids"]) for batch in take_sequences(batches, 3)]
        [2, 1]
    """
    selected: list[Batch] = []
    for batch in batches:
        remaining = None if sequences is None else sequences - sum(len(b["input_ids"]) for b in selected)
        if remaining is None or remaining > 0:
            selected.append({name: values[:remaining] for name, values in batch.items()})
    return selected

"""Calibration batches: token ids and padding masks."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prunelit.runtime.errors import BadOption, NoCalibration

TOKENS_PER_BATCH = 2048
"""Of a forward pass that needs no gradient: enough to keep a machine busy, few enough for its memory."""

Batch = Mapping[str, Tensor]
"""`input_ids` [B, S] and, where there is padding, `attention_mask` [B, S]."""
BATCHES_HINT = "make them with method.make_batches(text, tokenizer)"
"""What to do where batches lack or are none."""


def check_calibration_batches(batches: Any, needed: bool) -> None:
    """Check what a caller passes as calibration batches.

    Args:
        batches: should be a sequence of {"input_ids": [B, S], ...}.
        needed: whether there must be one.

    Raises:
        BadOption: something else.
        NoCalibration: there is none.
    """
    wrong: str | None = None
    if isinstance(batches, str):
        wrong = repr(batches)[:60]
    elif not isinstance(batches, Sequence):
        wrong = f"a {type(batches).__name__}"
    else:
        for batch in batches:
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if not isinstance(ids, Tensor) or ids.dim() != 2:
                wrong = f"a {type(batch).__name__}{'' if ids is None else ' with other input_ids'} in the list"
    if wrong is not None:
        raise BadOption(f"batches: expected a list of {{'input_ids': token ids [B, S]}}, got {wrong}; {BATCHES_HINT}")
    if needed and not batches:
        raise NoCalibration(f"calibration: expected at least one batch, got none; {BATCHES_HINT}")


def get_padding_mask(batch: Batch) -> Tensor | None:
    """The padding mask of a batch; None where it says nothing."""
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask


def count_real_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def split_into_batches(windows: Tensor) -> list[Batch]:
    """Windows [N, S] as batches of about 2,048 tokens."""
    return [{"input_ids": part} for part in windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))]


def take_sequences(batches: Sequence[Batch], sequences: int | None) -> list[Batch]:
    """The first so many sequences of batches; None: all."""
    found: list[Batch] = []
    for batch in batches:
        left = None if sequences is None else sequences - sum(len(b["input_ids"]) for b in found)
        if left is None or left > 0:
            found.append({name: x[:left] for name, x in batch.items()})
    return found

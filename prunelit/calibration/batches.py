"""Calibration batches: token ids and padding masks.

Legend: N sequences, B sequences of one batch, S tokens of a sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelit.runtime.errors import BadOption, NoCalibration

TOKENS_PER_BATCH = 2048
"""Tokens of one forward pass without gradients: enough to keep a machine busy, few enough to fit in its memory."""

Batch = Mapping[str, Tensor]
"""`input_ids` [B, S]; where some tokens are padding, `attention_mask` [B, S] with 0 at the padding; for a multimodal
model what its tower reads, see `TOWER_INPUTS`."""
TOWER_INPUTS = (
    *("pixel_values", "pixel_attention_mask", "pixel_values_videos", "image_sizes", "image_grid_thw", "video_grid_thw"),
    *("image_position_ids", "token_type_ids", "mm_token_type_ids", "input_features", "input_features_mask"),
)
"""Names under which processors of transformers return pictures, videos and sound, and where these are in the text."""
PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
"""Those of `TOWER_INPUTS` that have an entry for every token."""
BATCHES_HINT = "make them with method.make_batches(text, tokenizer)"
"""Advice in the error messages about missing or malformed batches."""


def check_calibration_batches(batches: Any, needed: bool) -> None:
    """Check the calibration batches that a caller passes.

    Args:
        batches: any object; what `convert_batches` takes is accepted.
        needed: whether at least one batch is required.

    Raises:
        BadOption: `batches` holds no token ids.
        NoCalibration: `needed` is true and there are no batches.

    Example:
        >>> check_calibration_batches([{"input_ids": torch.zeros(2, 8, dtype=torch.long)}], needed=True)
        >>> check_calibration_batches("some text", needed=True)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.BadOption: batches: expected a list of {'input_ids': token ids [B, S]}, ...
    """
    if not convert_batches(batches) and needed:
        raise NoCalibration(f"calibration: expected at least one batch, got none; {BATCHES_HINT}")


def convert_batches(batches: Any) -> list[Batch]:
    """Bring the calibration set of a caller into the form that methods read.

    Args:
        batches: a list, tuple or DataLoader of batches. A batch is {"input_ids": ids, ...}, or the ids alone; ids are a
            tensor [B, S] or [S], or lists of numbers, of which shorter ones are padded. One such batch, or all ids as
            one tensor, will do.

    Returns:
        The batches; those that have the form already are not copied.

    Raises:
        BadOption: anything else; nothing is dropped silently.

    Example:
        >>> convert_batches([[[5, 6, 7], [8, 9]]])
        [{'input_ids': tensor([[5, 6, 7],
                [8, 9, 0]]), 'attention_mask': tensor([[1, 1, 1],
                [1, 1, 0]])}]
        >>> loader = torch.utils.data.DataLoader(torch.ones(5, 8, dtype=torch.long), batch_size=2)
        >>> [len(batch["input_ids"]) for batch in convert_batches(loader)]
        [2, 2, 1]
    """
    if isinstance(batches, Tensor) and batches.dim() == 2 and not batches.is_floating_point():
        return split_into_batches(batches)
    if isinstance(batches, Mapping):
        return [_convert_batch(batches)]
    problem = repr(batches)[:60] if isinstance(batches, str) else f"a {type(batches).__name__}"
    if isinstance(batches, str | Tensor) or not hasattr(batches, "__iter__") or not _has_length(batches):
        raise BadOption(f"{_EXPECTED_BATCHES}, got {problem}; {BATCHES_HINT}")
    if isinstance(batches, list | tuple) and len(batches) == 2 and _is_mask_of(*batches):
        raise BadOption(
            "batches: expected a list of batches, got ids and a mask of the same shape; pass "
            "{'input_ids': ids, 'attention_mask': mask}"
        )
    return [_convert_batch(batch) for batch in batches]


def _is_mask_of(ids: Any, values: Any) -> bool:
    """Whether `values` are the padding mask of `ids`, not token ids: two batches of ids are no such pair."""
    if not isinstance(ids, Tensor) or not isinstance(values, Tensor) or ids.shape != values.shape:
        return False
    return bool(((values == 0) | (values == 1)).all()) and not bool(((ids == 0) | (ids == 1)).all())


_EXPECTED_BATCHES = "batches: expected a list of {'input_ids': token ids [B, S]}"


def _has_length(batches: Any) -> bool:
    """Whether the number of batches is known: a stream could have no end."""
    try:
        return len(batches) >= 0
    except TypeError:
        return False


def _convert_batch(batch: Any) -> Batch:
    """`convert_batches` of one batch."""
    if isinstance(batch, Mapping):
        ids, others = batch.get("input_ids"), batch
    else:
        # A loader of a TensorDataset gives lists of tensors; only one tensor can be nothing but ids.
        is_wrapped = isinstance(batch, list | tuple) and len(batch) == 1 and isinstance(batch[0], Tensor)
        ids, others = (batch[0] if is_wrapped else batch), {}
    mask = None
    if isinstance(ids, list | tuple) and ids and not any(isinstance(each, Tensor) for each in ids):
        ids, mask = _convert_lists(ids)
    if isinstance(ids, Tensor) and ids.dim() == 1:
        ids = ids[None]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point() or ids.is_complex():
        detail = " with other input_ids" if "input_ids" in others else ""
        if isinstance(ids, Tensor):
            detail += f" {list(ids.shape)} of {str(ids.dtype).removeprefix('torch.')}"
        elif isinstance(batch, list | tuple):
            detail += f" of {len(batch)}"
        raise BadOption(f"{_EXPECTED_BATCHES}, got a {type(batch).__name__}{detail} in the list; {BATCHES_HINT}")
    given_mask = others.get("attention_mask")
    if given_mask is not None and not isinstance(given_mask, Tensor):
        problem = f"a {type(given_mask).__name__}: {given_mask!r:.40}"
        given_mask = _convert_lists(given_mask)[0] if isinstance(given_mask, list | tuple) else None
        if given_mask is None:
            raise BadOption(f"batches: expected an attention_mask of 0 and 1, got {problem}; {BATCHES_HINT}")
    if given_mask is not None:
        mask = given_mask[None] if given_mask.dim() == 1 else given_mask
        if mask.shape != ids.shape:
            raise BadOption(
                f"batches: expected an attention_mask of the shape of input_ids {list(ids.shape)}, got "
                f"{list(mask.shape)}; {BATCHES_HINT}"
            )
    if others.get("input_ids") is ids and (mask is None or others.get("attention_mask") is mask):
        return others
    return {**others, "input_ids": ids.long(), **({} if mask is None else {"attention_mask": mask})}


def _convert_lists(ids: Sequence[Any]) -> tuple[Tensor | None, Tensor | None]:
    """Lists of numbers as a tensor, padded on the right, and the mask of what is no padding; None for anything else."""
    rows = [ids] if all(isinstance(each, int) for each in ids) else list(ids)
    if not all(isinstance(row, list | tuple) and all(isinstance(each, int) for each in row) for row in rows):
        return None, None
    longest = max(map(len, rows), default=0)
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long)
    if all(len(row) == longest for row in rows):
        return padded, None
    return padded, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def get_padding_mask(batch: Batch) -> Tensor | None:
    """Return the padding mask of a batch [B, S], or None where no token is padding.

    Example:
        >>> ids = torch.tensor([[5, 6, 0]])
        >>> get_padding_mask({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[1, 1, 0]])
        >>> get_padding_mask({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1]])}) is None
        True
    """
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask


def select_tower_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Select what the tower of a multimodal model reads; nothing where a batch holds text alone.

    Example:
        >>> ids, pixels = torch.tensor([[5, 6]]), torch.zeros(1, 3, 4, 4)
        >>> list(select_tower_inputs({"input_ids": ids, "pixel_values": pixels}))
        ['pixel_values']
        >>> select_tower_inputs({"input_ids": ids, "token_type_ids": ids})
        {}
    """
    if not any(name.startswith(("pixel_values", "input_features")) for name in batch):
        return {}
    return {name: batch[name] for name in TOWER_INPUTS if isinstance(batch.get(name), Tensor)}


def get_model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Get the arguments of a forward pass over a batch: token ids, a mask where there is padding, and pictures.

    Args:
        batch: the batch.
        device: of the model.

    Example:
        >>> ids = torch.tensor([[5, 6]])
        >>> list(get_model_inputs({"input_ids": ids, "attention_mask": torch.ones(1, 2)}, torch.device("cpu")))
        ['input_ids']
    """
    mask = get_padding_mask(batch)
    inputs = {"input_ids": batch["input_ids"], **({} if mask is None else {"attention_mask": mask})}
    return {name: values.to(device) for name, values in (inputs | select_tower_inputs(batch)).items()}


def select_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Select sequences of a batch.

    Raises:
        BadOption: the batch holds several sequences with pictures; these do not say which picture is whose.

    Example:
        >>> select_rows({"input_ids": torch.tensor([[5, 6], [7, 8]])}, [1])
        {'input_ids': tensor([[7, 8]])}
    """
    tower_inputs, count = select_tower_inputs(batch), len(batch["input_ids"])
    if tower_inputs and count > 1:
        raise BadOption(
            f"batches: expected one sequence a batch where batches hold pictures, got {count}; {BATCHES_HINT}"
        )
    text = {name: batch[name][list(rows)] for name in ("input_ids", "attention_mask") if name in batch}
    return text | tower_inputs


def count_real_tokens(batch: Mapping[str, Any]) -> int:
    """Count the tokens of a batch that are not padding.

    Example:
        >>> count_real_tokens({"input_ids": torch.zeros(2, 8)})
        16
    """
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def split_into_batches(windows: Tensor) -> list[Batch]:
    """Split windows of token ids [N, S] into batches of about `TOKENS_PER_BATCH` tokens.

    Example:
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
        >>> batches = split_into_batches(torch.zeros(5, 1024))
        >>> [len(batch["input_ids"]) for batch in take_sequences(batches, 3)]
        [2, 1]
    """
    selected: list[Batch] = []
    for batch in batches:
        remaining = None if sequences is None else sequences - sum(len(b["input_ids"]) for b in selected)
        if remaining is None or remaining > 0:
            rows = range(len(batch["input_ids"]))[:remaining]
            selected.append(batch if len(rows) == len(batch["input_ids"]) else select_rows(batch, rows))
    return selected

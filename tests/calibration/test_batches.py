"""Calibration batches of a caller: nothing is dropped silently, and a mask is not taken for ids."""

from typing import Any

import pytest
import torch

from prunelit.calibration.batches import convert_batches
from prunelit.runtime.errors import BadOption

IDS = torch.tensor([[5, 6, 7], [8, 9, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_ids_and_a_mask_are_no_two_batches(kind: Any, dtype: torch.dtype) -> None:
    with pytest.raises(BadOption, match=r"got ids and a mask .*'attention_mask': mask"):
        convert_batches(kind((IDS, MASK.to(dtype))))


def test_two_batches_of_ids_stay_two() -> None:
    assert len(convert_batches((IDS, IDS + 1))) == 2 and len(convert_batches([MASK, MASK])) == 2


@pytest.mark.parametrize("mask", [[1.0, 0.5, 1.0], 3, "111", [[1, 1], [1.0]]])
def test_a_mask_that_is_none_is_refused(mask: Any) -> None:
    with pytest.raises(BadOption, match="expected an attention_mask of 0 and 1, got a"):
        convert_batches([{"input_ids": IDS, "attention_mask": mask}])


def test_a_mask_of_lists_is_read() -> None:
    (batch,) = convert_batches([{"input_ids": IDS, "attention_mask": MASK.tolist()}])
    assert batch["attention_mask"].equal(MASK)

"""A file written part by part is the one that safetensors writes, to the byte; wrong parts are refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunelit.export.safetensors_parts import TensorParts, write_tensor_parts

DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.float16)


@pytest.mark.parametrize("letters", range(1, 10))
def test_it_is_the_file_of_safetensors_at_any_length_of_the_header(tmp_path: Path, letters: int) -> None:
    tensors = {
        f"{index}{'x' * letters}": torch.arange(3 * index + 3, dtype=torch.float64).reshape(-1, 3).to(dtype)
        for index, dtype in enumerate(DTYPES)
    }

    def split(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from tensor.split(2)

    parts = [
        TensorParts(name, x.dtype, tuple(x.shape), lambda tensor=x: split(tensor))  # type: ignore[misc]
        for name, x in tensors.items()
    ]
    write_tensor_parts(tmp_path / "parts.safetensors", parts)
    save_file(tensors, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_that_are_not_the_tensor_are_refused(tmp_path: Path, rows: int) -> None:
    parts = TensorParts("w", torch.float32, (2, 4), lambda: [torch.zeros(rows, 4)])
    with pytest.raises(ValueError, match=f"w: expected parts of 32 bytes, got {16 * rows}"):
        write_tensor_parts(tmp_path / "x.safetensors", [parts])

"""Write a safetensors file part by part, for tensors that do not fit in memory together."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorParts:
    """A tensor of a file, whose values are made when they are written.

    Example: see `write_tensor_parts`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make_parts: Callable[[], Iterable[Tensor]]
    """Returns the values in order, cut along the first axis in any way."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensor_parts(path: Path, tensors: Sequence[TensorParts]) -> None:
    """Write tensors to a safetensors file; one part is in memory at a time.

    Args:
        path: of the file.
        tensors: floating-point tensors with different names.

    Raises:
        ValueError: the parts of a tensor are more or less than its shape says.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> rows = TensorParts("w", torch.float32, (2, 1), lambda: (torch.full((1, 1), float(row)) for row in range(2)))
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> write_tensor_parts(path, [rows])
        >>> load_file(path)["w"].tolist()
        [[0.0], [1.0]]
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so that every tensor is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        places = [offset, offset := offset + tensor.nbytes]
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": places,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for part in tensor.make_parts():
                data = part.detach().cpu().to(tensor.dtype).contiguous().flatten().view(torch.uint8).numpy().data
                written += file.write(data)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: expected parts of {tensor.nbytes} bytes, got {written}")

"""What was computed from a dense model and a text, kept in files, so that it is not computed twice.

A run that was killed finds it again, and so does one at another ratio. A file is named by a digest of everything that
determines its content; a damaged one is computed anew.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.fingerprints import compute_digest, hash_tensors
from prunelit.runtime.distributed import get_rank
from prunelit.runtime.errors import BadPlan
from prunelit.runtime.progress import show_stage
from prunelit.runtime.torch_files import find_file_damage, write_torch_file

CachedResult = TypeVar("CachedResult")
"""Tensors, numbers and strings, in lists, tuples and dictionaries."""


class ResultCache:
    """A folder of results; rank zero reads and writes.

    Args:
        folder: made when the first file is written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def get_or_compute(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], CachedResult]
    ) -> tuple[CachedResult, float]:
        """What `compute` returned when it was called with this key, if it ever was; else it is called and kept.

        Args:
            name: first part of the file's name.
            key: everything that determines the result; JSON.
            compute: all ranks call it, or none.

        Returns:
            The result, its tensors on the CPU where it was kept, and the seconds that were saved (0 where it was
            computed now).

        Raises:
            OutputNotWritable: the disk refused.
        """
        said = json.dumps(key, sort_keys=True, default=str)
        path = self.folder / f"{name}-{compute_digest(said)}.pt"
        box: list[Any] = [_read_result(path, said) if get_rank() == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            return box[0]["found"], box[0]["seconds"]
        start = time.perf_counter()
        found = compute()
        if get_rank() == 0:
            write_torch_file(path, {"key": said, "seconds": time.perf_counter() - start, "found": found})
        return found, 0.0

    # Weights: too large for one broadcast --------------------------------------------------------------------------

    def has_file(self, name: str) -> bool:
        """Whether a whole file of this name is here; the same answer on every rank."""
        box = [get_rank() == 0 and find_file_damage(self.folder / name) is None]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def save_changed_weights(self, name: str, model: nn.Module, dense: Mapping[str, str], seconds: float) -> None:
        """Write the tensors of a model that are not those of the dense one; every rank calls it.

        Args:
            name: of the file.
            model: after the cut and its repair.
            dense: `hash_tensors` of the model before; read on rank zero only.
            seconds: that it took.

        Raises:
            OutputNotWritable: the disk refused.
        """
        if get_rank() == 0:
            with show_stage("keeping the repaired weights"):
                changed = hash_tensors(model)
                tensors = {n: v.detach() for n, v in model.state_dict().items() if changed[n] != dense.get(n)}
                write_torch_file(self.folder / name, {"seconds": seconds, "tensors": tensors})
        if dist.is_initialized():
            dist.barrier()

    @torch.no_grad()
    def load_changed_weights(self, name: str, model: nn.Module) -> float:
        """Load what `keep_changes` wrote into a model that was cut by the same plan; the seconds that were saved.

        A linear that was given a bias is given it again. Every rank calls it; rank zero reads.

        Raises:
            BadPlan: the file is of a model of other shapes.
        """
        found: dict[str, Any] = {"seconds": 0.0, "tensors": {}}
        if get_rank() == 0:
            found = torch.load(self.folder / name, map_location="cpu", mmap=True, weights_only=True)
        tensors: dict[str, Tensor] = found["tensors"]
        box = [(found["seconds"], {n: (v.shape, v.dtype) for n, v in tensors.items()})]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        seconds, shapes = box[0]
        device = next(model.parameters()).device
        state = model.state_dict()
        for tensor, (shape, dtype) in shapes.items():
            value = tensors[tensor].to(device) if get_rank() == 0 else torch.empty(shape, dtype=dtype, device=device)
            if dist.is_initialized():
                dist.broadcast(value, src=0)
            owner, _, leaf = tensor.rpartition(".")
            if tensor in state and state[tensor].shape == shape and state[tensor].dtype == dtype:
                state[tensor].copy_(value)
            elif leaf == "bias" and getattr(module := model.get_submodule(owner), leaf, value) is None:
                trained = cast(Tensor, module.weight).requires_grad
                module.bias = nn.Parameter(value.clone(), requires_grad=trained)
            else:
                raise BadPlan(
                    f"kept weights {str(self.folder / name)!r}: expected the tensors of this cut model, got {tensor} "
                    f"of shape {list(shape)}; remove the file"
                )
        return float(seconds)


def _read_result(path: Path, key: str) -> dict[str, Any] | None:
    if find_file_damage(path) is not None:
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  (whole, but not of ours)
        return None
    return content if isinstance(content, dict) and content.get("key") == key else None

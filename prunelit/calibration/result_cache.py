"""A cache on disk for results that follow from a dense model and a text.

A run that was killed finds its finished results again, and so does a run at another ratio. A file is named by a digest
of everything that determines its content. A damaged file counts as missing, and its result is computed again.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.runtime.distributed import get_rank
from prunelit.runtime.errors import BadPlan
from prunelit.runtime.fingerprints import compute_digest, hash_tensors
from prunelit.runtime.progress import show_stage
from prunelit.runtime.torch_files import find_file_damage, write_torch_file

CachedResult = TypeVar("CachedResult")
"""Tensors, numbers and strings, in lists, tuples and dictionaries."""


class ResultCache:
    """A folder of cached results, which rank zero alone reads and writes.

    Args:
        folder: of the files; created with the first file.

    Example:
        >>> import tempfile
        >>> cache = ResultCache(tempfile.mkdtemp())
        >>> cache.get_or_compute("scores", {"ratio": 0.5}, lambda: [1, 2])
        ([1, 2], 0.0)
        >>> cache.get_or_compute("scores", {"ratio": 0.5}, lambda: [3, 4])[0]
        [1, 2]
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def get_or_compute(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], CachedResult]
    ) -> tuple[CachedResult, float]:
        """Return the cached result of a key, or compute and cache it.

        Args:
            name: first part of the file's name.
            key: everything that determines the result, as JSON.
            compute: computes the result; called on all ranks or on none.

        Returns:
            The result, with its tensors on the CPU if it came from the cache, and the seconds that the cache saved (0
            for a result that was computed now).

        Raises:
            OutputNotWritable: the file cannot be written.
        """
        key_text = json.dumps(key, sort_keys=True, default=str)
        path = self.folder / f"{name}-{compute_digest(key_text)}.pt"
        shared: list[Any] = [_read_result(path, key_text) if get_rank() == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(shared, src=0)
        if shared[0] is not None:
            return shared[0]["found"], shared[0]["seconds"]
        start = time.perf_counter()
        result = compute()
        if get_rank() == 0:
            write_torch_file(path, {"key": key_text, "seconds": time.perf_counter() - start, "found": result})
        return result, 0.0

    # Weights, broadcast one tensor at a time ------------------------------------------------------------------------

    def has_file(self, name: str) -> bool:
        """Whether an undamaged file of this name exists; the same answer on every rank."""
        shared = [get_rank() == 0 and find_file_damage(self.folder / name) is None]
        if dist.is_initialized():
            dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def save_changed_weights(self, name: str, model: nn.Module, dense: Mapping[str, str], seconds: float) -> None:
        """Save the tensors of a repaired model that differ from those of the dense model; every rank has to call it.

        Args:
            name: of the file.
            model: the model after the cut and its repair.
            dense: `hash_tensors` of the dense model; read on rank zero only.
            seconds: time that the cut and the repair took.

        Raises:
            OutputNotWritable: the file cannot be written.
        """
        if get_rank() == 0:
            with show_stage("keeping the repaired weights"):
                hashes = hash_tensors(model)
                tensors = {n: v.detach() for n, v in model.state_dict().items() if hashes[n] != dense.get(n)}
                write_torch_file(self.folder / name, {"seconds": seconds, "tensors": tensors})
        if dist.is_initialized():
            dist.barrier()

    @torch.no_grad()
    def load_changed_weights(self, name: str, model: nn.Module) -> float:
        """Load the file of `save_changed_weights` into a model that was cut by the same plan.

        Every rank has to call it. A linear that the repair gave a bias gets that bias again.

        Args:
            name: of the file, which only rank zero reads.
            model: the model after the cut, without its repair.

        Returns:
            Seconds that the cut and the repair took when the file was saved.

        Raises:
            BadPlan: the file belongs to a model of other shapes.
        """
        content: dict[str, Any] = {"seconds": 0.0, "tensors": {}}
        if get_rank() == 0:
            content = torch.load(self.folder / name, map_location="cpu", mmap=True, weights_only=True)
        tensors: dict[str, Tensor] = content["tensors"]
        shared = [(content["seconds"], {n: (v.shape, v.dtype) for n, v in tensors.items()})]
        if dist.is_initialized():
            dist.broadcast_object_list(shared, src=0)
        seconds, shapes = shared[0]
        device = next(model.parameters()).device
        state = model.state_dict()
        for tensor_name, (shape, dtype) in shapes.items():
            value = (
                tensors[tensor_name].to(device) if get_rank() == 0 else torch.empty(shape, dtype=dtype, device=device)
            )
            if dist.is_initialized():
                dist.broadcast(value, src=0)
            owner, _, leaf = tensor_name.rpartition(".")
            if tensor_name in state and state[tensor_name].shape == shape and state[tensor_name].dtype == dtype:
                state[tensor_name].copy_(value)
            elif leaf == "bias" and getattr(module := model.get_submodule(owner), leaf, value) is None:
                requires_grad = cast(Tensor, module.weight).requires_grad
                module.bias = nn.Parameter(value.clone(), requires_grad=requires_grad)
            else:
                raise BadPlan(
                    f"kept weights {str(self.folder / name)!r}: expected the tensors of this cut model, got "
                    f"{tensor_name} of shape {list(shape)}; remove the file"
                )
        return float(seconds)


def _read_result(path: Path, key: str) -> dict[str, Any] | None:
    if find_file_damage(path) is not None:
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  (a complete file that another program wrote)
        return None
    return content if isinstance(content, dict) and content.get("key") == key else None

"""What was computed from a dense model and a text, kept in files, so that it is not computed twice.

A run that was killed finds it again, and so does one at another ratio. A file is named by a digest of everything that
determines its content; a damaged one is computed anew.
"""

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from prunelit.calibrate import Batch, own_rank
from prunelit.errors import OutputNotWritable

_SAMPLE = 4096  # values of each tensor that a model's fingerprint reads

Found = TypeVar("Found")
"""Tensors, numbers and strings, in lists, tuples and dictionaries."""


class Kept:
    """A folder of results; rank zero reads and writes.

    Args:
        folder: made when the first file is written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def recall(self, name: str, key: Mapping[str, Any], compute: Callable[[], Found]) -> tuple[Found, float]:
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
        path = self.folder / f"{name}-{digest(said)}.pt"
        box: list[Any] = [_read(path, said) if own_rank() == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            return box[0]["found"], box[0]["seconds"]
        start = time.perf_counter()
        found = compute()
        if own_rank() == 0:
            _write(path, {"key": said, "seconds": time.perf_counter() - start, "found": found})
        return found, 0.0


def _read(path: Path, key: str) -> dict[str, Any] | None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  (missing, or damaged: a pickle that is cut short fails in many ways)
        return None
    return content if isinstance(content, dict) and content.get("key") == key else None


def _write(path: Path, content: dict[str, Any]) -> None:
    """To the side, onto the disk, then into place: a file of this name is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputNotWritable(f"output {str(path)!r}: can not be written: {error.strerror or error}") from error


def digest(said: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def source_fingerprint(kind: type) -> str | None:
    """Hash of the file that a class stands in; None where there is none to read: it was typed into a console."""
    try:
        return digest(Path(inspect.getfile(kind)).read_text(encoding="utf-8"))
    except (OSError, TypeError):
        return None


def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's configuration and of a sample of every tensor's bytes: another one for a fine-tuned copy."""
    config = {
        name: value
        for name, value in model.config.to_dict().items()  # type: ignore[operator, union-attr]
        if name not in ("_name_or_path", "transformers_version")
    }
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().cpu()
        found.update(name.encode() + bytes(sample.view(torch.uint8).numpy()))
    return found.hexdigest()[:16]


def text_fingerprint(batches: Sequence[Batch]) -> str:
    """Hash of the tokens and masks of batches."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            values = batch[name].to("cpu", torch.int64)
            found.update(f"{name} {list(values.shape)}".encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]

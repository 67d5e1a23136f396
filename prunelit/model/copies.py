"""A second model of the same modules and tensors, for changes that the first is to be spared."""

import copy
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelit.runtime.progress import show_stage
from prunelit.runtime.torch_files import write_torch_file


def copy_sharing_tensors(model: Any) -> Any:
    """The modules again, the tensors shared: what is put in another module's place in one is not in the other."""
    return copy.deepcopy(model, {id(x): x for x in chain(model.parameters(), model.buffers())})


def copy_to_meta_device(model: nn.Module) -> nn.Module:
    """The modules again, the weights on the meta device; buffers are shared."""
    weights = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, weights | {id(buffer): buffer for buffer in model.buffers()})


def copy_to_disk(model: Any, folder: Path) -> Any:
    """The model as it is now, for later: on the CPU, its weights in a file that is read where they are used.

    The file has no name once it is mapped into memory, so it is gone with the process.

    Args:
        model: transformers model, plain.
        folder: on a disk of this machine; made if need be.

    Raises:
        OutputNotWritable: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place:
        path = Path(place) / "weights.pt"
        with show_stage("putting the cut weights on disk"):
            write_torch_file(path, model.state_dict())
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    other: Any = copy_to_meta_device(model)
    other.load_state_dict(weights, assign=True)
    other.tie_weights()
    return other

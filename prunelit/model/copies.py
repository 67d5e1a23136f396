"""Copies of a model that share its tensors, or hold them on the meta device or on disk."""

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelit.runtime.atomic_files import make_scratch_folder
from prunelit.runtime.progress import show_stage
from prunelit.runtime.torch_files import write_torch_file


def copy_sharing_tensors(model: Any) -> Any:
    """Copy the modules of a model and share its tensors; modules can be replaced in one without changing the other.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> copied = copy_sharing_tensors(linear)
        >>> copied is linear, copied.weight is linear.weight
        (False, True)
    """
    return copy.deepcopy(model, {id(x): x for x in chain(model.parameters(), model.buffers())})


def copy_to_meta_device(model: nn.Module) -> nn.Module:
    """Copy the modules of a model with its weights on the meta device; buffers are shared.

    Example:
        >>> copy_to_meta_device(nn.Linear(2, 2)).weight.device
        device(type='meta')
    """
    weights = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, weights | {id(buffer): buffer for buffer in model.buffers()})


def copy_to_disk(model: Any, folder: Path) -> Any:
    """Copy a model as it is now to disk; the copy is on the CPU and reads its weights where they are used.

    The weights are in a file that is mapped into memory. The file is deleted at once, so it takes disk space only as
    long as the process lives.

    Args:
        model: transformers model without adapters or 4-bit linears.
        folder: on a disk of this machine; created if it does not exist.

    Raises:
        OutputNotWritable: the file cannot be written.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     copied = copy_to_disk(model, Path(folder))
        >>> bool((copied.lm_head.weight == model.lm_head.weight).all())
        True
    """
    with make_scratch_folder(folder, "weights") as temporary:
        path = temporary / "weights.pt"
        with show_stage("writing the pruned weights to disk"):
            write_torch_file(path, model.state_dict())
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    copied: Any = copy_to_meta_device(model)
    copied.load_state_dict(weights, assign=True)
    copied.tie_weights()
    return copied

"""A second model of the same modules and tensors, for changes that the first is to be spared."""

import copy
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelit.decoder import Decoder, is_conv1d
from prunelit.hetero import replace_module, set_counters, set_linear
from prunelit.linears import decoder_linears, has_adapters, quantised_as, widths
from prunelit.progress import stage
from prunelit.quantize import CONV1D
from prunelit.whole import write_whole


def shared_copy(model: Any) -> Any:
    """The modules again, the tensors shared: what is put in another module's place in one is not in the other."""
    return copy.deepcopy(model, {id(x): x for x in chain(model.parameters(), model.buffers())})


def without_memory(model: nn.Module) -> nn.Module:
    """The modules again, the weights on the meta device; buffers are shared."""
    weights = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, weights | {id(buffer): buffer for buffer in model.buffers()})


def on_disk(model: Any, folder: Path) -> Any:
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
        with stage("putting the cut weights on disk"):
            write_whole(path, model.state_dict())
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    other: Any = without_memory(model)
    other.load_state_dict(weights, assign=True)
    other.tie_weights()
    return other


def plain(model: Any, multiple: int = 1) -> Any:
    """A 4-bit model as it would be with plain linears, which take no memory here: for shapes, classes and costs.

    Args:
        model: int4 or nf4, without adapters; a plain one is returned as it is.
        multiple: FFN widths are rounded up to it, as if channels of zeros were added.
    """
    if quantised_as(model) is None:
        return model
    other = shared_copy(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for linear in decoder_linears(other):
        outputs, inputs = widths(linear.module)
        replace_module(other, linear.name, _empty(linear.module, outputs, inputs, dtype))
    decoder = Decoder(other)
    for layer in decoder:
        channels = layer.shape.ffn_channels
        more = -channels % multiple
        if more:
            for into in layer.ffn_in:
                outputs, inputs = widths(into)
                _resize(into, outputs + outputs // channels * more, inputs)
            _resize(layer.down, widths(layer.down)[0], channels + more)
            set_counters(layer.module, decoder.architecture, other.config, 0, 0, channels + more)
    return other


def below_adapters(model: Any) -> Any:
    """The model without its adapters: a copy that shares all tensors; itself where there are none.

    Args:
        model: PEFT's, or int4 with adapters.
    """
    if not has_adapters(model):
        return model
    other = shared_copy(model)
    if hasattr(other, "peft_config"):
        return other.unload()
    for linear in decoder_linears(other):
        replace_module(other, linear.name, getattr(linear.module, "base_layer", linear.module))
    return other


def _empty(module: Any, outputs: int, inputs: int, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    bias = getattr(module, "bias", None) is not None
    with torch.device("meta"):
        if getattr(module, CONV1D, False):
            return Conv1D(outputs, inputs).to(dtype)
        return nn.Linear(inputs, outputs, bias, dtype=dtype)


def _resize(linear: Any, outputs: int, inputs: int) -> None:
    shape = (inputs, outputs) if is_conv1d(linear) else (outputs, inputs)
    bias = None if linear.bias is None else linear.bias.new_empty(outputs)
    set_linear(linear, linear.weight.new_empty(shape), bias)

"""A 4-bit or adapted model seen otherwise, made of the same tensors: with plain linears, without adapters."""

from typing import Any

import torch
from torch import nn

from prunelit.model.copies import copy_sharing_tensors
from prunelit.model.decoder import Decoder, is_conv1d
from prunelit.model.per_layer import replace_module, set_counters, set_linear
from prunelit.quantization.linears import get_linear_widths, get_quantization, has_adapters, list_decoder_linears
from prunelit.quantization.quantize import CONV1D_MARK


def view_as_plain_linears(model: Any, multiple: int = 1) -> Any:
    """A 4-bit model as it would be with plain linears, which take no memory here: for shapes, classes and costs.

    Args:
        model: int4 or nf4, without adapters; a plain one is returned as it is.
        multiple: FFN widths are rounded up to it, as if channels of zeros were added.
    """
    if get_quantization(model) is None:
        return model
    other = copy_sharing_tensors(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for linear in list_decoder_linears(other):
        outputs, inputs = get_linear_widths(linear.module)
        replace_module(other, linear.name, _make_empty_linear(linear.module, outputs, inputs, dtype))
    decoder = Decoder(other)
    for layer in decoder:
        channels = layer.shape.ffn_channels
        more = -channels % multiple
        if more:
            for into in layer.ffn_in:
                outputs, inputs = get_linear_widths(into)
                _resize_empty_linear(into, outputs + outputs // channels * more, inputs)
            _resize_empty_linear(layer.down, get_linear_widths(layer.down)[0], channels + more)
            set_counters(layer.module, decoder.architecture, other.config, 0, 0, channels + more)
    return other


def view_without_adapters(model: Any) -> Any:
    """The model without its adapters: a copy that shares all tensors; itself where there are none.

    Args:
        model: PEFT's, or int4 with adapters.
    """
    if not has_adapters(model):
        return model
    other = copy_sharing_tensors(model)
    if hasattr(other, "peft_config"):
        return other.unload()
    for linear in list_decoder_linears(other):
        replace_module(other, linear.name, getattr(linear.module, "base_layer", linear.module))
    return other


def _make_empty_linear(module: Any, outputs: int, inputs: int, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    bias = getattr(module, "bias", None) is not None
    with torch.device("meta"):
        if getattr(module, CONV1D_MARK, False):
            return Conv1D(outputs, inputs).to(dtype)
        return nn.Linear(inputs, outputs, bias, dtype=dtype)


def _resize_empty_linear(linear: Any, outputs: int, inputs: int) -> None:
    shape = (inputs, outputs) if is_conv1d(linear) else (outputs, inputs)
    bias = None if linear.bias is None else linear.bias.new_empty(outputs)
    set_linear(linear, linear.weight.new_empty(shape), bias)

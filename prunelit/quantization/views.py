"""A 4-bit or adapted model seen otherwise, made of the same tensors: with plain linears, without adapters."""

from typing import Any

import torch
from torch import nn

from prunelit.model.copies import shared_copy
from prunelit.model.decoder import Decoder, is_conv1d
from prunelit.model.per_layer import replace_module, set_counters, set_linear
from prunelit.quantization.linears import decoder_linears, has_adapters, quantised_as, widths
from prunelit.quantization.quantize import CONV1D


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

"""Copies of a model that share its tensors, but have plain linears, or no adapters."""

from typing import Any, TypeVar

import torch
from torch import nn

from prunelit.model.copies import copy_sharing_tensors
from prunelit.model.decoder import Decoder, is_conv1d
from prunelit.model.per_layer import replace_module, set_counters, set_linear
from prunelit.quantization.linears import (
    clear_adapter_mark,
    get_linear_widths,
    get_quantization,
    has_adapters,
    list_decoder_linears,
)
from prunelit.quantization.quantize import CONV1D_MARK

Model = TypeVar("Model", bound=nn.Module)


def view_as_plain_linears(model: Model, multiple: int = 1) -> Model:
    """Copy a 4-bit model with plain linears on the meta device, to read off shapes, classes and costs.

    Args:
        model: int4 or nf4, without adapters; a plain model is returned as it is.
        multiple: FFN widths are rounded up to a multiple of it, as if channels of zeros were added.

    Example:
        >>> from prunelit.quantization.quantize import quantize_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> linears = quantize_model(model, "int4", group_size=16)
        >>> view_as_plain_linears(model).model.layers[0].mlp.down_proj.weight.device
        device(type='meta')
    """
    if get_quantization(model) is None:
        return model
    copied = copy_sharing_tensors(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for linear in list_decoder_linears(copied):
        outputs, inputs = get_linear_widths(linear.module)
        replace_module(copied, linear.name, _make_empty_linear(linear.module, outputs, inputs, dtype))
    decoder = Decoder(copied)
    for layer in decoder:
        channels = layer.shape.ffn_channels
        added = -channels % multiple
        if added:
            for linear_in in layer.ffn_in:
                outputs, inputs = get_linear_widths(linear_in)
                _resize_empty_linear(linear_in, outputs + outputs // channels * added, inputs)
            _resize_empty_linear(layer.down, get_linear_widths(layer.down)[0], channels + added)
            set_counters(layer.module, decoder.architecture, copied.config, 0, 0, channels + added)
    return copied


def view_without_adapters(model: nn.Module) -> nn.Module:
    """Copy a model without its adapters; a model without adapters is returned as it is.

    Args:
        model: a PEFT model, or an int4 model with adapters.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> view_without_adapters(linear) is linear
        True
    """
    if not has_adapters(model):
        return model
    copied = copy_sharing_tensors(model)
    if hasattr(copied, "peft_config"):
        return clear_adapter_mark(copied.unload())
    for linear in list_decoder_linears(copied):
        replace_module(copied, linear.name, getattr(linear.module, "base_layer", linear.module))
    return copied


def _make_empty_linear(module: nn.Module, outputs: int, inputs: int, dtype: torch.dtype) -> nn.Module:
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

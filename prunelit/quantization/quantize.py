"""Quantises a base under adapters to 4 bits: group-wise INT4 (`prunelit.quantization.int4`) or NF4 (bitsandbytes).

NF4 is the data type of QLoRA (arXiv 2305.14314). On CPUs bitsandbytes gives wrong weights, without an error, for many
widths that pruning leaves. So widths are checked before anything is quantised, and every linear is compared with its
original before it replaces it. On CUDA widths are not restricted (that path has not been run here).
"""

import logging
from contextlib import suppress
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from prunelit.core.architectures import get_architecture, has_experts
from prunelit.model.decoder import get_weight_out_in, is_conv1d
from prunelit.model.per_layer import find, replace_module, set_linear
from prunelit.quantization.int4 import Int4Linear, check_group_size, compute_error_bound
from prunelit.quantization.integer_zeros import make_linear_with_integer_zeros
from prunelit.quantization.linears import (
    get_linear_widths,
    get_quantization,
    has_adapters,
    is_nf4,
    list_decoder_linears,
    list_decoder_mixtures,
)
from prunelit.runtime.errors import BadOption, BadQuantisation, UnknownArchitecture
from prunelit.runtime.progress import track_progress

Base = Literal["none", "nf4", "int4"]
Zeros = Literal["float", "integer"]
Model = TypeVar("Model", bound=nn.Module)
BASES = ("none", "nf4", "int4")
_NF4_BLOCK = 64  # on CPUs, other sizes give wrong weights at more widths
_NF4_ERROR_BOUND = 0.15  # correct results are near 0.09, wrong ones were 0.2 to 1.2
CONV1D_MARK = "prunelit_conv1d"
"""Attribute of quantised modules that replace transformers' Conv1D."""

# bitsandbytes warns at import on CPUs that lack an optional kernel of the hub; PEFT imports bitsandbytes too.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Misfit(NamedTuple):
    """A linear whose number of inputs does not suit its base.

    Attributes:
        name: path of the linear.
        in_features: its inputs.
        multiple: what the inputs should be a multiple of.
        align: value of the pruning option `align` that would make them one; None if they are not FFN channels.

    Example: `Misfit` is used further down in this module.
    """

    name: str
    in_features: int
    multiple: int
    align: int | None


class QuantizedLinear(NamedTuple):
    """A linear that was quantised, and its relative error |W~ - W| / |W| in the Frobenius norm.

    Example: `QuantizedLinear` is used further down in this module.
    """

    name: str
    out_features: int
    in_features: int
    error: float


def check_base_options(base: str, group_size: int = 32) -> None:
    """Check the options of `quantize_model` before a model is loaded.

    Args:
        base: one of BASES.
        group_size: of int4.

    Raises:
        BadOption: the base or group size is unknown, or bitsandbytes is not installed.

    Example:
        >>> check_base_options("int8")
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: base: expected one of none, nf4, int4, got 'int8'
    """
    if base not in BASES:
        raise BadOption(f"base: expected one of {', '.join(BASES)}, got {base!r}")
    check_group_size(group_size)
    if base == "nf4":
        import_bitsandbytes()


def check_base_fits_config(base: str, config: Any) -> None:
    """Check that a base can hold a model, from its config; no weights are needed.

    Args:
        base: one of BASES.
        config: of the model, or the content of config.json with attributes for names.

    Raises:
        BadQuantisation: a base in 4 bits for a mixture of experts.

    Example:
        >>> from types import SimpleNamespace
        >>> check_base_fits_config("int4", SimpleNamespace(model_type="llama"))
    """
    with suppress(UnknownArchitecture):  # loading says it
        if base != "none" and has_experts(config):
            raise BadQuantisation(_refuse_experts(base, "most of the model"))


def find_misfits(model: nn.Module, base: Base, group_size: int = 32) -> list[Misfit]:
    """Find the linears whose number of inputs does not suit a base.

    With int4 their last group is padded, which costs memory and nothing else. With nf4 on a CPU `check_base_shapes`
    refuses them; on CUDA they are not misfits.

    Args:
        model: dense or pruned, not yet quantised.
        base: "none" has no misfits.
        group_size: of int4.

    Raises:
        BadOption: see `check_base_options`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> [(misfit.in_features, misfit.align) for misfit in find_misfits(model, "int4", group_size=64)][-1]
        (32, 64)
    """
    check_base_options(base, group_size)
    if base == "none":
        return []
    multiple = _NF4_BLOCK if base == "nf4" else group_size
    down = get_architecture(model.config).down
    misfits = []
    for linear in list_decoder_linears(model):
        width = get_linear_widths(linear.module)[1]
        if width % multiple and (base == "int4" or get_weight_out_in(linear.module).device.type == "cpu"):
            from_channels = linear.kind == "ffn" and linear.path.split(".")[-1] == down
            misfits.append(Misfit(linear.name, width, multiple, multiple if from_channels else None))
    return misfits


def check_base_shapes(model: nn.Module, base: Base, group_size: int = 32) -> None:
    """Check that a base gives correct weights at every width of a model; call it as soon as the model is pruned.

    Args:
        model: dense or pruned, not yet quantised.
        base: one of BASES.
        group_size: of int4.

    Raises:
        BadOption: see `check_base_options`.
        BadQuantisation: nf4 on a CPU with inputs that are not a multiple of 64, or a mixture of experts.

    Example: see `find_misfits`.
    """
    misfits = find_misfits(model, base, group_size)
    if base != "none" and (mixtures := list_decoder_mixtures(model)):
        experts = [p for mixture in mixtures for p in find(mixture.module, mixture.experts).parameters()]
        share = sum(p.numel() for p in experts) / sum(p.numel() for p in model.parameters())
        raise BadQuantisation(_refuse_experts(base, f"{share:.0%} of this model"))
    if misfits and base == "nf4":
        first = misfits[0]
        remedy = f"cut with align: {first.align}, or " if first.align else ""
        raise BadQuantisation(
            f"{first.name}: nf4 on a CPU: expected inputs in multiples of {first.multiple}, got {first.in_features} "
            f"({len(misfits)} such linears); {remedy}use base int4 or none"
        )


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    base: Base,
    group_size: int = 32,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    zeros: Zeros = "float",
) -> list[QuantizedLinear]:
    """Replace every prunable linear of the decoder layers by a 4-bit one, in place, and freeze the model.

    Embeddings, norms and the output projection stay as they are. Every new linear is dequantised and compared with its
    original before it replaces it. This is done one linear at a time, so the full-precision weights are freed one by
    one.

    Args:
        model: dense or pruned, without adapters.
        base: "none" leaves the model as it is.
        group_size: inputs per group of int4; nf4 has blocks of 64.
        compute_dtype: dtype of the products; None: the dtype of the input with int4, of the weight with nf4.
        double_quant: whether nf4's statistics are quantised too.
        zeros: of int4: "float" for groups that begin at any number, "integer" for those of format w4a16, in which the
            number 0 is a code.

    Returns:
        One record per linear, in the order of the layers.

    Raises:
        BadOption: see `check_base_options`.
        BadQuantisation: nf4 does not take a width, the model is a mixture of experts, or is quantised or has adapters
            already (nothing is changed then); or a linear's error is too large (the linears before it are replaced).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> records = quantize_model(model, "int4", group_size=16)
        >>> len(records), records[0].name
        (7, 'model.layers.0.self_attn.q_proj')
    """
    check_base_options(base, group_size)
    if base == "none":
        return []
    if has_adapters(model) or get_quantization(model) is not None:
        raise BadQuantisation("quantize: expected a plain model, got adapters or 4-bit linears; quantise once, first")
    check_base_shapes(model, base, group_size)
    model.requires_grad_(False)
    records = []
    names = [linear.name for linear in list_decoder_linears(model)]  # a list of modules would keep all weights alive
    for name in track_progress(names, f"rounding to {base}", unit="linear"):
        old = find(model, name)
        weight = get_weight_out_in(old)
        if base == "int4":
            make = Int4Linear.from_weight if zeros == "float" else make_linear_with_integer_zeros
            new: nn.Module = make(weight, old.bias, group_size, compute_dtype)
        else:
            new = _make_nf4_linear(weight, old.bias, compute_dtype or weight.dtype, double_quant)
        bound = compute_error_bound(group_size) if base == "int4" else _NF4_ERROR_BOUND
        records.append(
            QuantizedLinear(
                name, len(weight), weight.shape[1], _measure_relative_error(weight, _dequantize_weight(new))
            )
        )
        _check_relative_error(records[-1], base, bound)
        setattr(new, CONV1D_MARK, is_conv1d(old))
        replace_module(model, name, new)
    if base == "nf4":
        marked: Any = model  # torch knows the type of no attribute
        marked.is_loaded_in_4bit = True  # PEFT chooses its 4-bit adapters by this attribute
    return records


@torch.no_grad()
def dequantize_model(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Replace every 4-bit linear by a plain one with the rounded weights, in place, as stock formats need it.

    Adapters on int4 are merged first by `prunelit.recovery.lora.merge_adapters`; a model of nf4 with adapters goes
    through `prunelit.recovery.lora.merge_into_full_precision` instead.

    Args:
        model: quantised, without adapters; a plain model is returned as it is.
        dtype: of the weights; None: the dtype of the model's first floating-point parameter.

    Raises:
        BadQuantisation: the model still has adapters.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> records = quantize_model(model, "int4", group_size=16)
        >>> type(dequantize_model(model).model.layers[0].mlp.down_proj).__name__
        'Linear'
    """
    if has_adapters(model):
        raise BadQuantisation("dequantised: expected a model without adapters, got some; merge them first")
    dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, module in list(model.named_modules()):
        if isinstance(module, Int4Linear) or is_nf4(module):
            replace_module(model, name, _make_plain_linear(module, dtype))
    if hasattr(model, "is_loaded_in_4bit"):
        del model.is_loaded_in_4bit
    return model


def measure_base_memory(model: nn.Module) -> dict[str, float]:
    """Measure the memory of the base and count parameters, for reports.

    Returns:
        trainable_parameters; parameters, with adapters; base_bytes: everything but adapters, with scales, zeros and
        nf4's statistics; bytes_per_base_parameter, where a 4-bit linear counts as O I parameters.

    Example:
        >>> measure_base_memory(nn.Linear(2, 2))["bytes_per_base_parameter"]
        4.0
    """
    trainable = base = adapters = base_bytes = 0
    counted: set[int] = set()  # ids of tied weights, and of tables that all nf4 linears share
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            base += module.in_features * module.out_features
            base_bytes += sum(_count_bytes(buffer) for buffer in module.buffers(recurse=False))
        for own_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            state = getattr(parameter, "quant_state", None)
            count = state.shape.numel() if state is not None else parameter.numel()
            trainable += count if parameter.requires_grad else 0
            if "lora_" in f"{name}.{own_name}":
                adapters += count
            else:
                base += count
                base_bytes += _count_bytes(parameter)
                base_bytes += sum(
                    _count_bytes(tensor) for tensor in _collect_nf4_statistics(state) if id(tensor) not in counted
                )
                counted.update(map(id, _collect_nf4_statistics(state)))
    return {
        "trainable_parameters": trainable,
        "parameters": base + adapters,
        "base_bytes": base_bytes,
        "bytes_per_base_parameter": base_bytes / base,
    }


def import_bitsandbytes(needed_by: str = "base nf4") -> ModuleType:
    """Import the optional package bitsandbytes.

    Args:
        needed_by: the option that needs it, for the message.

    Raises:
        BadOption: it is not installed.

    Example: see `quantize_model`.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise BadOption(f"{needed_by}: expected bitsandbytes, got {error}: pip install 'prunelit[nf4]'") from error
    return bitsandbytes


def _refuse_experts(base: str, share: str) -> str:
    """Say that the weights of experts are no linears, which alone are rounded."""
    return (
        f"base: expected none for a mixture of experts, got {base}; the experts' weights are {share}, and tensors that "
        f"{base} would leave in full precision: use base none, with dtype bfloat16 to halve the memory"
    )


def _make_nf4_linear(
    weight: Tensor, bias: nn.Parameter | None, compute_dtype: torch.dtype, double_quant: bool
) -> nn.Module:
    """Make a linear of bitsandbytes from a weight [O, I], on the weight's device."""
    nn4 = import_bitsandbytes().nn
    rows, width = weight.shape
    linear = nn4.Linear4bit(width, rows, False, compute_dtype, double_quant, "nf4", device="meta")
    # Params4bit quantises when it is moved to a device, and hands the statistics to the linear through `module`.
    linear.weight = nn4.Params4bit(
        weight.contiguous(),
        requires_grad=False,
        blocksize=_NF4_BLOCK,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=linear,
    )
    linear.bias = bias
    # In eval mode bitsandbytes would repack the weights on some CPUs, in bfloat16, and never undo it: then merges are
    # wrong, saving changes the statistics, and, without double quantisation, all later outputs are wrong.
    linear.support_avx512bf16_for_cpu = False
    return linear.to(weight.device)


def _dequantize_weight(module: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the weight [O, I] of a quantised linear."""
    if isinstance(module, Int4Linear):
        return module.dequantize_weight(dtype or torch.float32)
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise BadQuantisation("dequantised: nf4 weights were packed by an evaluation outside prunelit; load them again")
    weight = import_bitsandbytes().functional.dequantize_4bit(module.weight.data, state)
    return cast(Tensor, weight.to(dtype or weight.dtype))


def _measure_relative_error(weight: Tensor, rounded: Tensor) -> float:
    difference, norm = (rounded.float() - weight.float()).norm().item(), weight.float().norm().item()
    return difference / norm if norm else difference


def _check_relative_error(record: QuantizedLinear, base: str, bound: float) -> None:
    if not record.error <= bound:  # also catches NaN
        remedy = "cut with align: 64, or use base int4 or none" if base == "nf4" else "use base none"
        raise BadQuantisation(
            f"{record.name}: {base}: expected weights within a relative error of {bound:.3f} after quantising, got "
            f"{record.error:.3f} at {record.in_features} inputs and {record.out_features} outputs; {remedy}"
        )


def _make_plain_linear(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make a plain linear, or Conv1D if it was one, with the weight of a quantised linear."""
    from transformers.pytorch_utils import Conv1D

    weight = _dequantize_weight(module, dtype)
    is_transposed, bias = getattr(module, CONV1D_MARK, False), getattr(module, "bias", None)
    linear: nn.Module = Conv1D(1, 1) if is_transposed else nn.Linear(1, 1, bias=bias is not None, device="meta")
    linear.requires_grad_(False)
    set_linear(linear, weight.T.contiguous() if is_transposed else weight.contiguous(), _cast_bias(bias, dtype))
    return linear


def _cast_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.detach().to(dtype)


def _count_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _collect_nf4_statistics(state: object) -> list[Tensor]:
    """Collect the tensors that an nf4 weight needs besides its codes."""
    inner_state = getattr(state, "state2", None)  # the statistics of double quantisation
    values = [getattr(part, name, None) for part in (state, inner_state) for name in ("absmax", "code", "offset")]
    return [value for value in values if isinstance(value, Tensor)]

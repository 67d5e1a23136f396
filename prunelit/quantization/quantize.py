"""4-bit bases under adapters: group-wise INT4 (`prunelit.quantization.int4`) or NF4 (bitsandbytes; QLoRA, arXiv 2305.14314).

On CPUs bitsandbytes gives wrong weights, without an error, for many widths that pruning leaves. So widths are checked
before anything is quantised, and every linear is compared with its original before it replaces it. On CUDA widths are
not restricted (that path has not been run here).
"""

import logging
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from prunelit.core.architectures import get_architecture
from prunelit.model.decoder import get_weight_out_in, is_conv1d
from prunelit.model.per_layer import find, replace_module, set_linear
from prunelit.quantization.int4 import Int4Linear, check_group_size, compute_error_bound
from prunelit.quantization.linears import (
    get_linear_widths,
    get_quantization,
    has_adapters,
    is_nf4,
    list_decoder_linears,
)
from prunelit.runtime.errors import BadOption, BadQuantisation
from prunelit.runtime.progress import track_progress

Base = Literal["none", "nf4", "int4"]
BASES = ("none", "nf4", "int4")
_NF4_BLOCK = 64  # other sizes are wrong on CPUs at more widths
_NF4_ERROR_BOUND = 0.15  # right results are near 0.09, wrong ones were 0.2 to 1.2
CONV1D_MARK = "prunelit_conv1d"  # on quantised modules that stand for transformers' Conv1D

# Said at import on CPUs where an optional kernel of the hub is missing; PEFT imports bitsandbytes too.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Misfit(NamedTuple):
    """A linear whose inputs are no multiple of what its base wants; `align` would make them one, where it can."""

    name: str
    in_features: int
    multiple: int
    align: int | None


class QuantizedLinear(NamedTuple):
    """A linear that was quantised, and its relative error |W~ - W| / |W| (Frobenius)."""

    name: str
    out_features: int
    in_features: int
    error: float


def check_base_options(base: str, group_size: int = 32) -> None:
    """Check the options of `quantize_model` before a model is there.

    Raises:
        BadOption: no such base or group size, or bitsandbytes is not installed.
    """
    if base not in BASES:
        raise BadOption(f"base: expected one of {', '.join(BASES)}, got {base!r}")
    check_group_size(group_size)
    if base == "nf4":
        import_bitsandbytes()


def find_misfits(model: Any, base: Base, group_size: int = 32) -> list[Misfit]:
    """Linears that a base does not take as they are.

    With int4 their last group is padded, which costs memory and nothing else. With nf4 on a CPU `check_base_shapes` refuses
    them. `align` is the option of pruning methods (kept FFN widths are multiples of it) that would fit the linear; None
    where hidden size or heads are what does not divide.

    Args:
        model: dense or cut, not yet quantised.
        base: "none" and, on CUDA, "nf4" have no misfits.
        group_size: of int4.
    """
    check_base_options(base, group_size)
    if base == "none":
        return []
    wanted = _NF4_BLOCK if base == "nf4" else group_size
    down = get_architecture(model.config).down
    found = []
    for linear in list_decoder_linears(model):
        width = get_linear_widths(linear.module)[1]
        if width % wanted and (base == "int4" or get_weight_out_in(linear.module).device.type == "cpu"):
            from_channels = linear.kind == "ffn" and linear.path.split(".")[-1] == down
            found.append(Misfit(linear.name, width, wanted, wanted if from_channels else None))
    return found


def check_base_shapes(model: Any, base: Base, group_size: int = 32) -> None:
    """Raise where a base would be wrong at some width; call it as soon as the model is cut.

    Raises:
        BadOption: no such base or group size, or bitsandbytes is not installed.
        BadQuantisation: nf4 on a CPU with inputs that are no multiple of 64.
    """
    found = find_misfits(model, base, group_size)
    if found and base == "nf4":
        first = found[0]
        remedy = f"cut with align: {first.align}, or " if first.align else ""
        raise BadQuantisation(
            f"{first.name}: nf4 on a CPU: expected inputs in multiples of {first.multiple}, got {first.in_features} "
            f"({len(found)} such linears); {remedy}use base int4 or none"
        )


@torch.no_grad()
def quantize_model(
    model: Any,
    base: Base,
    group_size: int = 32,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
) -> list[QuantizedLinear]:
    """Replace every prunable linear of the decoder layers by a 4-bit one, in place, and freeze the model.

    Embeddings, norms and the output projection stay as they are. Every linear is dequantised and compared with its
    original first. One linear at a time; the full-precision weight is freed as soon as nothing else holds it.

    Args:
        model: dense or cut, without adapters.
        base: "none" leaves the model alone.
        group_size: inputs per group of int4; nf4 has blocks of 64.
        compute_dtype: dtype of the products; None: int4 that of the input, nf4 that of the weight.
        double_quant: nf4's own statistics are quantised too.

    Returns:
        One record per linear, in the order of the layers.

    Raises:
        BadOption: no such base or group size, or bitsandbytes is not installed.
        BadQuantisation: widths that nf4 does not take (nothing was changed then), a model that is quantised or has
            adapters already, or a linear that came out wrong (those before it are replaced).
    """
    check_base_options(base, group_size)
    if base == "none":
        return []
    if has_adapters(model) or get_quantization(model) is not None:
        raise BadQuantisation("quantize: expected a plain model, got adapters or 4-bit linears; quantise once, first")
    check_base_shapes(model, base, group_size)
    model.requires_grad_(False)
    records = []
    names = [linear.name for linear in list_decoder_linears(model)]  # a list of modules would hold all weights
    for name in track_progress(names, f"rounding to {base}", unit="linear"):
        old = find(model, name)
        weight = get_weight_out_in(old)
        if base == "int4":
            new: Any = Int4Linear.from_weight(weight, old.bias, group_size, compute_dtype)
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
        model.is_loaded_in_4bit = True  # PEFT takes its 4-bit adapters where it finds this
    return records


@torch.no_grad()
def dequantize_model(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Make every 4-bit linear a plain one again, in place: what stock formats hold.

    The weights are the rounded ones. For int4 after `lora.merge_adapters`; out of nf4 with adapters goes `lora.merge_into_full_precision`.

    Args:
        model: quantised, without adapters; a plain one is returned as it is.
        dtype: of the weights; None: that of the model's first floating-point parameter.

    Raises:
        BadQuantisation: the model still has adapters.
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
    """What the base costs in memory, for reports.

    Returns:
        trainable_parameters; parameters, adapters included; base_bytes of everything but adapters, with scales, zeros
        and nf4's statistics; bytes_per_base_parameter, where a 4-bit linear counts O I parameters.
    """
    trainable = base = adapters = held = 0
    seen: set[int] = set()  # tied weights, and tables that all nf4 linears share
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            base += module.in_features * module.out_features
            held += sum(_count_bytes(buffer) for buffer in module.buffers(recurse=False))
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            state = getattr(parameter, "quant_state", None)
            count = state.shape.numel() if state is not None else parameter.numel()
            trainable += count if parameter.requires_grad else 0
            if "lora_" in f"{name}.{own}":
                adapters += count
            else:
                base += count
                held += _count_bytes(parameter)
                held += sum(_count_bytes(tensor) for tensor in _collect_nf4_statistics(state) if id(tensor) not in seen)
                seen.update(map(id, _collect_nf4_statistics(state)))
    return {
        "trainable_parameters": trainable,
        "parameters": base + adapters,
        "base_bytes": held,
        "bytes_per_base_parameter": held / base,
    }


def import_bitsandbytes(needed_by: str = "base nf4") -> Any:
    """The package.

    Raises:
        BadOption: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise BadOption(f"{needed_by}: expected bitsandbytes, got {error}: pip install 'prunelit[nf4]'") from error
    return bitsandbytes


def _make_nf4_linear(weight: Tensor, bias: nn.Parameter | None, compute_dtype: torch.dtype, double_quant: bool) -> Any:
    """A linear of bitsandbytes from a weight [O, I], on the weight's device."""
    nn4 = import_bitsandbytes().nn
    rows, width = weight.shape
    linear = nn4.Linear4bit(width, rows, False, compute_dtype, double_quant, "nf4", device="meta")
    # It quantises when it is moved, and `module` is how the linear learns the statistics.
    linear.weight = nn4.Params4bit(
        weight.contiguous(),
        requires_grad=False,
        blocksize=_NF4_BLOCK,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=linear,
    )
    linear.bias = bias
    # Evaluation on some CPUs would put the weights into another order, in bfloat16, for good: then merges are garbage,
    # statistics change with every saved state, and, without double quantisation, all later outputs are wrong.
    linear.support_avx512bf16_for_cpu = False
    return linear.to(weight.device)


def _dequantize_weight(module: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [O, I] that a quantised linear stands for."""
    if isinstance(module, Int4Linear):
        return module.dequantize_weight(dtype or torch.float32)
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise BadQuantisation("dequantised: nf4 weights were packed by an evaluation outside prunelit; load them again")
    weight = import_bitsandbytes().functional.dequantize_4bit(module.weight.data, state)
    return cast(Tensor, weight.to(dtype or weight.dtype))


def _measure_relative_error(weight: Tensor, other: Tensor) -> float:
    difference, norm = (other.float() - weight.float()).norm().item(), weight.float().norm().item()
    return difference / norm if norm else difference


def _check_relative_error(record: QuantizedLinear, base: str, bound: float) -> None:
    if not record.error <= bound:  # NaN too
        remedy = "cut with align: 64, or use base int4 or none" if base == "nf4" else "use base none"
        raise BadQuantisation(
            f"{record.name}: {base}: expected weights within a relative error of {bound:.3f} after quantising, got "
            f"{record.error:.3f} at {record.in_features} inputs and {record.out_features} outputs; {remedy}"
        )


def _make_plain_linear(module: Any, dtype: torch.dtype) -> nn.Module:
    """A plain linear (or Conv1D, where it was one) with the weight of a quantised one."""
    from transformers.pytorch_utils import Conv1D

    weight = _dequantize_weight(module, dtype)
    turned = getattr(module, CONV1D_MARK, False)
    linear: Any = Conv1D(1, 1) if turned else nn.Linear(1, 1, bias=module.bias is not None, device="meta")
    linear.requires_grad_(False)
    set_linear(linear, weight.T.contiguous() if turned else weight.contiguous(), _cast_bias(module.bias, dtype))
    return cast(nn.Module, linear)


def _cast_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.detach().to(dtype)


def _count_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _collect_nf4_statistics(state: Any) -> list[Tensor]:
    """Tensors that an nf4 weight needs beside its codes."""
    inner = getattr(state, "state2", None)
    found = [getattr(part, name, None) for part in (state, inner) for name in ("absmax", "code", "offset")]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]

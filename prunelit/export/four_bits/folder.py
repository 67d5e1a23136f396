"""What the formats in 4 bits share: a model in groups of 4-bit codes is written in one of the layouts of files.

A model in 4 bits is written with exactly its codes, scales and zeros; no linear is unpacked. Class and modelling file
are chosen as for plain weights (`uniform` or `hetero`).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.core.architectures import get_architecture, has_experts
from prunelit.export import hetero, uniform
from prunelit.export.formats import ExportJob
from prunelit.export.proof import compare
from prunelit.model.per_layer import find
from prunelit.model.quiet import silence_transformers
from prunelit.model.stored.folder import read_model_config
from prunelit.quantization import int4_folder, views
from prunelit.quantization.int4 import Int4Linear
from prunelit.quantization.int4_layouts import Int4Layout
from prunelit.quantization.linears import get_linear_widths, get_quantization, list_decoder_linears
from prunelit.runtime.errors import BadQuantisation, DoesNotFit

# Relative: sums over added channels of zeros are rounded in another order.
_FLOAT32_TOLERANCE = 1e-4
# Units in the last place: the folder rounds scales and zeros to the dtype, memory rounds the unpacked weights.
_HALF_PRECISION_ULPS = 8


def write_4_bits(job: ExportJob, format: str, layout: Int4Layout) -> dict[str, Any]:
    """Write an int4 model without adapters.

    Args:
        job: the model, and the folder to write to.
        format: name of the format, for messages.
        layout: of the files.

    Scales and zeros take the dtype of the rest of the model, in which readers make plain linears. Where the FFN width
    is no multiple of the group size, channels of zeros are added, which changes no output.

    Returns:
        {"note", "size", "group_size", "added_channels": the largest number added to a layer, "bytes_per_weight"}.

    Raises:
        DoesNotFit: the model is not in 4 bits, or no group size fits its widths.

    Example: see `prunelit.export.four_bits.int4`, which uses it.
    """
    model, size = job.model, find_group_size(job.model, format, layout)
    plain_view = views.view_as_plain_linears(model, size)
    stock = uniform.build_stock_model(plain_view)
    like = next(p for p in model.parameters() if p.is_floating_point())
    shell = (hetero.build_per_layer_model(plain_view) if stock is None else stock).to(like.dtype)
    weights, facts = _collect_int4_tensors(model, plain_view, size, layout)
    state, in_4_bits = model.state_dict(), {linear.name for linear in list_decoder_linears(model)}
    for name, empty in shell.state_dict().items():
        if name not in weights and name.removesuffix(".weight") not in in_4_bits:
            weights[name] = state[name] if name in state else like.new_zeros(empty.shape)
    plain_linears = [
        name for name, module in shell.named_modules() if isinstance(module, nn.Linear) and name not in in_4_bits
    ]
    shell.config.quantization_config = layout.make_settings(size, plain_linears)
    shell.generation_config = model.generation_config
    with silence_transformers():
        shell.save_pretrained(job.path, state_dict=weights, max_shard_size=job.max_shard_size)
    if stock is None:
        hetero.add_modelling_file(plain_view, job.path)
    note = f"INT4 in groups of {size}, {facts['bytes_per_weight']:.3g} bytes for each weight of the layers' linears"
    if facts["added_channels"]:
        note += f"; up to {facts['added_channels']} FFN channels of zeros were added to fill the groups of a layer"
    return {"note": note, "size": metrics.measure_model_size(plain_view), "group_size": size, **facts}


def find_group_size(model: Any, format: str, layout: Int4Layout) -> int:
    """Find the group size in which an int4 model is written; its shapes are checked.

    Args:
        model: without adapters.
        format: name of the format, for messages.
        layout: of the files.

    Raises:
        DoesNotFit: the model is a mixture of experts, or not in 4 bits; or the layout has no group size that divides
            the widths and the model's own groups, or takes another number of rows.

    Example: see `write_4_bits`.
    """
    if has_experts(model.config):
        raise DoesNotFit(
            f"format {format!r}: expected weights in linears only, got a mixture of experts, whose tensors are not "
            "written in 4 bits; use format 'uniform' or 'hetero'"
        )
    if get_quantization(model) != "int4":
        raise DoesNotFit(
            f"format {format!r}: expected linears in 4 bits, got plain ones; quantise first: "
            f"`python -m prunelit export --format {format}`, or prunelit.quantization.quantize.quantize_model"
        )
    try:
        size = int4_folder.find_common_group_size(model)
    except BadQuantisation as error:
        raise DoesNotFit(f"format {format!r}: {error}") from error
    if layout.group_sizes is None:
        return size
    if not (sizes := [each for each in layout.group_sizes if size % each == 0]):
        raise DoesNotFit(
            f"format {format!r}: expected inputs and groups in multiples of {layout.group_sizes[0]}, got such of "
            f"{size}; use format int4"
        )
    for linear in list_decoder_linears(views.view_as_plain_linears(model, sizes[-1])):  # with added FFN channels
        if (rows := get_linear_widths(linear.module)[0]) % layout.rows_per_word:
            raise DoesNotFit(
                f"format {format!r}: {linear.name}: expected outputs in multiples of {layout.rows_per_word}, got "
                f"{rows}; use format int4"
            )
    return sizes[-1]


def _collect_int4_tensors(
    model: Any, plain_view: Any, size: int, layout: Int4Layout
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect the tensors of the 4-bit linears.

    Args:
        model: the int4 model.
        plain_view: the same model with plain linears on the meta device, in the widths that are written.
        size: group size.
        layout: of the files.

    Returns:
        Tensors by name, and {"added_channels", "bytes_per_weight"}.
    """
    fused = get_architecture(model.config).fused_gate_up
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tensors: dict[str, Tensor] = {}
    added_channels = weight_count = byte_count = 0
    for linear in list_decoder_linears(model):
        target = find(plain_view, linear.name)
        parts = 2 if fused and linear.path.split(".")[-1] == fused else 1
        module = cast(Int4Linear, linear.module)
        linear_tensors = int4_folder.make_int4_tensors(
            module, size, target.out_features, target.in_features, parts, dtype, layout
        )
        tensors |= {f"{linear.name}.{suffix}": value for suffix, value in linear_tensors.items()}
        added_channels = max(added_channels, target.in_features - module.in_features)
        weight_count += module.in_features * module.out_features
        byte_count += sum(value.nbytes for value in linear_tensors.values())
    return tensors, {"added_channels": added_channels, "bytes_per_weight": byte_count / weight_count}


def prove_4_bits(job: ExportJob) -> dict[str, Any]:
    """Compare the folder with the model in memory, which computes with unpacked codes.

    In float32 the limit is 1e-4 of the largest logit. In half precision the folder's scales and zeros are rounded once
    more, and the limit is 8 units in the last place of the largest logit.

    Returns:
        The verdict, see `prove_folder`.

    Raises:
        NotProved: the folder cannot be loaded.

    Example: see `prunelit.export.four_bits.int4`, which uses it.
    """
    dtype = next(p.dtype for p in job.model.parameters() if p.is_floating_point())
    config = read_model_config(job.path)
    tolerance = _FLOAT32_TOLERANCE if dtype == torch.float32 else _HALF_PRECISION_ULPS * torch.finfo(dtype).eps
    return compare.prove_folder(job, "auto_map" in config, placed=True, tolerance=tolerance)

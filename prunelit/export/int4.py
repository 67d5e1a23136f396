"""Format int4: groups of 4-bit codes, in a layout that transformers reads without a quantisation package.

The layout is that of `prunelit.quantization.int4_folder`. A model in 4 bits is written with exactly its codes, scales
and zeros; no linear is unpacked. Class and modelling file are chosen as for plain weights (`uniform` or `hetero`).
"""

from typing import Any, cast

import torch
from torch import Tensor

from prunelit.calibration import metrics
from prunelit.core.architectures import get_architecture, has_experts
from prunelit.export import hetero, uniform
from prunelit.export.formats import ExportJob, Format
from prunelit.export.proof import compare
from prunelit.model.per_layer import find
from prunelit.model.quiet import silence_transformers
from prunelit.model.stored.folder import read_model_config
from prunelit.quantization import int4_folder, views
from prunelit.quantization.int4 import Int4Linear
from prunelit.quantization.linears import get_quantization, list_decoder_linears
from prunelit.runtime.errors import BadQuantisation, DoesNotFit

# Relative: sums over added channels of zeros are rounded in another order.
_FLOAT32_TOLERANCE = 1e-4
# Units in the last place: the folder rounds scales and zeros to the dtype, memory rounds the unpacked weights.
_HALF_PRECISION_ULPS = 8


def write_int4(job: ExportJob) -> dict[str, Any]:
    """Write an int4 model without adapters.

    Scales and zeros take the dtype of the rest of the model, in which readers make plain linears. Where the FFN width
    is no multiple of the group size, channels of zeros are added, which changes no output.

    Returns:
        {"note", "size", "group_size", "added_channels": the largest number added to a layer, "bytes_per_weight"}.

    Raises:
        DoesNotFit: the model is not in 4 bits, or no group size fits its widths.

    Example: `prunelit.export.write_model(quantized_model, "folder", tokenizer, format="int4")` calls it.
    """
    model, size = job.model, _get_group_size(job.model)
    plain_view = views.view_as_plain_linears(model, size)
    stock = uniform.build_stock_model(plain_view)
    shell = hetero.build_per_layer_model(plain_view) if stock is None else stock
    weights, facts = _collect_int4_tensors(model, plain_view, size)
    like, state = next(p for p in model.parameters() if p.is_floating_point()), model.state_dict()
    for name, empty in shell.state_dict().items():
        if name not in weights:
            weights[name] = state[name] if name in state else like.new_zeros(empty.shape)
    head_names = [name for name, module in shell.named_modules() if module is shell.get_output_embeddings()]
    shell.config.quantization_config = {
        "quant_method": int4_folder.QUANT_METHOD,
        "bits": 4,
        "group_size": size,
        "modules_to_not_convert": head_names,
    }
    shell.generation_config = model.generation_config
    with silence_transformers():
        shell.save_pretrained(job.path, state_dict=weights, max_shard_size=job.max_shard_size)
    if stock is None:
        hetero.add_modelling_file(plain_view, job.path)
    note = f"INT4 in groups of {size}, {facts['bytes_per_weight']:.3g} bytes for each weight of the layers' linears"
    if facts["added_channels"]:
        note += f"; up to {facts['added_channels']} FFN channels of zeros were added to fill the groups of a layer"
    return {"note": note, "size": metrics.measure_model_size(plain_view), "group_size": size, **facts}


def check_int4(model: Any, tokenizer: Any) -> None:
    """Check that `write_int4` can write a model.

    Raises:
        DoesNotFit: see `write_int4`.

    Example: `check_int4` is used further down in this module.
    """
    _get_group_size(model)


def _get_group_size(model: Any) -> int:
    """Return the group size of an int4 model.

    Raises:
        DoesNotFit: the model is a mixture of experts, or not in 4 bits, or its linears have no group size in common.
    """
    if has_experts(model.config):
        raise DoesNotFit(
            "format 'int4': expected weights in linears only, got a mixture of experts, whose tensors no reader takes "
            "in 4 bits; use format 'uniform' or 'hetero'"
        )
    if get_quantization(model) != "int4":
        raise DoesNotFit(
            "format 'int4': expected linears in 4 bits, got plain ones; quantise first: "
            "prunelit.quantization.quantize.quantize_model(model, 'int4'), or `python -m prunelit export --format int4`"
        )
    try:
        return int4_folder.find_common_group_size(model)
    except BadQuantisation as error:
        raise DoesNotFit(f"format 'int4': {error}") from error


def _collect_int4_tensors(model: Any, plain_view: Any, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect the tensors of the 4-bit linears.

    Args:
        model: the int4 model.
        plain_view: the same model with plain linears on the meta device, in the widths that are written.
        size: group size.

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
            module, size, target.out_features, target.in_features, parts, dtype
        )
        tensors |= {f"{linear.name}.{suffix}": value for suffix, value in linear_tensors.items()}
        added_channels = max(added_channels, target.in_features - module.in_features)
        weight_count += module.in_features * module.out_features
        byte_count += sum(value.nbytes for value in linear_tensors.values())
    return tensors, {"added_channels": added_channels, "bytes_per_weight": byte_count / weight_count}


def prove_int4(job: ExportJob) -> dict[str, Any]:
    """Compare the folder with the model in memory, which computes with unpacked codes.

    In float32 the limit is 1e-4 of the largest logit. In half precision the folder's scales and zeros are rounded once
    more, and the limit is 8 units in the last place of the largest logit.

    Returns:
        The verdict, see `prove_folder`.

    Raises:
        NotProved: the folder cannot be loaded.

    Example: `prove_int4` is used further down in this module.
    """
    dtype = next(p.dtype for p in job.model.parameters() if p.is_floating_point())
    config = read_model_config(job.path)
    tolerance = _FLOAT32_TOLERANCE if dtype == torch.float32 else _HALF_PRECISION_ULPS * torch.finfo(dtype).eps
    return compare.prove_folder(job, "auto_map" in config, placed=True, tolerance=tolerance)


_LOAD_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

# A device must be named; trust_remote_code only where layers differ in shape. prunelit.load("PATH") needs neither.
model = AutoModelForCausalLM.from_pretrained("PATH", device_map="cpu", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)"""

FORMAT = Format("int4", _LOAD_SNIPPET, write_int4, prove_int4, check=check_int4)

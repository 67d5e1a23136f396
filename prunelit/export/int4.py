"""int4: 4-bit groups in a layout that transformers reads without a package for quantisation (`prunelit.quantization.int4_folder`).

A model in 4 bits is written with the very codes, scales and zeros that it has; no linear is unpacked. Under which
class, and with which modelling file, is decided as for plain weights.
"""

from typing import Any, cast

import torch
from torch import Tensor

from prunelit.calibration import metrics
from prunelit.core.architectures import get_architecture
from prunelit.export import hetero, uniform
from prunelit.export.formats import ExportJob, Format
from prunelit.export.proof import compare
from prunelit.model.folder import read_model_config
from prunelit.model.per_layer import find
from prunelit.model.quiet import silence_transformers
from prunelit.quantization import int4_folder, views
from prunelit.quantization.int4 import Int4Linear
from prunelit.quantization.linears import get_quantization, list_decoder_linears
from prunelit.runtime.errors import BadQuantisation, DoesNotFit

_FLOAT32_TOLERANCE = 1e-4  # relative; sums over added channels are rounded in another order
_HALF_PRECISION_ULPS = (
    8  # units in the last place: scales and zeros are rounded to the dtype, weights in memory after they are unpacked
)


def write_int4(job: ExportJob) -> dict[str, Any]:
    """Write an int4 model, without adapters.

    Scales and zeros take the dtype of the rest of the model: readers make plain linears in it. Where FFN widths are no
    multiple of the group, channels of zeros are added, which changes no output.

    Raises:
        DoesNotFit: the model is not in 4 bits, or no group size fits its widths.
    """
    model, size = job.model, _get_group_size(job.model)
    wide = views.view_as_plain_linears(model, size)
    stock = uniform.build_stock_model(wide)
    shell = hetero.build_per_layer_model(wide) if stock is None else stock
    weights, facts = _collect_int4_tensors(model, wide, size)
    like, own = next(p for p in model.parameters() if p.is_floating_point()), model.state_dict()
    for name, empty in shell.state_dict().items():
        if name not in weights:
            weights[name] = own[name] if name in own else like.new_zeros(empty.shape)
    head = [name for name, module in shell.named_modules() if module is shell.get_output_embeddings()]
    shell.config.quantization_config = {
        "quant_method": int4_folder.QUANT_METHOD,
        "bits": 4,
        "group_size": size,
        "modules_to_not_convert": head,
    }
    shell.generation_config = model.generation_config
    with silence_transformers():
        shell.save_pretrained(job.path, state_dict=weights, max_shard_size=job.max_shard_size)
    if stock is None:
        hetero.add_modelling_file(wide, job.path)
    note = f"INT4 in groups of {size}, {facts['bytes_per_weight']:.3g} bytes for each weight of the layers' linears"
    if facts["added_channels"]:
        note += f"; up to {facts['added_channels']} FFN channels of zeros were added to fill the groups of a layer"
    return {"note": note, "size": metrics.measure_model_size(wide), "group_size": size, **facts}


def check_int4(model: Any, tokenizer: Any) -> None:
    """As `write_int4`, without writing."""
    _get_group_size(model)


def _get_group_size(model: Any) -> int:
    if get_quantization(model) != "int4":
        raise DoesNotFit(
            "format 'int4': expected linears in 4 bits, got plain ones; quantise first: "
            "prunelit.quantization.quantize.quantize_model(model, 'int4'), or `python -m prunelit export --format int4`"
        )
    try:
        return int4_folder.find_common_group_size(model)
    except BadQuantisation as error:
        raise DoesNotFit(f"format 'int4': {error}") from error


def _collect_int4_tensors(model: Any, wide: Any, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the 4-bit linears by name, and what they cost."""
    fused = get_architecture(model.config).fused_gate_up
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    found: dict[str, Tensor] = {}
    added = count = held = 0
    for linear in list_decoder_linears(model):
        target = find(wide, linear.name)
        parts = 2 if fused and linear.path.split(".")[-1] == fused else 1
        module = cast(Int4Linear, linear.module)
        own = int4_folder.make_int4_tensors(module, size, target.out_features, target.in_features, parts, dtype)
        found |= {f"{linear.name}.{last}": value for last, value in own.items()}
        added = max(added, target.in_features - module.in_features)
        count += module.in_features * module.out_features
        held += sum(value.nbytes for value in own.values())
    return found, {"added_channels": added, "bytes_per_weight": held / count}


def prove_int4(job: ExportJob) -> dict[str, Any]:
    """Compare with the model in memory, whose products are those of unpacked codes.

    In float32 the limit is 1e-4 of the largest logit. In half precision scales and zeros are rounded once more.
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

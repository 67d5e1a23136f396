"""int4: 4-bit groups in a layout that transformers reads without a package for quantisation (`prunelit.quantization.int4_folder`).

A model in 4 bits is written with the very codes, scales and zeros that it has; no linear is unpacked. Under which
class, and with which modelling file, is decided as for plain weights.
"""

from typing import Any, cast

import torch
from torch import Tensor

from prunelit.calibration import metrics
from prunelit.core.architectures import architecture_of
from prunelit.export import hetero, uniform
from prunelit.export.formats import Format, Job
from prunelit.export.proof import compare
from prunelit.model.folder import settings
from prunelit.model.per_layer import find
from prunelit.model.quiet import quiet
from prunelit.quantization import int4_folder, views
from prunelit.quantization.int4 import Int4Linear
from prunelit.quantization.linears import decoder_linears, quantised_as
from prunelit.runtime.errors import BadQuantisation, DoesNotFit

_EXACT = 1e-4  # relative; sums over added channels are rounded in another order
_HALF = (
    8  # units in the last place: scales and zeros are rounded to the dtype, weights in memory after they are unpacked
)


def write(job: Job) -> dict[str, Any]:
    """Write an int4 model, without adapters.

    Scales and zeros take the dtype of the rest of the model: readers make plain linears in it. Where FFN widths are no
    multiple of the group, channels of zeros are added, which changes no output.

    Raises:
        DoesNotFit: the model is not in 4 bits, or no group size fits its widths.
    """
    model, size = job.model, _group_size(job.model)
    wide = views.plain(model, size)
    stock = uniform.stock_model(wide)
    shell = hetero.per_layer_model(wide) if stock is None else stock
    weights, facts = _weights(model, wide, size)
    like, own = next(p for p in model.parameters() if p.is_floating_point()), model.state_dict()
    for name, empty in shell.state_dict().items():
        if name not in weights:
            weights[name] = own[name] if name in own else like.new_zeros(empty.shape)
    head = [name for name, module in shell.named_modules() if module is shell.get_output_embeddings()]
    shell.config.quantization_config = {
        "quant_method": int4_folder.METHOD,
        "bits": 4,
        "group_size": size,
        "modules_to_not_convert": head,
    }
    shell.generation_config = model.generation_config
    with quiet():
        shell.save_pretrained(job.place, state_dict=weights, max_shard_size=job.max_shard_size)
    if stock is None:
        hetero.add_modelling_file(wide, job.place)
    note = f"INT4 in groups of {size}, {facts['bytes_per_weight']:.3g} bytes for each weight of the layers' linears"
    if facts["added_channels"]:
        note += f"; up to {facts['added_channels']} FFN channels of zeros were added to fill the groups of a layer"
    return {"note": note, "size": metrics.size(wide), "group_size": size, **facts}


def check(model: Any, tokenizer: Any) -> None:
    """As `write`, without writing."""
    _group_size(model)


def _group_size(model: Any) -> int:
    if quantised_as(model) != "int4":
        raise DoesNotFit(
            "format 'int4': expected linears in 4 bits, got plain ones; quantise first: "
            "prunelit.quantization.quantize.quantize(model, 'int4'), or `python -m prunelit export --format int4`"
        )
    try:
        return int4_folder.group_size(model)
    except BadQuantisation as error:
        raise DoesNotFit(f"format 'int4': {error}") from error


def _weights(model: Any, wide: Any, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the 4-bit linears by name, and what they cost."""
    fused = architecture_of(model.config).fused_gate_up
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    found: dict[str, Tensor] = {}
    added = count = held = 0
    for linear in decoder_linears(model):
        target = find(wide, linear.name)
        parts = 2 if fused and linear.path.split(".")[-1] == fused else 1
        module = cast(Int4Linear, linear.module)
        own = int4_folder.tensors(module, size, target.out_features, target.in_features, parts, dtype)
        found |= {f"{linear.name}.{last}": value for last, value in own.items()}
        added = max(added, target.in_features - module.in_features)
        count += module.in_features * module.out_features
        held += sum(value.nbytes for value in own.values())
    return found, {"added_channels": added, "bytes_per_weight": held / count}


def prove(job: Job) -> dict[str, Any]:
    """Compare with the model in memory, whose products are those of unpacked codes.

    In float32 the limit is 1e-4 of the largest logit. In half precision scales and zeros are rounded once more.
    """
    dtype = next(p.dtype for p in job.model.parameters() if p.is_floating_point())
    config = settings(job.place)
    tolerance = _EXACT if dtype == torch.float32 else _HALF * torch.finfo(dtype).eps
    return compare.prove(job, "auto_map" in config, placed=True, tolerance=tolerance)


_LOADS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

# A device must be named; trust_remote_code only where layers differ in shape. prunelit.load("PATH") needs neither.
model = AutoModelForCausalLM.from_pretrained("PATH", device_map="cpu", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)"""

FORMAT = Format("int4", _LOADS, write, prove, check=check)

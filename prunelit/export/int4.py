"""INT4 groups in a layout that transformers reads without another package (`prunelit.int4_folder`).

A model in full precision is rounded to nearest first, which loses; an INT4 model is written with the very codes, scales
and zeros that it has. Under which class, and with which modelling file, is decided as for plain weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from prunelit import int4_folder, models, twin
from prunelit.architectures import architecture_of
from prunelit.export import hetero, uniform
from prunelit.hetero import find
from prunelit.int4 import Int4Linear
from prunelit.linears import decoder_linears


def write(model: Any, folder: Path, max_shard_size: str = "5GB") -> dict[str, Any]:
    """Write an int4 model (no adapters) into an empty folder.

    Scales and zeros take the dtype of the rest of the model: readers make plain linears in it. Where FFN widths are no
    multiple of the group, channels of zeros are added, which changes no output.

    Returns:
        {"group_size", "added_channels", "bytes_per_weight" (of the 4-bit linears), "remote_code"}.

    Raises:
        BadQuantisation: no group size fits its widths.
        PrunelitError: no class holds its shapes.
    """
    size = int4_folder.group_size(model)
    wide = twin.plain(model, size)
    stock = uniform.stock_model(wide)
    shell = hetero.per_layer_model(wide) if stock is None else stock
    weights, facts = _weights(model, wide, size)
    like = next(p for p in model.parameters() if p.is_floating_point())
    own = model.state_dict()
    for name, empty in shell.state_dict().items():
        if name not in weights and f"{name.removesuffix('weight')}scales" not in weights:
            weights[name] = own[name] if name in own else like.new_zeros(empty.shape)
    head = [name for name, module in shell.named_modules() if module is shell.get_output_embeddings()]
    shell.config.quantization_config = {
        "quant_method": int4_folder.METHOD,
        "bits": 4,
        "group_size": size,
        "modules_to_not_convert": head,
    }
    shell.generation_config = model.generation_config
    with models.quiet():
        shell.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    if stock is None:
        hetero.add_modelling_file(wide, folder)
    return {"group_size": size, "remote_code": stock is None, **facts}


def _weights(model: Any, wide: Any, size: int) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
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

"""The prunable linears of a model, by layer and block: plain, quantised, or with adapters on them."""

from typing import Any, Literal, NamedTuple

from torch import nn

from prunelit.core.architectures import get_architecture
from prunelit.model.decoder import is_conv1d
from prunelit.model.per_layer import find
from prunelit.quantization.int4 import GroupLora, Int4Linear
from prunelit.runtime.errors import DeclarationMismatch

LinearKind = Literal["attention", "ffn"]


class DecoderLinear(NamedTuple):
    """A prunable linear: number of its layer, its block, path below the layer, path below the model, module."""

    layer: int
    kind: LinearKind
    path: str
    name: str
    module: nn.Module


def list_decoder_linears(model: Any) -> list[DecoderLinear]:
    """The prunable linears of a causal LM's layers in order: plain, quantised or with adapters; no removed blocks.

    Args:
        model: transformers model, or the PEFT model around it; paths are those of the former.

    Raises:
        UnknownArchitecture: no declaration for the model.
        DeclarationMismatch: no decoder layers where the declaration has them.
    """
    model = unwrap_peft_model(model)
    names = get_architecture(model.config)
    layers = find(model, names.layers)
    if not isinstance(layers, nn.ModuleList):
        raise DeclarationMismatch(
            f"{type(model).__name__}: expected a list of decoder layers at {names.layers!r}, "
            f"got {type(layers).__name__}; pass a causal LM, or correct the entry in prunelit/core/architectures.py"
        )
    qkv = (names.fused_qkv,) if names.fused_qkv else (names.query, names.key, names.value)
    ffn_in = (names.fused_gate_up,) if names.fused_gate_up else (names.gate, names.up)
    below = names.mlp and f"{names.mlp}."
    paths: list[tuple[LinearKind, str]] = [("attention", f"{names.attention}.{name}") for name in (*qkv, names.output)]
    paths += [("ffn", f"{below}{name}") for name in (*ffn_in, names.down) if name]
    return [
        DecoderLinear(index, kind, path, f"{names.layers}.{index}.{path}", module)
        for index, layer in enumerate(layers)
        for kind, path in paths
        if (module := find(layer, path)) is not None
        and not isinstance(module, nn.Identity)
        and not getattr(module, "prunelit_removed", False)
    ]


def get_linear_widths(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear: plain, Conv1D, quantised or with an adapter."""
    if is_conv1d(module):
        return module.nf, module.nx
    return module.out_features, module.in_features


def has_adapters(model: Any) -> bool:
    """Whether a model carries adapters: PEFT's, or those of int4."""
    return hasattr(model, "peft_config") or any(isinstance(module, GroupLora) for module in model.modules())


def get_quantization(model: nn.Module) -> Literal["nf4", "int4"] | None:
    """What a model's linears were quantised to; None where they are plain."""
    for module in model.modules():
        if isinstance(module, Int4Linear):
            return "int4"
        if is_nf4(module):
            return "nf4"
    return None


def unwrap_peft_model(model: Any) -> Any:
    """The transformers model below PEFT's."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def is_nf4(module: nn.Module) -> bool:
    """bitsandbytes' linear, and not PEFT's of the same name around it; told without importing either."""
    return type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer")

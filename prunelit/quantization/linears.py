"""Lists what adapters and 4-bit bases replace: the prunable linears of a model by layer and block, whether plain,
quantised or with adapters; and its mixtures of experts, whose weights are tensors and not linears."""

from typing import Any, Literal, NamedTuple, TypeVar

from torch import nn

from prunelit.core.architectures import Architecture
from prunelit.model.decoder import find_architecture, is_conv1d
from prunelit.model.per_layer import find, resolve_layer_names
from prunelit.quantization.int4 import GroupLora, Int4Linear
from prunelit.runtime.errors import DeclarationMismatch

LinearKind = Literal["attention", "ffn"]
Model = TypeVar("Model", bound=nn.Module)


class DecoderLinear(NamedTuple):
    """A prunable linear.

    Attributes:
        layer: number of its layer.
        kind: its block.
        path: path below the layer.
        name: path below the model.
        module: the linear, or the adapter around it.

    Example: see `prunelit.quantization.int4_folder`, which uses it.
    """

    layer: int
    kind: LinearKind
    path: str
    name: str
    module: nn.Module


class DecoderMixture(NamedTuple):
    """The mixture of experts of a layer, by name.

    Attributes:
        layer: number of the layer.
        prefix: path of the layer below the model.
        experts: path below the layer of the module that holds the weights of all experts.
        router: path below the layer of the module that chooses experts.
        tensors: names of the weights in `experts`, in the order of computing.
        module: the layer.

    Example: see `list_decoder_mixtures`.
    """

    layer: int
    prefix: str
    experts: str
    router: str
    tensors: tuple[str, ...]
    module: nn.Module


def list_decoder_linears(model: nn.Module) -> list[DecoderLinear]:
    """List the prunable linears of a causal LM, layer by layer; removed blocks have none.

    Args:
        model: transformers model, or the PEFT model around it; the paths are those of the transformers model.

    Raises:
        UnknownArchitecture: no declaration for the model.
        DeclarationMismatch: the model has no decoder layers where the declaration says.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> [linear.path for linear in list_decoder_linears(LlamaForCausalLM(LlamaConfig(**sizes)))][-2:]
        ['mlp.up_proj', 'mlp.down_proj']
    """
    names, layers = _find_layers(model)
    return [
        DecoderLinear(index, kind, path, f"{names.layers}.{index}.{path}", module)
        for index, layer in enumerate(layers)
        for kind, path in _list_linear_paths(resolve_layer_names(layer, names))
        if (module := find(layer, path)) is not None
        and not isinstance(module, nn.Identity)
        and not getattr(module, "prunelit_removed", False)
    ]


def list_decoder_mixtures(model: nn.Module) -> list[DecoderMixture]:
    """List the mixtures of experts of a causal LM, layer by layer; removed ones are left out.

    Args:
        model: as for `list_decoder_linears`.

    Raises:
        UnknownArchitecture, DeclarationMismatch: as for `list_decoder_linears`.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes))
        >>> [(mixture.experts, mixture.tensors) for mixture in list_decoder_mixtures(model)]
        [('mlp.experts', ('gate_up_proj', 'down_proj'))]
    """
    names, layers = _find_layers(model)
    mixtures = []
    for index, layer in enumerate(layers):
        mixture = resolve_layer_names(layer, names).mixture
        if mixture is not None:
            experts, router = f"{mixture.block}.{mixture.experts}", f"{mixture.block}.{mixture.router}"
            tensors = (mixture.gate_up, mixture.down)
            mixtures.append(DecoderMixture(index, f"{names.layers}.{index}", experts, router, tensors, layer))
    return mixtures


def _find_layers(model: nn.Module) -> tuple[Architecture, nn.ModuleList]:
    """Find the declaration of a model, which PEFT may have wrapped, and its decoder layers."""
    model = unwrap_peft_model(model)
    names = find_architecture(model)
    layers = find(model, names.layers)
    if not isinstance(layers, nn.ModuleList):
        raise DeclarationMismatch(
            f"{type(model).__name__}: expected a list of decoder layers at {names.layers!r}, "
            f"got {type(layers).__name__}; pass a causal LM, or correct the entry in prunelit/core/architectures.py"
        )
    return names, layers


def _list_linear_paths(names: Architecture) -> list[tuple[LinearKind, str]]:
    """List the paths of the linears below a layer; not every layer has each of them."""
    qkv = (names.fused_qkv,) if names.fused_qkv else (names.query, names.key, names.value)
    ffn_in = (names.fused_gate_up,) if names.fused_gate_up else (names.gate, names.up)
    prefix = names.mlp and f"{names.mlp}."
    paths: list[tuple[LinearKind, str]] = [("attention", f"{names.attention}.{name}") for name in (*qkv, names.output)]
    return paths + [("ffn", f"{prefix}{name}") for name in (*ffn_in, names.down) if name]


def get_linear_widths(module: nn.Module) -> tuple[int, int]:
    """Get outputs and inputs of a linear: plain, Conv1D, quantised or with an adapter.

    Example:
        >>> get_linear_widths(nn.Linear(in_features=2, out_features=3))
        (3, 2)
    """
    linear: Any = module  # torch knows the type of no attribute
    if is_conv1d(module):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters: PEFT's, or those on INT4 linears.

    Example:
        >>> has_adapters(nn.Linear(2, 2))
        False
    """
    return hasattr(model, "peft_config") or any(isinstance(module, GroupLora) for module in model.modules())


def clear_adapter_mark(model: Model) -> Model:
    """Remove what PEFT before 0.19 leaves on a model whose adapters were merged or removed, and return the model.

    Args:
        model: without adapters.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> linear.peft_config = {}
        >>> hasattr(clear_adapter_mark(linear), "peft_config")
        False
    """
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def get_quantization(model: nn.Module) -> Literal["nf4", "int4"] | None:
    """Get the format that a model's linears are quantised to; None if they are plain.

    Example:
        >>> get_quantization(nn.Sequential(Int4Linear(32, 4)))
        'int4'
    """
    for module in model.modules():
        if isinstance(module, Int4Linear):
            return "int4"
        if is_nf4(module):
            return "nf4"
    return None


def unwrap_peft_model(model: nn.Module) -> nn.Module:
    """Get the transformers model below a PEFT model; any other model is returned as it is.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> unwrap_peft_model(linear) is linear
        True
    """
    peft_model: Any = model  # torch knows the type of no attribute
    return peft_model.get_base_model() if hasattr(model, "peft_config") else model


def is_nf4(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' 4-bit linear, and not PEFT's adapter of the same name around it.

    Example:
        >>> is_nf4(nn.Linear(2, 2))
        False
    """
    # By name, because bitsandbytes is optional and slow to import.
    return type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer")

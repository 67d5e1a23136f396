"""Which stock transformers class, if any, holds a cut model."""

import copy
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from prunelit.architectures import PRUNED
from prunelit.decoder import Decoder
from prunelit.hetero import ADDED_BIASES

# What configs and models raise on widths that they can not have.
_REFUSED = (ValueError, TypeError, RuntimeError, AttributeError, StrictDataclassError)


def stock_base(kind: type) -> Any:
    """The transformers class that a (possibly already pruned) model class stands on."""
    return next(base for base in kind.__mro__ if base.__module__.startswith("transformers.models."))


def stock_model(model: nn.Module) -> Any:
    """A stock class built with the cut widths on the meta device, whose parameter shapes equal the model's.

    The model's own class is tried first. A Llama whose heads no longer divide the hidden size is a Mistral: the same
    computation, and a config that accepts any number of heads. Where output projections were given biases, and the
    family's config can have biases, it is told so; the class then has more of them, which are zeros in the file.

    Returns:
        The model on the meta device, or None where no stock class fits.
    """
    import transformers

    decoder = Decoder(model)
    shapes = {(s.query_heads, s.kv_groups, s.head_dim, s.ffn_channels) for s in (layer.shape for layer in decoder)}
    if len(shapes) != 1:
        return None
    heads, groups, dim, channels = shapes.pop()
    if not heads or not channels:
        return None
    names = decoder.architecture
    widths = {names.config_heads: heads, names.config_kv_heads: groups, names.config_ffn: channels}
    build: Any = type(model)
    config = copy.deepcopy(cast(Any, model.config))
    if str(config.model_type).startswith(PRUNED):  # it was read from a folder with per-layer shapes
        build = stock_base(build)
        own = ("per_layer_config", "model_type", "architectures", "auto_map", ADDED_BIASES)
        settings = {name: value for name, value in config.to_dict().items() if name not in own}
        try:
            config = build.config_class.from_dict(settings | widths)
        except _REFUSED:
            return None
    for name, value in widths.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if not isinstance(getattr(type(config), "head_dim", None), property):
        config.head_dim = widths["head_dim"] = dim  # many families read it if it is there; the others show below
    candidates = [(build, config)]
    if config.model_type == "llama":
        settings = config.to_dict() | widths | {"sliding_window": None}
        for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
            settings.pop(name, None)
        candidates.append((transformers.MistralForCausalLM, transformers.MistralConfig(**settings)))
    for kind, candidate in candidates:
        shell = fits(kind, candidate, model)
        if shell is not None:
            return shell
    linears = [(names.config_attention_bias, layer.output) for layer in decoder]
    linears += [(names.config_mlp_bias, layer.down) for layer in decoder]
    switches = {name for name, linear in linears if linear.bias is not None and getattr(config, name, None) is False}
    for name in switches:
        setattr(config, name, True)
    return fits(build, config, model, spare_biases=True) if switches else None


def fits(build: Any, config: Any, model: nn.Module, spare_biases: bool = False) -> Any:
    """`build(config)` without memory if its parameters have the model's names and shapes, else None.

    Args:
        build: class of a causal LM.
        config: its config.
        model: what it is to hold.
        spare_biases: it may have biases that the model lacks.
    """
    shell = built(build, config)
    if shell is None:
        return None
    expected = {(name, tensor.shape) for name, tensor in model.state_dict().items()}
    found = {(name, tensor.shape) for name, tensor in shell.state_dict().items()}
    spare = {name for name, _ in found - expected}
    return None if expected - found or (spare and not (spare_biases and all(map(_is_bias, spare)))) else shell


def built(build: Any, config: Any) -> Any:
    """`build(config)` without memory, or None where the config does not allow it."""
    try:
        config.validate()
        with torch.device("meta"):
            return build(copy.deepcopy(config))
    except _REFUSED:
        return None


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")

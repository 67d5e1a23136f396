"""Which stock transformers class, if any, holds a cut model."""

import copy
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from prunelit.decoder import Decoder


def stock_model(model: nn.Module) -> Any:
    """A stock class built with the cut widths on the meta device, whose parameter shapes equal the model's.

    The model's own class is tried first. A Llama whose heads no longer divide the hidden size is a Mistral: the same
    computation, and a config that accepts any number of heads.

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
    config = copy.deepcopy(cast(Any, model.config))
    for name, value in widths.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if not isinstance(getattr(type(config), "head_dim", None), property):
        config.head_dim = widths["head_dim"] = dim  # many families read it if it is there; the others show below
    candidates = [(type(model), config)]
    if config.model_type == "llama":
        settings = config.to_dict() | widths | {"sliding_window": None}
        for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
            settings.pop(name, None)
        candidates.append((transformers.MistralForCausalLM, transformers.MistralConfig(**settings)))
    for build, candidate in candidates:
        shell = fits(build, candidate, model)
        if shell is not None:
            return shell
    return None


def fits(build: Any, config: Any, model: nn.Module) -> Any:
    """`build(config)` without memory if its parameters have the model's names and shapes, else None."""
    try:
        config.validate()
        with torch.device("meta"):
            shell = build(copy.deepcopy(config))
    except (ValueError, TypeError, RuntimeError, AttributeError, StrictDataclassError):
        return None
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in shell.state_dict().items()}
    return shell if expected == found else None

"""uniform: a stock transformers class, wherever one holds the shapes of all layers."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, Self, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from prunelit.core.architectures import PRUNED
from prunelit.core.plan import LayerShape
from prunelit.export.formats import ExportJob, Format
from prunelit.export.model_files import write_model_as
from prunelit.export.proof.compare import prove_folder
from prunelit.model.decoder import Decoder, as_decoder
from prunelit.model.per_layer import ADDED_BIASES
from prunelit.runtime.errors import DoesNotFit

# What configs and models raise on widths that they cannot have.
_CONFIG_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, StrictDataclassError)


def find_stock_class(kind: type) -> Any:
    """The transformers class that a (possibly already pruned) model class stands on."""
    return next(base for base in kind.__mro__ if base.__module__.startswith("transformers.models."))


def build_stock_model(model: nn.Module | Decoder) -> Any:
    """A stock class built with the cut widths on the meta device, whose parameter shapes equal the model's.

    Returns:
        The model on the meta device, or None where no stock class fits.
    """
    decoder = as_decoder(model)
    widths = {LayerWidths.from_shape(layer.shape) for layer in decoder}
    if len(widths) != 1:
        return None
    only = widths.pop()
    if not only.query_heads or not only.ffn_channels:
        return None
    for build, config, spare_biases in propose_stock_configs(decoder, only):
        shell = build_if_shapes_match(build, config, decoder.model, spare_biases)
        if shell is not None:
            return shell
    return None


class LayerWidths(NamedTuple):
    """What all layers of a stock class have."""

    query_heads: int
    kv_groups: int
    head_dim: int
    ffn_channels: int

    @classmethod
    def from_shape(cls, shape: LayerShape) -> Self:
        """Those of a layer."""
        return cls(shape.query_heads, shape.kv_groups, shape.head_dim, shape.ffn_channels)


def propose_stock_configs(decoder: Decoder, widths: LayerWidths) -> Iterator[tuple[Any, Any, bool]]:
    """Stock classes that may hold a model of these widths: class, config, and whether it may have biases to spare.

    The model's own class comes first. A Llama whose heads no longer divide the hidden size is a Mistral: the same
    computation, and a config that accepts any number of heads. Where output projections were given biases, and the
    family's config can have biases, it is told so; the class then has more of them, which are zeros in the file.
    """
    import transformers

    model, names = decoder.model, decoder.architecture
    settings: dict[str, int] = {
        names.config_heads: widths.query_heads,
        names.config_kv_heads: widths.kv_groups,
        names.config_ffn: widths.ffn_channels,
    }
    build: Any = type(model)
    config = copy.deepcopy(cast(Any, model.config))
    if str(config.model_type).startswith(PRUNED):  # it was read from a folder with per-layer shapes
        build = find_stock_class(build)
        own = ("per_layer_config", "model_type", "architectures", "auto_map", ADDED_BIASES)
        kept = {name: value for name, value in config.to_dict().items() if name not in own}
        try:
            config = build.config_class.from_dict(kept | settings)
        except _CONFIG_ERRORS:
            return
    for name, value in settings.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if not isinstance(getattr(type(config), "head_dim", None), property):
        # many families read it if it is there; what the others have instead shows in their shapes
        config.head_dim = settings["head_dim"] = widths.head_dim
    yield build, config, False
    if config.model_type == "llama":
        kept = config.to_dict() | settings | {"sliding_window": None}
        for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
            kept.pop(name, None)
        yield transformers.MistralForCausalLM, transformers.MistralConfig(**kept), False
    linears = [(names.config_attention_bias, layer.output) for layer in decoder if layer.has_attention]
    linears += [(names.config_mlp_bias, layer.down) for layer in decoder if layer.has_mlp]
    switches = {name for name, linear in linears if linear.bias is not None and getattr(config, name, None) is False}
    for name in switches:
        setattr(config, name, True)
    if switches:
        yield build, config, True


def build_if_shapes_match(build: Any, config: Any, model: nn.Module, spare_biases: bool = False) -> Any:
    """`build(config)` without memory if its parameters have the model's names and shapes, else None.

    Args:
        build: class of a causal LM.
        config: its config.
        model: what it is to hold.
        spare_biases: it may have biases that the model lacks.
    """
    shell = build_on_meta(build, config)
    if shell is None:
        return None
    expected = {(name, tensor.shape) for name, tensor in model.state_dict().items()}
    shell_shapes = {(name, tensor.shape) for name, tensor in shell.state_dict().items()}
    spare = {name for name, _ in shell_shapes - expected}
    return (
        None if expected - shell_shapes or (spare and not (spare_biases and all(map(_is_bias_name, spare)))) else shell
    )


def build_on_meta(build: Any, config: Any) -> Any:
    """`build(config)` without memory, or None where the config does not allow it."""
    try:
        config.validate()
        with torch.device("meta"):
            return build(copy.deepcopy(config))
    except _CONFIG_ERRORS:
        return None


def _is_bias_name(name: str) -> bool:
    return name.endswith(".bias")


def write_uniform(job: ExportJob) -> dict[str, Any]:
    """Write a model under a stock class.

    Raises:
        DoesNotFit: no stock class holds it; says why.
    """
    write_model_as(_require_stock_model(job.get_decoder()), job)
    return {}


def _require_stock_model(model: nn.Module | Decoder) -> Any:
    shell = build_stock_model(model)
    if shell is None:
        raise DoesNotFit(
            f"format 'uniform': {_explain_misfit(model)}; use format 'hetero', or 'padded' where no code may be loaded"
        )
    return shell


def check_uniform(model: nn.Module, tokenizer: Any) -> None:
    """As `write_uniform`, without writing."""
    _require_stock_model(model)


def _explain_misfit(model: nn.Module | Decoder) -> str:
    """Why no stock class holds a model."""
    first, *others = [layer.shape for layer in as_decoder(model)]
    for index, shape in enumerate(others, 1):
        if LayerWidths.from_shape(shape) != LayerWidths.from_shape(first):
            return (
                f"expected layers of one shape, got {_describe_shape(first)} in layer 0, {_describe_shape(shape)} in "
                f"layer {index}"
            )
    return f"expected a stock class with the model's parameters, got none with {_describe_shape(first)} and its biases"


def _describe_shape(shape: LayerShape) -> str:
    return f"{shape.query_heads} query heads, {shape.kv_groups} KV groups, {shape.ffn_channels} channels"


LOAD_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""

FORMAT = Format("uniform", LOAD_SNIPPET, write_uniform, prove_folder, check=check_uniform, accepts_streamed=True)

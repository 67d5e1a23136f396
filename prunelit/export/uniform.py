"""Format uniform: a stock class of transformers, where one can hold the shapes of all layers."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, Self, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from prunelit.core.architectures import PRUNED, get_decoder_config
from prunelit.core.plan import LayerShape
from prunelit.export.formats import ExportJob, Format
from prunelit.export.model_files import write_model_as
from prunelit.export.proof.compare import prove_folder
from prunelit.model.decoder import Decoder, Layer, as_decoder
from prunelit.model.per_layer import ADDED_BIASES, MIXTURE_WIDTHS
from prunelit.runtime.errors import DoesNotFit

# Errors that configs and models of transformers raise for widths that they cannot have.
_CONFIG_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, StrictDataclassError)


def find_stock_class(kind: type) -> Any:
    """Find the transformers class that a model class, which may be a per-layer one, is derived from.

    Example: see `prunelit.export.hetero`, which uses it.
    """
    return next(base for base in kind.__mro__ if base.__module__.startswith("transformers.models."))


def build_stock_model(model: nn.Module | Decoder) -> Any:
    """Build a model of a stock class on the meta device, with the parameter names and shapes of a live model.

    Args:
        model: the live model, or its decoder.

    Returns:
        The model on the meta device; None where no stock class fits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        >>> build_stock_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))).device
        device(type='meta')
    """
    decoder = as_decoder(model)
    widths = find_common_widths(decoder)
    if widths is None:
        return None
    for build, config, spare_biases in propose_stock_configs(decoder, widths):
        shell = build_if_shapes_match(build, config, decoder.model, spare_biases)
        if shell is not None:
            return shell
    return None


class LayerWidths(NamedTuple):
    """The widths that all layers of a stock class have; 0 where no layer has such a block.

    Attributes:
        query_heads, kv_groups, head_dim: of an attention.
        ffn_channels: of the FFN in layers without experts.
        experts, expert_channels: number of experts, and channels of each.
        shared_channels: of the FFN beside the experts.

    Example: see `prunelit.export.padded`, which uses it.
    """

    query_heads: int
    kv_groups: int
    head_dim: int
    ffn_channels: int
    experts: int = 0
    expert_channels: int = 0
    shared_channels: int = 0

    @property
    def of_blocks(self) -> tuple[tuple[int, ...], ...]:
        """Widths of the attention, of the dense FFN, and of the mixture."""
        return tuple(self[:3]), (self.ffn_channels,), tuple(self[4:])

    @classmethod
    def from_shape(cls, shape: LayerShape) -> Self:
        """Take the widths of a layer."""
        heads = (shape.query_heads, shape.kv_groups, shape.head_dim)
        if shape.experts:
            return cls(*heads, 0, shape.experts, shape.expert_channels, shape.ffn_channels)
        return cls(*heads, shape.ffn_channels)


def find_common_widths(decoder: Decoder) -> LayerWidths | None:
    """Find the widths that all blocks of a kind have; None where they differ or a block was removed.

    Example: see `build_stock_model`.
    """
    if any(layer.list_removed_blocks() for layer in decoder):
        return None
    all_widths = [LayerWidths.from_shape(layer.shape) for layer in decoder]
    common: list[int] = []
    for widths in zip(*(widths.of_blocks for widths in all_widths), strict=True):
        present = {of_block for of_block in widths if any(of_block)}
        if len(present) > 1:
            return None
        common += present.pop() if present else widths[0]
    return LayerWidths(*common)


def propose_stock_configs(decoder: Decoder, widths: LayerWidths) -> Iterator[tuple[Any, Any, bool]]:
    """Propose stock classes and configs that may hold a model.

    The model's own class comes first. For a Llama, Mistral comes next: it computes the same, and its config accepts a
    number of heads that does not divide the hidden size. Where pruning added biases to output projections and the
    family's config has an option for biases, it is switched on; the class then has more biases than the model, which
    are zeros in the file.

    Args:
        decoder: the model.
        widths: the widths that all layers must have.

    Yields:
        A class, a config, and whether the class may have biases that the model lacks.

    Example: see `prunelit.export.padded`, which uses it.
    """
    import transformers

    model, names = decoder.model, decoder.architecture
    settings: dict[str, Any] = dict(names.config_exact_widths)
    if widths.ffn_channels:
        settings[names.config_ffn] = widths.ffn_channels
    if names.mixture is not None and widths.experts:
        settings |= names.mixture.get_config_widths(widths.experts, widths.expert_channels, widths.shared_channels)
    if widths.kv_groups:
        settings |= {names.config_heads: widths.query_heads, names.config_kv_heads: widths.kv_groups}
    build: Any = type(model)
    whole = copy.deepcopy(cast(Any, model.config))
    if str(whole.model_type).startswith(PRUNED):  # the model was loaded from a folder with per-layer shapes
        build = find_stock_class(build)
        try:
            whole = build.config_class.from_dict(_drop_per_layer_options(whole.to_dict(), settings))
        except _CONFIG_ERRORS:
            return
    config = get_decoder_config(whole)
    # What the family's config holds for each layer.
    of_single_layers = getattr(config, "per_layer_attributes", None) or ()
    for name, value in settings.items():
        if name not in of_single_layers and hasattr(config, name):
            setattr(config, name, decoder.spread_width(getattr(config, name), value))
    if widths.kv_groups and not isinstance(getattr(type(config), "head_dim", None), property):
        # Many families read head_dim where it is set. The others ignore it, and the check of shapes refuses them.
        config.head_dim = settings["head_dim"] = widths.head_dim
    yield build, whole, False
    if whole.model_type == "llama":
        mistral_options = config.to_dict() | settings | {"sliding_window": None}
        for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
            mistral_options.pop(name, None)
        yield transformers.MistralForCausalLM, transformers.MistralConfig(**mistral_options), False
    linears = [(names.config_attention_bias, layer.output) for layer in decoder if layer.has_attention]
    linears += [(names.config_mlp_bias, layer.down) for layer in decoder if layer.has_mlp]
    switches = {name for name, linear in linears if linear.bias is not None and getattr(config, name, None) is False}
    for name in switches:
        setattr(config, name, True)
    if switches:
        yield build, whole, True


def _drop_per_layer_options(options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The content of a per-layer config, of a decoder or around one, as a stock config class takes it."""
    kept = {
        name: value
        for name, value in options.items()
        if name not in ("per_layer_config", "model_type", "architectures", "auto_map", ADDED_BIASES, MIXTURE_WIDTHS)
    }
    if not isinstance(options.get("text_config"), dict):
        return kept | settings
    inner = options["text_config"]
    model_type = str(inner["model_type"]).removeprefix(PRUNED)
    return kept | {"text_config": _drop_per_layer_options(inner, settings) | {"model_type": model_type}}


def build_if_shapes_match(build: Any, config: Any, model: nn.Module, spare_biases: bool = False) -> Any:
    """Build a model on the meta device if its parameters have the names and shapes of another model.

    Args:
        build: class of a causal LM.
        config: its config.
        model: the model that it is to hold.
        spare_biases: whether it may have biases that the model lacks.

    Returns:
        The model on the meta device; None where names or shapes differ, or the config is invalid.

    Example: see `build_stock_model`.
    """
    shell = build_on_meta(build, config)
    if shell is None:
        return None
    expected = {(name, tensor.shape) for name, tensor in model.state_dict().items()}
    got = {(name, tensor.shape) for name, tensor in shell.state_dict().items()}
    spare_names = {name for name, _ in got - expected}
    if expected - got or (spare_names and not (spare_biases and all(map(_is_bias_name, spare_names)))):
        return None
    return shell


def build_on_meta(build: Any, config: Any) -> Any:
    """Build `build(config)` on the meta device; None where the class cannot have the config's widths.

    Example: see `prunelit.export.hetero`, which uses it.
    """
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
        DoesNotFit: no stock class can hold it; the message says why.

    Example: `prunelit.export.write_model(model, "folder", tokenizer, format="uniform")` calls it.
    """
    write_model_as(_require_stock_model(job.get_decoder()), job)
    return {}


def _require_stock_model(model: nn.Module | Decoder) -> Any:
    """Build a stock model, or raise `DoesNotFit`."""
    shell = build_stock_model(model)
    if shell is None:
        raise DoesNotFit(
            f"format 'uniform': {_explain_misfit(model)}; use format 'hetero', or 'padded' where no code may be loaded"
        )
    return shell


def check_uniform(model: nn.Module, tokenizer: Any) -> None:
    """Check that `write_uniform` can write a model, from shapes and config.

    Raises:
        DoesNotFit: see `write_uniform`.

    Example: `check_uniform` is used further down in this module.
    """
    _require_stock_model(model)


def _explain_misfit(model: nn.Module | Decoder) -> str:
    """Explain why no stock class can hold a model."""
    layers = list(as_decoder(model))
    first: dict[int, tuple[Layer, tuple[int, ...]]] = {}  # by kind of block
    for layer in layers:
        for kind, widths in enumerate(LayerWidths.from_shape(layer.shape).of_blocks):
            if not any(widths):
                continue
            other, other_widths = first.setdefault(kind, (layer, widths))
            if widths != other_widths:
                return (
                    f"expected layers of one shape, got {_describe_shape(other.shape)} in layer {other.index}, "
                    f"{_describe_shape(layer.shape)} in layer {layer.index}"
                )
    for layer in layers:
        if removed := layer.list_removed_blocks():
            return f"expected whole layers, got layer {layer.index} without its {' and '.join(removed)}"
    descriptions = " and ".join(dict.fromkeys(_describe_shape(layer.shape) for layer in layers))
    return f"expected a stock class with the model's parameters, got none with {descriptions} and its biases"


def _describe_shape(shape: LayerShape) -> str:
    description = f"{shape.query_heads} query heads, {shape.kv_groups} KV groups, {shape.ffn_channels} channels"
    if not shape.experts:
        return description
    return f"{description} beside {shape.experts} experts of {shape.expert_channels} channels"


LOAD_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""

FORMAT = Format("uniform", LOAD_SNIPPET, write_uniform, prove_folder, check=check_uniform, accepts_streamed=True)

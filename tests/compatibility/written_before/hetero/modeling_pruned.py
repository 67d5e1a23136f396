"""Decoders whose layers differ in shape, or miss a block.

The source of this file is copied, as it stands, into every folder saved with per-layer shapes (`auto_map`), so that
plain transformers loads it with `trust_remote_code=True`; therefore it imports torch, transformers and the standard
library only. `prunelit.load` uses this very module instead and runs no code from the folder.

`names` is an `Architecture`, or anything with the same attributes. Q query heads, G KV groups, D head size, F channels.
"""

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Integers that attention modules keep for themselves, and what they count.
_COUNTERS = {
    "num_heads": "query_heads",
    "num_attention_heads": "query_heads",
    "num_key_value_heads": "kv_groups",
    "num_kv_heads": "kv_groups",
    "num_key_value_groups": "group_size",
    "split_size": "query_width",
}
ADDED_BIASES = "added_biases"
"""Key of `per_layer_config`: blocks ("attention", "mlp") whose output projection has a bias that the family's lacks."""
# Config attributes with one entry per layer.
_PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "kv_sharing_modes")


class RemovedAttention(nn.Module):
    """In place of a removed attention block: adds nothing to the residual stream and stores no keys or values."""

    prunelit_removed = True

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class RemovedMLP(nn.Module):
    """In place of a removed FFN (or of its last linear): adds nothing to the residual stream."""

    prunelit_removed = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class _LayerConfig:
    """The model's config as one attention module sees it: live, but for that module's own head counts."""

    def __init__(self, config: Any, **own: int):
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)


def find(root: Any, path: str | None) -> Any:
    """Attribute of `root` at a dotted path; None where the path is None or leads nowhere; `root` itself for ""."""
    if path is None:
        return None
    for name in path.split(".") if path else ():
        root = getattr(root, name, None)
    return root


def replace_module(root: nn.Module, path: str | None, module: nn.Module) -> None:
    """Put `module` at a dotted path below `root`; nothing happens where the path is None or leads nowhere."""
    old = find(root, path)
    if path is None or old is None:
        return
    parent, _, name = path.rpartition(".")
    module.training = old.training
    setattr(find(root, parent), name, module)


def remove_attention(layer: nn.Module, names: Any) -> None:
    """Remove a layer's attention block with the norms that feed or follow it alone."""
    replace_module(layer, names.attention, RemovedAttention())
    for norm in (names.attention_norm, names.attention_post_norm):
        replace_module(layer, norm, nn.Identity())


def remove_mlp(layer: nn.Module, names: Any) -> None:
    """Remove a layer's FFN block with the norms that feed or follow it alone."""
    if names.mlp:
        replace_module(layer, names.mlp, RemovedMLP())
    else:  # the linears sit in the layer: the first passes its input on, the last returns zeros
        replace_module(layer, names.up, nn.Identity())
        replace_module(layer, names.down, RemovedMLP())
    for norm in (names.mlp_norm, names.mlp_post_norm):
        replace_module(layer, norm, nn.Identity())


def set_counters(layer: nn.Module, names: Any, config: Any, query_heads: int, kv_groups: int, channels: int) -> None:
    """Make the integers that a layer's modules keep match its weights; 0 leaves that block's counters alone."""
    attention, mlp = find(layer, names.attention), find(layer, names.mlp)
    if query_heads:
        values = {
            "query_heads": query_heads,
            "kv_groups": kv_groups,
            "group_size": query_heads // kv_groups,
            "query_width": query_heads * getattr(attention, names.head_dim),
        }
        for counter, meaning in _COUNTERS.items():
            if isinstance(getattr(attention, counter, None), int):
                setattr(attention, counter, values[meaning])
        if names.layer_config:
            own = {names.config_heads: query_heads, names.config_kv_heads: kv_groups}
            attention.config = _LayerConfig(config, **own)
    if channels and isinstance(getattr(mlp, "intermediate_size", None), int):
        mlp.intermediate_size = channels


def set_linear(linear: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Give a linear a weight of another shape ([out, in]; Conv1D: [in, out]), and the counts that go with it."""
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None and bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    if hasattr(linear, "nf"):  # Conv1D
        linear.nx, linear.nf = weight.shape
    else:
        linear.out_features, linear.in_features = weight.shape


def settle(model: Any, names: Any) -> None:
    """After blocks were removed: drop layers that hold nothing, and leave no hole in the KV cache.

    The cache finds the number of past tokens in its first layer. Where all layers are of one type, the attentions that
    remain are numbered 0, 1, ...; where types differ (sliding and full), positions carry the type, so the numbers stay
    and the removed ones are declared to the cache as layers that store nothing.
    """
    config = model.config
    layers = find(model, names.layers)

    def lacks_attention(layer: nn.Module) -> bool:
        return isinstance(find(layer, names.attention), RemovedAttention)

    def lacks_mlp(layer: nn.Module) -> bool:
        return isinstance(find(layer, names.mlp or names.down), RemovedMLP)

    kept = [index for index, layer in enumerate(layers) if not (lacks_attention(layer) and lacks_mlp(layer))]
    if len(kept) < len(layers):
        parent, _, name = names.layers.rpartition(".")
        for attribute in _PER_LAYER_LISTS:
            values = getattr(config, attribute, None)
            if isinstance(values, list) and len(values) == len(layers):
                setattr(config, attribute, [values[index] for index in kept])
        training = layers.training
        layers = nn.ModuleList(layers[index] for index in kept)
        layers.training = training
        setattr(find(model, parent), name, layers)
        config.num_hidden_layers = len(kept)
    mixed = len(set(getattr(config, "layer_types", None) or ())) > 1
    if mixed and any(lacks_attention(layer) for layer in layers):
        config.kv_sharing_modes = ["reuse" if lacks_attention(layer) else "own" for layer in layers]
    elif getattr(config, "kv_sharing_modes", None) is not None:  # left by an earlier cut
        config.kv_sharing_modes = None
    if mixed:
        numbers: Sequence[int] = range(len(layers))
    else:
        numbers = [sum(not lacks_attention(before) for before in layers[:index]) for index in range(len(layers))]
    for number, layer in zip(numbers, layers, strict=True):
        attention = find(layer, names.attention)
        if hasattr(attention, "layer_idx"):
            attention.layer_idx = number


def _biased(linear: Any) -> None:
    """Give a linear a bias, still empty, unless it has one."""
    if linear.bias is None:
        linear.bias = nn.Parameter(linear.weight.new_empty(linear.weight.shape[0]))


def _resized(linear: Any, out_features: int | None, in_features: int | None) -> None:
    """An empty weight of the given shape (None: as it is), on the linear's device and in its dtype."""
    transposed = hasattr(linear, "nf")
    rows, columns = linear.weight.shape[::-1] if transposed else linear.weight.shape
    rows, columns = out_features or rows, in_features or columns
    weight = linear.weight.new_empty((columns, rows) if transposed else (rows, columns))
    set_linear(linear, weight, None if linear.bias is None else linear.bias.new_empty(rows))


def build_layer_shapes(model: Any, names: Any) -> None:
    """Give the layers of a freshly built dense model the shapes of `config.per_layer_config`, weights still empty."""
    config = model.config
    for layer, own in zip(find(model, names.layers), config.per_layer_config, strict=True):
        skipped, biased = getattr(own, "skip", ()), getattr(own, ADDED_BIASES, ())
        heads, groups = getattr(own, names.config_heads), getattr(own, names.config_kv_heads)
        channels = getattr(own, names.config_ffn)
        if "attention" in skipped:
            remove_attention(layer, names)
            heads = groups = 0
        else:
            attention = find(layer, names.attention)
            dim = getattr(attention, names.head_dim)
            if names.fused_qkv:
                _resized(find(attention, names.fused_qkv), (heads + 2 * groups) * dim, None)
            else:
                _resized(find(attention, names.query), heads * dim, None)
                _resized(find(attention, names.key), groups * dim, None)
                _resized(find(attention, names.value), groups * dim, None)
            _resized(find(attention, names.output), None, heads * dim)
            if "attention" in biased:
                _biased(find(attention, names.output))
            for path, kind in names.per_head.items():
                keep_entries(attention, path, range(heads if kind == "query" else groups))
        if "mlp" in skipped:
            remove_mlp(layer, names)
            channels = 0
        else:
            mlp = find(layer, names.mlp)
            if names.fused_gate_up:
                _resized(find(mlp, names.fused_gate_up), 2 * channels, None)
            else:
                for path in (names.gate, names.up):
                    if path is not None:
                        _resized(find(mlp, path), channels, None)
            _resized(find(mlp, names.down), None, channels)
            if "mlp" in biased:
                _biased(find(mlp, names.down))
        set_counters(layer, names, config, heads, groups, channels)
    settle(model, names)


def keep_entries(attention: nn.Module, path: str, kept: Sequence[int]) -> None:
    """Keep some entries of a per-head parameter or module list; nothing happens where the path leads nowhere."""
    entries = find(attention, path)
    if entries is None:
        return
    parent, _, name = path.rpartition(".")
    if isinstance(entries, nn.ModuleList):
        fewer = nn.ModuleList(entries[index] for index in kept)
        fewer.training = entries.training
        setattr(find(attention, parent), name, fewer)
    else:
        value = entries.detach()[torch.tensor(list(kept), device=entries.device)].clone()
        setattr(find(attention, parent), name, nn.Parameter(value, requires_grad=entries.requires_grad))


class PerLayerConfig:
    """Mixed into a family's config: widths may differ per layer, so the global ones bind nobody."""

    def __getattribute__(self, key: str) -> Any:
        # transformers refuses or warns when a per-layer attribute is read from the whole config; the dense skeleton,
        # built before the layers get their shapes, needs the global value.
        spec = super().__getattribute__("__dict__").get("_heterogeneity_spec")
        if spec is not None and key in spec.per_layer_attributes:
            return self._getattr_without_heterogeneous_validation(key)
        return super().__getattribute__(key)

    @property
    def allow_global_per_layer_attribute_access(self) -> bool:  # type: ignore[override]
        return True

    def validate_architecture(self) -> None:
        """Head counts need not divide the hidden size: every layer has its own."""


class PerLayerModel:
    """Mixed into a family's causal LM: builds it dense (on the meta device when loading), then shapes every layer."""

    names: dict[str, Any]

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        build_layer_shapes(self, types.SimpleNamespace(**self.names))


# Generated by prunelit for this folder -------------------------------------------------------------------------------

from transformers.models.llama.configuration_llama import LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaForCausalLM  # noqa: E402


class PrunedLlamaConfig(PerLayerConfig, LlamaConfig):
    model_type = "pruned_llama"


class PrunedLlamaForCausalLM(PerLayerModel, LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    names = {   'layers': 'model.layers',
    'attention': 'self_attn',
    'query': 'q_proj',
    'key': 'k_proj',
    'value': 'v_proj',
    'output': 'o_proj',
    'fused_qkv': None,
    'qkv_layout': 'concat',
    'mlp': 'mlp',
    'gate': 'gate_proj',
    'up': 'up_proj',
    'down': 'down_proj',
    'fused_gate_up': None,
    'activation': 'act_fn',
    'attention_norm': 'input_layernorm',
    'mlp_norm': 'post_attention_layernorm',
    'attention_post_norm': None,
    'mlp_post_norm': None,
    'shared_norm': None,
    'parallel': False,
    'norm': 'rms',
    'norm_offset': 0.0,
    'residual_scale': None,
    'head_dim': 'head_dim',
    'heads_prunable': True,
    'per_head': {},
    'config_heads': 'num_attention_heads',
    'config_kv_heads': 'num_key_value_heads',
    'config_ffn': 'intermediate_size',
    'config_attention_bias': 'attention_bias',
    'config_mlp_bias': 'mlp_bias',
    'layer_config': False}

"""Decoders whose layers differ in shape, or miss a block.

The source of this file is copied, as it stands, into every folder saved with per-layer shapes (`auto_map`), so that
plain transformers loads it with `trust_remote_code=True`; therefore it imports torch, transformers and the standard
library only. `prunelit.load` uses this very module instead and runs no code from the folder.

vLLM's Transformers backend runs the same file. It builds the base model (without its head) with the attention
implementation "vllm", expects an attention in every layer, and finds it by the number of the layer; see
`UnusedAttention`.

`names` is an `Architecture`, or anything with the same attributes. Q query heads, G KV groups, D head size, F channels.
"""

import copy
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Integers that attention modules keep for themselves, and what they count.
_COUNTERS = {
    "num_heads": "query_heads",
    "num_attention_heads": "query_heads",
    "num_key_value_heads": "kv_groups",
    "num_kv_heads": "kv_groups",
    "num_key_value_groups": "group_size",
    "split_size": "query_width",
    "embed_dim": "query_width",
}
# Integers that a mixture of experts, its experts and its router keep, and what they count.
_MIXTURE_COUNTERS = {
    "num_experts": "experts",
    "num_local_experts": "experts",
    "n_routed_experts": "experts",
    "intermediate_dim": "channels",
    "intermediate_size": "channels",
    "expert_dim": "channels",
    "ffn_dim": "channels",
}
ADDED_BIASES = "added_biases"
"""Key of `per_layer_config`: blocks ("attention", "mlp") whose output projection has a bias that the family's lacks."""
MIXTURE_WIDTHS = "mixture_widths"
"""Key of `per_layer_config`: numbers of experts, of channels of each expert, and of channels of the shared FFN."""
# Config attributes with one entry per layer, and those with the numbers of some layers.
_PER_LAYER_LISTS = (
    *("layer_types", "no_rope_layers", "kv_sharing_modes", "layer_rope_theta", "attention_layers"),
    "mlp_layer_types",
)
_LAYER_NUMBERS = ("attn_layer_indices", "full_attn_idxs", "rope_scaling_layers", "moe_layers")
# Config attributes with the number of first layers that have a dense FFN, in a mixture of experts.
_DENSE_LAYER_COUNTS = ("first_k_dense_replace", "num_dense_layers")
# Integers of a block: its place in the cache.
_CACHE_NUMBERS = ("layer_idx", "layer_id")
# Config attributes that a model divides by the square root of its number of layers.
_DIVIDED_BY_ROOT_OF_DEPTH = ("scale_depth",)


# Those of transformers 5.19 do not: they take the number of past tokens from such a layer as from any other.
CACHES_KNOW_EMPTY_LAYERS = hasattr(Cache, "is_dummy")


class RemovedAttention(nn.Module):
    """In place of a removed attention block: adds nothing to the residual stream and stores no keys or values.

    With a `counted_as` it stores those of no heads under this number, so that the cache counts its tokens.
    """

    prunelit_removed = True
    counted_as: int | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        cache = kwargs.get("past_key_values")
        if self.counted_as is not None and cache is not None:
            no_heads = hidden_states.new_empty(hidden_states.shape[0], 0, hidden_states.shape[1], 1)
            cache.update(no_heads, no_heads, self.counted_as)
        return torch.zeros_like(hidden_states), None


class UnusedAttention(RemovedAttention):
    """In place of a removed attention in vLLM, which refuses layers without one: an attention that is never asked.

    vLLM counts a module as attention if the source of its forward calls what the interface returns, so these lines must
    stand here though nothing reaches them. vLLM then puts an attention of its own into the module (`attn`), which would
    reserve a KV cache; without a specification of its cache it reserves none.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        if hidden_states is None:
            attention_interface: Any = ALL_ATTENTION_FUNCTIONS.get_interface("vllm", None)
            return attention_interface(self, *args, **kwargs)
        return torch.zeros_like(hidden_states), None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "attn":
            value.get_kv_cache_spec = lambda *args, **kwargs: None


class RemovedMixer(nn.Module):
    """In place of a removed mixer: adds nothing to the residual stream and stores no state."""

    prunelit_removed = True

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class RemovedMLP(nn.Module):
    """In place of a removed FFN (or of its last linear): adds nothing to the residual stream."""

    prunelit_removed = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class RemovedMixture(nn.Module):
    """In place of a removed mixture of experts that returned a pair: adds nothing to the residual stream."""

    prunelit_removed = True

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class RemovedNorm(nn.Identity):
    """In place of a norm that went with its block; some families ask their norms for the dtype of the weight."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        weight = getattr(norm, "weight", None)
        if weight is not None:
            self.weight = weight.detach().new_empty(0)


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


def resolve_layer_names(layer: nn.Module, names: Any) -> Any:
    """`names` for one layer of a family whose layers differ: with the overrides that its modules select.

    In a layer with a mixture of experts, `mlp` is the shared FFN beside the experts, or None; in others `mixture` is.
    Where a mixture was removed, `mlp` is its stub.
    """
    matching = [overrides for path, overrides in names.layer_variants if find(layer, path) not in (None, False)]
    if not matching and names.mixture is None:
        return names
    resolved = copy.copy(names)
    for overrides in matching:
        vars(resolved).update(overrides)
    if resolved.mixture is not None:
        block = find(layer, resolved.mixture.block)
        if find(block, resolved.mixture.experts) is not None:
            own: dict[str, Any] = {"mlp": resolved.mixture.shared}
        elif block is not None and is_absent(block):
            own = {"mlp": resolved.mixture.block, "mixture": None}
        else:
            own = {"mixture": None}
        vars(resolved).update(own)
    return resolved


def is_absent(module: Any) -> bool:
    """Whether a block is not there: the layer has none, or it was removed."""
    return module is None or getattr(module, "prunelit_removed", False)


def _get_decoder_config(config: Any) -> Any:
    """The config of the text decoder: a part of a multimodal model's config, or the config itself."""
    return getattr(config, "text_config", None) or config


def find_layers_path(model: Any, layers: str) -> str:
    """The path from a whole model to its decoder layers.

    Args:
        model: a causal LM, or a multimodal model with a decoder inside.
        layers: the path as it is in a causal LM of the decoder's family.
    """
    if _get_decoder_config(model.config) is model.config or isinstance(find(model, layers), nn.ModuleList):
        return layers
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    # The decoder inside is a causal LM, or what a causal LM holds as its backbone.
    inner = layers if find(decoder, layers) is not None else layers.partition(".")[2]
    return f"{path}.{inner}".removeprefix(".")


def remove_attention(layer: nn.Module, names: Any, stub: nn.Module | None = None) -> None:
    """Remove a layer's attention block with the norms that feed or follow it alone.

    `stub` takes its place; None: a `RemovedAttention`.
    """
    names = resolve_layer_names(layer, names)
    _leave_stub(layer, names, names.attention, stub or RemovedAttention())
    _remove_mixing_norms(layer, names)


def remove_mixer(layer: nn.Module, names: Any) -> None:
    """Remove a layer's mixer with the norms that feed or follow it alone."""
    names = resolve_layer_names(layer, names)
    _leave_stub(layer, names, names.mixer, RemovedAttention() if names.mixer_is_attention else RemovedMixer())
    _remove_mixing_norms(layer, names)


def _leave_stub(layer: nn.Module, names: Any, path: str | None, stub: nn.Module) -> None:
    """Put a stub in place of a block, with the switches of the block by which the names of the layer are resolved."""
    for switch, _ in names.layer_variants:
        parent, _, name = switch.rpartition(".")
        if parent == path and isinstance(value := find(layer, switch), bool):
            setattr(stub, name, value)
    replace_module(layer, path, stub)


def _remove_mixing_norms(layer: nn.Module, names: Any) -> None:
    """Remove the norms around attention and mixer once neither is there."""
    if is_absent(find(layer, names.attention)) and is_absent(find(layer, names.mixer)):
        for norm in (names.attention_norm, names.attention_post_norm):
            _remove_norm(layer, norm)


def _remove_norm(layer: nn.Module, path: str | None) -> None:
    norm = find(layer, path)
    if isinstance(norm, nn.Module):
        replace_module(layer, path, RemovedNorm(norm))


def remove_mlp(layer: nn.Module, names: Any) -> None:
    """Remove a layer's FFN block, or mixture of experts, with the norms that feed or follow it alone."""
    names = resolve_layer_names(layer, names)
    if names.mixture is not None:
        stub = RemovedMixture() if names.mixture.returns_pair else RemovedMLP()
        replace_module(layer, names.mixture.block, stub)
    if names.mlp != "":
        replace_module(layer, names.mlp, RemovedMLP())
    else:  # the linears sit in the layer: the first passes its input on, the last returns zeros
        replace_module(layer, names.up, nn.Identity())
        replace_module(layer, names.down, RemovedMLP())
    for norm in (names.mlp_norm, names.mlp_post_norm):
        _remove_norm(layer, norm)


def set_counters(
    layer: nn.Module,
    names: Any,
    config: Any,
    query_heads: int,
    kv_groups: int,
    channels: int,
    experts: int = 0,
    expert_channels: int = 0,
) -> None:
    """Make the integers that a layer's modules keep match its weights; 0 leaves that block's counters alone."""
    names = resolve_layer_names(layer, names)
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
    if experts and names.mixture is not None:
        values = {"experts": experts, "channels": expert_channels}
        block = find(layer, names.mixture.block)
        for module in (block, find(block, names.mixture.experts), find(block, names.mixture.router)):
            for counter, meaning in _MIXTURE_COUNTERS.items():
                if isinstance(getattr(module, counter, None), int):
                    setattr(module, counter, values[meaning])


class ExpertTensor(NamedTuple):
    """A tensor of a mixture with one entry per expert, along its first axis."""

    owner: Any
    """The module that holds it."""
    name: str
    axis: int | None
    """Along which it has channels; None: it has none."""
    per_channel: int
    """Entries of a channel along that axis: 2 for gate and up in one tensor."""

    @property
    def value(self) -> torch.Tensor:
        tensor: torch.Tensor = getattr(self.owner, self.name)
        return tensor


def find_expert_tensors(layer: nn.Module, names: Any) -> list[ExpertTensor]:
    """Find the tensors of a layer's mixture; `names` are those of this layer."""
    mixture = names.mixture
    block = find(layer, mixture.block)
    experts, router = find(block, mixture.experts), find(block, mixture.router)
    out_axis, in_axis = (2, 1) if mixture.transposed else (1, 2)
    rows = 2 if mixture.gated else 1
    candidates = [
        ExpertTensor(experts, mixture.gate_up, out_axis, rows),
        ExpertTensor(experts, f"{mixture.gate_up}_bias", 1, rows),
        ExpertTensor(experts, mixture.down, in_axis, 1),
        ExpertTensor(experts, f"{mixture.down}_bias", None, 0),
        ExpertTensor(router, "weight", None, 0),
        ExpertTensor(router, "bias", None, 0),
    ]
    for path in mixture.per_expert:
        parent, _, name = path.rpartition(".")
        candidates.append(ExpertTensor(find(block, parent), name, None, 0))
    return [tensor for tensor in candidates if getattr(tensor.owner, tensor.name, None) is not None]


def set_expert_tensor(tensor: ExpertTensor, value: torch.Tensor) -> None:
    """Put a tensor of another shape in place of a parameter or buffer with one entry per expert."""
    if isinstance(tensor.value, nn.Parameter):
        value = _make_successor(tensor.value, value)
    setattr(tensor.owner, tensor.name, value)
    if tensor.name == "weight" and isinstance(getattr(tensor.owner, "out_features", None), int):  # a linear as router
        tensor.owner.out_features = value.shape[0]


def set_linear(linear: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Give a linear a weight of another shape ([out, in]; Conv1D: [in, out]), and the counts that go with it."""
    linear.weight = _make_successor(linear.weight, weight)
    if linear.bias is not None and bias is not None:
        linear.bias = _make_successor(linear.bias, bias)
    if hasattr(linear, "nf"):  # Conv1D
        linear.nx, linear.nf = weight.shape
    else:
        linear.out_features, linear.in_features = weight.shape


def _make_successor(old: Any, value: torch.Tensor) -> nn.Parameter:
    """A parameter in place of an old one, with what others have noted on it; not tensors, which have its old shape."""
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for name, note in getattr(old, "__dict__", {}).items():
        # A weight that is still in a file knows by attributes of its own which part of it is meant.
        if name not in vars(new) and not isinstance(note, torch.Tensor):
            setattr(new, name, note)
    return new


def settle(model: Any, names: Any) -> None:
    """After blocks were removed: drop layers that hold nothing, and leave no hole in the KV cache.

    The cache finds the number of past tokens in its first layer. Where all layers are of one type, the attentions that
    remain are numbered 0, 1, ...; where types differ (sliding and full, attention and mixer), positions carry the type,
    so the numbers stay and the removed ones are declared to the cache as layers that store nothing. An older cache does
    not know such layers and counts the tokens in them, see `RemovedAttention`. vLLM has a cache of its own and finds a
    layer's number of heads by the number of its attention, so there they stay as well.
    """
    config = _get_decoder_config(model.config)
    layers = find(model, names.layers)
    per_layer_names = [resolve_layer_names(layer, names) for layer in layers]
    blocks = [_find_blocks(*pair) for pair in zip(layers, per_layer_names, strict=True)]  # attention, mixer, FFN
    kept = [index for index, present in enumerate(blocks) if not all(map(is_absent, present))]
    mixed = len(set(getattr(config, "layer_types", None) or ())) > 1 or any(
        mixer is not None and not own.mixer_is_attention
        for (_, mixer, _), own in zip(blocks, per_layer_names, strict=True)
    )
    if len(kept) < len(layers):
        for attribute in _PER_LAYER_LISTS:
            values = getattr(config, attribute, None)
            if isinstance(values, list) and len(values) == len(layers) and not _is_derived(config, attribute):
                setattr(config, attribute, [values[index] for index in kept])
        for attribute in _LAYER_NUMBERS:
            values = getattr(config, attribute, None)
            if isinstance(values, list):
                setattr(config, attribute, [kept.index(index) for index in values if index in kept])
        if getattr(config, "attention_types", None) and hasattr(config, "attention_layers"):  # derived from the former
            config.attention_types = [[[kind], 1] for kind in config.attention_layers]
        for index in sorted(set(range(len(layers))) - set(kept), reverse=True):
            del layers[index]  # in place, because others may hold the list, such as a job under a name of its own
        for attribute in _DIVIDED_BY_ROOT_OF_DEPTH:
            if getattr(config, attribute, None) is not None:
                setattr(config, attribute, getattr(config, attribute) * (len(kept) / config.num_hidden_layers) ** 0.5)
        config.num_hidden_layers = len(kept)
        blocks = [blocks[index] for index in kept]
        if names.mixture is not None:
            _renumber_mixtures(config, [per_layer_names[index].mixture is not None for index in kept])
    # A layer of one block by design, such as an FFN alone, has no place in the cache to begin with.
    emptied = [_stores_nothing(attention, mixer) for attention, mixer, _ in blocks]
    if _is_derived(config, "kv_sharing_modes"):
        pass  # the family shares keys and values itself, and only layers without a place in the cache lose theirs
    elif mixed and any(emptied) and CACHES_KNOW_EMPTY_LAYERS:
        config.kv_sharing_modes = ["reuse" if is_empty else "own" for is_empty in emptied]
    elif getattr(config, "kv_sharing_modes", None) is not None:  # left by an earlier cut
        config.kv_sharing_modes = None
    numbers = list(range(len(layers)))
    if not mixed and not _is_run_by_vllm(config):
        numbers = [sum(not empty for empty in emptied[:index]) for index in numbers]
    # Layers that use the keys of others have no place in an older cache.
    counts = mixed and not CACHES_KNOW_EMPTY_LAYERS and not getattr(config, "num_kv_shared_layers", None)
    for number, is_empty, present in zip(numbers, emptied, blocks, strict=True):
        for block in present:
            if isinstance(block, RemovedAttention):
                block.counted_as = number if counts and is_empty else None
            for attribute in _CACHE_NUMBERS:
                if isinstance(getattr(block, attribute, None), int):
                    setattr(block, attribute, number)


def _is_run_by_vllm(config: Any) -> bool:
    """Whether vLLM builds the model: it names an attention implementation of its own ("vllm", "vllm_mla")."""
    return str(getattr(config, "_attn_implementation", "")).startswith("vllm")


def _renumber_mixtures(config: Any, has_experts: Sequence[bool]) -> None:
    """Say in the config which of the layers that remain have experts, in families whose layers differ in it."""
    numbers = [index for index, has in enumerate(has_experts) if has] or [len(has_experts)]
    for attribute in _DENSE_LAYER_COUNTS:
        if isinstance(getattr(config, attribute, None), int):
            setattr(config, attribute, numbers[0])
    if isinstance(getattr(config, "mlp_only_layers", None), list):
        config.mlp_only_layers = [index for index, has in enumerate(has_experts) if not has]
        config.decoder_sparse_step = 1


def shares_keys(config: Any) -> bool:
    """Whether layers of a family use the keys and values of others, as its config says."""
    if _is_derived(config, "kv_sharing_modes"):
        return "reuse" in config.kv_sharing_modes
    return bool(getattr(config, "num_kv_shared_layers", None))


def _is_derived(config: Any, attribute: str) -> bool:
    """Whether a config computes an attribute from others."""
    name = (getattr(config, "attribute_map", None) or {}).get(attribute, attribute)
    return isinstance(getattr(type(config), name, None), property)


def _find_blocks(layer: nn.Module, names: Any) -> tuple[Any, Any, Any]:
    """Attention, mixer and FFN of a layer: the module, its stub where it was removed, or None where there is none.

    `names` are those of this layer.
    """
    mlp = names.down if names.mlp == "" else names.mixture.block if names.mixture is not None else names.mlp
    return find(layer, names.attention), find(layer, names.mixer), find(layer, mlp)


def _stores_nothing(attention: Any, mixer: Any) -> bool:
    """Whether attention or mixer was removed, and no other block of the layer uses its place in the cache."""
    return not (attention is None and mixer is None) and is_absent(attention) and is_absent(mixer)


def add_zero_bias(linear: Any) -> None:
    """Give a linear a bias of zeros, unless it has one."""
    if linear.bias is None:
        weight = linear.weight
        linear.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)


def _resized(linear: Any, out_features: int | None, in_features: int | None) -> None:
    """An empty weight of the given shape (None: as it is), on the linear's device and in its dtype."""
    transposed = hasattr(linear, "nf")
    rows, columns = linear.weight.shape[::-1] if transposed else linear.weight.shape
    rows, columns = out_features or rows, in_features or columns
    weight = linear.weight.new_empty((columns, rows) if transposed else (rows, columns))
    set_linear(linear, weight, None if linear.bias is None else linear.bias.new_empty(rows))


def build_layer_shapes(model: Any, names: Any) -> None:
    """Give the layers of a freshly built dense model the shapes of `config.per_layer_config`, weights still empty."""
    config, model_names = _get_decoder_config(model.config), names
    for index, (layer, own) in enumerate(zip(find(model, model_names.layers), config.per_layer_config, strict=True)):
        names = resolve_layer_names(layer, model_names)
        skipped, biased = getattr(own, "skip", ()), getattr(own, ADDED_BIASES, ())
        attention, mlp = find(layer, names.attention), find(layer, names.mlp)
        heads, groups = getattr(own, names.config_heads), getattr(own, names.config_kv_heads)
        channels, experts, expert_channels = getattr(own, names.config_ffn), 0, 0
        if isinstance(channels, list | tuple):  # a config with a list of widths
            channels = channels[index]
        if names.mixture is not None and "mlp" not in skipped:
            experts, expert_channels, channels = getattr(own, MIXTURE_WIDTHS)
            _resize_experts(layer, names, experts, expert_channels)
        if "mixer" in skipped:
            remove_mixer(layer, names)
        if "attention" in skipped:
            remove_attention(layer, names, UnusedAttention(config, index) if _is_run_by_vllm(config) else None)
        if attention is None or "attention" in skipped:
            heads = groups = 0
        else:
            dim = getattr(attention, names.head_dim)
            if names.fused_qkv:
                _resized(find(attention, names.fused_qkv), (heads + 2 * groups) * dim, None)
            else:
                _resized(find(attention, names.query), heads * dim * (2 if names.gated_query else 1), None)
                _resized(find(attention, names.key), groups * dim, None)
                _resized(find(attention, names.value), groups * dim, None)
            _resized(find(attention, names.output), None, heads * dim)
            if "attention" in biased:
                add_zero_bias(find(attention, names.output))
            for path, kind in names.per_head.items():
                keep_entries(attention, path, range(heads if kind == "query" else groups))
        if "mlp" in skipped:
            remove_mlp(layer, names)
        if mlp is None or "mlp" in skipped:
            channels = 0
        else:
            if names.fused_gate_up:
                _resized(find(mlp, names.fused_gate_up), 2 * channels, None)
            else:
                for path in (names.gate, names.up):
                    if path is not None:
                        _resized(find(mlp, path), channels, None)
            _resized(find(mlp, names.down), None, channels)
            if "mlp" in biased:
                add_zero_bias(find(mlp, names.down))
        set_counters(layer, names, config, heads, groups, channels, experts, expert_channels)
    settle(model, model_names)


def _resize_experts(layer: nn.Module, names: Any, experts: int, channels: int) -> None:
    """Give a mixture other numbers of experts and channels, weights still empty."""
    for tensor in find_expert_tensors(layer, names):
        sizes = list(tensor.value.shape)
        if tensor.axis is not None:
            sizes[tensor.axis] = channels * tensor.per_channel
        set_expert_tensor(tensor, tensor.value.new_empty(experts, *sizes[1:]))


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
        setattr(find(attention, parent), name, _make_successor(entries, value))


class _LayerConfigs(Sequence[Any]):
    """The configs of the layers, by number; by layer type, that of the first layer of the type.

    transformers refuses the type where widths differ between its layers; models ask for what they have in common.
    """

    def __init__(self, configs: Sequence[Any], layer_types: Sequence[str]):
        self._configs, self._layer_types = configs, layer_types

    def __len__(self) -> int:
        return len(self._configs)

    def __getitem__(self, key: Any) -> Any:
        return self._configs[list(self._layer_types).index(key) if isinstance(key, str) else key]


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
    def per_layer_config(self) -> Any:
        configs = super().per_layer_config  # type: ignore[misc]
        layer_types = getattr(self, "layer_types", None)
        return configs if layer_types is None else _LayerConfigs(configs, layer_types)

    @per_layer_config.setter
    def per_layer_config(self, value: Any) -> None:
        PreTrainedConfig.per_layer_config.fset(self, value)  # type: ignore[attr-defined]

    @property
    def allow_global_per_layer_attribute_access(self) -> bool:  # type: ignore[override]
        return True

    def validate_architecture(self) -> None:
        """Head counts need not divide the hidden size: every layer has its own."""


def nest_per_layer_config(outer: Any, decoder: Any, prefix: str) -> dict[str, Any]:
    """The kinds of configs inside a multimodal config class, with one for layers of different shape for its decoder.

    Args:
        outer: config class of the multimodal model.
        decoder: stock config class of its decoder.
        prefix: of the `model_type` of the new class.
    """
    # The new class has the name of the stock one: by this name transformers finds the model class of the decoder.
    attributes = {"model_type": f"{prefix}{decoder.model_type}", "__module__": __name__}
    spec = copy.copy(outer.sub_configs_defaults["text_config"])
    spec.config_class = type(decoder.__name__, (PerLayerConfig, decoder), attributes)
    spec.model_type, spec.init_kwargs = decoder.model_type, {}
    return {**outer.sub_configs_defaults, "text_config": spec}


class PerLayerModel:
    """Mixed into a family's causal LM, or its base model: builds it dense (on the meta device when loading), then
    shapes every layer.
    """

    names: dict[str, Any]

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        names = types.SimpleNamespace(**self.names)
        names.layers = find_layers_path(self, names.layers)
        if find(self, names.layers) is None:  # a base model; the path begins at the model with the head
            names.layers = names.layers.partition(".")[2]
        if names.mixture is not None:
            names.mixture = types.SimpleNamespace(**names.mixture)
        build_layer_shapes(self, names)

    @classmethod
    def is_custom_code(cls) -> bool:
        """The modules are transformers' own; those of custom code do not get the buffers that no file holds."""
        return False

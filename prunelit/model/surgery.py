"""The cut: `apply(model, plan)`. Only this module removes units, layers and blocks from a model.

Other modules that prune layer by layer call its public parts: `prune_layer`, then `finish_pruning` once at the end.

Legend: Q query heads, G KV groups, D head size, F FFN channels.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model.decoder import Decoder, Layer, as_decoder, is_conv1d
from prunelit.model.experts import Experts
from prunelit.model.per_layer import (
    keep_entries,
    remove_attention,
    remove_mixer,
    remove_mlp,
    set_counters,
    set_expert_tensor,
    set_linear,
    settle,
)
from prunelit.model.unit_indices import expand_head_rows, index_ffn_rows, index_qkv_blocks
from prunelit.runtime.errors import BadPlan


def check_plan_fits(decoder: Decoder, plan: PruningPlan) -> None:
    """Raise unless `plan` was made for a model of this shape.

    Raises:
        BadPlan: another family, number of layers or width; says the first difference.

    Example: see `prunelit.callbacks.greedy_output.callback`, which uses it.
    """
    made_for, shape_now = plan.model, decoder.shape
    for name in ("model_type", "hidden_size"):
        if getattr(made_for, name) != getattr(shape_now, name):
            raise BadPlan(
                f"plan: made for another model: {name} {getattr(made_for, name)!r} ({made_for.name}), "
                f"got {getattr(shape_now, name)!r} ({shape_now.name}); make a plan for this model"
            )
    if len(made_for.layers) != len(shape_now.layers):
        raise BadPlan(
            f"plan: made for {len(made_for.layers)} layers ({made_for.name}), got a model with {len(shape_now.layers)} "
            f"({shape_now.name}); make a plan for this model, or load the dense one"
        )
    for index, (planned_shape, shape) in enumerate(zip(made_for.layers, shape_now.layers, strict=True)):
        if planned_shape != shape:
            raise BadPlan(
                f"plan: made for another model: layer {index} has {shape.query_heads} query heads, {shape.kv_groups} "
                f"KV groups, {shape.ffn_channels} channels, expected {planned_shape.query_heads}, "
                f"{planned_shape.kv_groups}, {planned_shape.ffn_channels}; make a plan for this model, or "
                "load the dense one"
            )
    if made_for.weights != shape_now.weights:
        warnings.warn(
            f"the plan was made for weights {made_for.weights} ({made_for.name}), this model has {shape_now.weights} "
            f"({shape_now.name}): right for a fine-tuned copy, wrong for any other model",
            stacklevel=4,  # check_fits, apply, its no_grad wrapper, the caller
        )


@torch.no_grad()
def apply(model: nn.Module | Decoder, plan: PruningPlan) -> None:
    """Cut `model` in place as `plan` says; dtype, device, mode and `requires_grad` stay.

    Kept weights are copied, so the memory of what is cut is freed layer by layer. The config's widths follow where all
    layers agree; otherwise `prunelit.save` writes the shape of every layer.

    Raises:
        BadPlan: the plan was made for another model; nothing has been changed then.

    Example: see `tests/model/test_copies.py`.
    """
    decoder = as_decoder(model)
    check_plan_fits(decoder, plan)
    apply_checked_plan(decoder, plan)


def apply_checked_plan(decoder: Decoder, plan: PruningPlan) -> None:
    """`apply` of a plan that is known to fit; the weights may be without memory.

    Example: see `prunelit.cli.prune`, which uses it.
    """
    for layer, kept in zip(decoder, plan.layers, strict=True):
        prune_layer(layer, kept, decoder.config)
    finish_pruning(decoder, plan)


@torch.no_grad()
def prune_layer(layer: Layer, kept: LayerPlan, config: Any) -> None:
    """Cut one layer in place. `finish_pruning` follows once all layers are cut; before it, only single layers run.

    Args:
        layer: as it is before the cut; look at its module afresh afterwards.
        kept: what of it stays.
        config: of the model.

    Example: see `prunelit.callbacks.greedy_output.two_step`, which uses it.
    """
    if layer.has_attention:
        _prune_attention(layer, kept)
    if layer.has_mixer and not kept.mixer:
        remove_mixer(layer.module, layer.architecture)
    if layer.experts is not None and kept.experts:
        _prune_experts(layer.experts, kept)
    if layer.has_mlp or layer.has_experts:
        _prune_mlp(layer, kept)
    counts = len(kept.experts), len(kept.expert_channels)
    set_counters(layer.module, layer.architecture, config, *kept.widths, *counts)


def finish_pruning(decoder: Decoder, plan: PruningPlan) -> None:
    """After every layer was cut: drop layers without blocks, close holes in the KV cache, write widths that agree.

    Example: see `prunelit.callbacks.greedy_output.two_step`, which uses it.
    """
    settle(decoder.model, decoder.architecture)
    if plan.is_uniform:
        _write_config_widths(decoder, plan)


def _write_config_widths(decoder: Decoder, plan: PruningPlan) -> None:
    """Write the widths that all layers share into the config.

    Head counts are left alone where the config has no head size of its own: it would be derived from them, wrongly; and
    where other attentions, which stay whole, have the config's number of heads.
    """
    names, config = decoder.architecture, decoder.config
    widths: dict[str, Any] = dict(names.config_exact_widths)
    pairs = list(zip(plan.layers, plan.model.layers, strict=True))
    if ffn := next((kept for kept, shape in pairs if kept.ffn_channels and not shape.experts), None):
        widths[names.config_ffn] = len(ffn.ffn_channels)
    mixture_plan = next((kept for kept in plan.layers if kept.experts), None)
    if names.mixture is not None and mixture_plan is not None:
        counts = mixture_plan.counts
        widths |= names.mixture.get_config_widths(counts["experts"], counts["expert_channels"], counts["ffn_channels"])
    attention = next((kept for kept in plan.layers if not kept.attention_removed), None)
    has_whole_attention = any(layer.has_mixer and layer.architecture.mixer_is_attention for layer in decoder)
    if attention and not has_whole_attention and isinstance(vars(config).get("head_dim"), int):
        widths |= {names.config_heads: len(attention.query_heads), names.config_kv_heads: len(attention.kv_groups)}
    for name, value in widths.items():
        if hasattr(config, name):
            setattr(config, name, decoder.spread_width(getattr(config, name), value))


_REMOVE_BLOCK = {"attention": remove_attention, "mixer": remove_mixer, "mlp": remove_mlp}


@contextmanager
def remove_blocks_temporarily(decoder: Decoder, blocks: Iterable[tuple[int, str]]) -> Iterator[None]:
    """Put the stubs of a cut in place of whole blocks while the context is open, and the blocks back afterwards.

    Args:
        decoder: the model.
        blocks: (layer index, "attention", "mixer" or "mlp") of every block.

    Example: see `prunelit.callbacks.block_pruner.evaluator`, which measures the model without some of its blocks.
    """
    blocks = list(blocks)
    layers = [decoder.layers[index].module for index in {index for index, _ in blocks}]
    children_before = [(module, dict(module.named_children())) for layer in layers for module in layer.modules()]
    try:
        for index, kind in blocks:
            _REMOVE_BLOCK[kind](decoder.layers[index].module, decoder.architecture)
        yield
    finally:
        for module, children in children_before:
            for name, child in children.items():
                setattr(module, name, child)


def replace_layers(decoder: Decoder, plan: PruningPlan, modules: Sequence[nn.Module | None]) -> None:
    """Put layers that were pruned one by one, as copies, in place of the dense ones, and finish the cut.

    Args:
        decoder: the dense model, changed in place.
        plan: by which the layers were pruned.
        modules: the pruned layers; None: the dense layer stays.

    Example: see `prunelit.callbacks.greedy_output.two_step`, which prunes copies.
    """
    device, layers = decoder.device, decoder.layer_modules
    for index, module in enumerate(modules):
        if module is not None:
            layers[index] = module.to(device)
    finish_pruning(decoder, plan)


@torch.no_grad()
def mask_pruned_units(model: nn.Module | Decoder, plan: PruningPlan) -> None:
    """Zero what `plan` would cut instead of cutting it: the same outputs, dense shapes. For tests and comparisons.

    Example: see `tests/callbacks/test_wanda_sp.py`.
    """
    decoder = as_decoder(model)
    check_plan_fits(decoder, plan)
    for layer, kept in zip(decoder, plan.layers, strict=True):
        if layer.has_attention:
            columns = expand_head_rows(torch.tensor(kept.query_heads, dtype=torch.long), layer.head_dim)
            _zero_pruned_columns(layer.output, columns, kept.attention_removed, layer.get_norm("attention_post_norm"))
        if layer.has_mixer and not kept.mixer:
            cast(nn.Module, layer.mixer).register_forward_hook(_zero_output)
        if layer.experts is not None and kept.mlp_removed:
            layer.experts.block.register_forward_hook(_zero_output)
        elif layer.experts is not None:
            _mask_experts(layer.experts, kept)
        if layer.has_mlp:
            _zero_pruned_columns(
                layer.down, torch.tensor(kept.ffn_channels), kept.mlp_removed, layer.get_norm("mlp_post_norm")
            )


def _zero_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: zeros in place of what a block returns, alone or first in a tuple."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def _mask_experts(experts: Experts, kept: LayerPlan) -> None:
    """Let a router never choose the experts that `kept` leaves out, and zero what the channels that go would add."""
    removed = torch.ones(experts.count, dtype=torch.bool)
    removed[list(kept.experts)] = False
    for tensor in experts.tensors:
        if tensor.owner is experts.module and tensor.name == experts.names.down:
            channels = [channel for channel in range(experts.channels) if channel not in kept.expert_channels]
            tensor.value.index_fill_(cast(int, tensor.axis), torch.tensor(channels, dtype=torch.long), 0.0)
        elif not isinstance(tensor.value, nn.Parameter):  # a correction of the choice
            tensor.value.masked_fill_(removed, float("-inf"))
    router, weight_shape, own_forward = experts.router, experts.router.weight.shape, experts.router.forward

    def forward_masked(*args: Any, **kwargs: Any) -> Any:
        with _LogitMask(removed, weight_shape):
            return own_forward(*args, **kwargs)

    router.forward = forward_masked


class _LogitMask(TorchFunctionMode):
    """Adds minus infinity to some logits of a router, which are computed by a call of `linear` inside its forward."""

    def __init__(self, removed: Tensor, weight_shape: torch.Size):
        super().__init__()
        self.removed, self.weight_shape = removed, weight_shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1].shape == self.weight_shape:
            return result.masked_fill(self.removed.to(result.device), float("-inf"))
        return result


def _zero_pruned_columns(linear: nn.Module, kept: Tensor, removed: bool, post_norm: nn.Module | None) -> None:
    weight, bias = cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
    axis = 0 if is_conv1d(linear) else 1
    drop = torch.ones(weight.shape[axis], dtype=torch.bool)
    drop[kept.long()] = False
    weight.index_fill_(axis, drop.nonzero().flatten().to(weight.device), 0.0)
    if removed and bias is not None:
        bias.zero_()
    if removed and post_norm is not None and getattr(post_norm, "bias", None) is not None:
        cast(Tensor, post_norm.bias).zero_()


def _prune_attention(layer: Layer, kept: LayerPlan) -> None:
    shape, names = layer.shape, layer.architecture
    if kept.attention_removed:
        remove_attention(layer.module, names)
        return
    if len(kept.query_heads) == shape.query_heads:
        return
    dim, units = shape.head_dim, {"query": list(kept.query_heads), "kv": list(kept.kv_groups)}
    for linear, blocks in zip(layer.qkv, index_qkv_blocks(layer), strict=True):
        stays = torch.cat([of[units[kind]].flatten() for kind, of in blocks.items()]).sort().values
        _slice_linear(linear, rows=expand_head_rows(stays, dim))
    _slice_linear(layer.output, columns=expand_head_rows(torch.tensor(kept.query_heads), dim))
    for path, kind in names.per_head.items():
        keep_entries(layer.attention, path, kept.query_heads if kind == "query" else kept.kv_groups)


def _prune_mlp(layer: Layer, kept: LayerPlan) -> None:
    if kept.mlp_removed:
        remove_mlp(layer.module, layer.architecture)
        return
    if not layer.has_mlp or len(kept.ffn_channels) == layer.shape.ffn_channels:
        return
    channels = torch.tensor(kept.ffn_channels)
    rows = index_ffn_rows(layer)[channels].T.flatten()
    for linear in layer.ffn_in:
        _slice_linear(linear, rows=rows)
    _slice_linear(layer.down, columns=channels)


def _prune_experts(experts: Experts, kept: LayerPlan) -> None:
    """Keep some experts, with their entries of the router, and some channels of every expert."""
    all_channels = len(kept.expert_channels) == experts.channels
    channels = torch.tensor(kept.expert_channels)
    rows = experts.index_rows()[channels].flatten().sort().values
    for tensor in experts.tensors:
        value = tensor.value.detach()
        if len(kept.experts) < experts.count:
            value = value.index_select(0, torch.tensor(kept.experts, device=value.device))
        if tensor.axis is not None and not all_channels:
            entries = rows if tensor.per_channel > 1 else channels
            value = value.index_select(tensor.axis, entries.to(value.device))
        if value.shape != tensor.value.shape:
            set_expert_tensor(tensor, value)


def _slice_linear(linear: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep some outputs (rows) or inputs (columns) of a linear; a bias loses entries with the rows only."""
    weight, bias = cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
    index = cast(Tensor, rows if rows is not None else columns).to(weight.device)
    axis = (rows is None) != is_conv1d(linear)
    cut_bias = bias if bias is None or rows is None else bias.detach().index_select(0, index)
    if bias is not None and rows is None:
        cut_bias = bias.detach()
    set_linear(linear, weight.detach().index_select(int(axis), index), cut_bias)

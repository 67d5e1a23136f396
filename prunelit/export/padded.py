"""Format padded: layers of different shape in a stock class, filled up with zeros to the largest remaining width.

It is for programs that load plain models only. A head or channel of zeros contributes exactly zero, and so does a
block of zeros in place of a removed block. Every layer gets the heads, KV groups and channels of the largest layer, so
part of the saving is lost; the writer reports how much.

Legend: Q query heads, G KV groups, D head size, F FFN channels, H hidden size.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.core.architectures import get_decoder_config
from prunelit.export.formats import ExportJob, Format
from prunelit.export.model_files import write_model_as
from prunelit.export.proof.compare import prove_folder
from prunelit.export.uniform import (
    LOAD_SNIPPET,
    LayerWidths,
    build_on_meta,
    propose_stock_configs,
)
from prunelit.model import copies
from prunelit.model.decoder import Decoder, Layer, as_decoder, is_conv1d
from prunelit.model.per_layer import find
from prunelit.runtime.errors import DeclarationMismatch, DoesNotFit


def write_padded(job: ExportJob) -> dict[str, Any]:
    """Write a model under a stock class, with zeros where a layer has less than the largest one.

    Returns:
        {"note", "size": of the written model, "cut_size": of the model in memory}; with a plan also "saved_of_dense",
        the share of the dense model's parameters that is still saved, and "kept_of_saving", the share of the pruned
        model's saving that remains.

    Raises:
        DoesNotFit: no stock class of the family has such widths.

    Example: `prunelit.export.write_model(model, "folder", tokenizer, format="padded")` calls it.
    """
    shell, weights = _build_padded_shell(job.get_decoder())
    write_model_as(shell, job, weights)
    size, pruned_size = metrics.measure_model_size(shell), metrics.measure_model_size(job.get_decoder())
    facts: dict[str, Any] = {"size": size, "cut_size": pruned_size}
    zeros = size["parameters"] - pruned_size["parameters"]
    note = f"padded: {size['parameters']:,} parameters, {zeros:,} of them zeros again"
    if job.plan is not None:
        dense = job.plan.model.parameters
        saved, saved_by_pruning = dense - size["parameters"], dense - pruned_size["parameters"]
        kept_of_saving = saved / saved_by_pruning if saved_by_pruning else 1.0
        facts |= {"saved_of_dense": saved / dense, "kept_of_saving": kept_of_saving}
        smaller = f"still {saved / dense:.1%} smaller" if saved > 0 else "not smaller"
        note += (
            f"; {smaller} than the dense model, where the pruned one is {saved_by_pruning / dense:.1%} smaller: "
            f"{min(1, 1 - kept_of_saving):.0%} of the saving is given up"
        )
    return facts | {"note": note}


def _build_padded_shell(model: nn.Module | Decoder) -> tuple[Any, dict[str, Tensor]]:
    """Build a stock model on the meta device that has room for every layer.

    Returns:
        The stock model, and its weights by name.

    Raises:
        DoesNotFit: there is no such class.
    """
    decoder = as_decoder(model)
    _check_mixtures_alike(decoder)
    all_widths = list(_propose_layer_widths(decoder))
    for widths in all_widths:
        for build, config, _ in propose_stock_configs(decoder, widths):
            # Pruning marks layers without attention as "reuse", so that the cache skips them. Here none lacks it.
            decoder_config = get_decoder_config(config)
            if vars(decoder_config).get("kv_sharing_modes") is not None:
                decoder_config.kv_sharing_modes = None
            shell = build_on_meta(build, config)
            weights = None if shell is None else _scatter_weights(decoder, shell, widths)
            if weights is not None:
                return shell, weights
    smallest = all_widths[0]
    mixture = (
        f", {smallest.experts} experts of {smallest.expert_channels} channels beside {smallest.shared_channels}, dense "
        f"FFNs of {smallest.ffn_channels}"
        if smallest.experts
        else ""
    )
    raise DoesNotFit(
        f"format 'padded': no {decoder.config.model_type} of transformers has {smallest.query_heads} query heads in "
        f"{smallest.kv_groups} KV groups of size {smallest.head_dim}{mixture} and this model's biases; use format "
        "'hetero'"
    )


def _check_mixtures_alike(decoder: Decoder) -> None:
    """Check that all mixtures have as many experts of one width: a router would choose experts of zeros.

    Raises:
        DoesNotFit: two layers differ.
    """
    having = [layer for layer in decoder if layer.shape.experts]
    for layer in having[1:]:
        first, widths = ((s.experts, s.expert_channels) for s in (having[0].shape, layer.shape))
        if first != widths:
            raise DoesNotFit(
                f"format 'padded': expected mixtures of one shape, got {first[0]} experts of {first[1]} channels in "
                f"layer {having[0].index}, {widths[0]} of {widths[1]} in layer {layer.index}; use format 'hetero'"
            )


def _propose_layer_widths(decoder: Decoder) -> Iterator[LayerWidths]:
    """Propose widths that hold every layer: the smallest first, then those of classes whose head size is H / Q."""
    shapes = [layer.shape for layer in decoder]
    groups = max(shape.kv_groups for shape in shapes)
    group_size, dim = max(shape.group_size for shape in shapes), max(shape.head_dim for shape in shapes)
    all_widths = [LayerWidths.from_shape(shape) for shape in shapes]
    dense, *mixture = (max(column) for column in list(zip(*all_widths, strict=True))[3:])
    channels, mixture = _widen_for_config(decoder, dense or 1, *mixture)
    yield LayerWidths(groups * group_size, groups, dim, channels, *mixture)
    if not groups:
        return
    heads = int(decoder.config.hidden_size) // dim
    for more_groups in range(groups, heads + 1):
        is_proposed = (heads, more_groups) == (groups * group_size, groups)
        if heads % more_groups == 0 and heads // more_groups >= group_size and not is_proposed:
            yield LayerWidths(heads, more_groups, dim, channels, *mixture)
    names, values = decoder.architecture, vars(decoder.config)  # attentions that stay whole have the config's numbers
    if any(layer.architecture.mixer_is_attention for layer in decoder):
        yield LayerWidths(values[names.config_heads], values[names.config_kv_heads], dim, channels, *mixture)


def _widen_for_config(
    decoder: Decoder, channels: int, experts: int, expert_channels: int, shared_channels: int
) -> tuple[int, list[int]]:
    """Widen dense and shared FFNs where the family's config derives their widths from that of the experts.

    Returns:
        Channels of the dense FFNs; experts, channels of each, and of the shared FFN.
    """
    names = decoder.architecture
    mixture = names.mixture
    if mixture is not None and experts:
        if mixture.config_channels == names.config_ffn:
            channels = max(channels, expert_channels)
        if mixture.config_shared_count or mixture.config_shared == mixture.config_channels:
            shared_channels = -(-shared_channels // expert_channels) * expert_channels
    return channels, [experts, expert_channels, shared_channels]


def _scatter_weights(decoder: Decoder, shell: nn.Module, widths: LayerWidths) -> dict[str, Tensor] | None:
    """Scatter a model's weights into the shapes of a stock model.

    Args:
        decoder: the model in memory.
        shell: the stock model on the meta device.
        widths: what every layer of `shell` must have.

    Returns:
        The weights by name; None where `shell` has other shapes, or a weight of the model has no place in it.
    """
    if any(layer.has_attention and layer.head_dim != widths.head_dim for layer in decoder):
        return None
    try:
        padded = Decoder(shell)
    except DeclarationMismatch:  # a class that takes some of its widths from other options, as Helium does
        return None
    if len(padded.layers) != len(decoder.layers) or not all(_has_widths(layer, widths) for layer in padded):
        return None
    weights = decoder.model.state_dict()
    shapes = {name: x.shape for name, x in shell.state_dict().items()}
    like = next(decoder.model.parameters())
    for layer in decoder:
        prefix = f"{decoder.architecture.layers}.{layer.index}."
        for path, axis, places, size in _map_linear_places(layer, widths):
            conv1d = is_conv1d(cast(nn.Module, find(layer.module, path)))
            for part in ("weight", "bias") if axis == 0 else ("weight",):
                if (name := f"{prefix}{path}.{part}") in weights:
                    stored_axis = axis ^ (conv1d and part == "weight")  # Conv1D stores its weight as [in, out]
                    weights[name] = _scatter_with_zeros(weights[name], stored_axis, places, size)
        _scatter_per_head_entries(layer, prefix, weights, widths)
    if any(name not in shapes or shapes[name] != x.shape for name, x in weights.items()):
        return None
    return {name: weights[name] if name in weights else like.new_zeros(shape) for name, shape in shapes.items()}


def _has_widths(layer: Layer, widths: LayerWidths) -> bool:
    """Whether the blocks that a layer has are of these widths."""
    actual = LayerWidths.from_shape(layer.shape)
    return (
        (not layer.has_attention or actual[:3] == widths[:3])
        and (layer.has_experts or not layer.has_mlp or actual.ffn_channels == widths.ffn_channels)
        and (not layer.has_experts or not widths.experts or actual[4:] == widths[4:])
    )


def _map_linear_places(layer: Layer, widths: LayerWidths) -> Iterator[tuple[str, int, Tensor, int]]:
    """Map the rows and columns of a layer's linears to their places in the padded layer.

    Yields:
        For each linear: its path in the layer, the axis (0 rows, 1 columns), the new place of each of its rows or
        columns, and their total number in the padded layer.
    """
    a, dim = layer.architecture, widths.head_dim
    if layer.has_attention:
        queries, groups = _map_head_places(layer, widths)
        total_q, total_kv = widths.query_heads, widths.kv_groups
        if not a.fused_qkv:
            query_rows = 2 * dim if a.gated_query else dim
            for name, places, total, rows_per_head in (
                (a.query, queries, total_q, query_rows),
                (a.key, groups, total_kv, dim),
                (a.value, groups, total_kv, dim),
            ):
                yield f"{a.attention}.{name}", 0, _expand_head_rows(places, rows_per_head), total * rows_per_head
        elif a.qkv_layout == "concat":
            head_places = [*queries, *(total_q + g for g in groups), *(total_q + total_kv + g for g in groups)]
            rows = _expand_head_rows(head_places, dim)
            yield f"{a.attention}.{a.fused_qkv}", 0, rows, (total_q + 2 * total_kv) * dim
        else:  # rows are ordered by KV group: its query heads, its key head, its value head
            padded_size, size = total_q // total_kv, layer.shape.group_size
            head_places = [
                g * (padded_size + 2) + k for g in groups for k in (*range(size), padded_size, padded_size + 1)
            ]
            rows = _expand_head_rows(head_places, dim)
            yield f"{a.attention}.{a.fused_qkv}", 0, rows, (total_q + 2 * total_kv) * dim
        yield f"{a.attention}.{a.output}", 1, _expand_head_rows(queries, dim), total_q * dim
    if layer.has_mlp:
        total = widths.shared_channels if layer.has_experts else widths.ffn_channels
        channels = torch.arange(layer.shape.ffn_channels)
        mlp_prefix = f"{a.mlp}." if a.mlp else ""
        if a.fused_gate_up:
            yield f"{mlp_prefix}{a.fused_gate_up}", 0, torch.cat([channels, total + channels]), 2 * total
        else:
            for path in (a.gate, a.up):
                if path is not None:
                    yield f"{mlp_prefix}{path}", 0, channels, total
        yield f"{mlp_prefix}{a.down}", 1, channels, total


def _map_head_places(layer: Layer, widths: LayerWidths) -> tuple[list[int], list[int]]:
    """Map a layer's query heads and KV groups to their places in the padded layer."""
    padded_size = widths.query_heads // widths.kv_groups
    groups = list(range(layer.shape.kv_groups))
    return [g * padded_size + k for g in groups for k in range(layer.shape.group_size)], groups


def _scatter_per_head_entries(layer: Layer, prefix: str, weights: dict[str, Tensor], widths: LayerWidths) -> None:
    """Move a layer's parameters that belong to single heads (norms) to the places of these heads, in `weights`."""
    if not layer.has_attention:
        return
    queries, groups = _map_head_places(layer, widths)
    for path, kind in layer.architecture.per_head.items():
        places, total = (queries, widths.query_heads) if kind == "query" else (groups, widths.kv_groups)
        name = f"{prefix}{layer.architecture.attention}.{path}"
        if name in weights:
            weights[name] = _scatter_with_zeros(weights[name], 0, torch.tensor(places), total)
        else:  # a list of modules, one per head
            per_head = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
            for key, x in per_head.items():
                number, _, rest = key.removeprefix(f"{name}.").partition(".")
                weights[f"{name}.{places[int(number)]}.{rest}"] = x


def _expand_head_rows(heads: Sequence[int], dim: int) -> Tensor:
    """Return the row numbers of the given heads, [len(heads) * D].

    Example:
        >>> _expand_head_rows([0, 2], dim=2)
        tensor([0, 1, 4, 5])
    """
    return (torch.tensor(heads)[:, None] * dim + torch.arange(dim)).flatten()


def _scatter_with_zeros(x: Tensor, axis: int, places: Tensor, size: int) -> Tensor:
    """Put the entries of `x` along an axis at `places` of an axis of `size`, with zeros at the other places.

    Example:
        >>> _scatter_with_zeros(torch.tensor([5, 6]), axis=0, places=torch.tensor([0, 2]), size=3)
        tensor([5, 0, 6])
    """
    if len(places) == size:
        return x
    shape = list(x.shape)
    shape[axis] = size
    return x.new_zeros(shape).index_copy_(axis, places.to(x.device), x)


def check_padded(model: nn.Module, tokenizer: Any) -> None:
    """Check that `write_padded` can write a model; no weight is read, and the zeros take no memory.

    Raises:
        DoesNotFit: no stock class of the family has such widths.

    Example: `check_padded` is used further down in this module.
    """
    _build_padded_shell(copies.copy_to_meta_device(model))


FORMAT = Format("padded", LOAD_SNIPPET, write_padded, partial(prove_folder, same_shapes=False), check=check_padded)

"""padded: layers that differ, in a stock class: zeros up to the largest kept width of each kind.

For programs that load plain models only. A head or channel of zeros adds exactly nothing, and neither does a removed
block, which comes back as a block of zeros. Every layer then has the heads, KV groups and channels of the largest one,
so a part of what the cut saved is given up; the writer says how much.

Legend: Q query heads, G KV groups, D head size, F FFN channels, H hidden.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.export.formats import ExportJob, Format
from prunelit.export.model_files import write_model_as
from prunelit.export.proof.compare import prove_folder
from prunelit.export.uniform import LOAD_SNIPPET, LayerWidths, build_on_meta, propose_stock_configs
from prunelit.model import copies
from prunelit.model.decoder import Decoder, Layer, is_conv1d
from prunelit.model.per_layer import find
from prunelit.runtime.errors import DeclarationMismatch, DoesNotFit


def write_padded(job: ExportJob) -> dict[str, Any]:
    """Write a model under a stock class, with zeros in place of what only its largest layers have.

    Returns:
        {"note", "size": of what is written, "cut_size": of the model, "saved_of_dense", "kept_of_saving": shares of
        parameters, where there is a plan}.

    Raises:
        DoesNotFit: no stock class of the family has such widths.
    """
    shell, weights = _build_padded_shell(job.model)
    write_model_as(shell, job, weights)
    size, cut = metrics.measure_model_size(shell), metrics.measure_model_size(job.model)
    facts: dict[str, Any] = {"size": size, "cut_size": cut}
    note = f"padded: {size['parameters']:,} parameters, {size['parameters'] - cut['parameters']:,} of them zeros again"
    if job.plan is not None:
        dense = job.plan.model.parameters
        saved, would = dense - size["parameters"], dense - cut["parameters"]
        facts |= {"saved_of_dense": saved / dense, "kept_of_saving": saved / would if would else 1.0}
        smaller = f"still {saved / dense:.1%} smaller" if saved > 0 else "not smaller"
        note += (
            f"; {smaller} than the dense model, where the cut one is {would / dense:.1%} smaller: "
            f"{min(1, 1 - facts['kept_of_saving']):.0%} of the saving is given up"
        )
    return facts | {"note": note}


def _build_padded_shell(model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """A stock class on the meta device that has room for every layer, and its weights.

    Raises:
        DoesNotFit: there is none.
    """
    decoder = Decoder(model)
    tried = []
    for widths in _propose_layer_widths(decoder):
        tried.append(widths)
        for build, config, _ in propose_stock_configs(decoder, widths):
            if getattr(config, "kv_sharing_modes", None) is not None:  # every layer has an attention again
                config.kv_sharing_modes = None
            shell = build_on_meta(build, config)
            weights = None if shell is None else _scatter_weights(decoder, shell, widths)
            if weights is not None:
                return shell, weights
    least = tried[0]
    raise DoesNotFit(
        f"format 'padded': no {decoder.config.model_type} of transformers has {least.query_heads} query heads in "
        f"{least.kv_groups} KV groups of size {least.head_dim} and this model's biases; use format 'hetero'"
    )


def _propose_layer_widths(decoder: Decoder) -> Iterator[LayerWidths]:
    """Widths that hold every layer: the least first, then those of classes whose head size is H / Q."""
    shapes = [layer.shape for layer in decoder]
    groups = max(shape.kv_groups for shape in shapes)
    in_group, dim = max(shape.group_size for shape in shapes), max(shape.head_dim for shape in shapes)
    channels = max(shape.ffn_channels for shape in shapes) or 1
    yield LayerWidths(groups * in_group, groups, dim, channels)
    heads = int(decoder.config.hidden_size) // dim
    for more in range(groups, heads + 1):
        if heads % more == 0 and heads // more >= in_group and (heads, more) != (groups * in_group, groups):
            yield LayerWidths(heads, more, dim, channels)


def _scatter_weights(decoder: Decoder, shell: nn.Module, widths: LayerWidths) -> dict[str, Tensor] | None:
    """The weights of `shell`; None where its shapes are others, or a weight of the model has no place in it."""
    try:
        wide = Decoder(shell)
    except DeclarationMismatch:  # a class that takes some of its widths from elsewhere, as Helium does
        return None
    if {LayerWidths.from_shape(layer.shape) for layer in wide} != {widths} or len(wide.layers) != len(decoder.layers):
        return None
    own, room = decoder.model.state_dict(), {name: x.shape for name, x in shell.state_dict().items()}
    like = next(decoder.model.parameters())
    for layer in decoder:
        prefix = f"{decoder.architecture.layers}.{layer.index}."
        for path, axis, places, size in _map_linear_places(layer, widths):
            conv1d = is_conv1d(cast(nn.Module, find(layer.module, path)))
            for part in ("weight", "bias") if axis == 0 else ("weight",):
                if (name := f"{prefix}{path}.{part}") in own:
                    own[name] = _scatter_with_zeros(own[name], axis ^ (conv1d and part == "weight"), places, size)
        _scatter_per_head_entries(layer, prefix, own, widths)
    if any(name not in room or room[name] != x.shape for name, x in own.items()):
        return None
    return {name: own[name] if name in own else like.new_zeros(shape) for name, shape in room.items()}


def _map_linear_places(layer: Layer, widths: LayerWidths) -> Iterator[tuple[str, int, Tensor, int]]:
    """Where rows (axis 0) and columns (1) of a layer's linears go: path in the layer, axis, their new places, how many
    there are in all."""
    a, dim = layer.architecture, widths.head_dim
    if layer.has_attention:
        queries, groups = _map_head_places(layer, widths)
        total_q, total_kv = widths.query_heads, widths.kv_groups
        if not a.fused_qkv:
            for name, places, total in (
                (a.query, queries, total_q),
                (a.key, groups, total_kv),
                (a.value, groups, total_kv),
            ):
                yield f"{a.attention}.{name}", 0, _expand_head_rows(places, dim), total * dim
        elif a.qkv_layout == "concat":
            blocks = [*queries, *(total_q + g for g in groups), *(total_q + total_kv + g for g in groups)]
            yield f"{a.attention}.{a.fused_qkv}", 0, _expand_head_rows(blocks, dim), (total_q + 2 * total_kv) * dim
        else:  # per group: its query heads, its key head, its value head
            in_group, has = total_q // total_kv, layer.shape.group_size
            places = [g * (in_group + 2) + k for g in groups for k in (*range(has), in_group, in_group + 1)]
            yield f"{a.attention}.{a.fused_qkv}", 0, _expand_head_rows(places, dim), (total_q + 2 * total_kv) * dim
        yield f"{a.attention}.{a.output}", 1, _expand_head_rows(queries, dim), total_q * dim
    if layer.has_mlp:
        total, kept = widths.ffn_channels, torch.arange(layer.shape.ffn_channels)
        inside = f"{a.mlp}." if a.mlp else ""
        if a.fused_gate_up:
            yield f"{inside}{a.fused_gate_up}", 0, torch.cat([kept, total + kept]), 2 * total
        else:
            for path in (a.gate, a.up):
                if path is not None:
                    yield f"{inside}{path}", 0, kept, total
        yield f"{inside}{a.down}", 1, kept, total


def _map_head_places(layer: Layer, widths: LayerWidths) -> tuple[list[int], list[int]]:
    """Places of a layer's query heads and of its KV groups among those of the widest layer."""
    in_group = widths.query_heads // widths.kv_groups
    groups = list(range(layer.shape.kv_groups))
    return [g * in_group + k for g in groups for k in range(layer.shape.group_size)], groups


def _scatter_per_head_entries(layer: Layer, prefix: str, own: dict[str, Tensor], widths: LayerWidths) -> None:
    """Move a layer's entries of single heads (norms) to the places of these heads."""
    if not layer.has_attention:
        return
    queries, groups = _map_head_places(layer, widths)
    for path, kind in layer.architecture.per_head.items():
        places, total = (queries, widths.query_heads) if kind == "query" else (groups, widths.kv_groups)
        name = f"{prefix}{layer.architecture.attention}.{path}"
        if name in own:
            own[name] = _scatter_with_zeros(own[name], 0, torch.tensor(places), total)
        else:
            moved = {key: own.pop(key) for key in list(own) if key.startswith(f"{name}.")}
            for key, x in moved.items():
                number, _, rest = key.removeprefix(f"{name}.").partition(".")
                own[f"{name}.{places[int(number)]}.{rest}"] = x


def _expand_head_rows(heads: Sequence[int], dim: int) -> Tensor:
    """Rows of the given heads: [len(heads) * D]."""
    return (torch.tensor(heads)[:, None] * dim + torch.arange(dim)).flatten()


def _scatter_with_zeros(x: Tensor, axis: int, places: Tensor, size: int) -> Tensor:
    """`x` with its entries along an axis at `places`, and zeros at the others of `size`."""
    if len(places) == size:
        return x
    shape = list(x.shape)
    shape[axis] = size
    return x.new_zeros(shape).index_copy_(axis, places.to(x.device), x)


def check_padded(model: nn.Module, tokenizer: Any) -> None:
    """As `write_padded`, without writing; the zeros take no memory."""
    _build_padded_shell(copies.copy_to_meta_device(model))


FORMAT = Format("padded", LOAD_SNIPPET, write_padded, partial(prove_folder, same_shapes=False), check=check_padded)

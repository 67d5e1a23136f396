"""Which rows and columns of which linear go with which unit: one place for scores and for the cut.

Legend: Q query heads, G KV groups, D head size, F FFN channels. A *slice* is what of one linear goes with a unit: a row
with its bias entry (q, k, v, gate, up), or a column (o, down); E elements a slice. A *block* is the D rows of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from prunelit.model.decoder import Layer, is_conv1d

UnitKind = Literal["query", "kv", "channel"]


def index_qkv_blocks(layer: Layer) -> list[dict[UnitKind, Tensor]]:
    """Of every linear of q, k and v, separate or fused, the blocks of each query head [Q, 1] and KV group [G, n]."""
    shape, names = layer.shape, layer.architecture
    heads, groups, size = shape.query_heads, shape.kv_groups, shape.group_size
    query, group = torch.arange(heads)[:, None], torch.arange(groups)[:, None]
    if not names.fused_qkv:
        return [{"query": query}, {"kv": group}, {"kv": group}]
    if names.qkv_layout == "concat":  # all query heads, all key heads, all value heads
        return [{"query": query, "kv": torch.cat([heads + group, heads + groups + group], 1)}]
    first = group * (size + 2) + size  # per group: its query heads, its key head, its value head
    return [{"query": query + 2 * (query // size), "kv": torch.cat([first, first + 1], 1)}]


def index_ffn_rows(layer: Layer) -> Tensor:
    """Of every linear that reads into the FFN, the rows of each channel [F, n]."""
    channel = torch.arange(layer.shape.ffn_channels)[:, None]
    fused = layer.architecture.fused_gate_up  # all gates, then all ups
    return torch.cat([channel, channel + layer.shape.ffn_channels], 1) if fused else channel


def expand_head_rows(blocks: Tensor, head_dim: int) -> Tensor:
    """Rows of head-sized blocks, [..., n] -> [..., n * D]."""
    return (blocks[..., None] * head_dim + torch.arange(head_dim)).flatten(-2)


@dataclass(frozen=True, eq=False)
class LinearSlices:
    """The slices of one linear, and the units that own them.

    Attributes:
        layer: index of the decoder layer.
        linear: the linear.
        columns: the slices are its inputs (o, down) instead of its outputs.
        owners: indices of the slices of every unit: {"query": [Q, n], "kv": [G, n]} or {"channel": [F, n]}.
    """

    layer: int
    linear: nn.Module
    columns: bool
    owners: Mapping[UnitKind, Tensor]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight, and bias where its entries go with the slices."""
        bias = cast("nn.Parameter | None", self.linear.bias)
        own = [cast(nn.Parameter, self.linear.weight)]
        return own if bias is None or self.columns else [*own, bias]

    def arrange_by_slice(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Elements by slice, [slices, E], of tensors that are shaped like the linear's own."""
        out_in = weight.T if is_conv1d(self.linear) else weight
        if self.columns:
            return out_in.T
        return out_in if bias is None else torch.cat([out_in, bias[:, None]], dim=1)

    def sum_per_unit(self, values: Tensor) -> dict[UnitKind, Tensor]:
        """Sums in float64 over the slices of each unit, from values per slice [slices]."""
        return {kind: values.double()[owned].sum(1) for kind, owned in self.owners.items()}


def collect_layer_slices(layer: Layer) -> list[LinearSlices]:
    """The slices of every linear of a layer that shrinks with its units; none of heads that can not be cut."""
    found: list[LinearSlices] = []
    shape = layer.shape
    if layer.has_attention and shape.heads_prunable:
        for linear, of in zip(layer.qkv, index_qkv_blocks(layer), strict=True):
            owners = {kind: expand_head_rows(blocks, shape.head_dim) for kind, blocks in of.items()}
            found.append(_build_linear_slices(layer, linear, owners))
        query = torch.arange(shape.query_heads)[:, None]
        found.append(
            _build_linear_slices(layer, layer.output, {"query": expand_head_rows(query, shape.head_dim)}, columns=True)
        )
    if layer.has_mlp:
        for linear in layer.ffn_in:
            found.append(_build_linear_slices(layer, linear, {"channel": index_ffn_rows(layer)}))
        channel = torch.arange(shape.ffn_channels)[:, None]
        found.append(_build_linear_slices(layer, layer.down, {"channel": channel}, columns=True))
    return found


def _build_linear_slices(
    layer: Layer, linear: nn.Module, owners: dict[UnitKind, Tensor], columns: bool = False
) -> LinearSlices:
    device = cast(Tensor, linear.weight).device
    return LinearSlices(layer.index, linear, columns, {kind: owned.to(device) for kind, owned in owners.items()})

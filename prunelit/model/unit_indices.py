"""Maps units (heads, KV groups, channels) to the rows and columns of linears, for scores and for surgery alike.

A *slice* is the part of one linear that belongs to a unit: a row with its bias entry (q, k, v, gate, up), or a column
(o, down); E elements per slice. A *block* is the D rows of a head.

The slices of a mixture are those of single experts: a row or column of one channel in one expert.

Legend: Q query heads, G KV groups, D head size, F FFN channels, E experts, C channels of an expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from prunelit.model.decoder import Layer, is_conv1d

UnitKind = Literal["query", "kv", "channel", "expert", "expert_channel"]


def index_qkv_blocks(layer: Layer) -> list[dict[UnitKind, Tensor]]:
    """Index the blocks of each query head and KV group in the linears of q, k and v, separate or fused.

    Returns:
        For each linear, {"query": [Q, 1]} and/or {"kv": [G, n]}: the blocks of n heads that belong to each unit.

    Example: see `collect_layer_slices`.
    """
    shape, names = layer.shape, layer.architecture
    heads, groups, size = shape.query_heads, shape.kv_groups, shape.group_size
    query, group = torch.arange(heads)[:, None], torch.arange(groups)[:, None]
    if not names.fused_qkv:
        rows = torch.cat([2 * query, 2 * query + 1], 1) if names.gated_query else query
        return [{"query": rows}, {"kv": group}, {"kv": group}]
    if names.qkv_layout == "concat":  # all query heads, all key heads, all value heads
        return [{"query": query, "kv": torch.cat([heads + group, heads + groups + group], 1)}]
    key = group * (size + 2) + size  # per group: its query heads, its key head, its value head
    return [{"query": query + 2 * (query // size), "kv": torch.cat([key, key + 1], 1)}]


def index_ffn_rows(layer: Layer) -> Tensor:
    """Index the rows of each channel, [F, n], in every linear that reads into the FFN.

    Example: see `collect_layer_slices`.
    """
    channel = torch.arange(layer.shape.ffn_channels)[:, None]
    fused = layer.architecture.fused_gate_up  # all gates, then all ups
    return torch.cat([channel, channel + layer.shape.ffn_channels], 1) if fused else channel


def expand_head_rows(blocks: Tensor, head_dim: int) -> Tensor:
    """Expand head-sized blocks to their rows, [..., n] -> [..., n * D].

    Example:
        >>> expand_head_rows(torch.tensor([0, 2]), head_dim=2)
        tensor([0, 1, 4, 5])
    """
    return (blocks[..., None] * head_dim + torch.arange(head_dim)).flatten(-2)


@dataclass(frozen=True, eq=False)
class _OwnedSlices:
    """Slices of one decoder layer, and the units that own them.

    Attributes:
        layer: index of the decoder layer.
        owners: indices of the slices that belong to each unit, {kind: [units, n]}.
    """

    layer: int
    owners: Mapping[UnitKind, Tensor]

    def sum_per_unit(self, values: Tensor) -> dict[UnitKind, Tensor]:
        """Sum values per slice, [slices], over the slices of each unit, in float64."""
        return {kind: values.double()[indices].sum(1) for kind, indices in self.owners.items()}


@dataclass(frozen=True, eq=False)
class LinearSlices(_OwnedSlices):
    """The slices of one linear; its owners are {"query": [Q, n], "kv": [G, n]} or {"channel": [F, n]}.

    Attributes:
        linear: the linear.
        columns: whether the slices are its inputs (o, down) instead of its outputs.

    Example: see `collect_layer_slices`.
    """

    linear: nn.Module
    columns: bool

    @property
    def weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.linear.weight)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if its entries belong to the slices."""
        bias = cast("nn.Parameter | None", self.linear.bias)
        weight = cast(nn.Parameter, self.linear.weight)
        return [weight] if bias is None or self.columns else [weight, bias]

    def arrange_by_slice(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Arrange tensors shaped like the linear's weight and bias by slice, [slices, E]."""
        out_in = weight.T if is_conv1d(self.linear) else weight
        if self.columns:
            return out_in.T
        return out_in if bias is None else torch.cat([out_in, bias[:, None]], dim=1)


@dataclass(frozen=True, eq=False)
class ExpertSlices(_OwnedSlices):
    """The slices of one tensor of a mixture, with its bias; owners: {"expert": [E, n], "expert_channel": [C, n]}.

    Attributes:
        parameters: the tensor with one entry per expert, and its bias if its entries belong to the slices.
        axis: along which the tensor has slices; None: it has one per expert.

    Example: see `collect_expert_slices`.
    """

    parameters: list[nn.Parameter]
    axis: int | None

    @property
    def weight(self) -> nn.Parameter:
        return self.parameters[0]

    def arrange_by_slice(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Arrange tensors shaped like the weight and bias by slice, [slices, elements]."""
        if self.axis is None:
            rows = weight.flatten(1)
            return rows if bias is None else torch.cat([rows, bias[:, None]], dim=1)
        rows = weight.transpose(1, self.axis).flatten(0, 1)
        return rows if bias is None else torch.cat([rows, bias.flatten()[:, None]], dim=1)


def collect_expert_slices(layer: Layer) -> list[ExpertSlices]:
    """Collect the slices of a layer's mixture, those of the router included; a layer without one has none.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> from prunelit.model.decoder import Decoder
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=32)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
        >>> layer = Decoder(MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes, **heads))).layers[0]
        >>> for slices in collect_expert_slices(layer):
        ...     print({kind: tuple(indices.shape) for kind, indices in slices.owners.items()})
        {'expert': (4, 64), 'expert_channel': (32, 8)}
        {'expert': (4, 32), 'expert_channel': (32, 4)}
        {'expert': (4, 1)}
    """
    experts = layer.experts
    if experts is None:
        return []
    tensors = {(tensor.owner is experts.module, tensor.name): tensor for tensor in experts.tensors}
    gate_up, down, router = (True, experts.names.gate_up), (True, experts.names.down), (False, "weight")
    expert, device = torch.arange(experts.count)[:, None], experts.down.device

    def build(name: tuple[bool, str], bias_name: tuple[bool, str] | None, rows: Tensor | None) -> ExpertSlices:
        """`rows` [C, n]: the slices of every channel in the tensor of one expert; None: an expert is one slice."""
        tensor, bias = tensors[name], tensors.get(bias_name) if bias_name else None
        parameters = [cast(nn.Parameter, each.value) for each in (tensor, bias) if each is not None]
        owners: dict[UnitKind, Tensor] = {"expert": expert.to(device)}
        if rows is not None:
            size = rows.numel()
            owners["expert"] = (expert * size + torch.arange(size)).to(device)
            owners["expert_channel"] = (rows[:, None, :] + expert * size).flatten(1).to(device)
        return ExpertSlices(layer.index, owners, parameters, tensor.axis)

    return [
        build(gate_up, (True, f"{experts.names.gate_up}_bias"), experts.index_rows()),
        build(down, None, torch.arange(experts.channels)[:, None]),
        build(router, (False, "bias"), None),
    ]


def collect_layer_slices(layer: Layer) -> list[LinearSlices]:
    """Collect the slices of every linear that shrinks with the layer's units; heads that cannot be pruned have none.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from prunelit.model.decoder import Decoder
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> layer = Decoder(LlamaForCausalLM(LlamaConfig(**sizes))).layers[0]
        >>> for slices in collect_layer_slices(layer):
        ...     print({kind: tuple(indices.shape) for kind, indices in slices.owners.items()}, slices.columns)
        {'query': (2, 8)} False
        {'kv': (2, 8)} False
        {'kv': (2, 8)} False
        {'query': (2, 8)} True
        {'channel': (32, 1)} False
        {'channel': (32, 1)} False
        {'channel': (32, 1)} True
    """
    slices: list[LinearSlices] = []
    shape = layer.shape
    if layer.has_attention and shape.heads_prunable:
        for linear, blocks_by_kind in zip(layer.qkv, index_qkv_blocks(layer), strict=True):
            owners = {kind: expand_head_rows(blocks, shape.head_dim) for kind, blocks in blocks_by_kind.items()}
            slices.append(_build_linear_slices(layer, linear, owners))
        query = torch.arange(shape.query_heads)[:, None]
        slices.append(
            _build_linear_slices(layer, layer.output, {"query": expand_head_rows(query, shape.head_dim)}, columns=True)
        )
    if layer.has_mlp:
        for linear in layer.ffn_in:
            slices.append(_build_linear_slices(layer, linear, {"channel": index_ffn_rows(layer)}))
        channel = torch.arange(shape.ffn_channels)[:, None]
        slices.append(_build_linear_slices(layer, layer.down, {"channel": channel}, columns=True))
    return slices


def _build_linear_slices(
    layer: Layer, linear: nn.Module, owners: dict[UnitKind, Tensor], columns: bool = False
) -> LinearSlices:
    device = cast(Tensor, linear.weight).device
    return LinearSlices(layer.index, {kind: indices.to(device) for kind, indices in owners.items()}, linear, columns)

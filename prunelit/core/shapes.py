"""What a dense model is made of, as numbers: sizes and costs of its layers. Plans hold them, so they need no model."""

from dataclasses import dataclass, fields
from typing import Any

from prunelit.runtime.errors import BadPlan

_TYPE_NAMES = {int: "a count", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class LayerShape:
    """Size and cost of one decoder layer before the cut; all costs in parameters, biases included.

    A removed block has 0 heads or 0 channels.
    """

    query_heads: int
    kv_groups: int
    head_dim: int
    ffn_channels: int
    ffn_matrices: int  # 3 gated (gate, up, down), 2 plain (up, down)
    query_head_cost: int  # one query head: its rows of q, its columns of o
    kv_head_cost: int  # one key head and one value head
    channel_cost: int  # one FFN channel
    attention_cost: int  # the whole attention block with the norms that go with it
    mlp_cost: int  # the whole FFN block with the norms that go with it
    shared_cost: int = 0  # norms that go only with the whole layer
    heads_prunable: bool = True

    @property
    def group_size(self) -> int:
        """Query heads per KV group."""
        return self.query_heads // self.kv_groups if self.kv_groups else 0

    @property
    def parameters(self) -> int:
        return self.attention_cost + self.mlp_cost + self.shared_cost

    # What the layer costs at other widths; 0 heads or 0 channels: the block is removed -------------------------------

    def parameters_at(self, query_heads: int, kv_groups: int, ffn_channels: int) -> int:
        """Parameters; a removed block takes its norms along, a layer without blocks holds nothing."""
        if not query_heads and not ffn_channels:
            return 0
        attention = mlp = 0
        if query_heads:
            attention = self.attention_cost - self.query_head_cost * (self.query_heads - query_heads)
            attention -= self.kv_head_cost * (self.kv_groups - kv_groups)
        if ffn_channels:
            mlp = self.mlp_cost - self.channel_cost * (self.ffn_channels - ffn_channels)
        return attention + mlp + self.shared_cost

    def macs_at(self, hidden_size: int, query_heads: int, kv_groups: int, ffn_channels: int) -> int:
        """Multiply-accumulates with weights, per token."""
        attention = 2 * self.head_dim * (query_heads + kv_groups)  # rows of q, k, v and columns of o
        return hidden_size * (attention + self.ffn_matrices * ffn_channels)

    def kv_elements_at(self, kv_groups: int) -> int:
        """Numbers in the KV cache, per token."""
        return 2 * self.head_dim * kv_groups


@dataclass(frozen=True)
class ModelShape:
    """The model that a plan was made for."""

    model_type: str
    name: str
    hidden_size: int
    parameters: int  # of the whole model, tied weights counted once
    head_macs: int  # multiply-accumulates per token outside the decoder layers (the output projection)
    bytes_per_element: int  # of the KV cache, from the model's dtype
    weights: str  # fingerprint: hash of the signs of a sample of the weights, the same in every dtype
    layers: tuple[LayerShape, ...]

    @property
    def block_parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)


def check_field_types(where: str, data: Any) -> None:
    """Check that counts of a dataclass are integers and not negative, names text, switches true or false.

    Raises:
        BadPlan: with the field's name.
    """
    for item in fields(data):
        value, kind = getattr(data, item.name), item.type
        if kind in _TYPE_NAMES and (type(value) is not kind or (kind is int and value < 0)):
            raise BadPlan(f"{where}: {item.name}: expected {_TYPE_NAMES[kind]}, got {value!r:.40}")


def check_dense_shape(index: int, shape: LayerShape) -> None:
    """Check that a dense layer's numbers belong together.

    Raises:
        BadPlan: with the layer's number.
    """
    where = f"plan: dense layer {index}"
    check_field_types(where, shape)
    if (shape.kv_groups == 0) != (shape.query_heads == 0) or shape.query_heads % (shape.kv_groups or 1):
        raise BadPlan(f"{where}: {shape.query_heads} heads in {shape.kv_groups} KV groups")
    heads = shape.query_head_cost * shape.query_heads + shape.kv_head_cost * shape.kv_groups
    if heads > shape.attention_cost or shape.channel_cost * shape.ffn_channels > shape.mlp_cost:
        raise BadPlan(f"{where}: its heads or channels cost more than the block they are part of")

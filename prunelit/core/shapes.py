"""Sizes and costs of the layers of a dense model, as plain numbers. Plans hold them, so a plan needs no model."""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from prunelit.runtime.errors import BadPlan

_TYPE_NAMES = {int: "a count", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class LayerShape:
    """Size and cost of one decoder layer before pruning; all costs in parameters, biases included.

    A removed block has 0 heads or 0 channels.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> layer.parameters, layer.parameters_at(query_heads=2, kv_groups=1, ffn_channels=32)
        (3104, 2336)
        >>> layer.macs_at(hidden_size=16, query_heads=4, kv_groups=2, ffn_channels=32)
        3072
        >>> layer.kv_elements_at(kv_groups=2)
        32
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
    mixer_cost: int = 0  # a block in place of attention, or beside it, that stays whole or goes; with its norms
    gated_query: bool = False  # each query head has a gate, with as many rows of q again
    fixed: bool = False  # the layer has to stay: what else the model computes counts layers
    attention_removable: bool = True  # False where a mixer beside it shares its place in the cache, or others read it
    one_block: bool = False  # the family's layers are one block each
    experts: int = 0  # of a mixture; the layer's FFN, if any, is then the one that every token passes beside them
    experts_per_token: int = 0
    expert_channels: int = 0  # of every expert
    expert_channel_cost: int = 0  # one channel of one expert
    expert_cost: int = 0  # one whole expert, with its row of the router
    router_row_cost: int = 0
    mixture_cost: int = 0  # all experts and the router, with the norms that go with the FFN block
    expert_groups: int = 1  # of equal size; the router first chooses some groups, then experts in them
    groups_per_token: int = 1

    @property
    def group_size(self) -> int:
        """Query heads per KV group."""
        return self.query_heads // self.kv_groups if self.kv_groups else 0

    @property
    def parameters(self) -> int:
        return self.attention_cost + self.mlp_cost + self.mixer_cost + self.mixture_cost + self.shared_cost

    @property
    def has_mixer(self) -> bool:
        return self.mixer_cost > 0

    @property
    def has_ffn(self) -> bool:
        """Whether the layer has an FFN, a mixture of experts, or both."""
        return self.ffn_channels > 0 or self.experts > 0

    @property
    def least_experts(self) -> int:
        """The least number of experts with which the router works: as many in every group, and enough of them."""
        if self.expert_groups == 1:
            return self.experts_per_token
        return self.expert_groups * max(2, -(-self.experts_per_token // self.groups_per_token))

    # What the layer costs at other widths; 0 heads or 0 channels: the block is removed -------------------------------

    def parameters_at(
        self,
        query_heads: int,
        kv_groups: int,
        ffn_channels: int,
        mixer: bool = True,
        experts: int | None = None,
        expert_channels: int | None = None,
        *,
        active: bool = False,
    ) -> int:
        """Count parameters; a removed block takes its norms with it, and a layer without blocks has none.

        Args:
            query_heads: that remain; 0: the attention is removed, or the layer has none.
            kv_groups: that remain.
            ffn_channels: that remain; 0: the FFN is removed, or the layer has none.
            mixer: whether the mixer remains, if the layer has one.
            experts: that remain; 0: the mixture is removed with the FFN beside it; None: all.
            expert_channels: of every expert that remain; None: all.
            active: count only the parameters that a token passes: of the experts, those that the router chooses.
        """
        mixer_cost = self.mixer_cost if mixer else 0
        mixture = self._count_mixture(experts, expert_channels, active)
        if not query_heads and not ffn_channels and not mixer_cost and not mixture:
            return 0
        attention = mlp = 0
        if query_heads:
            attention = self.attention_cost - self.query_head_cost * (self.query_heads - query_heads)
            attention -= self.kv_head_cost * (self.kv_groups - kv_groups)
        if ffn_channels:
            mlp = self.mlp_cost - self.channel_cost * (self.ffn_channels - ffn_channels)
        return attention + mlp + mixer_cost + mixture + self.shared_cost

    def _count_mixture(self, experts: int | None, channels: int | None, active: bool) -> int:
        """Count the parameters of experts and router, or those that a token passes."""
        experts = self.experts if experts is None else experts
        if not experts:
            return 0
        channels = self.expert_channels if channels is None else channels
        narrower_cost = self.expert_cost - self.expert_channel_cost * (self.expert_channels - channels)
        rest = self.mixture_cost - self.experts * self.expert_cost
        if active:
            chosen = min(experts, self.experts_per_token)
            return rest + experts * self.router_row_cost + chosen * (narrower_cost - self.router_row_cost)
        return rest + experts * narrower_cost

    def macs_at(
        self,
        hidden_size: int,
        query_heads: int,
        kv_groups: int,
        ffn_channels: int,
        mixer: bool = True,
        experts: int | None = None,
        expert_channels: int | None = None,
    ) -> int:
        """Count multiply-accumulates with weights, per token.

        A mixer is taken to use each of its weights once, and so are the router and the experts that it chooses.
        """
        query_rows = 2 if self.gated_query else 1
        attention = self.head_dim * ((query_rows + 1) * query_heads + 2 * kv_groups)  # rows of q, k, v; columns of o
        mixer_macs = self.mixer_cost if mixer else 0
        mixture_macs = self._count_mixture(experts, expert_channels, active=True)
        return hidden_size * (attention + self.ffn_matrices * ffn_channels) + mixer_macs + mixture_macs

    def kv_elements_at(self, kv_groups: int) -> int:
        """Count elements of the KV cache, per token."""
        return 2 * self.head_dim * kv_groups


@dataclass(frozen=True)
class ModelShape:
    """The dense model that a plan is for.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer)).block_parameters
        6208
    """

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

    @property
    def has_experts(self) -> bool:
        """Whether a layer has a mixture of experts."""
        return any(layer.experts for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; those that only some families need are left out where they say nothing.

        So the plans of other families, and their digests, stay as they were before there were such fields.
        """
        return asdict(self) | {"layers": [_drop_added_defaults(asdict(layer)) for layer in self.layers]}


_ADDED_FIELDS = {
    item.name: item.default
    for item in fields(LayerShape)
    if item.default is not MISSING and item.name not in ("shared_cost", "heads_prunable")
}


def _drop_added_defaults(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in _ADDED_FIELDS or value != _ADDED_FIELDS[name]}


def check_field_types(where: str, data: Any) -> None:
    """Check the values of a dataclass: counts are integers and not negative, names are text, switches are booleans.

    Args:
        where: start of the error message.
        data: a dataclass instance.

    Raises:
        BadPlan: names the field.

    Example:
        >>> check_field_types("plan: layer 0", LayerShape(4, 2, 8, -1, 3, 256, 256, 48, 1552, 1552))
        Traceback (most recent call last):
        prunelit.runtime.errors.BadPlan: plan: layer 0: ffn_channels: expected a count, got -1
    """
    for item in fields(data):
        value, kind = getattr(data, item.name), item.type
        if kind in _TYPE_NAMES and (type(value) is not kind or (kind is int and value < 0)):
            raise BadPlan(f"{where}: {item.name}: expected {_TYPE_NAMES[kind]}, got {value!r:.40}")


def check_dense_shape(index: int, shape: LayerShape) -> None:
    """Check that the sizes and costs of a dense layer are consistent.

    Args:
        index: number of the layer.
        shape: of the layer.

    Raises:
        BadPlan: names the layer.

    Example:
        >>> check_dense_shape(0, LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552))
    """
    where = f"plan: dense layer {index}"
    check_field_types(where, shape)
    if (shape.kv_groups == 0) != (shape.query_heads == 0) or shape.query_heads % (shape.kv_groups or 1):
        raise BadPlan(f"{where}: {shape.query_heads} heads in {shape.kv_groups} KV groups")
    heads_cost = shape.query_head_cost * shape.query_heads + shape.kv_head_cost * shape.kv_groups
    if heads_cost > shape.attention_cost or shape.channel_cost * shape.ffn_channels > shape.mlp_cost:
        raise BadPlan(f"{where}: its heads or channels cost more than the block they are part of")
    if shape.expert_channels * shape.expert_channel_cost + shape.router_row_cost > shape.expert_cost or (
        shape.experts * shape.expert_cost > shape.mixture_cost
    ):
        raise BadPlan(f"{where}: its experts or their channels cost more than the mixture they are part of")
    groups = shape.expert_groups
    if shape.experts and (
        not (groups and shape.groups_per_token and shape.experts_per_token)
        or shape.experts % groups
        or shape.experts < shape.least_experts
    ):
        raise BadPlan(f"{where}: {shape.experts} experts in {groups} groups, {shape.experts_per_token} for each token")

"""The mixture of experts of a layer, seen through the declaration of its family: tensors by role, sizes, outputs.

Legend: T tokens, H hidden size, E experts, C channels of an expert.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.core.declaration import Mixture
from prunelit.model.per_layer import ExpertTensor, find, find_expert_tensors
from prunelit.model.stored.lazy_weight import LazyWeight
from prunelit.runtime.errors import DeclarationMismatch


class Experts:
    """The experts of a layer and their router.

    Args:
        layer: module of the decoder layer.
        names: the family's declaration, as it holds for this layer; its `mixture` is set.
        index: number of the layer, for messages.

    Attributes:
        block: the module that holds experts and router.
        module: the module whose tensors hold the weights of all experts.
        router: the module that chooses experts.
        tensors: all tensors with one entry per expert.
        count, channels: E and C.
        per_token: number of experts that the router chooses for each token.
        rounds: set while the experts run on several batches, one expert after the other
            (`prunelit.calibration.expert_activations.ExpertRounds`); None otherwise.
        groups, groups_per_token: the router first chooses groups of experts, in some families; 1 and 1 in the others.

    Raises:
        DeclarationMismatch: the module does not have what the declaration names.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=32)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
        >>> from prunelit.model.decoder import Decoder
        >>> model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes, **heads))
        >>> experts = Decoder(model).layers[0].experts
        >>> experts.count, experts.channels, experts.per_token
        (4, 32, 2)
    """

    def __init__(self, layer: nn.Module, names: Any, index: int):
        self.names: Mixture = names.mixture
        self.rounds: Any = None
        self.block: Any = find(layer, self.names.block)
        self.module: Any = find(self.block, self.names.experts)
        self.router: Any = find(self.block, self.names.router)
        self.tensors = find_expert_tensors(layer, names)
        by_name = {tensor.name: tensor for tensor in self.tensors if tensor.owner is self.module}
        self.count = len(self.gate_up) if self.names.gate_up in by_name else 0
        shapes = {tensor.name: tuple(tensor.value.shape) for tensor in self.tensors}
        expected = {self.names.gate_up, self.names.down}
        if not expected <= set(by_name) or len({shape[0] for shape in shapes.values()}) != 1:
            raise DeclarationMismatch(
                f"layer {index}: expected tensors of experts {sorted(expected)} with one entry per expert, got "
                f"{shapes}; correct the entry in prunelit/core/architectures.py"
            )
        down_axis = cast(int, by_name[self.names.down].axis)
        self.channels = int(self.down.shape[down_axis])
        rows = self.gate_up.shape[cast(int, by_name[self.names.gate_up].axis)]
        self.per_token = int(find(self.router, "top_k") or find(self.block, "top_k") or 0)
        self.groups = int(find(self.router, "num_group") or 1)
        self.groups_per_token = int(find(self.router, "topk_group") or 1)
        if rows != self.channels * (2 if self.names.gated else 1) or not self.per_token:
            raise DeclarationMismatch(
                f"layer {index}: {rows} rows before and {self.channels} columns after the activation of each expert, "
                f"{self.per_token} experts per token; correct the entry in prunelit/core/architectures.py"
            )

    @property
    def gate_up(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.names.gate_up))

    @property
    def down(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.names.down))

    @property
    def hidden_size(self) -> int:
        return int(self.router.weight.shape[1])

    @property
    def own_tensors(self) -> list[ExpertTensor]:
        """The tensors of the experts themselves; the others are small, and every token passes them."""
        return [tensor for tensor in self.tensors if tensor.owner is self.module]

    @property
    def channel_cost(self) -> int:
        """Parameters of one channel of one expert."""
        return sum(
            tensor.per_channel * _count_per_expert(tensor) // tensor.value.shape[tensor.axis]
            for tensor in self.tensors
            if tensor.axis is not None and isinstance(tensor.value, nn.Parameter)
        )

    @property
    def expert_cost(self) -> int:
        """Parameters of one expert, with its row of the router."""
        return sum(_count_per_expert(tensor) for tensor in self.tensors if isinstance(tensor.value, nn.Parameter))

    @property
    def router_row_cost(self) -> int:
        """Parameters of an expert that every token passes: those outside the experts' own tensors."""
        return sum(
            _count_per_expert(tensor)
            for tensor in self.tensors
            if tensor.owner is not self.module and isinstance(tensor.value, nn.Parameter)
        )

    def index_rows(self) -> Tensor:
        """Index the rows of every channel before the activation, [C, n]: gate and up where experts are gated."""
        channels = torch.arange(self.channels)[:, None]
        if not self.names.gated:
            return channels
        if self.names.interleaved:
            return torch.cat([2 * channels, 2 * channels + 1], dim=1)
        return torch.cat([channels, channels + self.channels], dim=1)

    def get_tensor(self, tensor: ExpertTensor, expert: int) -> Tensor:
        """Get the entry of one expert; of a weight on disk only this entry is read."""
        value = tensor.value
        if isinstance(value, LazyWeight):
            return value.load_entry(expert)
        return value[expert]

    def get_weights(self, expert: int) -> dict[str, Tensor]:
        """Get an expert's tensors by name, weights as [out, in]."""
        weights = {tensor.name: self.get_tensor(tensor, expert) for tensor in self.own_tensors}
        if self.names.transposed:
            weights |= {name: weights[name].T for name in (self.names.gate_up, self.names.down)}
        return weights

    def compute_channels(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Compute the channels of an expert: [T, H] -> [T, C].

        Args:
            weights: of the expert, see `get_weights`.
            x: its input.
        """
        names = self.names
        inner = nn.functional.linear(x, weights[names.gate_up], weights.get(f"{names.gate_up}_bias"))
        if names.gated and hasattr(self.module, "_apply_gate"):
            return cast(Tensor, self.module._apply_gate(inner))
        if not names.gated:
            return cast(Tensor, self.module.act_fn(inner))
        gate, up = inner.chunk(2, dim=-1)
        return cast(Tensor, self.module.act_fn(gate) * up)

    def compute_output(self, weights: dict[str, Tensor], channels: Tensor) -> Tensor:
        """Compute the output of an expert from its channels, before the router's weight: [T, C] -> [T, H]."""
        return nn.functional.linear(channels, weights[self.names.down], weights.get(f"{self.names.down}_bias"))

    def reduce_down(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduce the weight of the last linear of every expert, one expert at a time.

        Args:
            reduce: from the weight in float32 [H, C] to a value per channel [C].

        Returns:
            [E, C].
        """
        weights = (self.get_weights(expert)[self.names.down].detach().float() for expert in range(self.count))
        return torch.stack([reduce(weight) for weight in weights])


def _count_per_expert(tensor: ExpertTensor) -> int:
    """Count the values of one expert; an index would read a weight that stays on disk."""
    return tensor.value.numel() // len(tensor.value)

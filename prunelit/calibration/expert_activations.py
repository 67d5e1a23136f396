"""What single experts of a mixture read, compute and return, observed while the model runs.

While it is observed, a mixture runs one expert after the other, on the tokens that the router sends to it: as often as
the model itself would compute it. Weights that stay on disk are read one expert at a time.

Legend: T tokens, H hidden size, E experts, C channels of an expert, N tokens that an expert gets.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunelit.model.decoder import Layer


class ExpertActivations(NamedTuple):
    """One expert on the tokens of a batch that the router sends to it; padding is left out.

    Example: see `prunelit.calibration.expert_statistics`, which reads them.
    """

    expert: int
    inputs: Tensor
    """[N, H]; already multiplied by the router's weight in families that do so."""
    gates: Tensor
    """[N], the factor of each output; ones where the inputs were multiplied."""
    channels: Tensor
    """[N, C], input of the last linear."""
    outputs: Tensor
    """[N, H], before the factor."""


ExpertObserver = Callable[[Layer, ExpertActivations], None]
"""Receives a layer and the activations of one of its experts."""


@contextmanager
def observe_layer_experts(
    layer: Layer, observer: ExpertObserver | None, get_real_tokens: Callable[[], Tensor | None]
) -> Iterator[None]:
    """Call `observer` for every expert that gets a token, while the context is open; other layers are left alone.

    Args:
        layer: with or without a mixture.
        observer: called with the layer and the activations of one expert on one batch; None: the experts only run one
            after the other.
        get_real_tokens: returns which of the T tokens of the batch that is running are no padding, bool [T]; None: all.

    Example: see `prunelit.calibration.observe.observe`.
    """
    experts = layer.experts
    if experts is None:
        yield
        return
    module, scales_input = experts.module, experts.names.scales_input

    def run_expert(expert: int, x: Tensor, gates: Tensor, rows: Tensor) -> Tensor:
        weights = experts.get_weights(expert)
        channels = experts.compute_channels(weights, x)
        outputs = experts.compute_output(weights, channels)
        if observer is not None:
            real_tokens = get_real_tokens()
            is_real = slice(None) if real_tokens is None else real_tokens[rows]
            activations = ExpertActivations(expert, x[is_real], gates[is_real], channels[is_real], outputs[is_real])
            if len(activations.inputs):
                observer(layer, activations)
        return outputs * gates[:, None]

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`hidden` [T, H], `chosen` experts and their `weights` [T, experts per token]."""
        output = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            rows, places = torch.where(chosen == expert)
            weighted = run_expert(expert, hidden[rows], weights[rows, places], rows)
            output.index_add_(0, rows, weighted.to(output.dtype))
        return output

    def forward_scaled(hidden: Tensor) -> Tensor:
        """`hidden` [E * T, H]: the tokens for every expert, zeros where it is not chosen."""
        by_expert = hidden.view(experts.count, -1, hidden.shape[-1])
        output = torch.zeros_like(by_expert)
        for expert, x in enumerate(by_expert):
            rows = x.any(-1).nonzero().flatten()
            if len(rows):
                output[expert, rows] = run_expert(expert, x[rows], x.new_ones(len(rows)), rows)
        return output.view_as(hidden)

    own_forward: Any = module.__dict__.get("forward")
    module.forward = forward_scaled if scales_input else forward
    try:
        yield
    finally:
        if own_forward is None:
            del module.forward
        else:
            module.forward = own_forward

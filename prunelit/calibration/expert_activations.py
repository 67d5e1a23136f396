"""What single experts of a mixture read, compute and return, observed while the model runs.

While it is observed, a mixture runs one expert after the other, on the tokens that the router sends to it: as often as
the model itself would compute it. Weights that stay on disk are read one expert at a time.

Legend: T tokens, H hidden size, E experts, C channels of an expert, N tokens that an expert gets.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from prunelit.model.decoder import Layer
from prunelit.model.experts import Experts


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
    rows: Tensor
    """[N], places of the tokens among those of the batch that are no padding."""


ExpertObserver = Callable[[Layer, ExpertActivations], None]
"""Receives a layer and the activations of one of its experts."""


class ExpertsReached(Exception):
    """Stops a forward pass at the experts of a layer, whose inputs `ExpertRounds` has recorded.

    Example: see `ExpertRounds`, whose passes end by it.
    """


class _Call:
    """What the experts of a layer got for one batch, and their output as far as it is computed."""

    def __init__(self, hidden: Tensor, chosen: Tensor, gates: Tensor):
        self.hidden, self.chosen, self.gates = hidden, chosen, gates
        self.output = torch.zeros_like(hidden)


class ExpertRounds:
    """Runs the experts of a layer on several batches, one expert after the other, so that each expert is read once.

    Every batch passes the layer twice: up to its experts, whose inputs are recorded, and after all experts ran, with
    their output.

    Args:
        experts: of the layer; their `rounds` is this object while it is in use, see `observe_layer_experts`.

    Example: see `prunelit.calibration.layer_pipeline`, which uses it.
    """

    def __init__(self, experts: Experts):
        self.experts = experts
        self._calls: dict[int, _Call] = {}
        self._number = 0
        self._is_recording = False
        self._loaded: tuple[int, dict[str, Tensor]] | None = None

    def record(self, number: int, run: Callable[[], object]) -> None:
        """Run a batch up to the experts.

        Args:
            number: of the batch.
            run: runs the batch through the layer.
        """
        self._number, self._is_recording = number, True
        with suppress(ExpertsReached):
            run()

    def compute(self, number: int, expert: int) -> None:
        """Run one expert on its tokens of a recorded batch."""
        call = self._calls[number]
        rows, places = torch.where(call.chosen == expert)
        if not len(rows):
            return
        if self._loaded is None or self._loaded[0] != expert:
            self._loaded = None  # the last one is freed first
            self._loaded = expert, self.experts.get_weights(expert)
        weighted = self._run_expert(expert, self._loaded[1], call.hidden[rows], call.gates[rows, places], rows)
        call.output.index_add_(0, rows, weighted.to(call.output.dtype))

    def finish(self, number: int, run: Callable[[], object]) -> None:
        """Run a batch through the whole layer, with the output that its experts have computed."""
        self._number, self._is_recording, self._loaded = number, False, None
        run()

    def answer(self, run_expert: Callable[..., Tensor], hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Stand in for the forward method of the experts' module."""
        if not self._is_recording:
            return self._calls.pop(self._number).output
        self._calls[self._number], self._run_expert = _Call(hidden, chosen, gates), run_expert
        raise ExpertsReached


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

    def run_expert(expert: int, weights: dict[str, Tensor], x: Tensor, gates: Tensor, rows: Tensor) -> Tensor:
        channels = experts.compute_channels(weights, x)
        outputs = experts.compute_output(weights, channels)
        if observer is not None:
            real_tokens = get_real_tokens()
            is_real = slice(None) if real_tokens is None else real_tokens[rows]
            places = rows if real_tokens is None else (real_tokens.cumsum(0) - 1)[rows][is_real]
            tensors = (x[is_real], gates[is_real], channels[is_real], outputs[is_real], places)
            if len(places):
                observer(layer, ExpertActivations(expert, *tensors))
        return outputs * gates[:, None]

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`hidden` [T, H], `chosen` experts and their `weights` [T, experts per token]."""
        if experts.rounds is not None:
            return cast(Tensor, experts.rounds.answer(run_expert, hidden, chosen, weights))
        output = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            rows, places = torch.where(chosen == expert)
            own_weights = experts.get_weights(expert)
            weighted = run_expert(expert, own_weights, hidden[rows], weights[rows, places], rows)
            output.index_add_(0, rows, weighted.to(output.dtype))
        return output

    def forward_scaled(hidden: Tensor) -> Tensor:
        """`hidden` [E * T, H]: the tokens for every expert, zeros where it is not chosen."""
        by_expert = hidden.view(experts.count, -1, hidden.shape[-1])
        output = torch.zeros_like(by_expert)
        for expert, x in enumerate(by_expert):
            rows = x.any(-1).nonzero().flatten()
            if len(rows):
                own_weights = experts.get_weights(expert)
                output[expert, rows] = run_expert(expert, own_weights, x[rows], x.new_ones(len(rows)), rows)
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

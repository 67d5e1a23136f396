"""Least-squares refit of what the experts of a mixture sum to, expert by expert.

The output of a mixture is y(x) = sum over the chosen experts j of g_j(x) W_j h_j(x), with the router's weight g_j, the
channels h_j and the down projection W_j. All W_j together are one linear map of the inputs g_j h_j, too wide to be
solved at once. So each W_j in turn is fitted to the error that the others leave, on the tokens that the router sends to
its expert; after each fit the error of these tokens is brought up to date (block Gauss-Seidel, one round).

Source: ours; the refit of dense projections is in `prunelit.repair.reconstruct`.

Legend: T tokens without padding, H hidden size, C channels of an expert.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from prunelit.calibration.expert_activations import ExpertActivations, observe_layer_experts
from prunelit.calibration.paired_streams import PairedStreams
from prunelit.model.decoder import Layer
from prunelit.model.experts import Experts
from prunelit.repair.fit_record import FitRecord, record_layer_fit
from prunelit.repair.least_squares import Fit, NormalEquations, widen_to_float32
from prunelit.runtime.distributed import sum_over_ranks
from prunelit.runtime.errors import BadOption


@dataclass
class _RoutedTokens:
    """The tokens of the batches that the router sends to one expert: inputs, factors, and places among all tokens."""

    inputs: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def refit_experts(streams: PairedStreams, ridge: float) -> FitRecord:
    """Refit the down projections of the current layer's experts, so that its output comes close to the dense one.

    Memory beyond the model: the inputs of every chosen expert, T x experts per token x H, and one error of T x H.

    Args:
        streams: has entered the layer, which was cut since.
        ridge: pull towards the present weights, relative to the mean square of the inputs.

    Returns:
        The relative errors of the layer's output before and after.

    Raises:
        BadOption: a norm follows the FFN, so its output is no sum of what the experts return.

    Example: see `prunelit.repair.reconstruct.apply_least_squares`, which uses it.
    """
    layer = streams.layer
    experts = cast(Experts, layer.experts)
    if layer.get_norm("mlp_post_norm") is not None:
        raise BadOption(
            f"repair: layer {layer.index}: expected 'none' for experts whose sum passes a norm, got 'least_squares'"
        )
    routed, error, target_squares = _collect_routed_tokens(streams, layer)
    before = sum_over_ranks(error.double().square().sum())
    for expert in range(experts.count):
        weights = experts.get_weights(expert)
        down = weights[experts.names.down]
        equations = NormalEquations(down.shape[1], down.shape[0], device=streams.decoder.device)
        tokens = routed.get(expert, _RoutedTokens())
        inputs = [
            widen_to_float32(experts.compute_channels(weights, x)) * widen_to_float32(gates)[:, None]
            for x, gates in zip(tokens.inputs, tokens.gates, strict=True)
        ]
        for weighted, rows in zip(inputs, tokens.rows, strict=True):
            equations.add_batch(weighted, error[rows])
        # Every rank solves the same equations, also one whose tokens do not reach the expert.
        fit = equations.solve(ridge)
        down.copy_((down.float() + fit.weight.to(down.device)).to(down.dtype))  # a view of the tensor of all experts
        for weighted, rows in zip(inputs, tokens.rows, strict=True):
            error[rows] -= weighted @ fit.weight.T.to(weighted)
    after = sum_over_ranks(error.double().square().sum())
    squares = float(sum_over_ranks(target_squares))
    relative = [(float(each) / squares) ** 0.5 if squares > 0 else 0.0 for each in (before, after)]
    summary = Fit(torch.zeros(0), None, ridge, before=relative[0], after=relative[1])
    return record_layer_fit(layer.index, "experts", summary)


def _collect_routed_tokens(streams: PairedStreams, layer: Layer) -> tuple[dict[int, _RoutedTokens], Tensor, Tensor]:
    """Run the cut stream once and collect what each expert gets.

    Returns:
        The tokens of every expert, the error of the layer's output [T, H] as a change of what the experts sum to, and
        the sum of the squared targets.
    """
    routed: dict[int, _RoutedTokens] = {}
    offset = 0
    errors: list[Tensor] = []
    target_squares = torch.zeros((), dtype=torch.float64, device=streams.decoder.device)

    def collect(layer: Layer, x: ExpertActivations) -> None:
        tokens = routed.setdefault(x.expert, _RoutedTokens())
        tokens.inputs.append(x.inputs)
        tokens.gates.append(x.gates)
        tokens.rows.append(x.rows + offset)

    scale = layer.get_residual_scale(streams.decoder.config, "mlp")
    with observe_layer_experts(layer, collect, streams.get_running_mask):
        for place, activations in streams.run_cut_stream(("layer_output",)):
            target = widen_to_float32(streams.get_target("layer_output", place))
            errors.append((target - activations["layer_output"]) / scale)
            target_squares += (target / scale).double().square().sum()
            offset += len(target)
    error = torch.cat(errors) if errors else target_squares.new_zeros(0, int(streams.decoder.config.hidden_size))
    return routed, error, target_squares

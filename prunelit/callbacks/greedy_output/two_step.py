"""Reconstruction before pruning, module by module.

Source: J. Li, Y. Dong, Q. Lei, "Greedy Output Approximation", CPAL 2025, arXiv 2407.19126: its remedy for the error
that the pruned layers pass on.

Legend: H hidden, T tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, get_args

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.observe import ActivationPoint
from prunelit.calibration.paired_streams import PairedStreams
from prunelit.core.plan import LayerPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, Layer, get_weight_out_in
from prunelit.model.per_layer import find
from prunelit.repair.fit_record import record_layer_fit
from prunelit.repair.least_squares import NormalEquations, widen_to_float32
from prunelit.repair.reconstruct import (
    BlockName,
    accumulate_equations,
    find_first_changed,
    get_output_projection,
)
from prunelit.runtime.progress import track_progress

_ATTENTION_INPUT: ActivationPoint = "attention_input"
_MLP_INPUT: ActivationPoint = "mlp_input"


class UnitChooser(Protocol):
    """Chooses the remaining units of a module from the activations that the reconstructed prefix gives it.

    Example: `UnitChooser` is used further down in this module.
    """

    def list_points(self, block: BlockName) -> tuple[ActivationPoint, ...]:
        """List the points of a block that `accumulate` reads."""

    def accumulate(self, layer: Layer, block: BlockName, x: Mapping[str, Tensor]) -> None:
        """Accumulate statistics of the activations {point: [T, width]} of one batch of this rank."""

    def choose_units(self, streams: PairedStreams, block: BlockName, layer_plan: LayerPlan) -> LayerPlan:
        """Choose the units of the block again, as many as `layer_plan` has; the other block stays as planned."""


@torch.no_grad()
def reconstruct_two_step(
    decoder: Decoder,
    layer_plans: Sequence[LayerPlan],
    batches: Sequence[Batch],
    chooser: UnitChooser | None = None,
    ridge: float = 1e-4,
    refit_kept: bool = False,
) -> tuple[tuple[LayerPlan, ...], list[nn.Module | None]]:
    """Reconstruct module by module, each before it is pruned; the model itself stays dense.

    For the attention and then the FFN of every layer, from the first layer that is cut: the input projections (q, k and
    v; gate and up) are fitted to their dense outputs on the inputs that the pruned prefix gives; the output projection
    is fitted to its dense output; the module is pruned. The targets of the input projections are linear in their
    common input, so one system of H unknowns serves all of them. With n the input,

        W^T <- W^T + M W^T        M = (n^T n + ridge)^-1 n^T (n_dense - n)

    Args:
        decoder: the dense model; left as it was.
        layer_plans: the remaining units of every layer.
        batches: calibration batches, the same list on every rank.
        chooser: chooses the remaining units again, as many as `layer_plans` has; None: keep those of `layer_plans`.
        ridge: relative to the mean square of the inputs, see `prunelit.repair.least_squares`.
        refit_kept: fit the output projection once more after the cut, to the remaining inputs.

    Returns:
        The remaining units of every layer, and the reconstructed and cut layers in host memory (None for layers that
        are left alone). `prunelit.model.surgery.replace_layers` puts them in the model.

    Raises:
        NoCalibration: there are no batches, or nothing but padding.

    Example: see `prunelit.callbacks.greedy_output.callback`, which uses it.
    """
    layers = find(decoder.model, decoder.architecture.layers)
    plans, start = list(layer_plans), find_first_changed(layer_plans, decoder)
    modules: list[nn.Module | None] = [None] * len(plans)
    if start == len(plans):
        return tuple(plans), modules
    streams = PairedStreams(decoder, batches, start)
    for index in track_progress(range(start, len(plans)), "reconstructing", unit="layer"):
        dense_module = layers[index]
        streams.enter_layer(index, _list_targets(decoder.layers[index]))
        # All layers share the config object. The copy must share it too, since a cut changes it.
        layers[index] = module = copy.deepcopy(dense_module, {id(decoder.config): decoder.config})
        try:
            streams.refresh_layer()
            plans[index] = _rebuild_layer(streams, plans[index], chooser, ridge, refit_kept)
            if index + 1 < len(plans):
                streams.leave_layer()
        finally:
            layers[index] = dense_module
        modules[index] = module.cpu()
    return tuple(plans), modules


def _list_targets(layer: Layer) -> tuple[ActivationPoint, ...]:
    """List the points where the dense activations of a layer are targets."""
    attention: tuple[ActivationPoint, ...] = ("attention_input", "attention_output") if layer.has_attention else ()
    return attention + (("mlp_input", "mlp_output") if layer.has_mlp else ())


def _rebuild_layer(
    streams: PairedStreams, layer_plan: LayerPlan, chooser: UnitChooser | None, ridge: float, refit_kept: bool
) -> LayerPlan:
    """Fit and cut both blocks of the current layer, one after the other, and return its remaining units."""
    for block in get_args(BlockName):
        layer = streams.layer
        if not (layer.has_attention if block == "attention" else layer.has_mlp):
            continue
        remaining_count = len(_get_units(layer_plan, block))
        dense_count = len(_get_units(LayerPlan.dense(layer.shape), block))
        equations = None
        if remaining_count:
            _fit_inputs(streams, block, ridge)
            equations = _fit_output(streams, block, ridge, chooser, refit_kept)
            if chooser is not None and remaining_count < dense_count:
                layer_plan = chooser.choose_units(streams, block, layer_plan)
        if remaining_count == dense_count:
            continue
        columns = torch.tensor(_get_units(layer_plan, block), dtype=torch.long, device=streams.decoder.device)
        if block == "attention":
            head_dim = layer.shape.head_dim
            columns = (columns[:, None] * head_dim + torch.arange(head_dim).to(columns)).flatten()
        if equations is not None:
            output_projection = get_output_projection(layer, block)[0]
            equations = equations.derive_after_cut(columns, get_weight_out_in(output_projection))
        block_plan = LayerPlan.dense(layer.shape)
        if block == "attention":
            block_plan = replace(block_plan, query_heads=layer_plan.query_heads, kv_groups=layer_plan.kv_groups)
        else:
            block_plan = replace(block_plan, ffn_channels=layer_plan.ffn_channels)
        surgery.prune_layer(layer, block_plan, streams.decoder.config)
        streams.refresh_layer()
        if block == "attention":
            streams.held_heads = [heads[..., columns] for heads in streams.held_heads]
        if equations is not None:
            fit = equations.solve(ridge)
            fit.add_to(get_output_projection(streams.layer, block)[0])
            record_layer_fit(layer.index, f"{block}, kept", fit)
    return layer_plan


def _get_units(layer_plan: LayerPlan, block: BlockName) -> tuple[int, ...]:
    return layer_plan.query_heads if block == "attention" else layer_plan.ffn_channels


def _fit_inputs(streams: PairedStreams, block: BlockName, ridge: float) -> None:
    """Fit the linears that read the residual stream to their dense outputs."""
    layer = streams.layer
    linears, point = (layer.qkv, _ATTENTION_INPUT) if block == "attention" else (layer.ffn_in, _MLP_INPUT)
    width, have_bias = get_weight_out_in(linears[0]).shape[1], all(linear.bias is not None for linear in linears)
    equations = NormalEquations(width, width, have_bias, streams.decoder.device)
    for place, x in streams.run_cut_stream((point,)):
        target = streams.get_target(point, place)
        equations.add_batch(x[point], widen_to_float32(target) - x[point], target)
    streams.free_target(point)
    fit = equations.solve(ridge)
    for linear in linears:
        weight = widen_to_float32(get_weight_out_in(linear))
        bias_change = None if fit.bias is None else weight @ fit.bias
        replace(fit, weight=weight @ fit.weight, bias=bias_change).add_to(linear)
    record_layer_fit(layer.index, f"{block}, inputs", fit)


def _fit_output(
    streams: PairedStreams, block: BlockName, ridge: float, chooser: UnitChooser | None, refit: bool
) -> NormalEquations | None:
    """Fit a block's output projection to its dense output, and return the equations after that fit for a `refit`."""
    layer = streams.layer
    linear, _, output = get_output_projection(layer, block)
    visitor = None
    if chooser is not None:
        visitor = chooser.list_points(block), partial(chooser.accumulate, layer, block)
    equations = accumulate_equations(streams, block, output, visitor, hold_heads=block == "attention")
    streams.free_target(output)
    fit = equations.solve(ridge)
    fit.add_to(linear)
    record_layer_fit(layer.index, block, fit)
    return equations.derive_after_fit(fit) if refit else None

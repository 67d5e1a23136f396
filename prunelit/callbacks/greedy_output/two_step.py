"""Reconstruction before pruning, module by module: the remedy of Greedy Output Approximation (arXiv 2407.19126)."""

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
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, Layer, get_weight_out_in
from prunelit.model.per_layer import find
from prunelit.repair.least_squares import NormalEquations, widen_to_float32
from prunelit.repair.reconstruct import (
    BlockName,
    accumulate_equations,
    find_first_changed,
    get_output_projection,
    record_layer_fit,
)
from prunelit.runtime.progress import track_progress

_ATTENTION_INPUT: ActivationPoint = "attention_input"
_MLP_INPUT: ActivationPoint = "mlp_input"


class UnitChooser(Protocol):
    """Which units go, decided module by module from what the reconstructed prefix shows."""

    def list_points(self, block: BlockName) -> tuple[ActivationPoint, ...]:
        """What `observe` reads in a block."""

    def accumulate(self, layer: Layer, block: BlockName, x: Mapping[str, Tensor]) -> None:
        """Accumulate over the activations of one batch of this rank."""

    def choose_units(self, lock: PairedStreams, block: BlockName, kept: LayerPlan) -> LayerPlan:
        """As many units of the block as `kept` has, newly chosen; the other block as it is."""


@torch.no_grad()
def reconstruct_two_step(
    decoder: Decoder,
    kept: Sequence[LayerPlan],
    batches: Sequence[Batch],
    chooser: UnitChooser | None = None,
    ridge: float = 1e-4,
    refit_kept: bool = False,
) -> tuple[tuple[LayerPlan, ...], list[nn.Module | None]]:
    """Reconstruct module by module, each before it is pruned; the model itself stays dense (see `install_layers`).

    For the attention and then the FFN of every layer, from the first that is cut on: q, k and v (gate and up) are
    fitted to their dense outputs on the inputs that the pruned prefix gives; the output projection is fitted to its
    dense output; the module is pruned. Targets of q, k and v are linear in their input, so one system of H unknowns
    serves all of them: with n the input, W^T <- W^T + M W^T, M = (n^T n + ridge)^-1 n^T (n_dense - n).

    Args:
        decoder: dense model, the same when this returns.
        kept: what stays.
        batches: the same list on every rank.
        chooser: decides anew which units stay, as many as `kept` says; None: those of `kept`.
        ridge: see `apply`.
        refit_kept: fit the output projection once more, to the inputs that stay.

    Returns:
        What stays, and the reconstructed and cut layers, in host memory; None for those left alone.
    """
    layers = find(decoder.model, decoder.architecture.layers)
    plans, start = list(kept), find_first_changed(kept, decoder)
    modules: list[nn.Module | None] = [None] * len(plans)
    if start == len(plans):
        return tuple(plans), modules
    lock = PairedStreams(decoder, batches, start)
    for index in track_progress(range(start, len(plans)), "reconstructing", unit="layer"):
        dense = layers[index]
        lock.enter_layer(index, _list_targets(decoder.layers[index]))
        # The config is shared by all layers: the copy is to see it change.
        layers[index] = module = copy.deepcopy(dense, {id(decoder.config): decoder.config})
        try:
            lock.refresh_layer()
            plans[index] = _rebuild_layer(lock, plans[index], chooser, ridge, refit_kept)
            if index + 1 < len(plans):
                lock.leave_layer()
        finally:
            layers[index] = dense
        modules[index] = module.cpu()
    return tuple(plans), modules


def install_layers(decoder: Decoder, plan: PruningPlan, modules: Sequence[nn.Module | None]) -> None:
    """Put the layers made by `reconstruct_two_step` in place of the dense ones."""
    device, layers = decoder.device, find(decoder.model, decoder.architecture.layers)
    for index, module in enumerate(modules):
        if module is not None:
            layers[index] = module.to(device)
    surgery.finish_pruning(decoder, plan)


def _list_targets(layer: Layer) -> tuple[ActivationPoint, ...]:
    attention: tuple[ActivationPoint, ...] = ("attention_input", "attention_output") if layer.has_attention else ()
    return attention + (("mlp_input", "mlp_output") if layer.has_mlp else ())


def _rebuild_layer(
    lock: PairedStreams, kept: LayerPlan, chooser: UnitChooser | None, ridge: float, refit_kept: bool
) -> LayerPlan:
    """Fit and cut both blocks of the layer at hand, one after the other; what it keeps."""
    for block in get_args(BlockName):
        layer = lock.layer
        if not (layer.has_attention if block == "attention" else layer.has_mlp):
            continue
        stays, whole = (len(_get_units(each, block)) for each in (kept, LayerPlan.dense(layer.shape)))
        system = None
        if stays:
            _fit_inputs(lock, block, ridge)
            system = _fit_output(lock, block, ridge, chooser, refit_kept)
            if chooser is not None and stays < whole:
                kept = chooser.choose_units(lock, block, kept)
        if stays == whole:
            continue
        columns = torch.tensor(_get_units(kept, block), dtype=torch.long, device=lock.decoder.device)
        if block == "attention":
            columns = (
                columns[:, None] * layer.shape.head_dim + torch.arange(layer.shape.head_dim).to(columns)
            ).flatten()
        if system is not None:
            system = system.derive_after_cut(columns, get_weight_out_in(get_output_projection(layer, block)[0]))
        now = LayerPlan.dense(layer.shape)
        if block == "attention":
            now = replace(now, query_heads=kept.query_heads, kv_groups=kept.kv_groups)
        else:
            now = replace(now, ffn_channels=kept.ffn_channels)
        surgery.prune_layer(layer, now, lock.decoder.config)
        lock.refresh_layer()
        if block == "attention":
            lock.held_heads = [heads[..., columns] for heads in lock.held_heads]
        if system is not None:
            fit = system.solve(ridge)
            fit.add_to(get_output_projection(lock.layer, block)[0])
            record_layer_fit(layer.index, f"{block}, kept", fit)
    return kept


def _get_units(kept: LayerPlan, block: BlockName) -> tuple[int, ...]:
    return kept.query_heads if block == "attention" else kept.ffn_channels


def _fit_inputs(lock: PairedStreams, block: BlockName, ridge: float) -> None:
    """Fit the linears that read the residual stream to their dense outputs."""
    layer = lock.layer
    linears, point = (layer.qkv, _ATTENTION_INPUT) if block == "attention" else (layer.ffn_in, _MLP_INPUT)
    width, bias = get_weight_out_in(linears[0]).shape[1], all(linear.bias is not None for linear in linears)
    system = NormalEquations(width, width, bias, lock.decoder.device)
    for place, x in lock.run_cut_stream((point,)):
        system.add_batch(
            x[point], widen_to_float32(lock.get_target(point, place)) - x[point], lock.get_target(point, place)
        )
    lock.free_target(point)
    fit = system.solve(ridge)
    for linear in linears:
        weight = widen_to_float32(get_weight_out_in(linear))
        change = weight @ fit.weight, None if fit.bias is None else weight @ fit.bias
        replace(fit, weight=change[0], bias=change[1]).add_to(linear)
    record_layer_fit(layer.index, f"{block}, inputs", fit)


def _fit_output(
    lock: PairedStreams, block: BlockName, ridge: float, chooser: UnitChooser | None, refit: bool
) -> NormalEquations | None:
    """Fit a block's output projection to its dense output; the equations that are left, if it is to be fitted again."""
    layer = lock.layer
    linear, _, output = get_output_projection(layer, block)
    also = None
    if chooser is not None:
        also = chooser.list_points(block), partial(chooser.accumulate, layer, block)
    system = accumulate_equations(lock, block, output, also, hold_heads=block == "attention")
    lock.free_target(output)
    fit = system.solve(ridge)
    fit.add_to(linear)
    record_layer_fit(layer.index, block, fit)
    return system.derive_after_fit(fit) if refit else None

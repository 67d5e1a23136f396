"""Reconstruction before pruning, module by module: the remedy of Greedy Output Approximation (arXiv 2407.19126)."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, get_args

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.observe import Point
from prunelit.calibration.paired_streams import Lockstep
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, Layer, weight_out_in
from prunelit.model.per_layer import find
from prunelit.repair.least_squares import NormalEquations, widened
from prunelit.repair.reconstruct import Block, equations, first_changed, output_of, record
from prunelit.runtime.progress import track

_ATTENTION_INPUT: Point = "attention_input"
_MLP_INPUT: Point = "mlp_input"


class Chooser(Protocol):
    """Which units go, decided module by module from what the reconstructed prefix shows."""

    def points(self, block: Block) -> tuple[Point, ...]:
        """What `observe` reads in a block."""

    def observe(self, layer: Layer, block: Block, x: Mapping[str, Tensor]) -> None:
        """Accumulate over the activations of one batch of this rank."""

    def choose(self, lock: Lockstep, block: Block, kept: LayerPlan) -> LayerPlan:
        """As many units of the block as `kept` has, newly chosen; the other block as it is."""


@torch.no_grad()
def two_step(
    decoder: Decoder,
    kept: Sequence[LayerPlan],
    batches: Sequence[Batch],
    chooser: Chooser | None = None,
    ridge: float = 1e-4,
    refit_kept: bool = False,
) -> tuple[tuple[LayerPlan, ...], list[nn.Module | None]]:
    """Reconstruct module by module, each before it is pruned; the model itself stays dense (see `install`).

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
    plans, start = list(kept), first_changed(kept, decoder)
    modules: list[nn.Module | None] = [None] * len(plans)
    if start == len(plans):
        return tuple(plans), modules
    lock = Lockstep(decoder, batches, start)
    for index in track(range(start, len(plans)), "reconstructing", unit="layer"):
        dense = layers[index]
        lock.enter(index, _two_step_targets(decoder.layers[index]))
        # The config is shared by all layers: the copy is to see it change.
        layers[index] = module = copy.deepcopy(dense, {id(decoder.config): decoder.config})
        try:
            lock.look()
            plans[index] = _rebuild(lock, plans[index], chooser, ridge, refit_kept)
            if index + 1 < len(plans):
                lock.leave()
        finally:
            layers[index] = dense
        modules[index] = module.cpu()
    return tuple(plans), modules


def install(decoder: Decoder, plan: PruningPlan, modules: Sequence[nn.Module | None]) -> None:
    """Put the layers made by `two_step` in place of the dense ones."""
    device, layers = decoder.device, find(decoder.model, decoder.architecture.layers)
    for index, module in enumerate(modules):
        if module is not None:
            layers[index] = module.to(device)
    surgery.finish(decoder, plan)


def _two_step_targets(layer: Layer) -> tuple[Point, ...]:
    attention: tuple[Point, ...] = ("attention_input", "attention_output") if layer.has_attention else ()
    return attention + (("mlp_input", "mlp_output") if layer.has_mlp else ())


def _rebuild(lock: Lockstep, kept: LayerPlan, chooser: Chooser | None, ridge: float, refit_kept: bool) -> LayerPlan:
    """Fit and cut both blocks of the layer at hand, one after the other; what it keeps."""
    for block in get_args(Block):
        layer = lock.layer
        if not (layer.has_attention if block == "attention" else layer.has_mlp):
            continue
        stays, whole = (len(_units(each, block)) for each in (kept, LayerPlan.dense(layer.shape)))
        system = None
        if stays:
            _fit_inputs(lock, block, ridge)
            system = _fit_output(lock, block, ridge, chooser, refit_kept)
            if chooser is not None and stays < whole:
                kept = chooser.choose(lock, block, kept)
        if stays == whole:
            continue
        columns = torch.tensor(_units(kept, block), dtype=torch.long, device=lock.decoder.device)
        if block == "attention":
            columns = (
                columns[:, None] * layer.shape.head_dim + torch.arange(layer.shape.head_dim).to(columns)
            ).flatten()
        if system is not None:
            system = system.keeping(columns, weight_out_in(output_of(layer, block)[0]))
        now = LayerPlan.dense(layer.shape)
        if block == "attention":
            now = replace(now, query_heads=kept.query_heads, kv_groups=kept.kv_groups)
        else:
            now = replace(now, ffn_channels=kept.ffn_channels)
        surgery.cut_layer(layer, now, lock.decoder.config)
        lock.look()
        if block == "attention":
            lock.heads = [heads[..., columns] for heads in lock.heads]
        if system is not None:
            fit = system.solve(ridge)
            fit.add_to(output_of(lock.layer, block)[0])
            record(layer.index, f"{block}, kept", fit)
    return kept


def _units(kept: LayerPlan, block: Block) -> tuple[int, ...]:
    return kept.query_heads if block == "attention" else kept.ffn_channels


def _fit_inputs(lock: Lockstep, block: Block, ridge: float) -> None:
    """Fit the linears that read the residual stream to their dense outputs."""
    layer = lock.layer
    linears, point = (layer.qkv, _ATTENTION_INPUT) if block == "attention" else (layer.ffn_in, _MLP_INPUT)
    width, bias = weight_out_in(linears[0]).shape[1], all(linear.bias is not None for linear in linears)
    system = NormalEquations(width, width, bias, lock.decoder.device)
    for place, x in lock.visit((point,)):
        system.add(x[point], widened(lock.target(point, place)) - x[point], lock.target(point, place))
    lock.forget(point)
    fit = system.solve(ridge)
    for linear in linears:
        weight = widened(weight_out_in(linear))
        change = weight @ fit.weight, None if fit.bias is None else weight @ fit.bias
        replace(fit, weight=change[0], bias=change[1]).add_to(linear)
    record(layer.index, f"{block}, inputs", fit)


def _fit_output(
    lock: Lockstep, block: Block, ridge: float, chooser: Chooser | None, refit: bool
) -> NormalEquations | None:
    """Fit a block's output projection to its dense output; the equations that are left, if it is to be fitted again."""
    layer = lock.layer
    linear, _, output = output_of(layer, block)
    also = None
    if chooser is not None:
        also = chooser.points(block), partial(chooser.observe, layer, block)
    system = equations(lock, block, output, also, hold_heads=block == "attention")
    lock.forget(output)
    fit = system.solve(ridge)
    fit.add_to(linear)
    record(layer.index, block, fit)
    return system.corrected(fit) if refit else None

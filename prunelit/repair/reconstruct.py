"""Least squares on what a plan keeps: the dense model's activations on the calibration text are the target.

The cut model is built layer by layer, in network order, while two residual streams are carried: the dense model's, and
the one that the layers cut so far make of the same text. So each layer is fitted to the inputs it will really get, the
dense layer is gone before the next one is cut, and there is never a second copy of the model.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.observe import ActivationPoint
from prunelit.calibration.paired_streams import PairedStreams
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, Layer, as_decoder, get_weight_out_in
from prunelit.repair.least_squares import Fit, NormalEquations, widen_to_float32
from prunelit.runtime.errors import BadOption
from prunelit.runtime.progress import track_progress

_log = logging.getLogger("prunelit")

FitTarget = Literal["residual", "module"]
BlockName = Literal["attention", "mlp"]
ActivationVisitor = tuple[Sequence[ActivationPoint], Callable[[Mapping[str, Tensor]], None]]


@torch.no_grad()
def apply_least_squares(
    model: nn.Module | Decoder,
    plan: PruningPlan,
    batches: Sequence[Batch],
    how: str = "least_squares",
    target: FitTarget = "residual",
    ridge: float = 1e-2,
) -> list[dict[str, Any]]:
    """Cut `model` in place as `plan` says and refit the output projections of what is kept, layer by layer.

    From the first layer that is cut on, every layer's attention output projection and then its down projection are
    corrected on the inputs that the model cut so far gives them. Memory beside the model: four tensors of calibration
    tokens by hidden size, and X^T X of one linear. Time: less than four forward passes.

    Args:
        model: dense causal LM; dtype, device, modes and `requires_grad` stay.
        plan: widths and blocks.
        batches: calibration text, the same list on every rank.
        how: "least_squares".
        target: "residual" fits each projection so that the residual stream after it comes close to the dense one, and
            so makes up for the layers below as well; "module" fits it to the dense projection's own output. Where a
            norm follows the projection, and for attention in a parallel layer, it is the module in both cases.
        ridge: pull towards the weights that are there, relative to the mean square of the inputs.

    Returns:
        One record for each linear: {"layer", "block", "before", "after" (errors relative to the outputs wanted),
        "ridge"}.

    Raises:
        BadPlan: the plan was made for another model; nothing has been changed then.
        NoCalibration: no batches, or nothing but padding.
        BadOption: an option outside its range.
    """
    if how != "least_squares":
        raise BadOption(f"repair: expected 'least_squares', got {how!r}")
    if target not in get_args(FitTarget):
        raise BadOption(f"target: expected one of {', '.join(get_args(FitTarget))}, got {target!r}")
    check_ridge(ridge)
    decoder = as_decoder(model)
    surgery.check_plan_fits(decoder, plan)
    start, records = find_first_changed(plan.layers, decoder), []
    if start < len(decoder.layers):
        lock = PairedStreams(decoder, batches, start)
        for index in track_progress(range(start, len(decoder.layers)), "repairing", unit="layer"):
            dense, kept = decoder.layers[index], plan.layers[index]
            ends = _choose_target_points(dense, kept, target)
            lock.enter_layer(index, tuple(ends.values()))
            surgery.prune_layer(dense, kept, decoder.config)
            lock.refresh_layer()
            for block, end in ends.items():
                fit = accumulate_equations(lock, block, end, hold_heads=block == "attention").solve(ridge)
                fit.add_to(get_output_projection(lock.layer, block)[0])
                records.append(record_layer_fit(index, block, fit))
            if index + 1 < len(decoder.layers):
                lock.leave_layer()
    surgery.finish_pruning(decoder, plan)
    return records


def check_ridge(ridge: float, name: str = "ridge") -> None:
    """Check a ridge before a model is loaded.

    Raises:
        BadOption: not a number of at least 0.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < math.inf:
        raise BadOption(f"{name}: expected a number of at least 0, got {ridge!r}")


def find_first_changed(layers: Sequence[LayerPlan], decoder: Decoder) -> int:
    """Index of the first layer that loses something; the number of layers if none does."""
    pairs = enumerate(zip(layers, decoder, strict=True))
    return next((i for i, (k, layer) in pairs if k.widths != LayerPlan.dense(layer.shape).widths), len(layers))


def accumulate_equations(
    lock: PairedStreams,
    block: BlockName,
    end: ActivationPoint,
    also: ActivationVisitor | None = None,
    **options: Any,
) -> NormalEquations:
    """The normal equations of a block's output projection, from one pass over the cut stream.

    Args:
        lock: it has entered the layer, with `end` among its targets.
        block: "attention" (the projection o) or "mlp" (down).
        end: where the dense model's values are the target: the projection's own output, or the residual stream.
        also: sees the activations of the same pass: (points to see, function of {point: [T, width]}).
        options: of `PairedStreams.visit`.
    """
    linear, inputs, output = get_output_projection(lock.layer, block)
    outputs, width = get_weight_out_in(linear).shape
    found = NormalEquations(width, outputs, linear.bias is not None, lock.decoder.device)
    name = lock.layer.architecture.residual_scale
    scale = float(getattr(lock.decoder.config, name)) if name and end != output else 1.0
    points, watch = also or ((), None)
    for place, x in lock.run_cut_stream((inputs, output, end, *points), **options):
        error = (widen_to_float32(lock.get_target(end, place)) - x[end]) / scale
        found.add_batch(x[inputs], error, x[output] + error)
        if watch is not None:
            watch(x)
    return found


def get_output_projection(layer: Layer, block: BlockName) -> tuple[nn.Module, ActivationPoint, ActivationPoint]:
    """A block's output projection, and the points at its input and its output."""
    if block == "attention":
        return layer.output, "heads", "attention_output"
    return layer.down, "channels", "mlp_output"


def _choose_target_points(layer: Layer, kept: LayerPlan, target: FitTarget) -> dict[BlockName, ActivationPoint]:
    """Where each block that stays is to meet the dense model."""
    ends: dict[BlockName, ActivationPoint] = {}
    mlp = layer.has_mlp and not kept.mlp_removed
    if layer.has_attention and not kept.attention_removed:
        ends["attention"] = "attention_output"
        if target == "residual" and layer.get_norm("attention_post_norm") is None:
            if not mlp:  # it is alone, and makes up for the other block
                ends["attention"] = "layer_output"
            elif not layer.architecture.parallel:
                ends["attention"] = "residual"
    if mlp:
        raw = target == "module" or layer.get_norm("mlp_post_norm") is not None
        ends["mlp"] = "mlp_output" if raw else "layer_output"
    return ends


def record_layer_fit(layer: int, block: str, fit: Fit) -> dict[str, Any]:
    """A fit for the reports, and for the log at debug level."""
    _log.debug("layer %d: %s: error %.4f -> %.4f (ridge %g)", layer, block, fit.before, fit.after, fit.ridge)
    return {"layer": layer, "block": block, "before": fit.before, "after": fit.after, "ridge": fit.ridge}

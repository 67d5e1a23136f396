"""Least-squares refit of the output projections that remain, with the dense model's activations as targets.

The model is cut layer by layer, in network order, while two residual streams of the calibration text are carried: that
of the dense model, and that of the layers cut so far. So each layer is fitted to the inputs that it will really get.
The dense layer is freed before the next one is cut, and there is never a second copy of the model.

Legend: T tokens without padding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.observe import ActivationPoint
from prunelit.calibration.paired_streams import PairedStreams
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, Layer, as_decoder, get_weight_out_in
from prunelit.repair.expert_refit import refit_experts
from prunelit.repair.fit_record import FitRecord, record_layer_fit
from prunelit.repair.least_squares import NormalEquations, widen_to_float32
from prunelit.runtime.errors import BadOption
from prunelit.runtime.progress import track_progress

FitTarget = Literal["residual", "module"]
"""What a refit aims at, see `apply_least_squares`."""
BlockName = Literal["attention", "mlp"]
ActivationVisitor = tuple[Sequence[ActivationPoint], Callable[[Mapping[str, Tensor]], None]]
"""Points to observe, and a function that receives {point: activations [T, width]} of every batch."""


@torch.no_grad()
def apply_least_squares(
    model: nn.Module | Decoder,
    plan: PruningPlan,
    batches: Sequence[Batch],
    how: str = "least_squares",
    target: FitTarget = "residual",
    ridge: float = 1e-2,
) -> list[FitRecord]:
    """Cut a model in place and refit its remaining output projections, layer by layer.

    From the first layer that is cut on, the attention output projection and then the down projection of every layer are
    corrected on the inputs that the model cut so far gives them; of a mixture of experts the down projections of all
    experts, see `prunelit.repair.expert_refit`. Memory beyond the model: four tensors of calibration
    tokens by hidden size, and X^T X of one linear. Time: less than four forward passes.

    Args:
        model: dense causal LM, or its `Decoder`; dtype, device, modes and `requires_grad` stay.
        plan: the remaining units.
        batches: calibration batches, the same list on every rank.
        how: "least_squares".
        target: "residual" fits each projection so that the residual stream after it comes close to the dense one, which
            also makes up for errors of the layers below; "module" fits it to the dense projection's own output. Where a
            norm follows the projection, and for attention in a parallel layer, both fit the module.
        ridge: pull towards the present weights, relative to the mean square of the inputs.

    Returns:
        One record per refitted linear: {"layer", "block", "before", "after" (relative errors of its outputs), "ridge"}.

    Raises:
        BadPlan: the plan was made for another model, which is left unchanged.
        NoCalibration: there are no batches, or nothing but padding.
        BadOption: an option is outside its range, or later layers use the keys of earlier ones; the model is unchanged.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> decoder = Decoder(transformers.LlamaForCausalLM(config))
        >>> plan = PruningPlan("by hand", decoder.shape, (LayerPlan((0, 1), (0, 1), tuple(range(16))),))
        >>> records = apply_least_squares(decoder, plan, [{"input_ids": torch.arange(20).view(2, 10)}])
        >>> [record["block"] for record in records], records[1]["after"] < records[1]["before"]
        (['attention', 'mlp'], True)
    """
    if how != "least_squares":
        raise BadOption(f"repair: expected 'least_squares', got {how!r}")
    if target not in get_args(FitTarget):
        raise BadOption(f"target: expected one of {', '.join(get_args(FitTarget))}, got {target!r}")
    check_ridge(ridge)
    decoder = as_decoder(model)
    surgery.check_plan_fits(decoder, plan)
    start = find_first_changed(plan.layers, decoder)
    records: list[FitRecord] = []
    if start < len(decoder.layers):
        streams = PairedStreams(decoder, batches, start)
        for index in track_progress(range(start, len(decoder.layers)), "repairing", unit="layer"):
            layer, layer_plan = decoder.layers[index], plan.layers[index]
            targets = _choose_target_points(layer, layer_plan, target)
            streams.enter_layer(index, tuple(targets.values()))
            surgery.prune_layer(layer, layer_plan, decoder.config)
            streams.refresh_layer()
            for block, target_point in targets.items():
                fit = accumulate_equations(streams, block, target_point, hold_heads=block == "attention").solve(ridge)
                fit.add_to(get_output_projection(streams.layer, block)[0])
                records.append(record_layer_fit(index, block, fit))
            if streams.layer.has_experts:
                records.append(refit_experts(streams, ridge))
            if index + 1 < len(decoder.layers):
                streams.leave_layer()
    surgery.finish_pruning(decoder, plan)
    return records


def check_ridge(ridge: float, name: str = "ridge") -> None:
    """Check a ridge before a model is loaded.

    Args:
        ridge: the value to check.
        name: name of the option, for the error message.

    Raises:
        BadOption: the ridge is not a number of at least 0.

    Example:
        >>> check_ridge(0.01)
        >>> check_ridge(-1)
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.BadOption: ridge: expected a number of at least 0, got -1
    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < math.inf:
        raise BadOption(f"{name}: expected a number of at least 0, got {ridge!r}")


def find_first_changed(layers: Sequence[LayerPlan], decoder: Decoder) -> int:
    """Find the first layer that loses units.

    Args:
        layers: remaining units of every layer.
        decoder: the dense model.

    Returns:
        Index of the layer; the number of layers if none loses units.

    Example: see `prunelit.callbacks.greedy_output.two_step`, which uses it.
    """
    pairs = zip(layers, decoder, strict=True)
    changes = [layer_plan.counts != LayerPlan.dense(layer.shape).counts for layer_plan, layer in pairs]
    return changes.index(True) if True in changes else len(changes)


def accumulate_equations(
    streams: PairedStreams,
    block: BlockName,
    target_point: ActivationPoint,
    visitor: ActivationVisitor | None = None,
    hold_heads: bool = False,
) -> NormalEquations:
    """Accumulate the normal equations of a block's output projection in one pass over the cut stream.

    Args:
        streams: has entered the layer, with `target_point` among its points.
        block: "attention" (the projection o) or "mlp" (down).
        target_point: where the dense activations are the target: at the projection's own output, or in the residual
            stream.
        visitor: also receives the activations of this pass.
        hold_heads: see `PairedStreams.run_cut_stream`.

    Example: see `prunelit.callbacks.greedy_output.two_step`, which uses it.
    """
    linear, inputs, output = get_output_projection(streams.layer, block)
    outputs, width = get_weight_out_in(linear).shape
    equations = NormalEquations(width, outputs, linear.bias is not None, streams.decoder.device)
    # Some families scale a block's output before they add it to the residual stream.
    scale = 1.0 if target_point == output else streams.layer.get_residual_scale(streams.decoder.config, block)
    points, visit = visitor or ((), None)
    for place, x in streams.run_cut_stream((inputs, output, target_point, *points), hold_heads):
        error = (widen_to_float32(streams.get_target(target_point, place)) - x[target_point]) / scale
        equations.add_batch(x[inputs], error, x[output] + error)
        if visit is not None:
            visit(x)
    return equations


def get_output_projection(layer: Layer, block: BlockName) -> tuple[nn.Module, ActivationPoint, ActivationPoint]:
    """Return a block's output projection and the points at its input and its output.

    Example: see `prunelit.callbacks.greedy_output.two_step`, which uses it.
    """
    if block == "attention":
        return layer.output, "heads", "attention_output"
    return layer.down, "channels", "mlp_output"


def _choose_target_points(layer: Layer, layer_plan: LayerPlan, target: FitTarget) -> dict[BlockName, ActivationPoint]:
    """Choose the point where each remaining block is fitted to the dense model."""
    points: dict[BlockName, ActivationPoint] = {}
    # The FFN beside experts is left alone: some families scale its output by a gate of each token.
    mlp_remains = layer.has_mlp and not layer_plan.mlp_removed and not layer.has_experts
    experts_remain = layer.has_experts and not layer_plan.mlp_removed
    if layer.has_attention and not layer_plan.attention_removed:
        points["attention"] = "attention_output"
        if target == "residual" and layer.get_norm("attention_post_norm") is None:
            if not mlp_remains and not experts_remain:  # attention alone has to make up for the removed FFN
                points["attention"] = "layer_output"
            elif not layer.architecture.parallel:
                points["attention"] = "residual"
    if mlp_remains:
        fit_module = target == "module" or layer.get_norm("mlp_post_norm") is not None
        points["mlp"] = "mlp_output" if fit_module else "layer_output"
    return points

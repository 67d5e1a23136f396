"""Bias compensation: the mean of what is cut stays, in the bias of the output projection.

Source: Y. An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP), AAAI 2024, arXiv
2312.11983. For an output projection y = W x + b that loses inputs J, b += W[:, J] E[x_J], with means over the
calibration tokens of the dense model; then E[y] is as before where the remaining inputs are. A projection without a
bias is given one, which the plan states. A block that goes altogether is not compensated: no linear is left to hold
its mean.

Legend: T tokens, H hidden, C inputs of an output projection.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.observe import ActivationPoint, Sums, observe
from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.core.scores import Cost
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, Layer, as_decoder, get_weight_out_in


@torch.no_grad()
def apply_bias_compensation(
    model: nn.Module | Decoder,
    plan: PruningPlan,
    batches: Sequence[Batch],
    means: Sequence[Mapping[str, Tensor]] | None = None,
) -> None:
    """Cut `model` in place as `plan` says and add the means of what went to the output biases; one forward pass.

    Dtype, device, mode and `requires_grad` stay; a new bias has those of its weight.

    Args:
        model: dense.
        plan: what stays.
        batches: the same list on every rank; they are shared out.
        means: {"heads": [Q * D], "channels": [F]} of every layer, where they are known; then no text is read.

    Raises:
        BadPlan: the plan was made for another model; nothing has been changed then.
        NoCalibration: no batches, or nothing but padding.
        NonFinite: activations hold NaN or infinity.
    """
    decoder = as_decoder(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # surgery.apply says it again
        surgery.check_plan_fits(decoder, plan)
    means = means or _measure_means(decoder, batches)
    additions = [
        (linear, get_weight_out_in(linear).float() @ (mean[point].cpu() * gone).to(decoder.device, torch.float32))
        for layer, kept, mean in zip(decoder, plan.layers, means, strict=True)
        for point, linear, gone in list_lost_inputs(layer, kept)
    ]
    surgery.apply(decoder, plan)
    for linear, addition in additions:  # the cut keeps these modules and replaces their weights
        _add_to_bias(linear, addition)


def _measure_means(decoder: Decoder, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Means over tokens of what the output projections read, float64, per layer."""
    sums = Sums(len(decoder.layers))

    def accumulate(layer: Layer, x: Mapping[str, Tensor]) -> None:
        for point, rows in x.items():
            sums.add(layer, point, rows.sum(0, dtype=torch.float64))

    tokens = observe(decoder, batches, ("heads", "channels"), accumulate, "means for biases")
    return sums.means(tokens, decoder.device)


def declare_biases(decoder: Decoder, plan: PruningPlan, added: bool) -> PruningPlan:
    """The plan with the biases stated that `apply_bias_compensation` gives this model, or with none stated.

    A plan that does not fit the model is returned as it is: the cut refuses it.
    """
    if plan.model.layers != tuple(layer.shape for layer in decoder):
        return plan
    layers = []
    for layer, kept in zip(decoder, plan.layers, strict=True):
        bare = {point for point, linear, _ in list_lost_inputs(layer, kept) if linear.bias is None} if added else set()
        layers.append(replace(kept, attention_bias="heads" in bare, mlp_bias="channels" in bare))
    return replace(plan, layers=tuple(layers))


def make_bias_cost(decoder: Decoder) -> Cost:
    """Parameters of a layer at given widths, with the biases that a cut adds: what a budget then has to count."""
    bare = {}
    for layer in decoder:
        hidden = decoder.config.hidden_size
        attention = hidden if layer.has_attention and layer.output.bias is None else 0
        bare[layer.shape] = attention, hidden if layer.has_mlp and layer.down.bias is None else 0

    def cost(shape: LayerShape, query_heads: int, kv_groups: int, ffn_channels: int) -> int:
        attention, mlp = bare[shape]
        added = attention * (0 < query_heads < shape.query_heads) + mlp * (0 < ffn_channels < shape.ffn_channels)
        return shape.parameters_at(query_heads, kv_groups, ffn_channels) + added

    return cost


def list_lost_inputs(layer: Layer, kept: LayerPlan) -> Iterator[tuple[ActivationPoint, nn.Module, Tensor]]:
    """Output projections that stay but lose inputs: the point they read, the linear, and which inputs go [C]."""
    shape = layer.shape
    if layer.has_attention and 0 < len(kept.query_heads) < shape.query_heads:
        yield (
            "heads",
            layer.output,
            _mask_removed(kept.query_heads, shape.query_heads).repeat_interleave(shape.head_dim),
        )
    if layer.has_mlp and 0 < len(kept.ffn_channels) < shape.ffn_channels:
        yield "channels", layer.down, _mask_removed(kept.ffn_channels, shape.ffn_channels)


def _mask_removed(kept: Sequence[int], size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[list(kept)] = False
    return gone


def _add_to_bias(linear: nn.Module, addition: Tensor) -> None:
    weight, bias = cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
    if bias is None:
        linear.bias = nn.Parameter(addition.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        bias.copy_(bias.float() + addition)

"""Bias compensation: the mean contribution of removed inputs is kept in the bias of the output projection.

Source: Y. An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP), AAAI 2024, arXiv
2312.11983. For an output projection y = W x + b that loses the inputs J, b += W[:, J] E[x_J], with means over the
calibration tokens of the dense model. E[y] then stays as it was, as far as the remaining inputs do. A projection
without a bias gets one, which the plan states. A block that is removed as a whole is not compensated, since no linear
remains to hold its mean.

Legend: T tokens, H hidden, Q query heads, D head size, F FFN channels, C inputs of an output projection.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

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
    """Cut a model in place and add the mean contributions of the removed inputs to the output biases.

    It takes one forward pass. Dtype, device, mode and `requires_grad` stay; a new bias takes those of its weight.

    Args:
        model: the dense model, or its `Decoder`.
        plan: the remaining units.
        batches: calibration batches, the same list on every rank; the ranks share the work.
        means: mean inputs {"heads": [Q * D], "channels": [F]} of every layer, if they are known; then no text is read.

    Raises:
        BadPlan: the plan was made for another model, which is left unchanged.
        NoCalibration: there are no batches, or nothing but padding.
        NonFinite: activations hold NaN or infinity.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> decoder = Decoder(transformers.LlamaForCausalLM(config))
        >>> layers = (LayerPlan((0, 1), (0, 1), tuple(range(16)), mlp_bias=True),)
        >>> plan = PruningPlan("by hand", decoder.shape, layers)
        >>> apply_bias_compensation(decoder, plan, [{"input_ids": torch.arange(20).view(2, 10)}])
        >>> decoder.model.model.layers[0].mlp.down_proj.bias.shape
        torch.Size([16])
    """
    decoder = as_decoder(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # surgery.apply repeats the warnings
        surgery.check_plan_fits(decoder, plan)
    means = means or _measure_means(decoder, batches)
    # Computed before the cut, which takes the columns that they need.
    additions = [
        (linear, get_weight_out_in(linear).float() @ (mean[point].cpu() * removed).to(decoder.device, torch.float32))
        for layer, layer_plan, mean in zip(decoder, plan.layers, means, strict=True)
        for point, linear, removed in list_lost_inputs(layer, layer_plan)
    ]
    surgery.apply(decoder, plan)
    for linear, addition in additions:  # the cut keeps these modules and replaces their weights
        _add_to_bias(linear, addition)


def _measure_means(decoder: Decoder, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Measure the mean inputs of the output projections of every layer, float64."""
    sums = Sums(len(decoder.layers))

    def accumulate(layer: Layer, x: Mapping[str, Tensor]) -> None:
        for point, rows in x.items():
            sums.add(layer, point, rows.sum(0, dtype=torch.float64))

    tokens = observe(decoder, batches, ("heads", "channels"), accumulate, "means for biases")
    return sums.means(tokens, decoder.device)


def declare_biases(decoder: Decoder, plan: PruningPlan, added: bool) -> PruningPlan:
    """State in a plan which biases `apply_bias_compensation` adds to a model.

    A plan that does not fit the model is returned unchanged; the cut refuses it.

    Args:
        decoder: the dense model.
        plan: the plan.
        added: whether the biases are added; False: state none.

    Returns:
        A plan with the same remaining units.

    Example: see `tests/repair/test_bias.py`.
    """
    if plan.model.layers != tuple(layer.shape for layer in decoder):
        return plan
    layers = []
    for layer, layer_plan in zip(decoder, plan.layers, strict=True):
        new_biases = set()
        if added:
            new_biases = {point for point, linear, _ in list_lost_inputs(layer, layer_plan) if linear.bias is None}
        layers.append(replace(layer_plan, attention_bias="heads" in new_biases, mlp_bias="channels" in new_biases))
    return replace(plan, layers=tuple(layers))


def make_bias_cost(decoder: Decoder) -> Cost:
    """Make the cost function of a budget that counts parameters, with the biases that compensation adds.

    Args:
        decoder: the dense model.

    Returns:
        A function of (layer shape, query heads, KV groups, FFN channels) to parameters.

    Example: see `tests/repair/test_bias.py`.
    """
    bias_sizes = {}
    for layer in decoder:
        hidden = decoder.config.hidden_size
        attention = hidden if layer.has_attention and layer.output.bias is None else 0
        bias_sizes[layer.shape] = attention, hidden if layer.has_mlp and layer.down.bias is None else 0

    def cost(shape: LayerShape, query_heads: int, kv_groups: int, ffn_channels: int, **mixture: Any) -> int:
        attention, mlp = bias_sizes[shape]
        added = attention * (0 < query_heads < shape.query_heads) + mlp * (0 < ffn_channels < shape.ffn_channels)
        return shape.parameters_at(query_heads, kv_groups, ffn_channels, **mixture) + added

    return cost


def list_lost_inputs(layer: Layer, layer_plan: LayerPlan) -> Iterator[tuple[ActivationPoint, nn.Module, Tensor]]:
    """List the output projections that remain but lose inputs.

    Args:
        layer: the dense layer.
        layer_plan: its remaining units.

    Yields:
        The point at the projection's input, the projection, and which inputs it loses, bool [C].

    Example: see `prunelit.callbacks.wanda_sp`, which uses it.
    """
    shape = layer.shape
    if layer.has_attention and 0 < len(layer_plan.query_heads) < shape.query_heads:
        removed_heads = _mask_removed(layer_plan.query_heads, shape.query_heads)
        yield "heads", layer.output, removed_heads.repeat_interleave(shape.head_dim)
    if layer.has_mlp and 0 < len(layer_plan.ffn_channels) < shape.ffn_channels:
        yield "channels", layer.down, _mask_removed(layer_plan.ffn_channels, shape.ffn_channels)


def _mask_removed(remaining: Sequence[int], size: int) -> Tensor:
    """Return which of `size` units are not among the remaining ones, bool [size]."""
    removed = torch.ones(size, dtype=torch.bool)
    removed[list(remaining)] = False
    return removed


def _add_to_bias(linear: nn.Module, addition: Tensor) -> None:
    weight, bias = cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
    if bias is None:
        linear.bias = nn.Parameter(addition.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        bias.copy_(bias.float() + addition)

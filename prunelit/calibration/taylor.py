"""Taylor importances of units, from the products of weights and their gradients.

Every first- and second-order importance is a function of p = weight * gradient alone, because the diagonal Fisher
approximation of the second-order term, weight^2 * gradient^2, is p^2.

Source: X. Ma, G. Fang, X. Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, arXiv
2305.11627.

Legend: N samples (sequences), Q query heads, G KV groups, F FFN channels; slices, and E elements of a slice, as in
`prunelit.model.unit_indices`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.per_sample_gradients import (
    Slices,
    collect_slices,
    split_into_samples,
    visit_sample_gradients,
)
from prunelit.core.scores import LayerScores, Unit
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.unit_indices import UnitKind, collect_layer_slices
from prunelit.runtime.distributed import sum_over_ranks
from prunelit.runtime.errors import NonFinite

TaylorForm = Literal["vector", "first", "second", "mixed"]
"""Name of an importance, see `TAYLOR_FORMS`."""


class _FormDefinition(NamedTuple):
    get_terms: Callable[[Tensor], tuple[Tensor, ...]]  # from p [slices, E] to the tensors averaged over samples
    compute_importance: Callable[..., Tensor]  # from these averages to importances, not yet summed over a slice


TAYLOR_FORMS: Mapping[TaylorForm, _FormDefinition] = {
    "vector": _FormDefinition(lambda p: (p.sum(1, keepdim=True),), lambda mean: mean.abs()),
    "first": _FormDefinition(lambda p: (p,), lambda mean: mean.abs()),
    "second": _FormDefinition(lambda p: (p.square().sum(1, keepdim=True),), lambda square: square),
    "mixed": _FormDefinition(lambda p: (p, p.square()), lambda mean, square: (mean - square / 2).abs()),
}
"""Importance of a slice with elements e, weight w, gradient G, Fisher F = mean over samples of G^2:
vector |sum_e w G|; first sum_e |w G|; second sum_e w^2 F; mixed sum_e |w G - w^2 F / 2|."""


@torch.inference_mode(False)
def score_each_sample(
    decoder: Decoder,
    batches: Sequence[Batch],
    forms: Sequence[TaylorForm],
    unit: Unit = "kv_group",
    checkpointing: bool = False,
) -> dict[Literal["heads", "channels"], dict[int, Tensor]]:
    """Score the units on every sample by itself, where F is the squared gradient of that sample.

    In a distributed run sample n is computed on rank n % world size; all ranks get all samples, in order.

    Args:
        decoder: the model; left as it was.
        batches: calibration batches, the same list on every rank; one sequence is one sample.
        forms: keys of `TAYLOR_FORMS`; all are computed in the same backward passes.
        unit: unit of attention. A KV group has the sum over its query heads, keys and values; a query head, which is
            cut without its group, has its own rows and columns only.
        checkpointing: keep only the inputs of the layers and run each layer again in the backward pass.

    Returns:
        {"heads": {layer: [forms, N, G or Q]}, "channels": {layer: [forms, N, F]}}, float64, for the layers that have
        units of the kind.

    Raises:
        NonFinite: a loss or an importance is NaN or infinite.
        NoCalibration: no sequence has two adjacent tokens.

    Example: see `prunelit.callbacks.saap.callback.SAAP`.
    """
    count = len(split_into_samples(batches))
    sums_by_layer: list[dict[UnitKind, Tensor]] = []
    for layer in decoder:
        owners = {kind: own for slices in collect_layer_slices(layer) for kind, own in slices.owners.items()}
        sums_by_layer.append({kind: _make_zeros(len(forms), count, len(own), like=own) for kind, own in owners.items()})

    def visit(sample: int, slices: Slices, p: Tensor) -> None:
        for number, name in enumerate(forms):
            form = TAYLOR_FORMS[name]
            importance = form.compute_importance(*form.get_terms(p)).sum(1)
            for kind, unit_importance in slices.sum_per_unit(importance).items():
                sums_by_layer[slices.layer][kind][number, sample] += unit_importance

    visit_sample_gradients(decoder, batches, visit, checkpointing=checkpointing)
    heads, channels = {}, {}
    for layer, sums in zip(decoder, sums_by_layer, strict=True):
        for values in sums.values():
            _check_finite(layer, sum_over_ranks(values))
        if "query" in sums:
            by_group = sums["query"].unflatten(-1, (-1, layer.shape.group_size)).sum(-1)
            heads[layer.index] = sums["query"] if unit == "query_head" else by_group + sums["kv"]
        if "channel" in sums:
            channels[layer.index] = sums["channel"]
    return {"heads": heads, "channels": channels}


@torch.inference_mode(False)
def score_mean_loss(
    decoder: Decoder,
    batches: Sequence[Batch],
    form: TaylorForm,
    unit: Unit = "kv_group",
    checkpointing: bool = False,
    layers_at_once: int | None = None,
    experts: bool = False,
) -> list[LayerScores]:
    """Score the units on the mean loss over samples, where F is the mean of the samples' squared gradients.

    "vector" and "second" keep a number per slice. "first" and "mixed" need the mean gradient of each single weight: one
    float64 number ("mixed": two) per weight of the layers scored at once, which is 4 (8) times a bfloat16 model.

    Args:
        decoder, batches, checkpointing: see `score_each_sample`.
        form: a key of `TAYLOR_FORMS`.
        unit: with "kv_group" the key and value rows of a group count, in equal parts for each of its query heads; with
            "query_head" they are not cut and do not count.
        layers_at_once: number of layers whose means are held at the same time; fewer layers take more passes over the
            text. None: all.
        experts: score the experts of mixtures and their channels as well.

    Returns:
        One `LayerScores` per layer, float64.

    Raises:
        NonFinite, NoCalibration: see `score_each_sample`.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> decoder = Decoder(transformers.LlamaForCausalLM(config))
        >>> scores = score_mean_loss(decoder, [{"input_ids": torch.tensor([[1, 2, 3]])}], "first")
        >>> scores[0].heads.shape, scores[0].channels.shape
        (torch.Size([2]), torch.Size([24]))
    """
    count, span_length = len(split_into_samples(batches)), layers_at_once or len(decoder.layers)
    scores = []
    for start in range(0, len(decoder.layers), span_length):
        span = decoder.layers[start : start + span_length]
        sums = _sum_terms(decoder, batches, form, span, checkpointing, experts)
        for layer in span:
            by_kind: dict[UnitKind, Tensor] = {}
            for slices in collect_slices(layer, experts):
                means = [sum_over_ranks(total) / count for total in sums.pop(slices.weight)]
                importance = TAYLOR_FORMS[form].compute_importance(*means).sum(1)
                for kind, unit_importance in slices.sum_per_unit(importance).items():
                    by_kind[kind] = by_kind[kind] + unit_importance if kind in by_kind else unit_importance
            for values in by_kind.values():
                _check_finite(layer, values)
            scores.append(_build_layer_scores(layer, by_kind, unit))
    return scores


def _sum_terms(
    decoder: Decoder,
    batches: Sequence[Batch],
    form: TaylorForm,
    span: Sequence[Layer],
    checkpointing: bool,
    experts: bool,
) -> dict[nn.Parameter, tuple[Tensor, ...]]:
    """Sum the terms of a form over this rank's samples: {weight: tensors [slices, E] or [slices, 1]}."""
    get_terms = TAYLOR_FORMS[form].get_terms
    sums = {
        slices.weight: get_terms(slices.arrange_by_slice(*map(_make_zeros_like, slices.parameters)))
        for layer in span
        for slices in collect_slices(layer, experts)
    }

    def visit(sample: int, slices: Slices, p: Tensor) -> None:
        for total, term in zip(sums[slices.weight], get_terms(p), strict=True):
            total += term

    indices = [layer.index for layer in span]
    visit_sample_gradients(decoder, batches, visit, layers=indices, checkpointing=checkpointing, experts=experts)
    return sums


def _make_zeros(*size: int, like: Tensor) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=like.device)


def _make_zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.float64)


def _build_layer_scores(layer: Layer, sums: Mapping[UnitKind, Tensor], unit: Unit) -> LayerScores:
    heads = sums.get("query")
    if heads is not None and unit == "kv_group":
        size = layer.shape.group_size
        heads = heads + sums["kv"].repeat_interleave(size, dim=-1) / size
    return LayerScores(heads, sums.get("channel"), sums.get("expert"), sums.get("expert_channel"))


def _check_finite(layer: Layer, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NonFinite(
            f"layer {layer.index}: weight gradients hold NaN or infinity on the calibration text; expected finite "
            "numbers: load the model in bfloat16 or float32"
        )

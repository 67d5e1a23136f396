"""Taylor importances of units, from the products of weights and their gradients.

Every first- and second-order importance follows from p = weight * gradient alone, because the diagonal Fisher
approximation of the second-order term, weight^2 * gradient^2, is p^2.

Legend: N samples (sequences), Q query heads, G KV groups, F FFN channels; slices, and E elements a slice, as in
`prunelit.model.unit_indices`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.per_sample_gradients import split_into_samples, visit_sample_gradients
from prunelit.core.scores import LayerScores, Unit
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.unit_indices import LinearSlices, UnitKind, collect_layer_slices
from prunelit.runtime.distributed import sum_over_ranks
from prunelit.runtime.errors import NonFinite

TaylorForm = Literal["vector", "first", "second", "mixed"]


class _FormDefinition(NamedTuple):
    keep: Callable[[Tensor], tuple[Tensor, ...]]  # what is averaged over samples, from p [slices, E]
    importance: Callable[..., Tensor]  # of the averages, before the sum over a slice


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
    """Taylor importances of every sample by itself, F being that sample's squared gradient.

    In a distributed run sample n is computed on rank n % world size; all ranks get all samples, in order.

    Args:
        decoder: the model; left as it was.
        batches: the same list on every rank; one sequence is one sample.
        forms: keys of `TAYLOR_FORMS`; all from the same backward passes.
        unit: what "heads" are. KV groups are the sums of all that goes with them; of query heads that are cut without
            their group, key and value rows do not count.
        checkpointing: keep the layers' inputs only and run each layer again in the backward pass.

    Returns:
        For the layers that have units of the kind, {layer: float64 [forms, N, G or Q]} and {layer: [forms, N, F]}.

    Raises:
        NonFinite: a loss or an importance is NaN or infinite.
        NoCalibration: no sequence of two tokens.
    """
    count = len(split_into_samples(batches))
    found: list[dict[UnitKind, Tensor]] = []
    for layer in decoder:
        units = {kind: owned for of in collect_layer_slices(layer) for kind, owned in of.owners.items()}
        found.append({kind: _make_zeros(len(forms), count, len(owned), like=owned) for kind, owned in units.items()})

    def visit(sample: int, of: LinearSlices, p: Tensor) -> None:
        for number, name in enumerate(forms):
            value = TAYLOR_FORMS[name].importance(*TAYLOR_FORMS[name].keep(p)).sum(1)
            for kind, part in of.sum_per_unit(value).items():
                found[of.layer][kind][number, sample] += part

    visit_sample_gradients(decoder, batches, visit, checkpointing=checkpointing)
    heads, channels = {}, {}
    for layer, sums in zip(decoder, found, strict=True):
        for values in sums.values():
            _check_finite(layer, sum_over_ranks(values))
        if "query" in sums:
            size = layer.shape.group_size
            by_group = sums["query"].unflatten(-1, (-1, size)).sum(-1)
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
) -> list[LayerScores]:
    """Taylor importances of the mean loss over samples, F being the mean of the samples' squared gradients.

    "vector" and "second" keep numbers per slice. "first" and "mixed" need the mean gradient of each weight itself: one
    float64 number per weight of the layers in hand ("mixed": two), 4 (8) times a bfloat16 model.

    Args:
        decoder, batches, checkpointing: see `score_each_sample`.
        form: a key of `TAYLOR_FORMS`.
        unit: with "kv_group", a group's key and value rows count, an equal part for each of its query heads; with
            "query_head" they stay, so they do not.
        layers_at_once: layers whose means are held at the same time; fewer need more passes. None: all.

    Returns:
        One `LayerScores` per layer, float64.

    Raises:
        NonFinite, NoCalibration: see `score_each_sample`.
    """
    count, width = len(split_into_samples(batches)), layers_at_once or len(decoder.layers)
    scores = []
    for start in range(0, len(decoder.layers), width):
        span = decoder.layers[start : start + width]
        sums = _sum_terms(decoder, batches, form, span, checkpointing)
        for layer in span:
            kinds: dict[UnitKind, Tensor] = {}
            for of in collect_layer_slices(layer):
                means = [sum_over_ranks(total) / count for total in sums.pop(of.linear)]
                for kind, part in of.sum_per_unit(TAYLOR_FORMS[form].importance(*means).sum(1)).items():
                    kinds[kind] = kinds[kind] + part if kind in kinds else part
            for values in kinds.values():
                _check_finite(layer, values)
            scores.append(_build_layer_scores(layer, kinds, unit))
    return scores


def _sum_terms(
    decoder: Decoder, batches: Sequence[Batch], form: TaylorForm, span: Sequence[Layer], checkpointing: bool
) -> dict[nn.Module, tuple[Tensor, ...]]:
    """What a form averages, summed over this rank's samples: {linear: tensors [slices, E] or [slices, 1]}."""
    keep = TAYLOR_FORMS[form].keep
    sums = {
        of.linear: keep(of.arrange_by_slice(*map(_make_zeros_like, of.parameters)))
        for layer in span
        for of in collect_layer_slices(layer)
    }

    def visit(sample: int, of: LinearSlices, p: Tensor) -> None:
        for total, part in zip(sums[of.linear], keep(p), strict=True):
            total += part

    indices = [layer.index for layer in span]
    visit_sample_gradients(decoder, batches, visit, layers=indices, checkpointing=checkpointing)
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
    return LayerScores(heads, sums.get("channel"))


def _check_finite(layer: Layer, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NonFinite(
            f"layer {layer.index}: weight gradients hold NaN or infinity on the calibration text; expected finite "
            "numbers: load the model in bfloat16 or float32"
        )

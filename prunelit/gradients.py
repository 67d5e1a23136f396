"""Gradients of one sequence at a time, reduced to numbers per unit as soon as they exist.

A backward pass hands over the weight gradient of one linear after the other; each is multiplied with its weight,
reduced, and freed before the next one comes. Memory is the model, the activations of one sequence, one weight gradient.

Every first- and second-order Taylor importance follows from the products p = weight * gradient alone, because the
diagonal Fisher approximation of the second-order term, weight^2 * gradient^2, is p^2.

Legend: N samples (sequences), S tokens, Q query heads, G KV groups, D head size, F FFN channels. A *slice* is what of
one linear goes with a unit: a row with its bias entry (q, k, v, gate, up), or a column (o, down); E elements a slice.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunelit.calibrate import Batch, all_sum, evaluating, own_share
from prunelit.decoder import Decoder, Layer, is_conv1d
from prunelit.errors import NoCalibration, NonFinite
from prunelit.progress import track
from prunelit.rank import LayerScores, Unit

Kind = Literal["query", "kv", "channel"]
Form = Literal["vector", "first", "second", "mixed"]

_FLOAT16_SCALE = 1024.0  # of the loss: weight gradients of a mean loss lie below float16's least number


class _Form(NamedTuple):
    keep: Callable[[Tensor], tuple[Tensor, ...]]  # what is averaged over samples, from p [slices, E]
    importance: Callable[..., Tensor]  # of the averages, before the sum over a slice


FORMS: Mapping[Form, _Form] = {
    "vector": _Form(lambda p: (p.sum(1, keepdim=True),), lambda mean: mean.abs()),
    "first": _Form(lambda p: (p,), lambda mean: mean.abs()),
    "second": _Form(lambda p: (p.square().sum(1, keepdim=True),), lambda square: square),
    "mixed": _Form(lambda p: (p, p.square()), lambda mean, square: (mean - square / 2).abs()),
}
"""Importance of a slice with elements e, weight w, gradient G, Fisher F = mean over samples of G^2:
vector |sum_e w G|; first sum_e |w G|; second sum_e w^2 F; mixed sum_e |w G - w^2 F / 2|."""


@dataclass(frozen=True, eq=False)
class Slices:
    """The slices of one linear, and the units that own them.

    Attributes:
        layer: index of the decoder layer.
        linear: the linear.
        columns: the slices are its inputs (o, down) instead of its outputs.
        owners: indices of the slices of every unit: {"query": [Q, n], "kv": [G, n]} or {"channel": [F, n]}.
    """

    layer: int
    linear: nn.Module
    columns: bool
    owners: Mapping[Kind, Tensor]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight, and bias where its entries go with the slices."""
        bias = cast("nn.Parameter | None", self.linear.bias)
        own = [cast(nn.Parameter, self.linear.weight)]
        return own if bias is None or self.columns else [*own, bias]

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Elements by slice, [slices, E], of tensors that are shaped like the linear's own."""
        out_in = weight.T if is_conv1d(self.linear) else weight
        if self.columns:
            return out_in.T
        return out_in if bias is None else torch.cat([out_in, bias[:, None]], dim=1)

    def per_unit(self, values: Tensor) -> dict[Kind, Tensor]:
        """Sums in float64 over the slices of each unit, from values per slice [slices]."""
        return {kind: values.double()[owned].sum(1) for kind, owned in self.owners.items()}


def slices(layer: Layer) -> list[Slices]:
    """The slices of every linear of a layer that shrinks with its units; none of heads that can not be cut."""
    found: list[Slices] = []
    shape, names = layer.shape, layer.architecture
    if layer.has_attention and shape.heads_prunable:
        heads, groups, size = shape.query_heads, shape.kv_groups, shape.group_size
        query, group = torch.arange(heads), torch.arange(groups)
        if not names.fused_qkv:
            blocks: list[dict[Kind, Tensor]] = [{"query": query}, {"kv": group}, {"kv": group}]
        elif names.qkv_layout == "concat":  # all query heads, all key heads, all value heads
            blocks = [{"query": query, "kv": torch.stack([heads + group, heads + groups + group], 1)}]
        else:  # per group: its query heads, its key head, its value head
            first = group * (size + 2) + size
            blocks = [{"query": query + 2 * (query // size), "kv": torch.stack([first, first + 1], 1)}]
        for linear, of in zip(layer.qkv, blocks, strict=True):
            found.append(_slices(layer, linear, {kind: _rows(block, shape.head_dim) for kind, block in of.items()}))
        found.append(_slices(layer, layer.output, {"query": _rows(query, shape.head_dim)}, columns=True))
    if layer.has_mlp:
        channel = torch.arange(shape.ffn_channels)[:, None]
        fused = torch.cat([channel, channel + shape.ffn_channels], 1)
        for linear in layer.ffn_in:
            found.append(_slices(layer, linear, {"channel": fused if names.fused_gate_up else channel}))
        found.append(_slices(layer, layer.down, {"channel": channel}, columns=True))
    return found


def _slices(layer: Layer, linear: nn.Module, owners: dict[Kind, Tensor], columns: bool = False) -> Slices:
    device = cast(Tensor, linear.weight).device
    return Slices(layer.index, linear, columns, {kind: owned.to(device) for kind, owned in owners.items()})


def _rows(blocks: Tensor, head_dim: int) -> Tensor:
    """Rows of the head-sized blocks of each unit: [units] or [units, blocks] -> [units, rows]."""
    return (blocks.view(len(blocks), -1, 1) * head_dim + torch.arange(head_dim)).flatten(1)


# Importances ---------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)
def per_sample(
    decoder: Decoder,
    batches: Sequence[Batch],
    forms: Sequence[Form],
    unit: Unit = "kv_group",
    checkpointing: bool = False,
) -> dict[Literal["heads", "channels"], dict[int, Tensor]]:
    """Taylor importances of every sample by itself, F being that sample's squared gradient.

    In a distributed run sample n is computed on rank n % world size; all ranks get all samples, in order.

    Args:
        decoder: the model; left as it was.
        batches: the same list on every rank; one sequence is one sample.
        forms: keys of `FORMS`; all from the same backward passes.
        unit: what "heads" are. KV groups are the sums of all that goes with them; of query heads that are cut without
            their group, key and value rows do not count.
        checkpointing: keep the layers' inputs only and run each layer again in the backward pass.

    Returns:
        For the layers that have units of the kind, {layer: float64 [forms, N, G or Q]} and {layer: [forms, N, F]}.

    Raises:
        NonFinite: a loss or an importance is NaN or infinite.
        NoCalibration: no sequence of two tokens.
    """
    count = len(samples(batches))
    found: list[dict[Kind, Tensor]] = []
    for layer in decoder:
        units = {kind: owned for of in slices(layer) for kind, owned in of.owners.items()}
        found.append({kind: _zeros(len(forms), count, len(owned), like=owned) for kind, owned in units.items()})

    def visit(sample: int, of: Slices, p: Tensor) -> None:
        for number, name in enumerate(forms):
            value = FORMS[name].importance(*FORMS[name].keep(p)).sum(1)
            for kind, part in of.per_unit(value).items():
                found[of.layer][kind][number, sample] += part

    each_sample(decoder, batches, visit, checkpointing=checkpointing)
    heads, channels = {}, {}
    for layer, sums in zip(decoder, found, strict=True):
        for values in sums.values():
            _check(layer, all_sum(values))
        if "query" in sums:
            size = layer.shape.group_size
            by_group = sums["query"].unflatten(-1, (-1, size)).sum(-1)
            heads[layer.index] = sums["query"] if unit == "query_head" else by_group + sums["kv"]
        if "channel" in sums:
            channels[layer.index] = sums["channel"]
    return {"heads": heads, "channels": channels}


@torch.inference_mode(False)
def of_mean(
    decoder: Decoder,
    batches: Sequence[Batch],
    form: Form,
    unit: Unit = "kv_group",
    checkpointing: bool = False,
    layers_at_once: int | None = None,
) -> list[LayerScores]:
    """Taylor importances of the mean loss over samples, F being the mean of the samples' squared gradients.

    "vector" and "second" keep numbers per slice. "first" and "mixed" need the mean gradient of each weight itself: one
    float64 number per weight of the layers in hand ("mixed": two), 4 (8) times a bfloat16 model.

    Args:
        decoder, batches, checkpointing: see `per_sample`.
        form: a key of `FORMS`.
        unit: with "kv_group", a group's key and value rows count, an equal part for each of its query heads; with
            "query_head" they stay, so they do not.
        layers_at_once: layers whose means are held at the same time; fewer need more passes. None: all.

    Returns:
        One `LayerScores` per layer, float64.

    Raises:
        NonFinite, NoCalibration: see `per_sample`.
    """
    count, width = len(samples(batches)), layers_at_once or len(decoder.layers)
    scores = []
    for start in range(0, len(decoder.layers), width):
        span = decoder.layers[start : start + width]
        sums = _sums(decoder, batches, form, span, checkpointing)
        for layer in span:
            kinds: dict[Kind, Tensor] = {}
            for of in slices(layer):
                means = [all_sum(total) / count for total in sums.pop(of.linear)]
                for kind, part in of.per_unit(FORMS[form].importance(*means).sum(1)).items():
                    kinds[kind] = kinds[kind] + part if kind in kinds else part
            for values in kinds.values():
                _check(layer, values)
            scores.append(_scores(layer, kinds, unit))
    return scores


def _sums(
    decoder: Decoder, batches: Sequence[Batch], form: Form, span: Sequence[Layer], checkpointing: bool
) -> dict[nn.Module, tuple[Tensor, ...]]:
    """What a form averages, summed over this rank's samples: {linear: tensors [slices, E] or [slices, 1]}."""
    keep = FORMS[form].keep
    sums = {of.linear: keep(of.matrix(*map(_zeros_like, of.parameters))) for layer in span for of in slices(layer)}

    def visit(sample: int, of: Slices, p: Tensor) -> None:
        for total, part in zip(sums[of.linear], keep(p), strict=True):
            total += part

    indices = [layer.index for layer in span]
    each_sample(decoder, batches, visit, layers=indices, checkpointing=checkpointing)
    return sums


def _zeros(*size: int, like: Tensor) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=like.device)


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.float64)


def _scores(layer: Layer, sums: Mapping[Kind, Tensor], unit: Unit) -> LayerScores:
    heads = sums.get("query")
    if heads is not None and unit == "kv_group":
        size = layer.shape.group_size
        heads = heads + sums["kv"].repeat_interleave(size, dim=-1) / size
    return LayerScores(heads, sums.get("channel"))


def _check(layer: Layer, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NonFinite(
            f"layer {layer.index}: weight gradients hold NaN or infinity on the calibration text; expected finite "
            "numbers: load the model in bfloat16 or float32"
        )


# Backward passes -----------------------------------------------------------------------------------------------------


def samples(batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor | None]]:
    """Sequences one by one, (ids [S], mask [S] or None), without padding at their ends and without those too short.

    Raises:
        NoCalibration: no sequence has two tokens.
    """
    found: list[tuple[Tensor, Tensor | None]] = []
    for batch in batches:
        mask = batch.get("attention_mask")
        for row, ids in enumerate(batch["input_ids"]):
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row].bool()
            places = real.nonzero().flatten()
            if len(places) < 2:
                continue
            span = slice(int(places[0]), int(places[-1]) + 1)
            whole = bool(real[span].all())
            if whole or bool((real[span][1:] & real[span][:-1]).any()):
                found.append((ids[span], None if whole else real[span]))
    if not found:
        raise NoCalibration("calibration: expected a sequence of at least two tokens, got none")
    return found


def each_sample(
    decoder: Decoder,
    batches: Sequence[Batch],
    visit: Callable[[int, Slices, Tensor], None],
    layers: Collection[int] | None = None,
    checkpointing: bool = False,
    what: str = "gradients",
) -> None:
    """One backward pass per sample of this rank; `visit` sees p of one linear at a time.

    The loss of a sample is its mean next-token cross-entropy; padding counts neither as context nor as target.

    Args:
        decoder: the model; modes, hooks, `requires_grad` and gradients are as before when this returns.
        batches: the same list on every rank; this rank takes every world-size-th sample.
        visit: called with the sample's number, the slices of a linear, and their p = weight * gradient [slices, E] in
            float32 or better, which is freed afterwards.
        layers: the layers wanted; None: all. No gradient is computed below the first of them.
        checkpointing: keep the layers' inputs only and run each layer again in the backward pass.
        what: name on the progress bar.

    Raises:
        NonFinite: a loss is NaN or infinite.
        NoCalibration: no sequence of two tokens.
    """
    wanted = [of for layer in decoder if layers is None or layer.index in layers for of in slices(layer)]
    mine = own_share(list(enumerate(samples(batches))))
    if not wanted:
        return
    half = cast(Tensor, wanted[0].linear.weight).dtype == torch.float16
    scale = _FLOAT16_SCALE if half else 1.0
    now = 0  # the sample whose gradients come in

    def ready(of: Slices, parameter: Tensor) -> None:
        parameters = of.parameters
        if any(p.grad is None for p in parameters):
            return  # the other of weight and bias is still to come
        visit(now, of, of.matrix(*(_product(p, scale) for p in parameters)))
        for p in parameters:
            p.grad = None

    # A caller's inference mode or no_grad would leave no graph.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(decoder.model),
        _only(decoder.model, wanted, ready),
        _checkpointed(decoder.layers if checkpointing else ()),
    ):
        for now, (ids, mask) in track(mine, what):
            loss = sample_loss(decoder, ids, mask)
            if not torch.isfinite(loss):
                raise NonFinite(
                    f"sample {now}: expected a finite loss on the calibration text, got {loss.item()}; check the model "
                    "file, or load it in bfloat16 or float32"
                )
            (loss * scale).backward()  # type: ignore[no-untyped-call]


def sample_loss(decoder: Decoder, ids: Tensor, mask: Tensor | None, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy of one sequence, mean or sum over its targets, float32 or better."""
    ids = ids.clone().to(decoder.device)  # a tensor made in inference mode can not be saved for the backward pass
    extra = {} if mask is None else {"attention_mask": mask.clone().long().to(ids.device)[None]}
    logits = decoder.model(input_ids=ids[None], use_cache=False, **extra).logits[0, :-1]
    targets = ids[1:]
    if mask is not None:
        counted = (mask[1:] & mask[:-1]).to(ids.device)
        logits, targets = logits[counted], targets[counted]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, targets, reduction=reduction)


@torch.no_grad()
def _product(parameter: nn.Parameter, scale: float) -> Tensor:
    gradient = cast(Tensor, parameter.grad)
    product = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).mul_(parameter)
    return product.div_(scale) if scale != 1 else product


@contextmanager
def _only(model: nn.Module, wanted: Sequence[Slices], ready: Callable[[Slices, Tensor], None]) -> Iterator[None]:
    """Gradients of the wanted slices only, handed to `ready` one parameter at a time; everything as before after."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles: list[Any] = []
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for of in wanted:
            for parameter in of.parameters:
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(partial(ready, of)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wants, gradient in before:
            parameter.requires_grad_(wants)
            parameter.grad = gradient


@contextmanager
def _checkpointed(layers: Sequence[Layer]) -> Iterator[None]:
    """Forget the activations inside the layers; transformers' own switch works in training mode only."""
    before = [(layer.module, layer.module.__dict__.get("forward")) for layer in layers]
    try:
        for module, _ in before:
            # No dropout in eval mode, so no random state to keep.
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for module, forward in before:
            if forward is not None:
                module.forward = forward
            else:
                module.__dict__.pop("forward", None)

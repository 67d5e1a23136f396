"""Gradients of one sequence at a time, handed over as soon as they exist.

A backward pass gives the weight gradient of one linear after the other; each is multiplied with its weight, handed to
whoever reduces it to numbers per unit, and freed before the next one comes. Memory is the model, the activations of one
sequence, one weight gradient.

Legend: S tokens; slices, and E elements a slice, as in `prunelit.model.unit_indices`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunelit.calibration.batches import Batch
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.modes import use_eval_mode
from prunelit.model.unit_indices import LinearSlices, collect_layer_slices
from prunelit.runtime.distributed import take_rank_share
from prunelit.runtime.errors import NoCalibration, NonFinite
from prunelit.runtime.progress import track_progress

_FLOAT16_LOSS_SCALE = 1024.0  # of the loss: weight gradients of a mean loss lie below float16's least number


def split_into_samples(batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor | None]]:
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


def visit_sample_gradients(
    decoder: Decoder,
    batches: Sequence[Batch],
    visit: Callable[[int, LinearSlices, Tensor], None],
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
    wanted = [of for layer in decoder if layers is None or layer.index in layers for of in collect_layer_slices(layer)]
    mine = take_rank_share(list(enumerate(split_into_samples(batches))))
    if not wanted:
        return
    half = cast(Tensor, wanted[0].linear.weight).dtype == torch.float16
    scale = _FLOAT16_LOSS_SCALE if half else 1.0
    now = 0  # the sample whose gradients come in

    def ready(of: LinearSlices, parameter: Tensor) -> None:
        parameters = of.parameters
        if any(p.grad is None for p in parameters):
            return  # the other of weight and bias is still to come
        visit(now, of, of.arrange_by_slice(*(_multiply_by_gradient(p, scale) for p in parameters)))
        for p in parameters:
            p.grad = None

    # A caller's inference mode or no_grad would leave no graph.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        use_eval_mode(decoder.model),
        _collect_gradients(decoder.model, wanted, ready),
        _checkpoint_layers(decoder.layers if checkpointing else ()),
    ):
        for now, (ids, mask) in track_progress(mine, what):
            loss = compute_sample_loss(decoder, ids, mask)
            if not torch.isfinite(loss):
                raise NonFinite(
                    f"sample {now}: expected a finite loss on the calibration text, got {loss.item()}; check the model "
                    "file, or load it in bfloat16 or float32"
                )
            (loss * scale).backward()  # type: ignore[no-untyped-call]


def compute_sample_loss(decoder: Decoder, ids: Tensor, mask: Tensor | None, reduction: str = "mean") -> Tensor:
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
def _multiply_by_gradient(parameter: nn.Parameter, scale: float) -> Tensor:
    gradient = cast(Tensor, parameter.grad)
    product = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).mul_(parameter)
    return product.div_(scale) if scale != 1 else product


@contextmanager
def _collect_gradients(
    model: nn.Module, wanted: Sequence[LinearSlices], ready: Callable[[LinearSlices, Tensor], None]
) -> Iterator[None]:
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
def _checkpoint_layers(layers: Sequence[Layer]) -> Iterator[None]:
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

"""Gradients of one sequence at a time, processed linear by linear during the backward pass.

A backward pass computes the weight gradients of one linear after the other. Each gradient is multiplied with its
weight, passed to a function that reduces the product to numbers per unit, and freed before the next gradient is
computed. The peak memory is the model, the activations of one sequence and one weight gradient.

Legend: S tokens of a sequence; slices, and E elements of a slice, as in `prunelit.model.unit_indices`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from prunelit.calibration.batches import PER_TOKEN_INPUTS, Batch, select_rows, select_tower_inputs
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.modes import use_eval_mode
from prunelit.model.text_model import list_picture_tokens
from prunelit.model.unit_indices import ExpertSlices, LinearSlices, collect_expert_slices, collect_layer_slices
from prunelit.runtime.distributed import take_rank_share
from prunelit.runtime.errors import NoCalibration, NonFinite
from prunelit.runtime.progress import track_progress

Slices = LinearSlices | ExpertSlices
"""Slices of a linear, or of a tensor of a mixture."""
# Weight gradients of a mean loss lie below the smallest float16 number, so a float16 loss is scaled up.
_FLOAT16_LOSS_SCALE = 1024.0


class Sample(NamedTuple):
    """One sequence of the calibration set.

    Attributes:
        ids: [S] token ids.
        mask: [S], False at padding; None: no padding.
        tower_inputs: what the tower of a multimodal model reads beside them.

    Example: see `split_into_samples`.
    """

    ids: Tensor
    mask: Tensor | None
    tower_inputs: Mapping[str, Tensor] = {}

    def count_tokens(self) -> int:
        """Count the tokens that are not padding."""
        return len(self.ids) if self.mask is None else int(self.mask.sum())


def split_into_samples(batches: Sequence[Batch]) -> list[Sample]:
    """Split batches into single sequences, trimmed of the padding at their ends.

    Sequences without a token to predict are left out.

    Args:
        batches: calibration batches.

    Returns:
        Every sequence; its mask is None where no padding is left.

    Raises:
        NoCalibration: no sequence has two adjacent tokens.
        BadOption: a batch holds several sequences with pictures.

    Example:
        >>> ids, mask = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 1, 1, 1]])
        >>> split_into_samples([{"input_ids": ids, "attention_mask": mask}])
        [Sample(ids=tensor([5, 6, 7]), mask=None, tower_inputs={})]
    """
    samples: list[Sample] = []
    for batch in batches:
        mask, tower_inputs = batch.get("attention_mask"), select_tower_inputs(select_rows(batch, [0]))
        for row, ids in enumerate(batch["input_ids"]):
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row].bool()
            positions = real.nonzero().flatten()
            if len(positions) < 2:
                continue
            span = slice(int(positions[0]), int(positions[-1]) + 1)
            unpadded = bool(real[span].all())
            if unpadded or bool((real[span][1:] & real[span][:-1]).any()):
                own_inputs = {n: x[:, span] if n in PER_TOKEN_INPUTS else x for n, x in tower_inputs.items()}
                samples.append(Sample(ids[span], None if unpadded else real[span], own_inputs))
    if not samples:
        raise NoCalibration("calibration: expected a sequence of at least two tokens, got none")
    return samples


def collect_slices(layer: Layer, experts: bool) -> list[Slices]:
    """Collect the slices of a layer's linears, and with `experts` those of its mixture.

    Example: see `prunelit.calibration.taylor`, which uses it.
    """
    return [*collect_layer_slices(layer), *(collect_expert_slices(layer) if experts else [])]


def visit_sample_gradients(
    decoder: Decoder,
    batches: Sequence[Batch],
    visit: Callable[[int, Slices, Tensor], None],
    layers: Collection[int] | None = None,
    checkpointing: bool = False,
    what: str = "gradients",
    experts: bool = False,
) -> None:
    """Run one backward pass per sample of this rank and visit weight * gradient of one linear at a time.

    The loss of a sample is its mean next-token cross-entropy; padding counts neither as context nor as target.

    Args:
        decoder: the model; its modes, hooks, `requires_grad` and gradients are restored before this returns.
        batches: calibration batches, the same list on every rank; each rank takes every world-size-th sequence.
        visit: called with the sample's number, the slices of a linear, and p = weight * gradient [slices, E] in float32
            or better; the tensor is freed afterwards.
        layers: indices of the layers to visit; None: all. No gradient is computed below the first of them.
        checkpointing: keep only the inputs of the layers and run each layer again in the backward pass.
        what: label of the progress bar.
        experts: visit the tensors of mixtures as well.

    Raises:
        NonFinite: a loss is NaN or infinite.
        NoCalibration: no sequence has two adjacent tokens.

    Example: see `prunelit.calibration.taylor.score_mean_loss`.
    """
    visited = [layer for layer in decoder if layers is None or layer.index in layers]
    linear_slices: list[Slices] = [slices for layer in visited for slices in collect_slices(layer, experts)]
    own_samples = take_rank_share(list(enumerate(split_into_samples(batches))))
    if not linear_slices:
        return
    is_float16 = linear_slices[0].weight.dtype == torch.float16
    scale = _FLOAT16_LOSS_SCALE if is_float16 else 1.0
    sample = 0  # number of the sample in the backward pass

    def visit_linear(slices: Slices, parameter: Tensor) -> None:
        parameters = slices.parameters
        if any(p.grad is None for p in parameters):
            return  # the gradient of the weight or of the bias is not computed yet
        visit(sample, slices, slices.arrange_by_slice(*(_multiply_by_gradient(p, scale) for p in parameters)))
        for p in parameters:
            p.grad = None

    # Under a caller's inference mode or no_grad autograd would record nothing.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        use_eval_mode(decoder.model),
        _collect_gradients(decoder.model, linear_slices, visit_linear),
        _checkpoint_layers(decoder.layers if checkpointing else ()),
    ):
        for sample, sequence in track_progress(own_samples, what):
            loss = compute_sample_loss(decoder, sequence)
            if not torch.isfinite(loss):
                raise NonFinite(
                    f"sample {sample}: expected a finite loss on the calibration text, got {loss.item()}; check the "
                    "model file, or load it in bfloat16 or float32"
                )
            (loss * scale).backward()  # type: ignore[no-untyped-call]


def compute_sample_loss(decoder: Decoder, sample: Sample, reduction: str = "mean") -> Tensor:
    """Compute the next-token cross-entropy of one sequence; places of pictures are not predicted.

    Args:
        decoder: the model.
        sample: the sequence.
        reduction: "mean" or "sum" over the targets.

    Returns:
        The loss in nats, a scalar in float32 or better.

    Example: see `prunelit.callbacks.best.fisher`, which uses it.
    """
    # A clone: autograd cannot save a tensor for the backward pass that was made in inference mode.
    ids, mask = sample.ids.clone().to(decoder.device), sample.mask
    extra = {name: values.clone().to(ids.device) for name, values in sample.tower_inputs.items()}
    if mask is not None:
        extra["attention_mask"] = mask.clone().long().to(ids.device)[None]
    logits = decoder.model(input_ids=ids[None], use_cache=False, **extra).logits[0, :-1]
    targets = ids[1:]
    is_target = torch.ones_like(targets, dtype=torch.bool) if mask is None else (mask[1:] & mask[:-1]).to(ids.device)
    if sample.tower_inputs:
        is_target &= ~torch.isin(targets, torch.tensor(list_picture_tokens(decoder.model.config), device=ids.device))
    if not is_target.all():
        logits, targets = logits[is_target], targets[is_target]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, targets, reduction=reduction)


@torch.no_grad()
def _multiply_by_gradient(parameter: nn.Parameter, scale: float) -> Tensor:
    gradient = cast(Tensor, parameter.grad)
    product = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).mul_(parameter)
    return product.div_(scale) if scale != 1 else product


@contextmanager
def _collect_gradients(
    model: nn.Module, linear_slices: Sequence[Slices], visit_linear: Callable[[Slices, Tensor], None]
) -> Iterator[None]:
    """Compute gradients of these linears only, and call `visit_linear` when one of their parameters has its gradient.

    Gradients and `requires_grad` of all parameters are restored when the context closes.
    """
    states = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles: list[RemovableHandle] = []
    try:
        for parameter, _, _ in states:
            parameter.requires_grad_(False)
            parameter.grad = None
        for slices in linear_slices:
            for parameter in slices.parameters:
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(partial(visit_linear, slices)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad, gradient in states:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def _checkpoint_layers(layers: Sequence[Layer]) -> Iterator[None]:
    """Recompute the activations inside the layers in the backward pass instead of keeping them."""
    # transformers' own gradient checkpointing works in training mode only.
    own_forwards = [(layer.module, layer.module.__dict__.get("forward")) for layer in layers]
    try:
        for module, _ in own_forwards:
            # There is no dropout in eval mode, so the random state need not be kept.
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for module, own_forward in own_forwards:
            if own_forward is not None:
                module.forward = own_forward
            else:
                module.__dict__.pop("forward", None)

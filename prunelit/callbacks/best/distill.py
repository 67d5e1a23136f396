"""Distillation of a pruned model from the dense model's next-token distributions on calibration text, without labels.

The dense model is no longer in memory by then. The residual stream that left its last layer was recorded, and the final
norm and the output projection, which no method cuts, turn it into the dense logits again, one sequence at a time.

Source: Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531, at temperature 1. Ours: only
those changes are applied that exceed noise, see `prunelit.callbacks.best.denoise`.

Legend: B batch, S sequence, H hidden, V vocabulary, L layers.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import Batch, select_rows
from prunelit.calibration.partial_forward import PartialForward
from prunelit.callbacks.best.denoise import estimate_signal
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.runtime.distributed import sum_over_ranks
from prunelit.runtime.progress import track_progress

_WARMUP_SHARE = 0.05  # share of the steps with a rising learning rate
_MAX_GRADIENT_NORM = 1.0  # gradients of a larger norm are clipped


@torch.no_grad()
def record_dense_streams(decoder: Decoder, batches: Sequence[Batch]) -> list[Tensor]:
    """Record the residual stream that leaves the last layer of the dense model.

    Args:
        decoder: the dense model.
        batches: this rank's own batches.

    Returns:
        [B, S, H] of every batch, on the CPU.

    Example: see `tests/callbacks/best/test_distill.py`.
    """
    partial_forward, layer_count = PartialForward(decoder), len(decoder.layers)
    with use_eval_mode(decoder.model):
        return [
            partial_forward.run_layers(batch, None, 0, layer_count).cpu()
            for batch in track_progress(list(batches), "dense targets")
        ]


@torch.inference_mode(False)
def distill_layers(
    decoder: Decoder,
    batches: Sequence[Batch],
    targets: Sequence[Tensor],
    epochs: int = 1,
    learning_rate: float = 1e-4,
    denoise: bool = False,
    rows_per_step: int = 2,
    seed: int = 0,
) -> list[float]:
    """Train the decoder layers of a pruned model in place, to minimise KL(dense || pruned).

    AdamW without weight decay trains all weights of the layers, in float32 copies where their dtype is narrower. The
    learning rate warms up linearly and then falls to zero along a cosine. In a distributed run each rank passes its own
    batches, and gradients are averaged over tokens.

    Args:
        decoder: the pruned model; its embeddings, final norm, output projection and modes stay as they are.
        batches: this rank's own batches.
        targets: `record_dense_streams` of the same batches.
        epochs: passes over the batches; 0: no training.
        learning_rate: peak learning rate.
        denoise: apply only the part of every matrix's change that exceeds noise; takes one more copy of the weights.
        rows_per_step: sequences per rank and step.
        seed: seed of the order of the sequences.

    Returns:
        Mean divergence per token of every epoch, in nats.

    Example: see `prunelit.callbacks.best.callback.Best`.
    """
    if not epochs:
        return []
    rows = [
        (select_rows(batch, [i]), target[i : i + 1])
        for batch, target in zip(batches, targets, strict=True)
        for i in range(len(batch["input_ids"]))
    ]
    steps = math.ceil(_find_most_rows(len(rows), decoder.device) / rows_per_step)
    layers = [layer.module for layer in decoder]
    partial_forward, divergences = PartialForward(decoder), []
    requires_grad = [(parameter, parameter.requires_grad) for parameter in decoder.model.parameters()]
    for parameter, _ in requires_grad:
        parameter.requires_grad_(False)
    trained = [parameter for layer in layers for parameter in layer.parameters()]
    start_weights = [parameter.detach().clone() for parameter in trained] if denoise else []
    # Steps of 1e-4 would vanish in the rounding of bfloat16 weights.
    masters = [p.detach().float().clone().requires_grad_() for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule_rate(step, steps * epochs))
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in trained:
            parameter.requires_grad_(True)
        with torch.enable_grad(), use_eval_mode(decoder.model):
            for epoch in range(epochs):
                order = torch.randperm(len(rows), generator=generator).tolist()
                sums = torch.zeros(2, dtype=torch.float64, device=decoder.device)
                for step in track_progress(range(steps), f"distilling, pass {epoch + 1} of {epochs}"):
                    step_rows = [rows[i] for i in order[step * rows_per_step : (step + 1) * rows_per_step]]
                    sums += _take_step(partial_forward, step_rows, trained, masters, optimizer)
                    schedule.step()
                total, tokens = sums.tolist()
                divergences.append(total / tokens)
        if start_weights:
            _denoise_changes(trained, masters, start_weights)
    finally:
        for parameter, value in requires_grad:
            parameter.requires_grad_(value)
            parameter.grad = None
    return divergences


def _take_step(
    partial_forward: PartialForward,
    rows: Sequence[tuple[Batch, Tensor]],
    trained: Sequence[nn.Parameter],
    masters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """Take one optimiser step.

    Returns:
        [2]: the sum of divergences and the number of tokens, over all ranks.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=partial_forward.decoder.device)
    for batch, target in rows:
        hidden = partial_forward.run_layers(batch, None, 0, len(partial_forward.decoder.layers))
        divergence, gradient, tokens = _compute_divergence(partial_forward, batch, hidden, target)
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        sums += torch.tensor([divergence, tokens], dtype=torch.float64, device=sums.device)
    sum_over_ranks(sums)
    with torch.no_grad():
        for parameter, master in zip(trained, masters, strict=True):
            gradient = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            master.grad = sum_over_ranks(gradient) / sums[1].float().clamp(min=1)
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters, _MAX_GRADIENT_NORM)
        optimizer.step()
        for parameter, master in zip(trained, masters, strict=True):
            parameter.copy_(master)
    return sums


@torch.no_grad()
def _denoise_changes(
    trained: Sequence[nn.Parameter], masters: Sequence[Tensor], start_weights: Sequence[Tensor]
) -> None:
    """Remove noise from the changes of the matrices; norms and biases are too small to tell noise from signal."""
    weights = list(zip(trained, masters, start_weights, strict=True))
    for parameter, master, start in track_progress(weights, "denoising", unit="weight"):
        start_float32 = start.float()
        if parameter.ndim == 2:
            parameter.copy_(start_float32 + estimate_signal(master - start_float32))
        elif parameter.ndim == 3:  # one matrix per expert
            changes = [estimate_signal(change) for change in master - start_float32]
            parameter.copy_(start_float32 + torch.stack(changes))


def _compute_divergence(
    partial_forward: PartialForward, batch: Batch, hidden: Tensor, target: Tensor
) -> tuple[float, Tensor, int]:
    """Compute the summed KL(dense || pruned) of one sequence.

    Returns:
        The divergence, its gradient with respect to `hidden` [1, S, H], and the number of tokens without padding.
    """
    layer_count = len(partial_forward.decoder.layers)
    # A leaf: the gradient stops here, so the graph of the output projection is freed before that of the layers is used.
    leaf = hidden.detach().requires_grad_()
    with torch.no_grad():
        dense = partial_forward.run_layers(batch, target.to(leaf), layer_count)[0].float().log_softmax(-1)
    cut = partial_forward.run_layers(batch, leaf, layer_count)[0].float().log_softmax(-1)
    mask = batch.get("attention_mask")
    if mask is not None:
        is_real = mask[0].bool().to(cut.device)
        cut, dense = cut[is_real], dense[is_real]
    loss = nn.functional.kl_div(cut, dense, reduction="sum", log_target=True)
    return loss.item(), torch.autograd.grad(loss, leaf)[0], len(cut)


def _schedule_rate(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    warmup_steps = max(1, int(_WARMUP_SHARE * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _find_most_rows(rows: int, device: torch.device) -> int:
    """Find the largest number of rows of any rank, since every rank has to take part in every step."""
    most_rows = torch.tensor(rows, device=device)
    if dist.is_initialized():
        dist.all_reduce(most_rows, dist.ReduceOp.MAX)
    return int(most_rows)

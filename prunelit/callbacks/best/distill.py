"""Training a cut model towards the dense model's next-token distributions, on calibration text; no labels are read.

The dense model is gone by then: what stays of it is the residual stream that left its last layer, which the final norm
and the output projection (no method cuts them) turn into its logits again, one sequence at a time.

Source: Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531, temperature 1. That of what the
training has changed only what is more than noise is kept, see `prunelit.callbacks.best.denoise`, is ours.

Legend: B batch, S sequence, H hidden, V vocabulary, L layers.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.partial_forward import PartialForward
from prunelit.callbacks.best.denoise import estimate_signal
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.runtime.distributed import sum_over_ranks
from prunelit.runtime.progress import track_progress

_WARMUP_SHARE = 0.05  # share of the steps
_MAX_GRADIENT_NORM = 1.0  # largest norm of a step's gradient


@torch.no_grad()
def record_dense_streams(decoder: Decoder, batches: Sequence[Batch]) -> list[Tensor]:
    """What leaves the last layer of the dense model, [B, S, H] for every batch, in host memory."""
    stream, last = PartialForward(decoder), len(decoder.layers)
    with use_eval_mode(decoder.model):
        return [
            stream.run_layers(batch, None, 0, last).cpu() for batch in track_progress(list(batches), "dense targets")
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
    """Train the decoder layers of a cut model by the divergence KL(dense || cut), in place.

    AdamW without weight decay on all weights of the layers, in float32 copies where they are of less; linear warm-up,
    then a cosine to zero. In a distributed run each rank passes its own batches and the gradients are averaged.

    Args:
        decoder: the cut model; embeddings, final norm and output projection stay as they are, and so do the modes.
        batches: this rank's own.
        targets: `record_dense_streams` of the same batches.
        epochs: passes over the batches; 0 does nothing.
        learning_rate: peak.
        denoise: of every matrix's change keep what stands out of noise; costs one more copy of the layers' weights.
        rows_per_step: sequences per rank and step.
        seed: of the order of the sequences.

    Returns:
        Mean divergence per token of every epoch, in nats.
    """
    if not epochs:
        return []
    rows = [
        ({name: x[i : i + 1] for name, x in batch.items()}, target[i : i + 1])
        for batch, target in zip(batches, targets, strict=True)
        for i in range(len(batch["input_ids"]))
    ]
    steps = math.ceil(_find_most_rows(len(rows), decoder.device) / rows_per_step)
    layers = [layer.module for layer in decoder]
    stream, curve = PartialForward(decoder), []
    wanted = [(parameter, parameter.requires_grad) for parameter in decoder.model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    trained = [parameter for layer in layers for parameter in layer.parameters()]
    came = [parameter.detach().clone() for parameter in trained] if denoise else []
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
                    taken = [rows[i] for i in order[step * rows_per_step : (step + 1) * rows_per_step]]
                    sums += _take_step(stream, taken, trained, masters, optimizer)
                    schedule.step()
                total, tokens = sums.tolist()
                curve.append(total / tokens)
        if came:
            _denoise_changes(trained, masters, came)
    finally:
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
            parameter.grad = None
    return curve


def _take_step(
    stream: PartialForward,
    rows: Sequence[tuple[Batch, Tensor]],
    trained: Sequence[nn.Parameter],
    masters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """One optimiser step; (sum of divergences, tokens) over all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=stream.decoder.device)
    for batch, target in rows:
        hidden = stream.run_layers(batch, None, 0, len(stream.decoder.layers))
        divergence, gradient, tokens = _compute_divergence(stream, batch, hidden, target)
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
def _denoise_changes(trained: Sequence[nn.Parameter], masters: Sequence[Tensor], came: Sequence[Tensor]) -> None:
    """Norms and biases stay as trained: of few numbers one can not tell what is noise."""
    for parameter, master, start in track_progress(
        list(zip(trained, masters, came, strict=True)), "denoising", unit="weight"
    ):
        if parameter.ndim == 2:
            before = start.float()
            parameter.copy_(before + estimate_signal(master - before))


def _compute_divergence(
    stream: PartialForward, batch: Batch, hidden: Tensor, target: Tensor
) -> tuple[float, Tensor, int]:
    """Summed KL(dense || cut) of one sequence, its gradient at `hidden` [1, S, H], and the tokens that count."""
    last = len(stream.decoder.layers)
    leaf = hidden.detach().requires_grad_()
    with torch.no_grad():
        dense = stream.run_layers(batch, target.to(leaf), last)[0].float().log_softmax(-1)
    cut = stream.run_layers(batch, leaf, last)[0].float().log_softmax(-1)
    mask = batch.get("attention_mask")
    if mask is not None:
        real = mask[0].bool().to(cut.device)
        cut, dense = cut[real], dense[real]
    loss = nn.functional.kl_div(cut, dense, reduction="sum", log_target=True)
    return loss.item(), torch.autograd.grad(loss, leaf)[0], len(cut)


def _schedule_rate(step: int, steps: int) -> float:
    """Of the peak learning rate."""
    warm = max(1, int(_WARMUP_SHARE * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _find_most_rows(rows: int, device: torch.device) -> int:
    """The largest number of rows of any rank: every rank takes part in every step."""
    most = torch.tensor(rows, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)

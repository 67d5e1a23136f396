"""How much the loss feels a change of each block's output: squared gradients by token and by hidden channel.

One backward pass to activations only: no weight gradient is computed. The expected squared first-order change of the
loss for an error e_t in a block's output is E (g_t . e_t)^2, the Fisher metric. It is kept in factored form,
token weight x channel weight (a rank-one stand-in for the [T, H] table of squared gradients), which is what a weighted
least-squares problem can use.

Source: ours; the factored metric is that of K-FAC (Martens & Grosse, ICML 2015, arXiv 1503.05671) with the output
factor cut down to its diagonal and the token factor kept.

Legend: T tokens of a batch that are not padding, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunelit.calibrate import Batch, all_sum, evaluating
from prunelit.decoder import Decoder
from prunelit.errors import NonFinite
from prunelit.progress import track


@dataclass
class Sensitivity:
    """Of one block's output (where it joins the residual stream).

    Attributes:
        tokens: [T] float32 for every batch of this rank: squared gradient norm of the token.
        channels: [H] float32: share of each hidden channel in the squared gradient, sums to 1; the same on all ranks.
    """

    tokens: list[Tensor] = field(default_factory=list)
    channels: Tensor = field(default_factory=lambda: torch.zeros(0))


@torch.inference_mode(False)
def measure(decoder: Decoder, batches: Sequence[Batch]) -> list[Sensitivity]:
    """Sensitivity to the residual stream leaving every layer, from the summed next-token loss, one sequence at a time.

    Args:
        decoder: the model; left as it was.
        batches: this rank's own.

    Returns:
        One `Sensitivity` per layer.

    Raises:
        NonFinite: a gradient holds NaN or infinity.
    """
    found = [Sensitivity() for _ in decoder]
    sums = torch.zeros(len(found), decoder.config.hidden_size, dtype=torch.float64, device=decoder.device)

    counted: list[Tensor] = []

    def see(index: int, gradient: Tensor) -> None:
        squares = gradient[0][counted[0]].float().square()
        found[index].tokens.append(squares.sum(1))
        sums[index] += squares.sum(0).double()

    def watch(index: int, module: nn.Module, args: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output).register_hook(partial(see, index))

    handles: list[Any] = [decoder.layers[0].module.register_forward_pre_hook(_graph_from_here, with_kwargs=True)]
    handles += [layer.module.register_forward_hook(partial(watch, layer.index)) for layer in decoder]
    wanted = [(parameter, parameter.requires_grad) for parameter in decoder.model.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with torch.enable_grad(), evaluating(decoder.model):
            for batch in track(list(batches), "sensitivity"):
                mask = batch.get("attention_mask")
                for row, ids in enumerate(batch["input_ids"]):
                    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row].bool()
                    counted[:] = [real.clone().to(decoder.device)]
                    _backward(decoder, ids, counted[0])
                for one in found:
                    rows = len(batch["input_ids"])
                    one.tokens[-rows:] = [torch.cat(one.tokens[-rows:])]
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
    totals = all_sum(sums)
    if not torch.isfinite(totals).all():
        index = int((~torch.isfinite(totals)).any(1).nonzero()[0])
        raise NonFinite(
            f"layer {index}: gradients hold NaN or infinity on the calibration text; expected finite numbers: load the "
            "model in bfloat16 or float32"
        )
    for one, total in zip(found, totals, strict=True):
        one.channels = (total / total.sum().clamp(min=1e-300)).float()
    return found


def _graph_from_here(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """No weight wants a gradient, so the stream entering the first layer must, or there would be no graph."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _backward(decoder: Decoder, ids: Tensor, real: Tensor) -> None:
    ids = ids.clone().to(decoder.device)[None]  # a tensor made in inference mode can not be saved for the backward pass
    targets = ids[0, 1:].masked_fill(~(real[1:] & real[:-1]), -100)
    extra = {} if bool(real.all()) else {"attention_mask": real.long()[None]}
    logits = decoder.model(input_ids=ids, use_cache=False, **extra).logits[0, :-1]
    loss = nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]

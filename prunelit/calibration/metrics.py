"""What a model costs and how well it predicts: parameters, MACs, KV bytes, perplexity."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunelit.core.architectures import get_decoder_config
from prunelit.core.plan import LayerPlan, ModelShape, PruningPlan
from prunelit.model import context_length
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.quantization import views
from prunelit.runtime.distributed import sum_over_ranks, take_rank_share
from prunelit.runtime.errors import NotEnoughText
from prunelit.runtime.progress import track_progress

_IGNORED_LABEL = -100  # the label that torch's cross entropy leaves out
_TOKENS_PER_LOGIT_CHUNK = 512  # float32 logits of a 150k vocabulary: 0.3 GB


def measure_model_size(model: nn.Module | Decoder) -> dict[str, int]:
    """Parameters (tied weights once), block parameters, MACs and KV-cache bytes per token of a live model.

    For mixtures of experts also the active parameters: those that a token passes.
    A weight in 4 bits is one parameter. MACs count the multiplications with weights, output projection included; the
    products of attention with its context, which grow with it, are not counted. KV bytes are in the model's own dtype.

    Example: see `tests/calibration/test_metrics.py`.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(views.view_as_plain_linears(model))
    return compute_dense_size(decoder.shape)


def compute_dense_size(shape: ModelShape) -> dict[str, int]:
    """`measure_model_size` of a model of this shape.

    Example: see `prunelit.export.write`, which uses it.
    """
    as_it_is = PruningPlan("none", shape, tuple(LayerPlan.dense(layer) for layer in shape.layers))
    names = ("parameters", "block_parameters", "active_parameters", "macs_per_token", "kv_bytes_per_token")
    return {name: int(as_it_is.predicted[name]) for name in names if name in as_it_is.predicted}


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, batch_size: int = 4, what: str = "perplexity", stride: int | None = None
) -> dict[str, float]:
    """exp(mean negative log-likelihood) over windows of token ids.

    Every window is read on its own, its first token is not predicted; losses are summed in float32 or better. In a
    distributed run the windows are shared out.

    Args:
        model: a causal LM.
        windows: [N, S] token ids without padding.
        batch_size: windows per forward pass.
        what: name on the progress bar.
        stride: tokens from one window of a text to the next, where they overlap: all but the first window predict
            only their last `stride` tokens, so that each token counts once. None: no overlap.

    Returns:
        {"perplexity", "nll" (mean, nats), "tokens" (predicted ones)}.

    Raises:
        NotEnoughText: no windows, or windows of one token.
        BadOption: the model has no places for so many tokens, see `prunelit.model.context_length`.

    Example: see `tests/calibration/test_metrics.py`.
    """
    if windows.dim() != 2 or not len(windows) or windows.shape[1] < 2:
        raise NotEnoughText(f"perplexity: expected windows [N, S] with N >= 1 and S >= 2, got {list(windows.shape)}")
    context_length.check_context_length(getattr(model, "config", None), windows.shape[1])
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    labels = windows.clone()
    if stride is not None:
        labels[1:, : max(1, windows.shape[1] - stride)] = _IGNORED_LABEL
    with use_eval_mode(model):
        for batch, counts in track_progress(_pad_own_share(torch.stack((windows, labels)).split(batch_size, 1)), what):
            ids, labels = batch.to(device)
            hidden_logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            if not counts:
                continue
            targets = labels[:, 1:].flatten()
            pieces = zip(
                hidden_logits.split(_TOKENS_PER_LOGIT_CHUNK), targets.split(_TOKENS_PER_LOGIT_CHUNK), strict=True
            )
            for logits, target in pieces:
                total[0] += nn.functional.cross_entropy(logits.float(), target, reduction="sum").double()
            total[1] += (targets != _IGNORED_LABEL).sum()
    nll, tokens = sum_over_ranks(total).tolist()
    mean = nll / tokens
    return {"perplexity": convert_nll_to_perplexity(mean), "nll": mean, "tokens": int(tokens)}


def _pad_own_share(batches: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    """This rank's batches, and whether they count: every rank gets as many, since a sharded model needs all ranks for
    every pass."""
    own = [(batch, True) for batch in take_rank_share(batches)]
    most = len(take_rank_share(batches, rank=0))
    return own + [(batches[0], False)] * (most - len(own))


def convert_nll_to_perplexity(nll: float) -> float:
    """exp, infinity where it overflows.

    Example: see `prunelit.callbacks.block_pruner.evaluator`, which uses it.
    """
    return math.exp(nll) if nll < 700 else math.inf


def make_fixed_tokens(model: Any, length: int = 32, room: int = 8) -> Tensor:
    """Token ids [2, <= length] on the model's device, the same whenever they are asked for.

    Args:
        model: a transformers model.
        length: tokens of each row, less where the model has fewer positions.
        room: positions that are left for tokens to generate.

    Example: see `tests/export/proof/test_compare.py`.
    """
    longest = context_length.get_context_limit(model.config) or length + room
    length = max(2, min(length, longest - room))
    ids = torch.arange(2 * length, device=next(model.parameters()).device).view(2, length)
    return (ids * 7 + 3) % int(get_decoder_config(model.config).vocab_size)


@torch.no_grad()
def compute_logits(model: Any, ids: Tensor) -> Tensor:
    """[N, S, V] of token ids [N, S], in evaluation mode, float32 on the CPU.

    Example: see `prunelit.export.deci.writer`, which uses it.
    """
    with use_eval_mode(model):
        logits: Tensor = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    return logits.float().cpu()


def measure_logit_difference(before: Tensor, after: Tensor, ids: Tensor | None = None) -> dict[str, float]:
    """How far two models' logits are apart on the same tokens.

    Args:
        before: [N, S, V].
        after: of the other model.
        ids: [N, S], to compare losses as well.

    Returns:
        {"tokens", "largest_logit", "largest_difference", "relative" (Frobenius)}, with ids also {"loss_before",
        "loss_after"} (mean, nats).

    Example: see `prunelit.export.proof.compare`, which uses it.
    """
    first, second = before.float().cpu(), after.float().cpu()
    difference = {
        "tokens": first.shape[0] * first.shape[1],
        "largest_logit": first.abs().max().item(),
        "largest_difference": (first - second).abs().max().item(),
        "relative": ((first - second).norm() / first.norm()).item(),
    }
    if ids is not None:
        for name, logits in (("loss_before", first), ("loss_after", second)):
            difference[name] = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().cpu()
            ).item()
    return difference


def describe_protocol(sources: Sequence[str], windows: Tensor, dtype: str, stride: int | None = None) -> dict[str, Any]:
    """What must stand beside a perplexity for it to be comparable.

    Example: see `tests/calibration/test_metrics.py`.
    """
    return {
        "text": list(sources),
        "windows": len(windows),
        "sequence_length": windows.shape[1],
        "stride": stride or windows.shape[1],
        "joined_by": "text: \\n\\n, sentence: space",
        "dtype": dtype,
        "mean": "over predicted tokens",
    }


def format_text_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A small aligned text table of {row: {column: number}}.

    Example: see `tests/calibration/test_metrics.py`.
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [["", *(name.replace("_", " ") for name in columns)]]
    for name, row in rows.items():
        cells.append([name, *(_format_cell(row.get(column)) for column in columns)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _format_cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"

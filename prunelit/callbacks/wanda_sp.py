"""Wanda-sp: weight magnitude times activation norm, averaged over the output columns of heads and FFN channels.

Source: the structured Wanda baseline of FLAP (Y. An et al., AAAI 2024, arXiv 2312.11983; its code was read), after
M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695. With W the output
projection of a block and x_j its input over the calibration tokens,

    s_j = mean_i |W_ij| * ||x_j||_2        a head is the sum of its channels

Ours: the norm is a root mean square, so the number of tokens does not show. FLAP's code scores each layer on text that
has passed the layers cut before it; that is `sequential: true`, about two passes. The default is one dense pass.

    callbacks/wanda_sp.yaml     attaches it to any LightningCLI job with a second --config

Legend: B batch, S sequence, T tokens, H hidden, C inputs of an output projection.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.observe import Sums, observe
from prunelit.calibration.partial_forward import PartialForward
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Layer, get_weight_out_in
from prunelit.model.modes import use_eval_mode
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.repair.bias import list_lost_inputs
from prunelit.runtime.distributed import sum_over_ranks, take_rank_share
from prunelit.runtime.errors import BadOption, NoCalibration


class WandaSp(PruningCallback):
    """Score heads and FFN channels by weight magnitude times activation norm.

    Args:
        ratio: share of the decoder layers' budget to remove.
        sequential: score every layer on text that has passed the layers before it as they are cut; for scope "layer",
            which alone knows what a layer loses before the layers above are scored.
        kwargs: see `PruningCallback`.
    """

    score_options = ()

    def __init__(self, ratio: float, sequential: bool = False, **kwargs: Any):
        super().__init__(ratio, **kwargs)
        if sequential and self.scope != "layer":
            raise BadOption(f"sequential: expected scope 'layer' with it, got {self.scope!r}")
        self.sequential = sequential

    def score(self, context: PruningContext) -> list[LayerScores]:
        decoder, batches = context.decoder, context.batches
        sums = Sums(len(decoder.layers))

        def accumulate(layer: Layer, x: Mapping[str, Tensor]) -> None:
            for point, rows in x.items():
                sums.add(layer, point, _sum_squares(rows))

        tokens = observe(decoder, batches, ("heads", "channels"), accumulate)
        return [_score_layer(layer, x) for layer, x in zip(decoder, sums.means(tokens, decoder.device), strict=True)]

    def plan(self, context: PruningContext) -> PruningPlan:
        return self._plan_sequentially(context) if self.sequential else super().plan(context)

    @torch.no_grad()
    def _plan_sequentially(self, context: PruningContext) -> PruningPlan:
        """Layer by layer: score it, choose what it keeps, and let the text pass it without the rest."""
        decoder, batches = context.decoder, context.batches
        select, shape, stream = self.make_selector(context), decoder.shape, PartialForward(decoder)
        mine = take_rank_share(batches)
        tokens = int(
            sum_over_ranks(
                torch.tensor(sum(int(_mask_real_tokens(batch).sum()) for batch in mine), device=decoder.device)
            )
        )
        if not tokens:
            raise NoCalibration("calibration: expected at least one batch with tokens, got none")
        streams: list[Tensor | None] = [None] * len(mine)
        # Under scope "layer" the numbers of units do not depend on scores, so those to come may be zeros.
        scores = [LayerScores(torch.zeros(s.query_heads), torch.zeros(s.ffn_channels)) for s in shape.layers]
        kept: list[LayerPlan] = []
        with use_eval_mode(decoder.model), ExitStack() as cuts:
            for layer in decoder:
                span = layer.index, layer.index + 1
                sums = Sums(len(decoder.layers))
                with ExitStack() as watching:
                    seen: dict[str, Tensor] = {}
                    for point, linear in _list_output_projections(layer):
                        watching.callback(linear.register_forward_pre_hook(partial(_store_input, seen, point)).remove)
                    for batch, hidden in zip(mine, streams, strict=True):
                        stream.run_layers(batch, hidden, *span)
                        real = _mask_real_tokens(batch).flatten().to(decoder.device)
                        for point, x in seen.items():
                            sums.add(layer, point, _sum_squares(x.reshape(-1, x.shape[-1])[real]))
                scores[layer.index] = _score_layer(layer, sums.means(tokens, decoder.device)[layer.index])
                kept.append(select(scores)[layer.index])
                for _, linear, gone in list_lost_inputs(layer, kept[-1]):
                    cuts.callback(
                        linear.register_forward_pre_hook(partial(_zero_inputs, gone.to(decoder.device))).remove
                    )
                streams = [stream.run_layers(batch, hidden, *span) for batch, hidden in zip(mine, streams, strict=True)]
        return self.build_plan(context, kept)


def _sum_squares(rows: Tensor) -> Tensor:
    """Sums of squares over tokens: [T, C] -> [C]."""
    return rows.float().square().sum(0, dtype=torch.float64)


def _score_layer(layer: Layer, squares: Mapping[str, Tensor]) -> LayerScores:
    """Scores of a layer from the mean squares of what its output projections read."""
    found = {
        point: get_weight_out_in(linear).detach().float().abs().mean(0) * squares[point].sqrt()
        for point, linear in _list_output_projections(layer)
    }
    heads = found["heads"].view(layer.shape.query_heads, -1).sum(1) if "heads" in found else None
    return LayerScores(heads, found.get("channels"))


def _list_output_projections(layer: Layer) -> list[tuple[str, nn.Module]]:
    """The output projections that a layer has, by the point that they read."""
    heads = [("heads", layer.output)] if layer.has_attention else []
    return heads + ([("channels", layer.down)] if layer.has_mlp else [])


def _mask_real_tokens(batch: Batch) -> Tensor:
    """Which tokens are not padding [B, S]."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _store_input(seen: dict[str, Tensor], point: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen[point] = args[0]


def _zero_inputs(gone: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].masked_fill(gone, 0.0), *args[1:])

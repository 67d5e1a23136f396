"""Wanda-sp: weight magnitude times activation norm, averaged over the output columns of heads and FFN channels.

Source: the structured Wanda baseline in the code of FLAP (Y. An et al., AAAI 2024, arXiv 2312.11983), after M. Sun et
al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695. With W the output projection
of a block and x_j its input over the calibration tokens,

    s_j = mean_i |W_ij| * ||x_j||_2        a head is the sum of its channels, and so is an expert

In a mixture of experts, x_j is weighted by the router, and a channel of all experts is the sum over them.

Ours: the norm is a root mean square, which does not depend on the number of tokens. FLAP's code scores each layer on
text that has passed the pruned layers before it; that is `sequential: true`, which takes about two passes. The default
is one pass of the dense model.

    callbacks/wanda_sp.yaml     attaches it to any LightningCLI job with a second --config

Legend: B batch, S sequence, T tokens, H hidden, C inputs of an output projection.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.expert_activations import ExpertActivations
from prunelit.calibration.observe import Sums, observe
from prunelit.calibration.partial_forward import PartialForward
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.core.scores import LayerScores, ScoreKind
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
        sequential: score every layer on text that has passed the pruned layers before it; only for scope "layer", since
            under other scopes the cut of a layer depends on the scores of later ones.
        kwargs: see `PruningCallback`.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = WandaSp(ratio=0.4, align=8).prune(transformers.LlamaForCausalLM(config), batches)
        >>> plan.layers[0].widths  # query heads, KV groups, FFN channels
        (1, 1, 16)
    """

    score_options = ()
    unit_kinds = get_args(ScoreKind)

    def __init__(self, ratio: float | None = None, sequential: bool = False, **kwargs: Any):
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

        def accumulate_expert(layer: Layer, x: ExpertActivations) -> None:
            squares = _sum_squares(x.channels.float() * x.gates.float()[:, None])
            sums.add_entry(layer, "expert_channels", x.expert, layer.shape.experts, squares)

        tokens = observe(decoder, batches, ("heads", "channels"), accumulate, expert_observer=accumulate_expert)
        means = sums.means(tokens, decoder.device)
        return [_score_layer(layer, squares) for layer, squares in zip(decoder, means, strict=True)]

    def plan(self, context: PruningContext) -> PruningPlan:
        return self._plan_sequentially(context) if self.sequential else super().plan(context)

    @torch.no_grad()
    def _plan_sequentially(self, context: PruningContext) -> PruningPlan:
        """Plan layer by layer: score a layer, select its units, and pass the text on without the removed ones."""
        decoder, batches = context.decoder, context.batches
        if decoder.has_experts:
            raise BadOption("sequential: expected false for a mixture of experts, whose routing it does not follow")
        select, shape, partial_forward = self.make_selector(context), decoder.shape, PartialForward(decoder)
        own_batches = take_rank_share(batches)
        own_tokens = sum(int(_mask_real_tokens(batch).sum()) for batch in own_batches)
        tokens = int(sum_over_ranks(torch.tensor(own_tokens, device=decoder.device)))
        if not tokens:
            raise NoCalibration("calibration: expected at least one batch with tokens, got none")
        streams: list[Tensor | None] = [None] * len(own_batches)
        # Under scope "layer" the number of units to remove does not depend on scores, so zeros can stand for those of
        # the layers that are not scored yet.
        scores = [LayerScores(torch.zeros(s.query_heads), torch.zeros(s.ffn_channels)) for s in shape.layers]
        layer_plans: list[LayerPlan] = []
        with use_eval_mode(decoder.model), ExitStack() as cut_hooks:
            for layer in decoder:
                span = layer.index, layer.index + 1
                sums = Sums(len(decoder.layers))
                with ExitStack() as input_hooks:
                    inputs: dict[str, Tensor] = {}
                    for point, linear in _list_output_projections(layer):
                        handle = linear.register_forward_pre_hook(partial(_store_input, inputs, point))
                        input_hooks.callback(handle.remove)
                    for batch, hidden in zip(own_batches, streams, strict=True):
                        partial_forward.run_layers(batch, hidden, *span)
                        is_real = _mask_real_tokens(batch).flatten().to(decoder.device)
                        for point, x in inputs.items():
                            sums.add(layer, point, _sum_squares(x.reshape(-1, x.shape[-1])[is_real]))
                scores[layer.index] = _score_layer(layer, sums.means(tokens, decoder.device)[layer.index])
                layer_plans.append(select(scores)[layer.index])
                # Zeroed inputs have the effect of the cut, and the model itself stays dense while it is planned.
                for _, linear, removed in list_lost_inputs(layer, layer_plans[-1]):
                    handle = linear.register_forward_pre_hook(partial(_zero_inputs, removed.to(decoder.device)))
                    cut_hooks.callback(handle.remove)
                streams = [
                    partial_forward.run_layers(batch, hidden, *span)
                    for batch, hidden in zip(own_batches, streams, strict=True)
                ]
        return self.build_plan(context, layer_plans)


def _sum_squares(rows: Tensor) -> Tensor:
    """Sum squares over tokens: [T, C] -> [C], float64."""
    return rows.float().square().sum(0, dtype=torch.float64)


def _score_layer(layer: Layer, squares: Mapping[str, Tensor]) -> LayerScores:
    """Score a layer from the mean squares [C] of the inputs of its output projections."""
    channel_scores = {
        point: get_weight_out_in(linear).detach().float().abs().mean(0) * squares[point].sqrt()
        for point, linear in _list_output_projections(layer)
    }
    heads = channel_scores["heads"].view(layer.shape.query_heads, -1).sum(1) if "heads" in channel_scores else None
    experts = expert_channels = None
    if layer.experts is not None:
        per_expert = (
            layer.experts.reduce_down(lambda weight: weight.abs().mean(0)) * squares["expert_channels"].sqrt()
        )  # [E, C]
        experts, expert_channels = per_expert.sum(1), per_expert.sum(0)
    return LayerScores(heads, channel_scores.get("channels"), experts, expert_channels)


def _list_output_projections(layer: Layer) -> list[tuple[str, nn.Module]]:
    """List the output projections that a layer has, each with the point of its input."""
    heads = [("heads", layer.output)] if layer.has_attention else []
    return heads + ([("channels", layer.down)] if layer.has_mlp else [])


def _mask_real_tokens(batch: Batch) -> Tensor:
    """Return which tokens of a batch are not padding, [B, S]."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _store_input(inputs: dict[str, Tensor], point: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs[point] = args[0]


def _zero_inputs(removed: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].masked_fill(removed, 0.0), *args[1:])

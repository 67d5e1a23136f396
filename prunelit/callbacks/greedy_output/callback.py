"""GreedyOutput: cut heads that attend alike, then heads and FFN channels whose output has the least second moment.

Source: J. Li, Y. Dong, Q. Lei, "Greedy Output Approximation: Towards Efficient Structured Pruning for LLMs Without
Retraining", CPAL 2025, arXiv 2407.19126, and the authors' research code. With h and f the inputs of the output
projections O and W (`docs/methods.md` has the rest),

    heads      Jensen-Shannon divergence between their attention probabilities (Eq. 1), threshold tau (Algorithm 2)
    moment     empirical: |O_j|^2 E[h_j^2] and |W_j|^2 E[f_j^2], measured; a head has the sum of its channels
               paper: in a gated FFN the product over gate and up of |W_j|^2 E[(A x)_j^2] (Eq. 3, 4; appendix B)
               code: |O_j| E[v_j^2], v the value projection's output; |W_j| act(E[gate_j^2]) E[up_j^2]
    two_step   a `repair`: module by module, in network order, fit it to the dense outputs, then score and prune it

Ours: KV groups; tau follows from the budget; "both" counts heads as similar up to the paper's largest tau and ranks the
others by second moments; the ridge pulls towards the present weights.

    callbacks/greedy_output.yaml    attaches it to any LightningCLI job with a second --config

Legend: T tokens, Q query heads, G KV groups, D head size, F FFN channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.observe import ActivationPoint, Sums
from prunelit.calibration.paired_streams import PairedStreams
from prunelit.callbacks.greedy_output import attention_similarity, second_moment, two_step
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.core.scores import LayerScores
from prunelit.model import surgery
from prunelit.model.decoder import Layer
from prunelit.pruning.callback import PruningCallback, Repair
from prunelit.pruning.context import PruningContext
from prunelit.repair.reconstruct import BlockName
from prunelit.runtime.errors import BadOption

Criterion = Literal["both", "similarity", "second_moment"]
"""Criterion by which heads are cut."""

_LARGEST_TAU = {"both": 0.2, "similarity": math.inf, "second_moment": 0.0}


class GreedyOutput(PruningCallback):
    """Cut similar heads first, then the units that add least to the residual stream.

    Args:
        ratio: share of the decoder layers' parameters to remove.
        criterion_heads: "both", "similarity" (no limit on tau), or "second_moment".
        tau: threshold of similarity in nats, for scope "global": heads closer than this are removed as far as the ratio
            allows, and channels make up the rest. None: the smallest threshold that meets the budget.
        moment: "empirical", "paper" or "code", see above.
        repair: as in `PruningCallback`, or "two_step", the paper's remedy.
        refit_kept: after "two_step" pruned a module, fit its output projection once more to the remaining inputs.
        kwargs: see `PruningCallback`.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = GreedyOutput(ratio=0.4, align=8).prune(transformers.LlamaForCausalLM(config), batches)
        >>> plan.layers[0].widths  # query heads, KV groups, FFN channels
        (1, 1, 16)
    """

    joint = False
    score_options = ("moment",)
    repair_choices = ("none", "bias", "least_squares", "two_step")
    cut_options = ("refit_kept",)

    def __init__(
        self,
        ratio: float | None = None,
        criterion_heads: Criterion = "both",
        tau: float | None = None,
        moment: second_moment.Moment = "empirical",
        repair: Literal["none", "bias", "least_squares", "two_step"] = "none",
        refit_kept: bool = False,
        **kwargs: Any,
    ):
        super().__init__(ratio, repair=cast(Repair, repair), **kwargs)
        choices = ("criterion_heads", criterion_heads, Criterion), ("moment", moment, second_moment.Moment)
        for name, value, allowed in choices:
            if value not in get_args(allowed):
                raise BadOption(f"{name}: expected one of {', '.join(get_args(allowed))}, got {value!r}")
        if tau is not None and (isinstance(tau, bool) or not tau > 0):
            raise BadOption(f"tau: expected a positive number of nats or null, got {tau!r}")
        self._ranks_globally = self.scope == "global" and self.unit == "kv_group" and not self.uniform_heads
        if tau is not None and not (self._ranks_globally and criterion_heads != "second_moment"):
            raise BadOption(
                "tau: one threshold makes layers differ; expected with it scope 'global', unit 'kv_group', no "
                f"uniform_heads and a criterion_heads with similarity, got {self.scope!r}, {self.unit!r}, "
                f"{self.uniform_heads!r}, {criterion_heads!r}"
            )
        self.criterion_heads, self.tau, self.moment, self.refit_kept = criterion_heads, tau, moment, refit_kept
        self._reconstructed: tuple[str, list[nn.Module | None]] | None = None
        """Digest of the plan that was reconstructed, and its layers."""

    def score(self, context: PruningContext) -> list[LayerScores]:
        return second_moment.score_second_moments(context.decoder, context.batches, self.moment)

    def plan(self, context: PruningContext) -> PruningPlan:
        decoder, batches = context.decoder, context.batches
        scores, limit = self.load_or_score(context), self.tau or _LARGEST_TAU[self.criterion_heads]
        select = self.make_selector(context)
        layer_plans, shapes = select(scores), [layer.shape for layer in decoder]
        loses_heads = [
            len(layer_plan.query_heads) < shape.query_heads
            for layer_plan, shape in zip(layer_plans, shapes, strict=True)
        ]
        divergences: list[Tensor | None] = [None] * len(shapes)
        if limit and (self.tau is not None or any(loses_heads)):
            divergences = self.compute_cached(
                "divergences", context, lambda: attention_similarity.measure_head_divergence(decoder, batches)
            )
        if any(divergence is not None for divergence in divergences):
            if self._ranks_globally:
                protected = {layer % len(shapes) for layer in self.protect}
                ranks = attention_similarity.rank_groups_globally(
                    shapes, scores, divergences, layer_plans, protected, self.min_kept, limit, self.tau
                )
                layer_plans = select(ranks, standardise=False, joint=True)
            else:
                layers = zip(layer_plans, shapes, scores, divergences, loses_heads, strict=True)
                layer_plans = tuple(
                    attention_similarity.choose_heads(layer_plan, shape, layer_scores, divergence, limit)
                    if changes
                    else layer_plan
                    for layer_plan, shape, layer_scores, divergence, changes in layers
                )
        if self.repair == "two_step":
            chooser = _PrefixChooser(batches, len(shapes), self.moment, limit)
            layer_plans, modules = two_step.reconstruct_two_step(
                decoder, layer_plans, batches, chooser, refit_kept=self.refit_kept
            )
        plan = self.build_plan(context, layer_plans)
        self._reconstructed = (plan.digest, modules) if self.repair == "two_step" else None
        return plan

    def cut(self, context: PruningContext, plan: PruningPlan) -> None:
        decoder, batches = context.decoder, context.batches
        if self.repair != "two_step":
            super().cut(context, plan)
            return
        surgery.check_plan_fits(decoder, plan)
        reconstructed, self._reconstructed = self._reconstructed, None
        if reconstructed is not None and reconstructed[0] == plan.digest:
            modules = reconstructed[1]
        else:  # the plan is given, or comes from the cache
            modules = two_step.reconstruct_two_step(decoder, plan.layers, batches, refit_kept=self.refit_kept)[1]
        surgery.replace_layers(decoder, plan, modules)


class _PrefixChooser:
    """Chooses the units of a module by their scores on the inputs that the reconstructed prefix gives it.

    Args:
        batches: calibration batches, as for `reconstruct_two_step`.
        layers: number of layers.
        moment: form of the second moment.
        limit: largest threshold of similarity in nats; 0: second moments alone.
    """

    def __init__(self, batches: Sequence[Batch], layers: int, moment: second_moment.Moment, limit: float):
        self.batches, self.layers, self.moment, self.limit = batches, layers, moment, limit
        self.sums = Sums(layers)

    def list_points(self, block: BlockName) -> tuple[ActivationPoint, ...]:
        return second_moment.MOMENT_POINTS[self.moment][block]

    def accumulate(self, layer: Layer, block: BlockName, x: Mapping[str, Tensor]) -> None:
        second_moment.accumulate_squares(self.sums, layer, {point: x[point] for point in self.list_points(block)})

    def choose_units(self, streams: PairedStreams, block: BlockName, layer_plan: LayerPlan) -> LayerPlan:
        layer, sums = streams.layer, self.sums
        self.sums = Sums(self.layers)
        scores = second_moment.compute_moment_scores(
            layer, sums.means(streams.tokens, streams.decoder.device)[layer.index], self.moment
        )
        if block == "attention":
            divergence = attention_similarity.measure_layer_divergence(streams, self.batches) if self.limit else None
            return attention_similarity.choose_heads(layer_plan, layer.shape, scores, divergence, self.limit)
        order = cast(Tensor, scores.channels).argsort(stable=True)
        return replace(layer_plan, ffn_channels=tuple(order[-len(layer_plan.ffn_channels) :].sort().values.tolist()))

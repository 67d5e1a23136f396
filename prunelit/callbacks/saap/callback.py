"""SAAP: Taylor importances of two grains fused by their uncertainty; of the least important units the unstable ones go.

Source: H. Zheng, J. Ren et al., "Adaptive Pruning for Large Language Models with Structural Importance Awareness",
arXiv 2412.15127; its abstract and summaries were read: LLM-Pruner's importances are fused by homoscedastic uncertainty,
and units of large relative fluctuation over samples are removed, all layers ranked together. For sample n and unit j,

    S[n,j] = Iv[n,j] / (2 s1^2) + Ie[n,j] / (2 s2^2)     Iv, Ie: vector-wise, element-wise (`taylor_importance.FORMS`)
    s1^2, s2^2 = mean of Iv, of Ie                       over samples and all units of the kind, heads or channels
    mu[j] = mean over n of S[n,j]      ASI[j] = deviation over n of S[n,j] / mu[j]

Ours: s1 and s2 in closed form, the minimum of the loss by which the paper learns them; and the search. Cutting what has
the largest ASI outright destroys models; so where K units go, the kappa K of lowest mu are the candidates, and those of
largest ASI go first (with `align` > 1 channels go in steps of that order).

    callbacks/saap.yaml         attaches it to any LightningCLI job with a second --config

Legend: N samples; U units of one kind in a layer: KV groups (query heads, where those are cut) or FFN channels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prunelit.calibration import taylor
from prunelit.callbacks.saap.stability import UnitKey, UnitValues, trade_scores
from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.core.scores import LayerScores
from prunelit.planning import budget
from prunelit.planning.removal_steps import build_removal_sequences
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption

Fusion = Literal["uncertainty", "geometric"]
Asi = Literal["candidate", "none", "literal"]


class SAAP(PruningCallback):
    """Score heads and FFN channels by fused Taylor importance, and by its stability over samples.

    Args:
        ratio: share of the decoder layers' parameters to remove.
        scope: "global" ranks the raw scores of all layers, heads and channels apart and each to the same ratio.
        min_kept: least share of each layer's KV groups and of its channels that stays.
        fusion: "uncertainty", as above; "geometric": sqrt(Iv Ie), the order if every unit had its own s1 and s2.
        asi: "candidate", as above; "none": lowest mu goes; "literal": largest ASI goes, for ablation.
        kappa: candidates for each unit that goes; 1 is the same as asi "none".
        second_order: Ie is the sum of |w G - (w G)^2 / 2|, the diagonal Fisher form of one sample, or of |w G|.
        checkpointing: keep the layers' inputs only and run each layer again in the backward pass.
        kwargs: see `PruningCallback`.
    """

    standardise = False
    joint = False
    score_options = ("fusion", "second_order", "unit", "checkpointing")

    def __init__(
        self,
        ratio: float,
        scope: budget.Scope = "global",
        min_kept: float = 0.2,
        fusion: Fusion = "uncertainty",
        asi: Asi = "candidate",
        kappa: float = 1.1,
        second_order: bool = True,
        checkpointing: bool = False,
        **kwargs: Any,
    ):
        super().__init__(ratio, scope=scope, min_kept=min_kept, **kwargs)
        for name, value, allowed in (("fusion", fusion, get_args(Fusion)), ("asi", asi, get_args(Asi))):
            if value not in allowed:
                raise BadOption(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        if not 1 <= kappa < math.inf:
            raise BadOption(f"kappa: expected a number of at least 1, got {kappa!r}")
        self.fusion, self.asi, self.kappa = fusion, asi, kappa
        self.second_order, self.checkpointing = second_order, checkpointing

    def plan(self, context: PruningContext) -> PruningPlan:
        decoder = context.decoder
        select, shape = self.make_selector(context), decoder.shape
        mean, asi = self.compute_cached("statistics", context, lambda: self._measure_statistics(context))
        if self.asi == "literal" or (self.asi == "candidate" and self.kappa > 1):
            self._trade_scores(mean, asi, select(_build_layer_scores(mean, shape.layers, self.unit)), shape.layers)
        return self.build_plan(context, select(_build_layer_scores(mean, shape.layers, self.unit)))

    def score(self, context: PruningContext) -> list[LayerScores]:
        return _build_layer_scores(self._measure_statistics(context)[0], context.decoder.shape.layers, self.unit)

    def _measure_statistics(self, context: PruningContext) -> tuple[UnitValues, UnitValues]:
        decoder, batches = context.decoder, context.batches
        forms: tuple[taylor.TaylorForm, ...] = ("vector", "mixed" if self.second_order else "first")
        mean: UnitValues = {}
        asi: UnitValues = {}
        for kind, both in taylor.score_each_sample(decoder, batches, forms, self.unit, self.checkpointing).items():
            for layer, samples in fuse_importances(both, self.fusion).items():
                mean[kind, layer], asi[kind, layer] = samples.mean(0).cpu(), compute_volatility(samples).cpu()
        return mean, asi

    def _trade_scores(
        self, mean: UnitValues, asi: UnitValues, kept: Sequence[LayerPlan], shapes: Sequence[LayerShape]
    ) -> None:
        """Let the candidates trade their scores; as many are cut as without the search."""
        protected = {layer % len(kept) for layer in self.protect}
        every: dict[UnitKey, Sequence[int]] = {key: range(len(values)) for key, values in mean.items()}
        pools = self._find_removable(mean, shapes) if self.asi == "candidate" else every
        for kind, place in (("heads", 1 if self.unit == "kv_group" else 0), ("channels", 2)):  # in LayerPlan.widths
            keys = [key for key in mean if key[0] == kind and key[1] not in protected]
            for together in [keys] if self.scope == "global" else [[key] for key in keys]:
                count = sum(len(mean[key]) for key in together)
                if self.asi == "candidate":
                    count = round(self.kappa * (count - sum(kept[layer].widths[place] for _, layer in together)))
                trade_scores(mean, asi, {key: pools[key] for key in together}, count)

    def _find_removable(self, mean: UnitValues, shapes: Sequence[LayerShape]) -> dict[UnitKey, Sequence[int]]:
        """The least important units of each layer, without those that have to stay."""
        found: dict[UnitKey, Sequence[int]] = dict.fromkeys(mean, ())
        for layer, (shape, scores) in enumerate(zip(shapes, _build_layer_scores(mean, shapes, self.unit), strict=True)):
            cost, limits = LayerShape.parameters_at, (self.unit, self.align, self.min_kept)
            for ladder in build_removal_sequences(
                layer, shape, scores, cost, *limits, compared=False, standardise=False
            ):
                found["heads" if ladder.kind == "attention" else "channels", layer] = ladder.units
        return found


def _build_layer_scores(units: UnitValues, shapes: Sequence[LayerShape], unit: budget.Unit) -> list[LayerScores]:
    found = []
    for layer, shape in enumerate(shapes):
        heads = units.get(("heads", layer))
        if heads is not None and unit == "kv_group":  # given per head, and summed over a group again
            heads = heads.repeat_interleave(shape.group_size) / shape.group_size
        found.append(LayerScores(heads, units.get(("channels", layer))))
    return found


def fuse_importances(grains: Mapping[int, Tensor], fusion: Fusion = "uncertainty") -> dict[int, Tensor]:
    """S of each layer [N, U], from Iv and Ie of all units of a kind: {layer: [2, N, U]}."""
    if fusion == "geometric":
        return {layer: x.prod(0).sqrt() for layer, x in grains.items()}
    twice = 2 * torch.cat([x.flatten(1) for x in grains.values()], 1).mean(1) if grains else torch.ones(2)
    return {layer: (x / twice.clamp_min(1e-300)[:, None, None]).sum(0) for layer, x in grains.items()}


def compute_volatility(samples: Tensor) -> Tensor:
    """ASI from S: deviation over samples (of N - 1) by mean, [N, U] -> [U]; 0 for a single sample."""
    return samples.var(0, correction=min(1, len(samples) - 1)).sqrt() / samples.mean(0).clamp_min(1e-300)

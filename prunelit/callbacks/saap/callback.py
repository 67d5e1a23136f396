"""SAAP: fused Taylor importances of two kinds; of the least important units the unstable ones are removed.

Source: H. Zheng, J. Ren et al., "Adaptive Pruning for Large Language Models with Structural Importance Awareness",
arXiv 2412.15127, by its abstract and summaries: LLM-Pruner's importances are fused by homoscedastic uncertainty, and
units of large relative fluctuation over samples are removed, with all layers ranked together. For sample n and unit j,

    S[n,j] = Iv[n,j] / (2 s1^2) + Ie[n,j] / (2 s2^2)     Iv, Ie: vector-wise, element-wise (`taylor.TAYLOR_FORMS`)
    s1^2, s2^2 = mean of Iv, of Ie                       over samples and all units of the kind, heads or channels
    mu[j] = mean over n of S[n,j]      ASI[j] = deviation over n of S[n,j] / mu[j]

Ours: s1 and s2 in closed form, as the minimum of the loss by which the paper learns them; and the search. Removing the
units of largest ASI outright destroys models. So where K units are to be removed, the kappa K units of lowest mu are
the candidates, and of these the ones of largest ASI are removed first (with `align` > 1, channels in steps of that
order).

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
"""How the two importances are fused, see `SAAP`."""
Asi = Literal["candidate", "none", "literal"]
"""How the stability of scores decides, see `SAAP`."""


class SAAP(PruningCallback):
    """Score heads and FFN channels by fused Taylor importance, and by its stability over samples.

    Args:
        ratio: share of the decoder layers' parameters to remove.
        scope: "global" ranks the raw scores of all layers, heads and channels apart and each to the same ratio.
        min_kept: least share of each layer's KV groups and of its channels that stays.
        fusion: "uncertainty", as above; "geometric": sqrt(Iv Ie), the order if every unit had its own s1 and s2.
        asi: "candidate", as above; "none": units of lowest mu are removed; "literal": those of largest ASI, for
            ablation.
        kappa: candidates per removed unit; 1 is the same as asi "none".
        second_order: Ie is the sum of |w G - (w G)^2 / 2|, the diagonal Fisher form of one sample; False: of |w G|.
        checkpointing: keep only the inputs of the layers and run each layer again in the backward pass.
        kwargs: see `PruningCallback`.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = SAAP(ratio=0.4, align=8).prune(transformers.LlamaForCausalLM(config), batches)
        >>> plan.layers[0].widths  # query heads, KV groups, FFN channels
        (1, 1, 16)
    """

    standardise = False
    joint = False
    score_options = ("fusion", "second_order", "unit", "checkpointing")

    def __init__(
        self,
        ratio: float | None = None,
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
        select, shapes = self.make_selector(context), context.decoder.shape.layers
        mean, asi = self.compute_cached("statistics", context, lambda: self._measure_statistics(context))
        if self.asi == "literal" or (self.asi == "candidate" and self.kappa > 1):
            self._trade_scores(mean, asi, select(_build_layer_scores(mean, shapes, self.unit)), shapes)
        return self.build_plan(context, select(_build_layer_scores(mean, shapes, self.unit)))

    def score(self, context: PruningContext) -> list[LayerScores]:
        return _build_layer_scores(self._measure_statistics(context)[0], context.decoder.shape.layers, self.unit)

    def _measure_statistics(self, context: PruningContext) -> tuple[UnitValues, UnitValues]:
        """Measure mu and ASI of all units."""
        decoder, batches = context.decoder, context.batches
        forms: tuple[taylor.TaylorForm, ...] = ("vector", "mixed" if self.second_order else "first")
        mean: UnitValues = {}
        asi: UnitValues = {}
        for kind, importances in taylor.score_each_sample(
            decoder, batches, forms, self.unit, self.checkpointing
        ).items():
            for layer, samples in fuse_importances(importances, self.fusion).items():
                mean[kind, layer], asi[kind, layer] = samples.mean(0).cpu(), compute_volatility(samples).cpu()
        return mean, asi

    def _trade_scores(
        self, mean: UnitValues, asi: UnitValues, layer_plans: Sequence[LayerPlan], shapes: Sequence[LayerShape]
    ) -> None:
        """Redistribute the scores of the candidates in `mean`.

        Args:
            mean: mu of all units, changed in place.
            asi: ASI of all units.
            layer_plans: selection by `mean` alone; as many units are removed by the new scores.
            shapes: shapes of the dense layers.
        """
        protected = {layer % len(layer_plans) for layer in self.protect}
        all_units: dict[UnitKey, Sequence[int]] = {key: range(len(values)) for key, values in mean.items()}
        pools = self._find_removable(mean, shapes) if self.asi == "candidate" else all_units
        # Where the numbers of heads and of channels are in LayerPlan.widths.
        for kind, place in (("heads", 1 if self.unit == "kv_group" else 0), ("channels", 2)):
            keys = [key for key in mean if key[0] == kind and key[1] not in protected]
            for ranked_keys in [keys] if self.scope == "global" else [[key] for key in keys]:
                count = sum(len(mean[key]) for key in ranked_keys)
                if self.asi == "candidate":
                    remaining = sum(layer_plans[layer].widths[place] for _, layer in ranked_keys)
                    count = round(self.kappa * (count - remaining))
                trade_scores(mean, asi, {key: pools[key] for key in ranked_keys}, count)

    def _find_removable(self, mean: UnitValues, shapes: Sequence[LayerShape]) -> dict[UnitKey, Sequence[int]]:
        """Find the units of each layer that may be removed, the least important first."""
        removable: dict[UnitKey, Sequence[int]] = dict.fromkeys(mean, ())
        for layer, (shape, scores) in enumerate(zip(shapes, _build_layer_scores(mean, shapes, self.unit), strict=True)):
            cost, limits = LayerShape.parameters_at, (self.unit, self.align, self.min_kept)
            for sequence in build_removal_sequences(
                layer, shape, scores, cost, *limits, compared=False, standardise=False
            ):
                removable["heads" if sequence.kind == "attention" else "channels", layer] = sequence.units
        return removable


def _build_layer_scores(units: UnitValues, shapes: Sequence[LayerShape], unit: budget.Unit) -> list[LayerScores]:
    """Turn unit values into `LayerScores`, where heads are query heads."""
    layer_scores = []
    for layer, shape in enumerate(shapes):
        heads = units.get(("heads", layer))
        if heads is not None and unit == "kv_group":  # `LayerScores` sums the heads of a group
            heads = heads.repeat_interleave(shape.group_size) / shape.group_size
        layer_scores.append(LayerScores(heads, units.get(("channels", layer))))
    return layer_scores


def fuse_importances(importances: Mapping[int, Tensor], fusion: Fusion = "uncertainty") -> dict[int, Tensor]:
    """Fuse Iv and Ie of all units of a kind to S.

    Args:
        importances: {layer: [2, N, U]}.
        fusion: see `SAAP`.

    Returns:
        {layer: [N, U]}.

    Example:
        >>> fuse_importances({0: torch.tensor([[[1.0, 3.0]], [[4.0, 4.0]]])})
        {0: tensor([[0.7500, 1.2500]])}
    """
    if fusion == "geometric":
        return {layer: x.prod(0).sqrt() for layer, x in importances.items()}
    double_means = (
        2 * torch.cat([x.flatten(1) for x in importances.values()], 1).mean(1) if importances else torch.ones(2)
    )
    return {layer: (x / double_means.clamp_min(1e-300)[:, None, None]).sum(0) for layer, x in importances.items()}


def compute_volatility(samples: Tensor) -> Tensor:
    """Compute ASI from S: the deviation over samples, with divisor N - 1, relative to the mean.

    Args:
        samples: [N, U], S.

    Returns:
        [U]; zeros for a single sample.

    Example:
        >>> compute_volatility(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        tensor([0.7071, 0.0000])
    """
    return samples.var(0, correction=min(1, len(samples) - 1)).sqrt() / samples.mean(0).clamp_min(1e-300)

"""ShortGPT: whole decoder layers of the lowest Block Influence go, in one step.

Source: X. Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853,
and its code: the influence of a layer is 1 - E[cos(x_in, x_out)], over tokens, of the residual stream entering and
leaving it; layers go in ascending order. For the last layer the code takes the stream after the final norm; here it is
the layer's own output, as for the others. Ours: a ratio as the budget.

    callbacks/shortgpt.yaml     attaches it to any LightningCLI job with a second --config
    Python                      Trainer(callbacks=[ShortGPT(count=3)])

Legend: T tokens, H hidden.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunelit.calibration.observe import Sums, observe
from prunelit.core.plan import PruningPlan
from prunelit.model.decoder import Layer
from prunelit.planning.block_sets import (
    IGNORED_OPTIONS,
    Block,
    RemovalGoal,
    can_remove_blocks,
    list_blocks,
    plan_without_blocks,
)
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext


class ShortGPT(PruningCallback):
    """Remove whole layers by the angle through which they turn the residual stream.

    Args:
        ratio: least share of the decoder layers' budget to remove, met with as few layers as their order allows; give
            this or `count`.
        count: number of layers to remove, as in the paper.
        kwargs: see `PruningCallback`; `scope`, `unit`, `align`, `min_kept` and `uniform_heads` say nothing about whole
            layers.
    """

    score_options = ()
    ignored_options = IGNORED_OPTIONS
    repair_choices = ("none", "least_squares")  # no mean stands in for a block that is gone

    def __init__(self, ratio: float | None = None, count: int | None = None, **kwargs: Any):
        self.goal = RemovalGoal.from_options(ratio, count, kwargs)
        super().__init__(0.5 if ratio is None else ratio, **kwargs)  # it needs a number; the goal is what counts
        self.ratio, self.count = ratio, count  # type: ignore[assignment]

    def measure_influence(self, context: PruningContext) -> list[float]:
        """1 - mean cosine between the residual stream entering and leaving each layer."""
        decoder, batches = context.decoder, context.batches
        sums = Sums(len(decoder.layers))

        def accumulate(layer: Layer, x: Mapping[str, Tensor]) -> None:
            cosines = cosine_similarity(x["layer_input"].float(), x["layer_output"].float(), dim=-1)  # [T]
            sums.add(layer, "cosine", cosines.double().sum())

        tokens = observe(decoder, batches, ("layer_input", "layer_output"), accumulate)
        return [1 - float(mean["cosine"]) for mean in sums.means(tokens, decoder.device)]

    def plan(self, context: PruningContext) -> PruningPlan:
        decoder = context.decoder
        shape = decoder.shape
        free = list_blocks(shape, protect=self.protect)
        influence = self.compute_cached("influence", context, lambda: self.measure_influence(context))

        def blocks(layers: Sequence[int]) -> list[Block]:
            return [block for block in free if block.layer in layers]

        def met(layers: Sequence[int]) -> bool:
            return self.goal.is_met(shape, blocks(layers), len(layers))

        removed: list[int] = []
        for layer in sorted({block.layer for block in free}, key=lambda index: (influence[index], index)):
            if not met(removed) and can_remove_blocks(shape, blocks([*removed, layer])):
                removed.append(layer)
        if not met(removed):
            most = (
                len(removed)
                if self.count
                else f"{self.goal.compute_share(shape, blocks(removed)):.4f} of the {self.budget}"
            )
            raise self.goal.make_infeasible_error(str(most))
        for layer in reversed(removed):  # layers may differ in size: keep what the budget does not need
            if met([other for other in removed if other != layer]):
                removed.remove(layer)
        self._calibration_record = {**self._calibration_record, "block_influence": influence}
        return self.build_plan(context, plan_without_blocks(shape, blocks(removed)))

"""ShortGPT: remove the whole decoder layers of the lowest Block Influence, in one step.

Source: X. Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853,
and its code. The influence of a layer is 1 - E[cos(x_in, x_out)] over tokens, with x_in and x_out the residual stream
entering and leaving it; layers are removed in ascending order of influence. For the last layer the code reads the
stream after the final norm; here it is the layer's own output, as for all others. Ours: a ratio as the budget.

    callbacks/shortgpt.yaml     attaches it to any LightningCLI job with a second --config
    Python                      Trainer(callbacks=[ShortGPT(count=3)])

Legend: T tokens, H hidden.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunelit.calibration.observe import Sums, observe
from prunelit.core.plan import ModelShape, PruningPlan
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
        ratio: least share of the decoder layers' budget to remove, with as few layers as their order allows; give
            this, `count`, or `parameters` or `memory`.
        count: number of layers to remove, as in the paper.
        kwargs: see `PruningCallback`; `scope`, `unit`, `kinds`, `align`, `min_kept`, `uniform_heads`, `rounding` and
            `speedup` are about widths, and whole layers are removed here.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = ShortGPT(count=1).prune(transformers.LlamaForCausalLM(config), batches)
        >>> sum(layer.removed for layer in plan.layers)
        1
    """

    score_options = ()
    unit_kinds = ()
    ignored_options = IGNORED_OPTIONS
    repair_choices = ("none", "least_squares")  # no linear remains whose bias could hold the mean of a removed block

    def __init__(self, ratio: float | None = None, count: int | None = None, **kwargs: Any):
        self.goal = RemovalGoal.from_options(ratio, count, kwargs)
        super().__init__(0.5 if ratio is None else ratio, **kwargs)  # any valid number: `goal` holds the budget
        self.ratio, self.count = ratio, count  # type: ignore[assignment]

    def measure_influence(self, context: PruningContext) -> list[float]:
        """Measure 1 - mean cosine between the residual streams entering and leaving each layer.

        Args:
            context: of the run.

        Returns:
            The influence of every layer, in [0, 2].
        """
        decoder, batches = context.decoder, context.batches
        sums = Sums(len(decoder.layers))

        def accumulate(layer: Layer, x: Mapping[str, Tensor]) -> None:
            cosines = cosine_similarity(x["layer_input"].float(), x["layer_output"].float(), dim=-1)  # [T]
            sums.add(layer, "cosine", cosines.double().sum())

        tokens = observe(decoder, batches, ("layer_input", "layer_output"), accumulate)
        return [1 - float(mean["cosine"]) for mean in sums.means(tokens, decoder.device)]

    def check_size_target(self, shape: ModelShape | None) -> None:
        if shape is not None and self.given_plan is None:
            self.goal.check_feasible(shape, list_blocks(shape, protect=self.protect), whole_layers=True)

    def plan(self, context: PruningContext) -> PruningPlan:
        decoder = context.decoder
        shape = decoder.shape
        removable = list_blocks(shape, protect=self.protect)
        influence = self.compute_cached("influence", context, lambda: self.measure_influence(context))

        def list_blocks_of(layers: Sequence[int]) -> list[Block]:
            return [block for block in removable if block.layer in layers]

        def is_met(layers: Sequence[int]) -> bool:
            return self.goal.is_met(shape, list_blocks_of(layers), len(layers))

        removed: list[int] = []
        for layer in sorted({block.layer for block in removable}, key=lambda index: (influence[index], index)):
            if not is_met(removed) and can_remove_blocks(shape, list_blocks_of([*removed, layer])):
                removed.append(layer)
        if not is_met(removed):
            share = self.goal.compute_share(shape, list_blocks_of(removed))
            raise self.goal.make_infeasible_error(
                str(len(removed)) if self.count else f"{share:.4f} of the {self.budget}"
            )
        # Layers may differ in size, so a later, larger one can make an earlier one unnecessary for the budget.
        for layer in reversed(removed):
            if is_met([other for other in removed if other != layer]):
                removed.remove(layer)
        self.add_to_calibration_record(block_influence=influence, **self.goal.make_record(shape))
        return self.build_plan(context, plan_without_blocks(shape, list_blocks_of(removed)))

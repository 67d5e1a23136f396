"""Best: Fisher scores in one list over layers and kinds, a refit on the pruned prefix, and a short distillation.

Source: ours, from parts of the field. In order:
1. One backward pass gives the score: the Fisher information of the mask of every head, channel and expert (arXiv
   1906.10771, 2204.09656), per parameter. All layers and kinds are ranked in one list, and `min_kept` limits the cut of
   a layer.
2. The dense model generates as many tokens as the calibration text has (LLM-QAT, arXiv 2305.17888), see
   `prunelit.callbacks.best.generated_text`; texts begin as the model needs it to write other than repetitions.
3. On both texts the output projections are refitted on the pruned prefix (`prunelit.repair.reconstruct`).
4. The pruned model is distilled from the dense model's distributions for some passes, without labels
   (`prunelit.callbacks.best.distill`); of the changes only what exceeds noise is applied
   (`prunelit.callbacks.best.denoise`).
docs/lab-log.md has the worth of each step, and what was tried instead.

    callbacks/best.yaml         attaches it to any LightningCLI job with a second --config
    Python                      Trainer(callbacks=[Best(ratio=0.2)])

Legend: Q query heads, F FFN channels.
"""

import math
from typing import Any, get_args

from prunelit.calibration.batches import count_real_tokens
from prunelit.callbacks.best import distill, generated_text
from prunelit.callbacks.best.fisher import score_fisher
from prunelit.core.plan import LayerShape, PruningPlan
from prunelit.core.scores import LayerScores, ScoreKind
from prunelit.model.decoder import Decoder
from prunelit.planning import budget
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.repair import reconstruct
from prunelit.runtime.distributed import take_rank_share
from prunelit.runtime.errors import BadOption

# Fisher information is a local estimate and too optimistic for layers that lose nearly all units: every layer keeps at
# least this share of what an even cut would leave.
_EVEN_SHARE = 5 / 8
_MAX_TEXT_LENGTH = 128  # tokens of a generated sequence, which is never longer than those of the calibration text


class Best(PruningCallback):
    """prunelit's own method.

    Args:
        ratio: share of the decoder layers' budget to remove.
        scope: "global" (default) lets layers differ; "layer" keeps them alike for stock classes.
        min_kept: least share of a layer's units that stays; None: 5/8 of what an even cut would leave.
        own_text: tokens that the dense model generates, relative to those of the calibration text; 0: none.
        ridge: ridge of the refit, relative to the mean square of the inputs.
        epochs: passes of distillation over all text; 0: no distillation.
        learning_rate: peak learning rate of the distillation.
        denoise: apply only those changes of the distillation that exceed noise.
        kwargs: see `PruningCallback`.

    Example:
        >>> method = Best(ratio=0.2, epochs=0)  # closed forms only
        >>> method.scope, method.uses_repair
        ('global', True)
    """

    standardise = False
    unit_kinds = get_args(ScoreKind)
    score_options = ("unit", "own_text", "seed")
    repair_choices = ("none",)  # `cut` has a repair of its own
    cut_options = ("own_text", "ridge", "epochs", "learning_rate", "denoise")

    def __init__(
        self,
        ratio: float | None = None,
        scope: budget.Scope = "global",
        min_kept: float | None = None,
        own_text: float = 1.0,
        ridge: float = 1e-2,
        epochs: int = 1,
        learning_rate: float = 4.5e-4,
        denoise: bool = True,
        **kwargs: Any,
    ):
        super().__init__(ratio, scope=scope, min_kept=min_kept or 0.0, **kwargs)
        self.min_kept = min_kept  # type: ignore[assignment]
        for name, value in (("own_text", own_text), ("epochs", epochs), ("learning_rate", learning_rate)):
            if not 0 <= value < math.inf:
                raise BadOption(f"{name}: expected a number of at least 0, got {value!r}")
        reconstruct.check_ridge(ridge)
        self.own_text, self.ridge, self.epochs, self.learning_rate = own_text, ridge, epochs, learning_rate
        self.denoise = denoise

    @property
    def uses_repair(self) -> bool:
        return True

    def score(self, context: PruningContext) -> list[LayerScores]:
        layer_scores = []
        for layer, scores in zip(context.decoder, score_fisher(context.decoder, context.batches), strict=True):
            shape, heads, channels = layer.shape, scores.heads, scores.channels
            if heads is not None:
                # A KV group is ranked by the mean of its heads: each head bears an equal part of the keys and values.
                shared_cost = shape.kv_head_cost / shape.group_size if self.unit == "kv_group" else 0
                heads = heads / (shape.query_head_cost + shared_cost)
            if channels is not None:
                channels = channels / shape.channel_cost
            experts, expert_channels = scores.experts, scores.expert_channels
            if experts is not None and expert_channels is not None:
                experts = experts / shape.expert_cost
                expert_channels = expert_channels / (shape.expert_channel_cost * shape.experts)
            layer_scores.append(LayerScores(heads, channels, experts, expert_channels))
        return layer_scores

    def get_min_kept(self, decoder: Decoder) -> float:
        if self.min_kept is not None:
            return self.min_kept
        shapes = decoder.shape.layers
        protected = {layer % len(shapes) for layer in self.protect}
        removable = sum(self._count_removable(shape) for i, shape in enumerate(shapes) if i not in protected)
        even_cut = self.find_asked_share(decoder.shape) * decoder.shape.block_parameters / max(1, removable)
        return max(0.0, _EVEN_SHARE * (1 - even_cut))

    def cut(self, context: PruningContext, plan: PruningPlan) -> None:
        decoder, batches = context.decoder, context.batches
        tokens = int(self.own_text * sum(map(count_real_tokens, batches)))
        length = min(_MAX_TEXT_LENGTH, max((batch["input_ids"].shape[1] for batch in batches), default=0))
        all_batches = list(batches)
        if tokens:
            all_batches += self.compute_cached(
                "text", context, lambda: generated_text.generate_text(decoder.model, tokens, length, self.seed, batches)
            )
        own_batches = take_rank_share(all_batches)
        dense_streams = distill.record_dense_streams(decoder, own_batches) if self.epochs else []
        reconstruct.apply_least_squares(decoder, plan, all_batches, ridge=self.ridge)
        cut = Decoder(decoder.model)
        distill.distill_layers(
            cut, own_batches, dense_streams, self.epochs, self.learning_rate, self.denoise, seed=self.seed
        )

    def _count_removable(self, shape: LayerShape) -> int:
        """Count the parameters of a layer that may be removed: all but one KV group, or one query head of each.

        Of a mixture those of experts, or of their channels, down to what the router needs.
        """
        removable = shape.channel_cost * shape.ffn_channels
        if shape.experts and self.kinds is not None and "expert_channels" in self.kinds:
            removable += shape.experts * shape.expert_channel_cost * shape.expert_channels
        elif shape.experts:
            removable += (shape.experts - shape.least_experts) * shape.expert_cost
        if shape.heads_prunable and shape.kv_groups:
            if self.unit == "kv_group":
                removable += (shape.kv_groups - 1) * (shape.group_size * shape.query_head_cost + shape.kv_head_cost)
            else:
                removable += (shape.query_heads - shape.kv_groups) * shape.query_head_cost
        return removable

"""Best: Fisher scores in one list over layers and kinds, refit on the cut prefix, short distillation.

Source: ours, from parts of the field. In order:
1. one backward pass: the Fisher information of every head's and channel's switch (arXiv 1906.10771, 2204.09656), per
   parameter, is the score; all layers and kinds share one list, and no layer loses more than `min_kept` allows;
2. the dense model writes as much text again as it was given (LLM-QAT, arXiv 2305.17888), see `prunelit.callbacks.best.generated_text`;
3. on both texts, a least-squares refit of the output projections on the cut prefix (`prunelit.repair.reconstruct`);
4. and passes of distillation from the dense model's distributions (`prunelit.callbacks.best.distill`), of whose changes is kept what
   stands out of noise (`prunelit.callbacks.best.denoise`). No labels are read.
What each step is worth, and what was tried instead, is in docs/lab-log.md.

    callbacks/best.yaml         attaches it to any LightningCLI job with a second --config
    Python                      Trainer(callbacks=[Best(ratio=0.2)])

Legend: Q query heads, F FFN channels.
"""

import math
from typing import Any

from prunelit.calibration.batches import count_real_tokens
from prunelit.callbacks.best import distill, generated_text
from prunelit.callbacks.best.fisher import score_fisher
from prunelit.core.plan import LayerShape, PruningPlan
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Decoder
from prunelit.planning import budget
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.repair import reconstruct
from prunelit.runtime.distributed import take_rank_share
from prunelit.runtime.errors import BadOption

_EVEN_SHARE = 5 / 8  # Fisher information is local: of layers that lose nearly all it promises too much
_MAX_TEXT_LENGTH = 128  # tokens of a text that the model writes; never longer than the calibration's


class Best(PruningCallback):
    """prunelit's own method.

    Args:
        ratio: share of the decoder layers' budget to remove.
        scope: "global" (default) lets layers differ; "layer" keeps them alike for stock classes.
        min_kept: least share of a layer's units that stays; None: 5/8 of what an even cut would keep.
        own_text: tokens the dense model writes, relative to the calibration text's; 0 writes none.
        ridge: of the refit, relative to the mean square of the inputs.
        epochs: passes of distillation over all text; 0: closed forms only.
        learning_rate: peak, of the distillation.
        denoise: of what the distillation changes, keep what stands out of noise.
        kwargs: see `PruningCallback`.
    """

    standardise = False
    score_options = ("unit", "own_text", "seed")
    repair_choices = ("none",)  # it has its own
    cut_options = ("own_text", "ridge", "epochs", "learning_rate", "denoise")

    def __init__(
        self,
        ratio: float,
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
        found = []
        for layer, scores in zip(context.decoder, score_fisher(context.decoder, context.batches), strict=True):
            shape, heads, channels = layer.shape, scores.heads, scores.channels
            if heads is not None:
                # Across layers a KV group counts as the mean of its heads: each bears its part of key and value.
                shared = shape.kv_head_cost / shape.group_size if self.unit == "kv_group" else 0
                heads = heads / (shape.query_head_cost + shared)
            if channels is not None:
                channels = channels / shape.channel_cost
            found.append(LayerScores(heads, channels))
        return found

    def get_min_kept(self, decoder: Decoder) -> float:
        if self.min_kept is not None:
            return self.min_kept
        shapes = decoder.shape.layers
        whole = {layer % len(shapes) for layer in self.protect}
        most = sum(_count_removable(shape, self.unit) for index, shape in enumerate(shapes) if index not in whole)
        even = self.ratio * decoder.shape.block_parameters / max(1, most)
        return max(0.0, _EVEN_SHARE * (1 - even))

    def cut(self, context: PruningContext, plan: PruningPlan) -> None:
        decoder, batches = context.decoder, context.batches
        tokens = int(self.own_text * sum(map(count_real_tokens, batches)))
        length = min(_MAX_TEXT_LENGTH, max((batch["input_ids"].shape[1] for batch in batches), default=0))
        text = list(batches)
        if tokens:
            text += self.compute_cached(
                "text", context, lambda: generated_text.generate_text(decoder.model, tokens, length, self.seed)
            )
        own = take_rank_share(text)
        dense = distill.record_dense_streams(decoder, own) if self.epochs else []
        reconstruct.apply_least_squares(decoder.model, plan, text, ridge=self.ridge)
        cut = Decoder(decoder.model)
        distill.distill_layers(cut, own, dense, self.epochs, self.learning_rate, self.denoise, seed=self.seed)


def _count_removable(shape: LayerShape, unit: budget.Unit) -> int:
    """Parameters of a layer that may go; one KV group, or query head of each, has to stay."""
    found = shape.channel_cost * shape.ffn_channels
    if shape.heads_prunable and shape.kv_groups:
        if unit == "kv_group":
            found += (shape.kv_groups - 1) * (shape.group_size * shape.query_head_cost + shape.kv_head_cost)
        else:
            found += (shape.query_heads - shape.kv_groups) * shape.query_head_cost
    return found

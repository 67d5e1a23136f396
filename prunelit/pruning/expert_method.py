"""ExpertMethod: base of the methods that score whole experts from what the router and the experts compute."""

from abc import abstractmethod

from torch import Tensor

from prunelit.calibration.expert_statistics import ExpertStatistics, count_unreached_experts, measure_experts
from prunelit.core.scores import LayerScores
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext


class ExpertMethod(PruningCallback):
    """Base of methods that score experts by sums over the tokens that each gets. One pass over the text.

    Heads, FFN channels and the FFN beside the experts remain whole. The plan's record of the calibration says how many
    experts no token reached. Arguments: see `PruningCallback`.

    Example: see `prunelit.callbacks.reap`, which is one.
    """

    unit_kinds = ("experts",)
    ignored_options = ("unit", "kinds", "align", "uniform_heads")
    repair_choices = ("none", "least_squares", "merge")  # a bias cannot hold what an expert returned
    standardise = False
    score_options = ()

    @abstractmethod
    def compute_scores(self, statistics: ExpertStatistics) -> Tensor:
        """Compute the scores of a layer's experts, [E]; larger = stays."""

    def score(self, context: PruningContext) -> list[LayerScores]:
        statistics = measure_experts(context.decoder, context.batches)
        unreached, total = count_unreached_experts(statistics)
        self.add_to_calibration_record(experts=total, experts_without_tokens=unreached)
        return [
            LayerScores(experts=self.compute_scores(statistics[layer.index]) if layer.has_experts else None)
            for layer in context.decoder
        ]

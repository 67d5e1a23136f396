"""REAP: remove the experts whose outputs, weighted by the router, are smallest on the tokens that it sends to them.

Source: M. Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression", arXiv 2510.13999. With
f_j(x) the output of expert j, g_j(x) its weight from the router, and X_j the tokens that the router sends to it,

    S_j = mean over x in X_j of g_j(x) ||f_j(x)||_2

Router rows of the removed experts go along, so the router renormalises over those that remain. An expert that no token
reaches has the score 0. One pass over the text, whatever the number of experts.

    callbacks/reap.yaml         attaches it to any LightningCLI job with a second --config
    Python                      Trainer(callbacks=[REAP(ratio=0.25)])
"""

from torch import Tensor

from prunelit.calibration.expert_statistics import ExpertStatistics
from prunelit.pruning.expert_method import ExpertMethod


class REAP(ExpertMethod):
    """Score experts by the mean norm of their output times the router's weight. Arguments: see `PruningCallback`.

    Example:
        >>> import torch, transformers
        >>> config = transformers.MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = REAP(ratio=0.4).prune(transformers.MixtralForCausalLM(config), batches)
        >>> len(plan.layers[0].experts)
        2
    """

    def compute_scores(self, statistics: ExpertStatistics) -> Tensor:
        return statistics.mean_gated_norms

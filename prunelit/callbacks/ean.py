"""EAN: remove the experts with the smallest sum of output norms.

Source: A. Jaiswal et al., "Finding Fantastic Experts in MoEs: A Unified Study for Expert Dropping Strategies and
Observations", arXiv 2504.05586, as REAP (arXiv 2510.13999) states it. With f_j(x) the output of expert j and X_j the
tokens that the router sends to it,

    S_j = sum over x in X_j of ||f_j(x)||_2

    callbacks/ean.yaml          attaches it to any LightningCLI job with a second --config
"""

from torch import Tensor

from prunelit.calibration.expert_statistics import ExpertStatistics
from prunelit.pruning.expert_method import ExpertMethod


class EAN(ExpertMethod):
    """Score experts by the sum of the norms of their output. Arguments: see `PruningCallback`.

    Example:
        >>> import torch, transformers
        >>> config = transformers.MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = EAN(ratio=0.4).prune(transformers.MixtralForCausalLM(config), batches)
        >>> len(plan.layers[0].experts)
        2
    """

    def compute_scores(self, statistics: ExpertStatistics) -> Tensor:
        return statistics.norms

"""Expert frequency: remove the experts that the router chooses least often.

Source: the frequency baseline of the papers on expert pruning, as in X. Lu et al., "Not All Experts are Equal",
arXiv 2402.14800, and in REAP (arXiv 2510.13999). The score of an expert is the number of tokens that the router sends
to it.

    callbacks/expert_frequency.yaml     attaches it to any LightningCLI job with a second --config
"""

from torch import Tensor

from prunelit.calibration.expert_statistics import ExpertStatistics
from prunelit.pruning.expert_method import ExpertMethod


class ExpertFrequency(ExpertMethod):
    """Score experts by the number of tokens that they get. Arguments: see `PruningCallback`.

    Example:
        >>> import torch, transformers
        >>> config = transformers.MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = ExpertFrequency(ratio=0.4).prune(transformers.MixtralForCausalLM(config), batches)
        >>> len(plan.layers[0].experts)
        2
    """

    def compute_scores(self, statistics: ExpertStatistics) -> Tensor:
        return statistics.tokens

"""Random: uniform random scores, the baseline that every method must beat.

Source: the random baseline of the pruning papers. The same seed gives the same plan on every machine and rank.

    callbacks/random.yaml       attaches it to any LightningCLI job with a second --config
"""

from typing import get_args

import torch

from prunelit.core.scores import LayerScores, ScoreKind
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext


class Random(PruningCallback):
    """Score units at random, with the seed `seed`. Arguments: see `PruningCallback`.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> Random(ratio=0.4, align=8, seed=1).plan_model(model).layers[0].query_heads
        (0,)
    """

    reads_text = False
    unit_kinds = get_args(ScoreKind)

    def score(self, context: PruningContext) -> list[LayerScores]:
        # A CPU generator, whatever the device of the model: each device has a random sequence of its own.
        generator = torch.Generator().manual_seed(self.seed)
        return [
            LayerScores(
                torch.rand(layer.shape.query_heads, generator=generator),
                torch.rand(layer.shape.ffn_channels, generator=generator),
                *(
                    torch.rand(count, generator=generator) if count else None
                    for count in (layer.shape.experts, layer.shape.expert_channels)
                ),
            )
            for layer in context.decoder
        ]

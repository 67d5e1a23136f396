"""Random: uniform random scores, the baseline that every method must beat.

Source: the random baseline of the pruning papers. The same seed gives the same plan on every machine and rank.

    callbacks/random.yaml       attaches it to any LightningCLI job with a second --config
"""

import torch

from prunelit.core.scores import LayerScores
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

    def score(self, context: PruningContext) -> list[LayerScores]:
        # A CPU generator, whatever the device of the model: each device has a random sequence of its own.
        generator = torch.Generator().manual_seed(self.seed)
        return [
            LayerScores(
                torch.rand(layer.shape.query_heads, generator=generator),
                torch.rand(layer.shape.ffn_channels, generator=generator),
            )
            for layer in context.decoder
        ]

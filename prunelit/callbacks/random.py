"""Random: uniform random scores, the floor that every method must beat.

Source: the random baseline of the pruning papers. The same seed gives the same plan on every machine and rank.

    callbacks/random.yaml       attaches it to any LightningCLI job with a second --config
"""

import torch

from prunelit.core.scores import LayerScores
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext


class Random(PruningCallback):
    """Score units at random, from `seed`. Arguments: see `PruningCallback`."""

    reads_text = False

    def score(self, context: PruningContext) -> list[LayerScores]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            LayerScores(
                torch.rand(layer.shape.query_heads, generator=generator),
                torch.rand(layer.shape.ffn_channels, generator=generator),
            )
            for layer in context.decoder
        ]

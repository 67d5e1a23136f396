"""Magnitude: l2 norms of the output columns of heads and FFN channels, from the weights alone.

Source: the structured magnitude baseline of FLAP (An et al., AAAI 2024, "Mag-sp"): column norms of the output and down
projections; a head is the sum of its columns. No text is read.

    callbacks/magnitude.yaml    attaches it to any LightningCLI job with a second --config
"""

from prunelit.core.scores import LayerScores
from prunelit.model.decoder import get_weight_out_in
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext


class Magnitude(PruningCallback):
    """Score units by the norm of the weights that carry their output. Arguments: see `PruningCallback`."""

    reads_text = False

    def score(self, context: PruningContext) -> list[LayerScores]:
        found = []
        for layer in context.decoder:
            heads = channels = None
            if layer.has_attention:
                columns = get_weight_out_in(layer.output).detach().float().norm(dim=0)  # [Q * D]
                heads = columns.view(layer.shape.query_heads, layer.shape.head_dim).sum(1)
            if layer.has_mlp:
                channels = get_weight_out_in(layer.down).detach().float().norm(dim=0)  # [F]
            found.append(LayerScores(heads, channels))
        return found

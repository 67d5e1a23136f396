"""Magnitude: l2 norms of the output columns of heads and FFN channels, from the weights alone.

Source: the structured magnitude baseline of FLAP (An et al., AAAI 2024, "Mag-sp"). A channel has the norm of its column
of the down projection, a head the sum of the norms of its columns of the output projection. No text is read.

Ours: an expert has the sum over its channels, and a channel of all experts of a layer the sum over the experts.

    callbacks/magnitude.yaml    attaches it to any LightningCLI job with a second --config
"""

from typing import get_args

from prunelit.core.scores import LayerScores, ScoreKind
from prunelit.model.decoder import get_weight_out_in
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext


class Magnitude(PruningCallback):
    """Score units by the norm of the weights that carry their output. Arguments: see `PruningCallback`.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> plan = Magnitude(ratio=0.4, align=8).prune(transformers.LlamaForCausalLM(config))
        >>> plan.layers[0].widths  # query heads, KV groups, FFN channels
        (1, 1, 16)
    """

    reads_text = False
    unit_kinds = get_args(ScoreKind)

    def score(self, context: PruningContext) -> list[LayerScores]:
        scores = []
        for layer in context.decoder:
            heads = channels = None
            if layer.has_attention:
                columns = get_weight_out_in(layer.output).detach().float().norm(dim=0)  # [Q * D]
                heads = columns.view(layer.shape.query_heads, layer.shape.head_dim).sum(1)
            if layer.has_mlp:
                channels = get_weight_out_in(layer.down).detach().float().norm(dim=0)  # [F]
            experts = expert_channels = None
            if layer.experts is not None:
                norms = layer.experts.reduce_down(lambda weight: weight.norm(dim=0))  # [E, C]
                experts, expert_channels = norms.sum(1), norms.sum(0)
            scores.append(LayerScores(heads, channels, experts, expert_channels))
        return scores

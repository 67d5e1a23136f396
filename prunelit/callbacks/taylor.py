"""Taylor: first- or second-order estimate of the loss that removing heads and FFN channels would add.

Source: X. Ma, G. Fang, X. Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023,
arXiv 2305.11627; the exact forms are those of its code. With w a weight, G its gradient of the calibration loss and F
the mean of its squared gradients over samples, the score of a unit is the sum over its slices (rows of q, k, v, gate,
up; columns of o, down) of

    form      their --taylor   slice
    vector    vectorize        |sum_e w G|
    first     param_first      sum_e |w G|               the default of their script for models with KV groups
    second    param_second     sum_e w^2 F
    mixed     param_mix        sum_e |w G - w^2 F / 2|   named as the default in their README

Ours: the key and value rows of a KV group count for that group (their code adds query head h to group h mod G, although
head h attends with group h / (Q / G)); the bias of a row is one of its elements; G is the mean over sequences. Their
settings: `protect: [0, 1, 2, 3, -1, -2]` on 32 layers, `align: 1`, 10 sequences of 64 tokens.

    callbacks/taylor.yaml       attaches it to any LightningCLI job with a second --config
    Python                      Trainer(callbacks=[Taylor(ratio=0.2)])
"""

from typing import Any, get_args

from prunelit.calibration import taylor
from prunelit.core.scores import EXPERT_KINDS, LayerScores, ScoreKind
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption


class Taylor(PruningCallback):
    """Score heads and FFN channels by weight times gradient.

    Args:
        ratio: share of the decoder layers' parameters to remove.
        form: "vector", "first", "second" or "mixed", see above. "vector" and "second" keep numbers per unit only;
            "first" holds 8 bytes for every weight of the decoder layers, "mixed" 16.
        layers_at_once: number of layers that "first" and "mixed" score at the same time; fewer layers take less memory
            and more passes over the text. None: all.
        checkpointing: keep only the inputs of the layers and run each layer again in the backward pass: less memory for
            activations, a third more time.
        kwargs: see `PruningCallback`.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = Taylor(ratio=0.4, form="vector", align=8).prune(transformers.LlamaForCausalLM(config), batches)
        >>> plan.layers[0].widths  # query heads, KV groups, FFN channels
        (1, 1, 16)
    """

    unit_kinds = get_args(ScoreKind)
    score_options = ("kinds", "form", "unit", "checkpointing", "layers_at_once")

    def __init__(
        self,
        ratio: float | None = None,
        form: taylor.TaylorForm = "first",
        layers_at_once: int | None = None,
        checkpointing: bool = False,
        **kwargs: Any,
    ):
        super().__init__(ratio, **kwargs)
        if form not in get_args(taylor.TaylorForm):
            raise BadOption(f"form: expected one of {', '.join(get_args(taylor.TaylorForm))}, got {form!r}")
        if layers_at_once is not None and layers_at_once < 1:
            raise BadOption(f"layers_at_once: expected a positive number of layers or null, got {layers_at_once!r}")
        self.form, self.layers_at_once, self.checkpointing = form, layers_at_once, checkpointing

    def score(self, context: PruningContext) -> list[LayerScores]:
        return taylor.score_mean_loss(
            *(context.decoder, context.batches, self.form, self.unit, self.checkpointing, self.layers_at_once),
            experts=self.kinds is None or not set(EXPERT_KINDS).isdisjoint(self.kinds),
        )

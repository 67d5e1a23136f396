"""FLAP: how much the inputs of the output projections fluctuate, ranked over all layers; means stay as biases.

Source: Y. An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, arXiv
2312.11983; its code was read. With W the output projection of a block, x_j its input over the calibration tokens of the
dense model,

    IFV   Var x_j        WIFV  Var x_j ||W_:j||_2^2        WIFN  mean_i |W_ij| sqrt(E x_j^2)

For attention the metric is squared, as in the code. Per layer and kind the channels get mean 0 and deviation 1, and a
head is the mean of its channels. `scope: global` is the paper's adaptive structure (AL-AM): heads and neurons of all
layers in one list, a head counting as many neurons as it has parameters; `scope: layer` is its UL-UM. `repair: bias`,
the default, is its compensation (`prunelit.repair.bias`).

Ours: a KV group is the mean of its heads; a plain variance (the code's differs by a constant factor, and leaves out the
first batch); the budget is met from above, at least one KV group and `align` channels stay in every layer, and scope
"layer_mean" reads the metrics as they are, since standardised layers are all alike. The paper's `align` is 1.

    callbacks/flap.yaml         attaches it to any LightningCLI job with a second --config

Legend: T tokens, H hidden, C inputs of an output projection.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunelit.calibration.observe import Sums, observe
from prunelit.core.plan import PruningPlan
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Decoder, Layer, get_weight_out_in
from prunelit.planning import budget
from prunelit.pruning.callback import PruningCallback, Repair
from prunelit.pruning.context import PruningContext
from prunelit.repair import bias
from prunelit.runtime.errors import BadOption

Metric = Literal["WIFV", "IFV", "WIFN"]


class FLAP(PruningCallback):
    """Score heads and FFN channels by the fluctuation of their outputs.

    Args:
        ratio: share of the decoder layers' budget to remove.
        metric: "WIFV" (weighted input feature variance), "IFV" (not weighted) or "WIFN" (weighted norm).
        scope: see `PruningCallback`; "global" is the method.
        repair: see `PruningCallback`; "bias" is the method.
        kwargs: see `PruningCallback`.
    """

    standardise = False  # done here: heads are means of standardised channels
    joint = True

    def __init__(
        self,
        ratio: float,
        metric: Metric = "WIFV",
        scope: budget.Scope = "global",
        repair: Repair = "bias",
        **kwargs: Any,
    ):
        super().__init__(ratio, scope=scope, repair=repair, **kwargs)
        if metric not in get_args(Metric):
            raise BadOption(f"metric: expected one of {', '.join(get_args(Metric))}, got {metric!r}")
        self.metric = metric
        self._scored_means: tuple[Decoder, list[dict[str, Tensor]]] | None = None  # from scoring, for the biases

    def score(self, context: PruningContext) -> list[LayerScores]:
        decoder, batches = context.decoder, context.batches
        sums = Sums(len(decoder.layers))

        def accumulate(layer: Layer, x: Mapping[str, Tensor]) -> None:
            for point, rows in x.items():
                total = rows.sum(0, dtype=torch.float64)
                mean = total / max(1, len(rows))
                # Squares around the batch's own mean: those around zero would cancel where means are large.
                within = (rows.float() - mean.float()).square().sum(0, dtype=torch.float64)
                sums.add(layer, f"{point}.sum", total)
                sums.add(layer, f"{point}.squares", within + len(rows) * mean.square())

        tokens = observe(decoder, batches, ("heads", "channels"), accumulate)
        means = sums.means(tokens, decoder.device)
        self._scored_means = (
            decoder,
            [{name.removesuffix(".sum"): mean for name, mean in each.items()} for each in means],
        )
        return [
            LayerScores(
                self._score_heads(layer, self._compute_metric(layer.output, mean, "heads") ** 2)
                if layer.has_attention
                else None,
                self._standardise_channels(self._compute_metric(layer.down, mean, "channels"))
                if layer.has_mlp
                else None,
            )
            for layer, mean in zip(decoder, means, strict=True)
        ]

    def cut(self, context: PruningContext, plan: PruningPlan) -> None:
        decoder, batches = context.decoder, context.batches
        scored, self._scored_means = self._scored_means, None
        if self.repair == "bias" and scored is not None and scored[0] is decoder:  # a replayed plan was not scored here
            bias.apply_bias_compensation(decoder.model, plan, batches, scored[1])
        else:
            super().cut(context, plan)

    def _compute_metric(self, linear: nn.Module, mean: Mapping[str, Tensor], point: str) -> Tensor:
        """The metric of every input of an output projection, float64 [C]."""
        weight = get_weight_out_in(linear).detach().float()
        if self.metric == "WIFN":
            return weight.abs().mean(0) * mean[f"{point}.squares"].sqrt()
        variance = (mean[f"{point}.squares"] - mean[f"{point}.sum"].square()).clamp(min=0)
        return variance * weight.square().sum(0) if self.metric == "WIFV" else variance

    def _score_heads(self, layer: Layer, channels: Tensor) -> Tensor:
        return self._standardise_channels(channels).view(layer.shape.query_heads, layer.shape.head_dim).mean(1)

    def _standardise_channels(self, channels: Tensor) -> Tensor:
        """Mean 0 and deviation 1, unless the scope compares the layers' means."""
        if self.scope == "layer_mean":
            return channels
        deviation = channels.std() if len(channels) > 1 else channels.new_zeros(())
        return (channels - channels.mean()) / deviation if deviation > 0 else torch.zeros_like(channels)

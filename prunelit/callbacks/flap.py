"""FLAP: cut heads and channels whose values fluctuate least over the text, and keep their means as biases.

Source: Y. An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, arXiv
2312.11983, and its code. With W the output projection of a block, x_j its input over the calibration tokens of the
dense model,

    IFV   Var x_j        WIFV  Var x_j ||W_:j||_2^2        WIFN  mean_i |W_ij| sqrt(E x_j^2)

For attention the metric is squared, as in the code. The channels of a layer and kind are standardised to mean 0 and
deviation 1, and a head is the mean of its channels. `scope: global` is the paper's adaptive structure (AL-AM): heads
and neurons of all layers are ranked in one list, and a head counts as many neurons as it has parameters; `scope: layer`
is its UL-UM. `repair: bias`, the default, is its compensation (`prunelit.repair.bias`).

Ours: a KV group is the mean of its heads. The variance is the plain one; the code's differs by a constant factor and
leaves out the first batch. The cut removes at least the budget, and at least one KV group and `align` channels stay in
every layer. Scope "layer_mean" compares the metrics as they are, since standardised layers all have the same mean. The
paper's `align` is 1.

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
"""Importance of a channel, see above."""


class FLAP(PruningCallback):
    """Score heads and FFN channels by the fluctuation of their outputs.

    Args:
        ratio: share of the decoder layers' budget to remove.
        metric: "WIFV" (weighted input feature variance), "IFV" (not weighted) or "WIFN" (weighted norm).
        scope: see `PruningCallback`; "global" is the method.
        repair: see `PruningCallback`; "bias" is the method.
        kwargs: see `PruningCallback`.

    Example:
        >>> method = FLAP(ratio=0.2, metric="IFV")
        >>> method.scope, method.repair
        ('global', 'bias')
    """

    standardise = False  # `score` standardises channels itself, before it averages them to heads
    joint = True

    def __init__(
        self,
        ratio: float | None = None,
        metric: Metric = "WIFV",
        scope: budget.Scope = "global",
        repair: Repair = "bias",
        **kwargs: Any,
    ):
        super().__init__(ratio, scope=scope, repair=repair, **kwargs)
        if metric not in get_args(Metric):
            raise BadOption(f"metric: expected one of {', '.join(get_args(Metric))}, got {metric!r}")
        self.metric = metric
        self._scored_means: tuple[Decoder, list[dict[str, Tensor]]] | None = None
        """The scored decoder, and the mean inputs of its output projections, which the biases need."""

    def score(self, context: PruningContext) -> list[LayerScores]:
        decoder, batches = context.decoder, context.batches
        sums = Sums(len(decoder.layers))

        def accumulate(layer: Layer, x: Mapping[str, Tensor]) -> None:
            for point, rows in x.items():
                total = rows.sum(0, dtype=torch.float64)
                mean = total / max(1, len(rows))
                # Float32 squares are taken around the mean of the batch: squares around zero would lose the variance
                # to rounding where the mean is large.
                squares_around_mean = (rows.float() - mean.float()).square().sum(0, dtype=torch.float64)
                sums.add(layer, f"{point}.sum", total)
                sums.add(layer, f"{point}.squares", squares_around_mean + len(rows) * mean.square())

        tokens = observe(decoder, batches, ("heads", "channels"), accumulate)
        means = sums.means(tokens, decoder.device)
        self._scored_means = (
            decoder,
            [{name.removesuffix(".sum"): value for name, value in layer_means.items()} for layer_means in means],
        )
        return [self._score_layer(layer, layer_means) for layer, layer_means in zip(decoder, means, strict=True)]

    def cut(self, context: PruningContext, plan: PruningPlan) -> None:
        decoder, batches = context.decoder, context.batches
        scored_means, self._scored_means = self._scored_means, None
        # A plan that is given, or comes from the cache, was not scored here.
        if self.repair == "bias" and scored_means is not None and scored_means[0] is decoder:
            bias.apply_bias_compensation(decoder, plan, batches, scored_means[1])
        else:
            super().cut(context, plan)

    def _score_layer(self, layer: Layer, means: Mapping[str, Tensor]) -> LayerScores:
        heads = channels = None
        if layer.has_attention:
            heads = self._score_heads(layer, self._compute_metric(layer.output, means, "heads") ** 2)
        if layer.has_mlp:
            channels = self._standardise_channels(self._compute_metric(layer.down, means, "channels"))
        return LayerScores(heads, channels)

    def _compute_metric(self, linear: nn.Module, means: Mapping[str, Tensor], point: str) -> Tensor:
        """Compute the metric of every input of an output projection, float64 [C]."""
        weight = get_weight_out_in(linear).detach().float()
        if self.metric == "WIFN":
            return weight.abs().mean(0) * means[f"{point}.squares"].sqrt()
        variance = (means[f"{point}.squares"] - means[f"{point}.sum"].square()).clamp(min=0)
        return variance * weight.square().sum(0) if self.metric == "WIFV" else variance

    def _score_heads(self, layer: Layer, channels: Tensor) -> Tensor:
        return self._standardise_channels(channels).view(layer.shape.query_heads, layer.shape.head_dim).mean(1)

    def _standardise_channels(self, channels: Tensor) -> Tensor:
        """Standardise to mean 0 and deviation 1, unless the scope compares the means of layers."""
        if self.scope == "layer_mean":
            return channels
        deviation = channels.std() if len(channels) > 1 else channels.new_zeros(())
        return (channels - channels.mean()) / deviation if deviation > 0 else torch.zeros_like(channels)

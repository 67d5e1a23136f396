"""LLM-BIP: influence of heads and FFN channels on the output of their transformer block, in one forward pass.

Source: H. Wu, "LLM-BIP: Structured Pruning for Large Language Models with Block-Wise Forward Importance Propagation",
arXiv 2412.06419. The paper bounds the l1 distance between dense and pruned block output; its Eq. 8 (attention output
channels) and Eq. 9 (FFN channels) are derived again in docs/methods.md, where what is ours is marked.

    callbacks/llm_bip.yaml      attaches it to any LightningCLI job with a second --config
    Python                      Trainer(callbacks=[LLMBIP(ratio=0.2)])

Legend: T tokens, H hidden, C = Q * D attention-output channels, F FFN channels.
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunelit.calibration.observe import ActivationPoint, Sums, observe
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Layer, get_weight_out_in
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption

_OBSERVED_POINTS: tuple[ActivationPoint, ...] = (
    "heads",
    "attention_output",
    "residual",
    "up",
    "gate",
    "channels",
    "mlp_output",
)


class LLMBIP(PruningCallback):
    """Score heads and FFN channels by a bound on the change of their block's output.

    Args:
        ratio: share of the decoder layers' parameters to remove.
        form: "mean_field" keeps means of activation magnitudes (one forward pass, nothing more); "exact" propagates the
            bound token by token (about one more FFN and output projection per token).
        propagate_ffn: bound the change that attention makes through the FFN as well (the method); False keeps the
            direct term only.
        kwargs: see `PruningCallback`.
    """

    score_options = ("form", "propagate_ffn")

    def __init__(
        self,
        ratio: float,
        form: Literal["mean_field", "exact"] = "mean_field",
        propagate_ffn: bool = True,
        **kwargs: Any,
    ):
        super().__init__(ratio, **kwargs)
        if form not in ("mean_field", "exact"):
            raise BadOption(f"form: expected mean_field or exact, got {form!r}")
        self.form, self.propagate_ffn = form, propagate_ffn

    def score(self, context: PruningContext) -> list[LayerScores]:
        decoder, batches = context.decoder, context.batches
        sums = Sums(len(decoder.layers))
        bounds = [_Bound(layer, decoder.config, self.propagate_ffn) for layer in decoder]

        def accumulate(layer: Layer, x: Mapping[str, Tensor]) -> None:
            for name, value in bounds[layer.index].compute_statistics(x, exact=self.form == "exact").items():
                sums.add(layer, name, value)

        tokens = observe(decoder, batches, _OBSERVED_POINTS, accumulate)
        return [
            bound.compute_scores(mean) for bound, mean in zip(bounds, sums.means(tokens, decoder.device), strict=True)
        ]


class _Bound:
    """The bound of one layer: what to accumulate per token, and the scores that follow from the means."""

    def __init__(self, layer: Layer, config: Any, propagate_ffn: bool):
        self.layer, self.architecture = layer, layer.architecture
        self.scale = (
            float(getattr(config, self.architecture.residual_scale)) if self.architecture.residual_scale else 1.0
        )
        # In a parallel block the FFN does not see what attention changes.
        self.through_ffn = propagate_ffn and layer.has_attention and layer.has_mlp and not self.architecture.parallel
        self.gated = self.through_ffn and self.architecture.gate is not None
        self.slope = estimate_lipschitz(layer.activation) if self.through_ffn else 0.0

    def _measure_columns(self, linear: nn.Module, post_norm: str) -> Tensor:
        """|weight| of an output projection as it reaches the residual stream, [H, inputs]."""
        return get_weight_out_in(linear).detach().abs().float() * self.scale * self.layer.get_gain(post_norm)[:, None]

    def compute_statistics(self, x: Mapping[str, Tensor], exact: bool) -> dict[str, Tensor]:
        """Sums over the tokens of one batch, float32; x: {point: [T, width]}."""
        found, layer = {}, self.layer
        if layer.has_mlp:
            after = layer.compute_inverse_norm("mlp_post_norm", x["mlp_output"])  # [T]
            found["after"] = after.sum()
            for point in ("channels", "up", "gate") if self.gated else ("channels",):
                found[point] = after @ x[point].abs().float()
        if layer.has_attention:
            magnitude = x["heads"].abs().float()  # [T, C]
            magnitude *= layer.compute_inverse_norm("attention_post_norm", x["attention_output"])[:, None]
            found["direct"] = magnitude.sum(0)
            if self.through_ffn:
                before = layer.compute_inverse_norm("mlp_norm", x["residual"])
                if not exact:
                    found["normed"] = before @ magnitude
                else:
                    inner = [x[point].abs().float() * after[:, None] for point in ("up", "gate") if self.gated]
                    weight = self._weigh_ffn(after[:, None], *inner) * before[:, None]  # [T, H]
                    output = self._measure_columns(layer.output, "attention_post_norm")
                    found["through"] = (magnitude * (weight @ output)).sum(0)
        return found

    def compute_scores(self, mean: Mapping[str, Tensor]) -> LayerScores:
        """Scores from means over tokens: BIP-H summed over each head's channels, and BIP-F."""
        heads = channels = None
        layer = self.layer
        if layer.has_mlp:
            channels = mean["channels"] * self._measure_columns(layer.down, "mlp_post_norm").sum(0)
        if layer.has_attention:
            output = self._measure_columns(layer.output, "attention_post_norm")  # [H, C]
            score = mean["direct"] * output.sum(0)
            if "through" in mean:
                score = score + mean["through"]
            elif "normed" in mean:
                inner = [mean[point].float() for point in ("up", "gate") if point in mean]
                score = score + mean["normed"] * (self._weigh_ffn(mean["after"].float(), *inner) @ output)
            heads = score.view(layer.shape.query_heads, layer.shape.head_dim).sum(1)
        return LayerScores(heads, channels)

    def _weigh_ffn(self, after: Tensor, up: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """w: how much a unit change of each normed residual channel can move the block output, [..., H]."""
        down = self._measure_columns(self.layer.down, "mlp_post_norm").sum(0)  # [F]
        weights = [get_weight_out_in(linear).detach().abs().float() for linear in self.layer.ffn_in]  # [F, H] each
        if up is None or gate is None:
            weight = self.slope * after * (down @ weights[0])
        else:
            gate_weight, up_weight = weights if len(weights) == 2 else weights[0].chunk(2)
            weight = self.slope * (up * down) @ gate_weight + (gate * down) @ up_weight
        weight = weight * self.layer.get_gain("mlp_norm")
        if self.layer.architecture.norm == "layer" and self.layer.get_norm("mlp_norm") is not None:
            weight = weight + weight.mean(-1, keepdim=True)  # a LayerNorm also subtracts the mean
        return weight


@torch.no_grad()
def estimate_lipschitz(activation: nn.Module) -> float:
    """Largest slope of an activation on [-10, 10]: ReLU 1, SiLU 1.0998, GELU 1.1289."""
    grid = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    values = copy.deepcopy(activation).double().cpu()(grid)
    return float((values.diff() / grid.diff()).abs().max())

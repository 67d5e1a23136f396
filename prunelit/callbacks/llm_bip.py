"""LLM-BIP: influence of heads and FFN channels on the output of their transformer block, in one forward pass.

Source: H. Wu, "LLM-BIP: Structured Pruning for Large Language Models with Block-Wise Forward Importance Propagation",
arXiv 2412.06419. The paper bounds the l1 distance between dense and pruned block output. Its Eq. 8 (attention output
channels) and Eq. 9 (FFN channels) are derived again in docs/methods.md, which also marks what is ours.

    callbacks/llm_bip.yaml      attaches it to any LightningCLI job with a second --config
    Python                      Trainer(callbacks=[LLMBIP(ratio=0.2)])

Legend: T tokens, H hidden, C = Q * D attention-output channels, F FFN channels.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from prunelit.calibration.observe import ActivationPoint, Sums, observe
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Layer, get_weight_out_in
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
        form: "mean_field" averages activation magnitudes over tokens (one forward pass, nothing more); "exact"
            propagates the bound token by token (about one more FFN and output projection per token).
        propagate_ffn: also bound the change of the FFN's output that a change of attention causes (the method); False:
            the direct term only.
        kwargs: see `PruningCallback`.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = LLMBIP(ratio=0.4, align=8).prune(transformers.LlamaForCausalLM(config), batches)
        >>> plan.layers[0].widths  # query heads, KV groups, FFN channels
        (1, 1, 16)
    """

    score_options = ("form", "propagate_ffn")

    def __init__(
        self,
        ratio: float | None = None,
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
        means = sums.means(tokens, decoder.device)
        return [bound.compute_scores(layer_means) for bound, layer_means in zip(bounds, means, strict=True)]


class _Bound:
    """The bound of one layer: statistics to sum over tokens, and the scores that follow from their means."""

    def __init__(self, layer: Layer, config: "PreTrainedConfig", propagate_ffn: bool):
        self.layer, self.architecture = layer, layer.architecture
        self.attention_scale = layer.get_residual_scale(config, "attention") if layer.has_attention else 1.0
        self.mlp_scale = layer.get_residual_scale(config, "mlp") if layer.has_mlp else 1.0
        # In a parallel block the FFN does not read the output of attention.
        self.through_ffn = propagate_ffn and layer.has_attention and layer.has_mlp and not self.architecture.parallel
        self.gated = self.through_ffn and self.architecture.gate is not None
        self.slope = estimate_lipschitz(layer.activation) if self.through_ffn else 0.0

    def _measure_columns(self, linear: nn.Module, post_norm: str, scale: float) -> Tensor:
        """Return |weight| of an output projection, scaled as its output reaches the residual stream, [H, inputs]."""
        return get_weight_out_in(linear).detach().abs().float() * scale * self.layer.get_gain(post_norm)[:, None]

    def compute_statistics(self, x: Mapping[str, Tensor], exact: bool) -> dict[str, Tensor]:
        """Sum the statistics of one batch over its tokens.

        Args:
            x: {point: activations [T, width]}.
            exact: propagate the bound of attention through the FFN for each token.

        Returns:
            {name: sum}, float32.
        """
        statistics, layer = {}, self.layer
        if layer.has_mlp:
            output_scale = layer.compute_inverse_norm("mlp_post_norm", x["mlp_output"])  # [T]
            statistics["after"] = output_scale.sum()
            for point in ("channels", "up", "gate") if self.gated else ("channels",):
                statistics[point] = output_scale @ x[point].abs().float()
        if layer.has_attention:
            magnitude = x["heads"].abs().float()  # [T, C]
            magnitude *= layer.compute_inverse_norm("attention_post_norm", x["attention_output"])[:, None]
            statistics["direct"] = magnitude.sum(0)
            if self.through_ffn:
                input_scale = layer.compute_inverse_norm("mlp_norm", x["residual"])
                if not exact:
                    statistics["normed"] = input_scale @ magnitude
                else:
                    inner = [x[point].abs().float() * output_scale[:, None] for point in ("up", "gate") if self.gated]
                    weight = self._weigh_ffn(output_scale[:, None], *inner) * input_scale[:, None]  # [T, H]
                    output = self._measure_columns(layer.output, "attention_post_norm", self.attention_scale)
                    statistics["through"] = (magnitude * (weight @ output)).sum(0)
        return statistics

    def compute_scores(self, means: Mapping[str, Tensor]) -> LayerScores:
        """Score units from means over tokens: BIP-H summed over each head's channels, and BIP-F."""
        heads = channels = None
        layer = self.layer
        if layer.has_mlp:
            channels = means["channels"] * self._measure_columns(layer.down, "mlp_post_norm", self.mlp_scale).sum(0)
        if layer.has_attention:
            output = self._measure_columns(layer.output, "attention_post_norm", self.attention_scale)  # [H, C]
            score = means["direct"] * output.sum(0)
            if "through" in means:
                score = score + means["through"]
            elif "normed" in means:
                inner = [means[point].float() for point in ("up", "gate") if point in means]
                score = score + means["normed"] * (self._weigh_ffn(means["after"].float(), *inner) @ output)
            heads = score.view(layer.shape.query_heads, layer.shape.head_dim).sum(1)
        return LayerScores(heads, channels)

    def _weigh_ffn(self, output_scale: Tensor, up: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """Bound the change of the block output per unit change of each normed residual channel.

        Args:
            output_scale: [..., 1], factor of the norm after the FFN.
            up: [..., F], |up| times that factor, in a gated FFN.
            gate: [..., F], |act(gate)| times that factor, in a gated FFN.

        Returns:
            [..., H].
        """
        down = self._measure_columns(self.layer.down, "mlp_post_norm", self.mlp_scale).sum(0)  # [F]
        weights = [get_weight_out_in(linear).detach().abs().float() for linear in self.layer.ffn_in]  # [F, H] each
        if up is None or gate is None:
            weight = self.slope * output_scale * (down @ weights[0])
        else:
            gate_weight, up_weight = weights if len(weights) == 2 else weights[0].chunk(2)
            weight = self.slope * (up * down) @ gate_weight + (gate * down) @ up_weight
        weight = weight * self.layer.get_gain("mlp_norm")
        if self.layer.architecture.norm == "layer" and self.layer.get_norm("mlp_norm") is not None:
            weight = weight + weight.mean(-1, keepdim=True)  # LayerNorm subtracts the mean, so all channels move
        return weight


@torch.no_grad()
def estimate_lipschitz(activation: nn.Module) -> float:
    """Estimate the largest slope of an activation function on [-10, 10].

    Args:
        activation: the function as a module, applied element by element.

    Example:
        >>> round(estimate_lipschitz(nn.SiLU()), 4), round(estimate_lipschitz(nn.GELU()), 4)
        (1.0998, 1.1289)
    """
    grid = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    values = copy.deepcopy(activation).double().cpu()(grid)
    return float((values.diff() / grid.diff()).abs().max())

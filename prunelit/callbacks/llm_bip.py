"""LLM-BIP: influence of heads and FFN channels on the output of their transformer block, in one forward pass.

Source: H. Wu, "LLM-BIP: Structured Pruning for Large Language Models with Block-Wise Forward Importance Propagation",
arXiv 2412.06419. The paper bounds the l1 distance between dense and pruned block output; its Eq. 8 (attention output
channels) and Eq. 9 (FFN channels) are derived again in docs/methods.md, where what is ours is marked.

    callbacks/llm_bip.yaml      trainer: {callbacks+: {class_path: prunelit.callbacks.LLMBIP, init_args: {ratio: 0.2}}}
    Python                      Trainer(callbacks=[LLMBIP(ratio=0.2)])

Legend: T tokens, H hidden, C = Q * D attention-output channels, F FFN channels.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from prunelit.calibrate import Batch, Point, all_sum, observe
from prunelit.callbacks.base import PruningCallback
from prunelit.decoder import Decoder, Layer, find, weight_out_in
from prunelit.rank import LayerScores

_POINTS: tuple[Point, ...] = ("heads", "attention_output", "residual", "up", "gate", "channels", "mlp_output")


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

    def __init__(
        self, ratio: float, form: Literal["mean_field", "exact"] = "mean_field", propagate_ffn: bool = True, **kwargs: Any
    ):
        super().__init__(ratio, **kwargs)
        self.form, self.propagate_ffn = form, propagate_ffn

    def score(self, decoder: Decoder, batches: Sequence[Batch]) -> list[LayerScores]:
        sums: list[dict[str, Tensor]] = [defaultdict(lambda: torch.zeros((), dtype=torch.float64)) for _ in decoder]
        bounds = [_Bound(layer, decoder.config, self.propagate_ffn) for layer in decoder]

        def accumulate(layer: Layer, x: Mapping[str, Tensor]) -> None:
            for name, value in bounds[layer.index].statistics(x, exact=self.form == "exact").items():
                sums[layer.index][name] = sums[layer.index][name].to(value.device) + value.double()

        tokens = observe(decoder, batches, _POINTS, accumulate)
        means = [{name: all_sum(value) / tokens for name, value in of_layer.items()} for of_layer in sums]
        return [bound.scores(mean) for bound, mean in zip(bounds, means, strict=True)]


class _Bound:
    """The bound of one layer: what to accumulate per token, and the scores that follow from the means."""

    def __init__(self, layer: Layer, config: Any, propagate_ffn: bool):
        self.layer, names = layer, layer.architecture
        scale = float(getattr(config, names.residual_scale)) if names.residual_scale else 1.0
        # In a parallel block the FFN does not see what attention changes.
        self.through_ffn = propagate_ffn and layer.has_attention and layer.has_mlp and not names.parallel
        if layer.has_attention:
            gain = _gain(layer, "attention_post_norm")
            self.output = weight_out_in(layer.output).detach().abs().float() * scale * gain[:, None]  # [H, C]
        if layer.has_mlp:
            gain = _gain(layer, "mlp_post_norm")
            self.down = (weight_out_in(layer.down).detach().abs().float() * scale * gain[:, None]).sum(0)  # [F]
        if self.through_ffn:
            weights = [weight_out_in(linear).detach().abs().float() for linear in layer.ffn_in]
            if names.fused_gate_up:
                weights = list(weights[0].chunk(2))
            self.up, self.gate = weights[-1], weights[0] if names.gate else None  # [F, H]
            self.lipschitz = lipschitz(layer.activation)

    def statistics(self, x: Mapping[str, Tensor], exact: bool) -> dict[str, Tensor]:
        """Sums over the tokens of one batch, float32; x: {point: [T, width]}."""
        found = {}
        if self.layer.has_mlp:
            after = self._inverse_norm(x, "mlp_output", "mlp_post_norm")
            for point in ("channels", "up", "gate") if self.through_ffn and self.gate is not None else ("channels",):
                found[point] = after @ x[point].abs().float()
            found["after"] = after.sum()
        if self.layer.has_attention:
            magnitude = x["heads"].abs().float() * self._inverse_norm(x, "attention_output", "attention_post_norm")[:, None]
            found["direct"] = magnitude.sum(0)
            if self.through_ffn:
                before = self._inverse_norm(x, "residual", "mlp_norm")
                if exact:
                    up, gate = (x[point].abs().float() * after[:, None] for point in ("up", "gate")) if self.gate is not None else (None, None)
                    weight = self._ffn_weight(up, gate, after[:, None])  # [T, H]
                    found["through"] = (magnitude * ((weight * before[:, None]) @ self.output)).sum(0)
                else:
                    found["normed"] = before @ magnitude
        return found

    def scores(self, mean: Mapping[str, Tensor]) -> LayerScores:
        """Scores from means over tokens: BIP-H summed over each head's channels, and BIP-F."""
        heads = channels = None
        if self.layer.has_mlp:
            channels = mean["channels"] * self.down
        if self.layer.has_attention:
            score = mean["direct"] * self.output.sum(0)
            if self.through_ffn and "through" in mean:
                score = score + mean["through"]
            elif self.through_ffn:
                up, gate = (mean[p].float() if self.gate is not None else None for p in ("up", "gate"))
                weight = self._ffn_weight(up, gate, mean["after"].float())
                score = score + mean["normed"] * (weight @ self.output)
            heads = score.view(self.layer.shape.query_heads, self.layer.shape.head_dim).sum(1)
        return LayerScores(heads, channels)

    def _ffn_weight(self, up: Tensor | None, gate: Tensor | None, after: Tensor) -> Tensor:
        """w: how much a unit change of each normed residual channel can move the block output, [..., H]."""
        if self.gate is None:
            weight = self.lipschitz * after * (self.down @ self.up)
        else:
            up, gate = cast(Tensor, up), cast(Tensor, gate)
            weight = self.lipschitz * (up * self.down) @ self.gate + (gate * self.down) @ self.up
        weight = weight * _gain(self.layer, "mlp_norm")
        if self.layer.architecture.norm == "layer" and self.layer.norm("mlp_norm") is not None:
            weight = weight + weight.mean(-1, keepdim=True)  # a LayerNorm also subtracts the mean
        return weight

    def _inverse_norm(self, x: Mapping[str, Tensor], point: str, role: str) -> Tensor:
        """1 / rms (or deviation) of a norm's input per token [T]; 1 where the layer has no such norm."""
        values = next(iter(x.values())) if point not in x else x[point]
        if self.layer.norm(role) is None:
            return torch.ones(len(values), device=values.device)
        values = values.float()
        if self.layer.architecture.norm == "layer":
            values = values - values.mean(-1, keepdim=True)
        return values.square().mean(-1).add(1e-6).rsqrt()


def _gain(layer: Layer, role: str) -> Tensor:
    """|gain| of a norm [H]; 1 where there is no norm or it has no weight."""
    weight = find(layer.norm(role), "weight") if layer.norm(role) is not None else None
    size = weight_out_in(layer.output if layer.has_attention else layer.down).shape[0]
    if weight is None:
        return torch.ones(size, device=next(layer.module.parameters()).device)
    return (cast(Tensor, weight).detach().float() + layer.architecture.norm_offset).abs()


@torch.no_grad()
def lipschitz(activation: nn.Module) -> float:
    """Largest slope of an activation on [-10, 10]: ReLU 1, SiLU 1.0998, GELU 1.1289."""
    grid = torch.linspace(-10, 10, 20001)
    values = copy.deepcopy(activation).float().cpu()(grid)
    return float((values.diff() / grid.diff()).abs().max())

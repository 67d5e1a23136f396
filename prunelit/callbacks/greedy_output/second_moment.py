"""Second moment of what a head or an FFN channel adds to the residual stream.

Source: J. Li, Y. Dong, Q. Lei, "Greedy Output Approximation", CPAL 2025, arXiv 2407.19126, Eq. 3 and 4, appendix B and
the authors' research code. For a module y = B A x, channel j adds B_j (A x)_j, with second moment

    M_j = |B_j|^2 E[(A x)_j^2]        |B_j|: l2 norm of column j; A includes the bias

The paper writes E[(A x)_j^2] as A_j Sigma A_j^T with Sigma = E[x x^T]: the same number, from far more memory.

Legend: T tokens, H hidden, Q query heads, G KV groups, D head size, F FFN channels.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.observe import ActivationPoint, Sums, observe
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Decoder, Layer, get_weight_out_in

Moment = Literal["empirical", "paper", "code"]
MOMENT_POINTS: dict[str, dict[str, tuple[ActivationPoint, ...]]] = {
    "empirical": {"attention": ("heads",), "mlp": ("channels",)},
    "paper": {"attention": ("heads",), "mlp": ("mlp_input",)},  # Eq. 3 on the attention-mixed input is E[h^2]
    "code": {"attention": ("attention_input",), "mlp": ("mlp_input",)},
}
"""What `accumulate_squares` reads, by form and block."""


def score_second_moments(decoder: Decoder, batches: Sequence[Batch], moment: Moment) -> list[LayerScores]:
    """Scores of the dense model, from one forward pass; larger = keep.

    Args:
        decoder: the model; left as it was.
        batches: the same list on every rank; the ranks share the work.
        moment: with h and f the inputs of the output projections O and W, g and u the outputs of gate and up, v that of
            the value projection: "empirical" |O_j|^2 E[h_j^2] and |W_j|^2 E[f_j^2]; "paper" the same for heads, and the
            product over g and u of |W_j|^2 E[u_j^2]; "code" |O_j| E[v_j^2] and |W_j| act(E[g_j^2]) E[u_j^2]. In a plain
            FFN there is no g, and act(E[u_j^2]) in the last. A head has the sum of its channels.
    """
    sums = Sums(len(decoder.layers))
    points = tuple(point for of_block in MOMENT_POINTS[moment].values() for point in of_block)
    tokens = observe(decoder, batches, points, lambda layer, x: accumulate_squares(sums, layer, x))
    means = sums.means(tokens, decoder.device)
    return [compute_moment_scores(layer, mean, moment) for layer, mean in zip(decoder, means, strict=True)]


def accumulate_squares(sums: Sums, layer: Layer, x: Mapping[str, Tensor]) -> None:
    """Add the squares over a batch of heads and channels, or of the linears at the inputs; x: {point: [T, width]}."""
    for point, value in x.items():
        linears = {"attention_input": layer.qkv[-1:], "mlp_input": layer.ffn_in}[point] if "input" in point else ()
        values = [nn.functional.linear(value.float(), *_get_float_weights(linear)) for linear in linears] or [
            value.float()
        ]
        sums.add(layer, point, torch.cat([each.square().sum(0) for each in values]))


def _get_float_weights(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    bias = cast("Tensor | None", linear.bias)
    return get_weight_out_in(linear).float(), None if bias is None else bias.float()


def compute_moment_scores(layer: Layer, mean: Mapping[str, Tensor], moment: Moment) -> LayerScores:
    """Scores from means of squares over tokens."""
    heads = channels = None
    shape, names = layer.shape, layer.architecture
    if "heads" in mean or "attention_input" in mean:
        norm = get_weight_out_in(layer.output).detach().double().norm(dim=0).view(shape.query_heads, shape.head_dim)
        if "heads" in mean:
            heads = (norm.square() * mean["heads"].view_as(norm)).sum(1)
        else:  # rows of the value projection: the last of each group's block, or of all
            blocks = mean["attention_input"].view(shape.kv_groups if names.qkv_layout == "grouped" else 1, -1)
            value = blocks[:, -shape.kv_groups * shape.head_dim // len(blocks) :].reshape(-1, shape.head_dim)  # [G, D]
            heads = (norm * value.repeat_interleave(shape.group_size, 0)).sum(1)
    if "channels" in mean or "mlp_input" in mean:
        norm = get_weight_out_in(layer.down).detach().double().norm(dim=0)
        parts = mean["channels"][None] if "channels" in mean else mean["mlp_input"].view(-1, shape.ffn_channels)
        if moment == "code":  # act(gate) * up, or act(up) in a plain FFN
            channels = norm * layer.activation(parts[0].float()) * parts[1:].prod(0)
        else:
            channels = (norm.square() * parts).prod(0)
    return LayerScores(heads, channels)

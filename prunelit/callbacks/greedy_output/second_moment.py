"""Second moment of the contribution of a head or an FFN channel to the residual stream.

Source: J. Li, Y. Dong, Q. Lei, "Greedy Output Approximation", CPAL 2025, arXiv 2407.19126, Eq. 3 and 4, appendix B and
the authors' research code. For a module y = B A x, channel j adds B_j (A x)_j, with second moment

    M_j = |B_j|^2 E[(A x)_j^2]        |B_j|: l2 norm of column j; A includes the bias

The paper writes E[(A x)_j^2] as A_j Sigma A_j^T with Sigma = E[x x^T], which is the same number and takes far more
memory.

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
"""Form of the second moment, see `score_second_moments`."""
MOMENT_POINTS: dict[str, dict[str, tuple[ActivationPoint, ...]]] = {
    "empirical": {"attention": ("heads",), "mlp": ("channels",)},
    "paper": {"attention": ("heads",), "mlp": ("mlp_input",)},  # Eq. 3 on the attention-mixed input is E[h^2]
    "code": {"attention": ("attention_input",), "mlp": ("mlp_input",)},
}
"""Points that `accumulate_squares` reads, by form and block."""


def score_second_moments(decoder: Decoder, batches: Sequence[Batch], moment: Moment) -> list[LayerScores]:
    """Score the units of the dense model by second moments, from one forward pass; larger = stays.

    With h and f the inputs of the output projections O and W, g and u the outputs of gate and up, and v the output of
    the value projection, the forms are

        empirical   |O_j|^2 E[h_j^2]     |W_j|^2 E[f_j^2]
        paper       |O_j|^2 E[h_j^2]     |W_j|^2 E[g_j^2] |W_j|^2 E[u_j^2]
        code        |O_j| E[v_j^2]       |W_j| act(E[g_j^2]) E[u_j^2]

    A plain FFN has no g: "paper" then has one factor, and "code" is |W_j| act(E[u_j^2]). A head is the sum of its
    channels.

    Args:
        decoder: the model; left as it was.
        batches: calibration batches, the same list on every rank; the ranks share the work.
        moment: the form.

    Returns:
        One `LayerScores` per layer, float64: [Q] heads and [F] channels.

    Raises:
        NonFinite, NoCalibration: see `prunelit.calibration.observe.observe`.

    Example: see `tests/callbacks/greedy_output/test_second_moment.py`.
    """
    sums = Sums(len(decoder.layers))
    points = tuple(point for block_points in MOMENT_POINTS[moment].values() for point in block_points)
    tokens = observe(decoder, batches, points, lambda layer, x: accumulate_squares(sums, layer, x))
    means = sums.means(tokens, decoder.device)
    return [
        compute_moment_scores(layer, layer_means, moment) for layer, layer_means in zip(decoder, means, strict=True)
    ]


def accumulate_squares(sums: Sums, layer: Layer, x: Mapping[str, Tensor]) -> None:
    """Sum the squares of one batch: of the activations themselves, or of the linears' outputs at an input point.

    Args:
        sums: receives one sum per point.
        layer: of the activations.
        x: {point: activations [T, width]}.

    Example: see `prunelit.callbacks.greedy_output.callback`, which uses it.
    """
    for point, activations in x.items():
        values = [activations.float()]
        if point in ("attention_input", "mlp_input"):
            linears = layer.qkv[-1:] if point == "attention_input" else layer.ffn_in
            values = [nn.functional.linear(values[0], *_get_float_weights(linear)) for linear in linears]
        sums.add(layer, point, torch.cat([each.square().sum(0) for each in values]))


def _get_float_weights(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    bias = cast("Tensor | None", linear.bias)
    return get_weight_out_in(linear).float(), None if bias is None else bias.float()


def compute_moment_scores(layer: Layer, means: Mapping[str, Tensor], moment: Moment) -> LayerScores:
    """Score the units of a layer from mean squares.

    Args:
        layer: the layer.
        means: {point: mean square over tokens [width]}, see `accumulate_squares`.
        moment: the form, see `score_second_moments`.

    Returns:
        Scores of the kinds of unit whose points are there, float64.

    Example: see `prunelit.callbacks.greedy_output.callback`, which uses it.
    """
    heads = channels = None
    shape, names = layer.shape, layer.architecture
    if "heads" in means or "attention_input" in means:
        norm = get_weight_out_in(layer.output).detach().double().norm(dim=0).view(shape.query_heads, shape.head_dim)
        if "heads" in means:
            heads = (norm.square() * means["heads"].view_as(norm)).sum(1)
        else:
            # In a fused projection the value rows are the last rows of every group's block, or of the whole projection.
            blocks = means["attention_input"].view(shape.kv_groups if names.qkv_layout == "grouped" else 1, -1)
            value = blocks[:, -shape.kv_groups * shape.head_dim // len(blocks) :].reshape(-1, shape.head_dim)  # [G, D]
            heads = (norm * value.repeat_interleave(shape.group_size, 0)).sum(1)
    if "channels" in means or "mlp_input" in means:
        norm = get_weight_out_in(layer.down).detach().double().norm(dim=0)
        squares = means["channels"][None] if "channels" in means else means["mlp_input"].view(-1, shape.ffn_channels)
        if moment == "code":  # act(gate) * up, or act(up) in a plain FFN
            channels = norm * layer.activation(squares[0].float()) * squares[1:].prod(0)
        else:
            channels = (norm.square() * squares).prod(0)
    return LayerScores(heads, channels)

"""REAM: merge the experts that a plan removes into those that remain, instead of dropping them.

Source: S. Jha et al., "REAM: Merging Improves Pruning of Experts in LLMs", arXiv 2604.04356, and its code. Layer by
layer, on text that has passed the merged layers before:

1. The experts that remain are the centroids. In the order of their REAP score (`prunelit.callbacks.reap`) each takes
   the experts nearest to it that are still free, until its group has `GROUP_SIZE` of them. The similarity of two
   experts is the mean of two numbers in [0, 1]: (1 + cosine) / 2 of their mean outputs, each weighted by the router's
   softmax over all experts; and 1 - d / max d, where d is the distance of their normalised router logits over tokens.
2. The channels of each expert are permuted to match those of its centroid: the assignment of least total distance
   between normalised channel activations plus that between normalised weights of the channels.
3. A group becomes the mean of its experts, weighted by their scores. The router keeps the centroids' rows.

Ours: the distance of weights is exact (the code projects them to 64 principal components), and groups grow beyond
`GROUP_SIZE` where they could not hold all experts otherwise. Outputs, logits and activations of all experts are
computed on `MAX_TOKENS` tokens of the text, the scores on all of it.

Legend: T tokens, H hidden size, E experts, C channels of an expert.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from prunelit.calibration.batches import Batch, get_padding_mask
from prunelit.calibration.expert_activations import ExpertActivations, observe_layer_experts
from prunelit.calibration.expert_statistics import ExpertStatistics, sum_output_norms
from prunelit.calibration.partial_forward import PartialForward, check_layers_run_alone
from prunelit.core.plan import PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, Layer, as_decoder
from prunelit.model.experts import Experts
from prunelit.model.modes import use_eval_mode
from prunelit.runtime.distributed import broadcast_from_rank_zero, sum_over_ranks, take_rank_share
from prunelit.runtime.progress import track_progress

GROUP_SIZE = 16
"""Experts of a group, its centroid included."""
MAX_TOKENS = 1024
"""Tokens on which all experts of a layer are compared."""


@torch.no_grad()
def apply_merge(model: torch.nn.Module | Decoder, plan: PruningPlan, batches: Sequence[Batch]) -> list[list[list[int]]]:
    """Cut a model in place; the experts that the plan removes are merged into those that remain.

    Args:
        model: dense causal LM, or its `Decoder`.
        plan: the remaining units; those that are no experts are cut as without repair.
        batches: calibration batches, the same list on every rank.

    Returns:
        For every layer the groups of experts that became one, each with its centroid first.

    Raises:
        BadPlan: the plan was made for another model, which is left unchanged.
        BadOption: later layers use the keys of earlier ones; the model is unchanged.

    Example: see `prunelit.callbacks.reap`, with `repair: merge`.
    """
    decoder = as_decoder(model)
    surgery.check_plan_fits(decoder, plan)
    check_layers_run_alone(decoder.config)
    forward = PartialForward(decoder)
    own_batches = take_rank_share(list(batches))
    streams: list[Tensor | None] = [None] * len(own_batches)
    groups_by_layer: list[list[list[int]]] = []
    changed = [len(kept.experts) < shape.experts for kept, shape in zip(plan.layers, plan.model.layers, strict=True)]
    last = max((index for index, is_changed in enumerate(changed) if is_changed), default=-1)
    with use_eval_mode(decoder.model):
        for index in track_progress(range(len(decoder.layers)), "merging", unit="layer"):
            layer, kept = decoder.layers[index], plan.layers[index]
            groups: list[list[int]] = []
            if layer.experts is not None and kept.experts and changed[index]:
                evidence = _observe_layer(forward, layer, own_batches, streams)
                groups = group_experts(evidence.scores, evidence.compute_similarity(), kept.experts)
                for group in groups:
                    merge_group(layer.experts, group, evidence.scores, evidence.channels)
            groups_by_layer.append(groups)
            surgery.prune_layer(layer, kept, decoder.config)
            if index < last:
                streams = [
                    forward.run_layers(batch, hidden, index, index + 1)
                    for batch, hidden in zip(own_batches, streams, strict=True)
                ]
    surgery.finish_pruning(decoder, plan)
    return groups_by_layer


class _LayerEvidence(NamedTuple):
    """What the experts of a layer do on the text."""

    scores: Tensor
    """REAP scores, float64 [E]; those of experts without tokens are the smallest of the others."""
    outputs: Tensor
    """Mean outputs weighted by the router's softmax, [E, H]."""
    logits: Tensor
    """Of the router on the compared tokens, [T, E]."""
    channels: Tensor
    """Activations on the compared tokens, [E, C, T]."""

    def compute_similarity(self) -> Tensor:
        """Compute the similarity of every two experts, in [0, 1], [E, E]."""
        directions = torch.nn.functional.normalize(self.outputs.float(), dim=1)
        of_outputs = (1 + directions @ directions.T) / 2
        rows = torch.nn.functional.normalize(self.logits.float().T, dim=1)
        distances = torch.cdist(rows, rows)
        of_logits = 1 - distances / distances.max().clamp(min=torch.finfo(torch.float32).tiny)
        return (of_outputs + of_logits) / 2


def _observe_layer(
    forward: PartialForward, layer: Layer, own_batches: Sequence[Batch], streams: Sequence[Tensor | None]
) -> _LayerEvidence:
    """Run all batches through a layer, score its experts on all tokens, and compare them on some."""
    experts, device = cast(Experts, layer.experts), forward.decoder.device
    sums = torch.zeros(experts.count, 3, dtype=torch.float64, device=device)
    inputs: list[Tensor] = []
    mask: Tensor | None = None

    def score(layer: Layer, x: ExpertActivations) -> None:
        sums[x.expert] += sum_output_norms(x)

    def store_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = (args[0] if args else kwargs["hidden_states"]).reshape(-1, experts.hidden_size)
        inputs.append(rows if mask is None else rows[mask])

    handle = experts.router.register_forward_pre_hook(store_input, with_kwargs=True)
    try:
        with observe_layer_experts(layer, score, lambda: mask):
            for batch, hidden in zip(own_batches, streams, strict=True):
                padding_mask = get_padding_mask(batch)
                mask = None if padding_mask is None else padding_mask.to(device).reshape(-1).bool()
                forward.run_layers(batch, hidden, layer.index, layer.index + 1)
    finally:
        handle.remove()
    scores = ExpertStatistics(*sum_over_ranks(sums).T).mean_gated_norms
    if (scores > 0).any():
        scores = torch.where(scores > 0, scores, scores[scores > 0].min())
    else:
        scores = torch.ones_like(scores)
    # All ranks compare the experts on the tokens of rank zero, so they make the same groups.
    x = torch.cat(inputs) if inputs else torch.zeros(0, experts.hidden_size)
    x = x[torch.linspace(0, len(x) - 1, min(len(x), MAX_TOKENS), device=x.device).long()]
    x = broadcast_from_rank_zero(x.cpu()).to(device)
    logits = torch.nn.functional.linear(x, experts.router.weight, getattr(experts.router, "bias", None)).float()
    weights = logits.softmax(dim=1)
    outputs, channels = [], []
    for expert in range(experts.count):
        tensors = experts.get_weights(expert)
        activations = experts.compute_channels(tensors, x)
        outputs.append((experts.compute_output(tensors, activations).float() * weights[:, expert, None]).mean(0))
        channels.append(activations.T)
    return _LayerEvidence(scores, torch.stack(outputs), logits, torch.stack(channels))


def group_experts(scores: Tensor, similarity: Tensor, centroids: Sequence[int]) -> list[list[int]]:
    """Group the experts of a layer around those that remain.

    Args:
        scores: [E]; centroids with larger scores choose first.
        similarity: [E, E].
        centroids: the experts that remain.

    Returns:
        One group per centroid, which comes first in it; centroids in ascending order.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.8], [0.9, 0.8, 1.0]])
        >>> group_experts(torch.tensor([3.0, 2.0, 1.0]), similarity, centroids=[0, 1])
        [[0, 2], [1]]
    """
    size = max(GROUP_SIZE, -(-len(scores) // len(centroids)))
    free = set(range(len(scores))) - set(centroids)
    groups = {}
    for centroid in sorted(centroids, key=lambda expert: (-float(scores[expert]), expert)):
        nearest = sorted(free, key=lambda expert: (-float(similarity[centroid, expert]), expert))[: size - 1]
        groups[centroid] = [centroid, *nearest]
        free -= set(nearest)
    return [groups[centroid] for centroid in sorted(groups)]


def merge_group(experts: Experts, group: Sequence[int], scores: Tensor, channels: Tensor) -> None:
    """Put the weighted mean of a group of experts in the place of its first one.

    Args:
        experts: of the layer; changed in place.
        group: the centroid, then the experts that are merged into it.
        scores: [E], weights of the mean.
        channels: [E, C, T], activations by which channels are matched.

    Example: see `tests/repair/test_merge_experts.py`.
    """
    if len(group) == 1:
        return
    centroid, *others = group
    shares = scores[list(group)] / scores[list(group)].sum()
    rows_of_channels = experts.index_rows()
    orders = {expert: _match_channels(experts, centroid, expert, channels) for expert in others}
    for tensor in experts.own_tensors:
        merged = tensor.value[centroid].double() * shares[0]
        for expert, share in zip(others, shares[1:], strict=True):
            values = tensor.value[expert]
            if tensor.axis is not None:
                order = orders[expert]
                entries = torch.empty(values.shape[tensor.axis - 1], dtype=torch.long)
                if tensor.per_channel > 1:
                    entries[rows_of_channels.flatten()] = rows_of_channels[order].flatten()
                else:
                    entries[:] = order
                values = values.index_select(tensor.axis - 1, entries.to(values.device))
            merged += values.double() * share
        tensor.value[centroid] = merged.to(tensor.value.dtype)


def _match_channels(experts: Experts, centroid: int, expert: int, channels: Tensor) -> Tensor:
    """Match the channels of an expert to those of a centroid: for each of these the number of one of the expert's."""
    from scipy.optimize import linear_sum_assignment

    of_weights = [_list_channel_weights(experts, each) for each in (centroid, expert)]
    cost = _compute_distances(channels[centroid], channels[expert]) + _compute_distances(*of_weights)
    return torch.from_numpy(linear_sum_assignment(cost.double().cpu().numpy())[1])


def _compute_distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute the distances of the normalised rows of two matrices."""
    normalize = torch.nn.functional.normalize
    return torch.cdist(normalize(x.float(), dim=1), normalize(y.float(), dim=1))


def _list_channel_weights(experts: Experts, expert: int) -> Tensor:
    """The weights of every channel of an expert: its rows before the activation and its column after it, [C, n * H]."""
    weights = experts.get_weights(expert)
    before = weights[experts.names.gate_up][experts.index_rows()].flatten(1)  # [C, n, H] -> [C, n * H]
    return torch.cat([before, weights[experts.names.down].T], dim=1)

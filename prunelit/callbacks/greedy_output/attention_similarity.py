"""Similarity of attention heads by the Jensen-Shannon divergence of their attention probabilities.

Source: J. Li, Y. Dong, Q. Lei, "Greedy Output Approximation", CPAL 2025, arXiv 2407.19126, Eq. 1 and Algorithm 2. For
heads i and j, with P the probabilities that a head gives to the keys of one query row,

    D_ij = mean over query rows of  H((P_i + P_j) / 2) - (H(P_i) + H(P_j)) / 2        H: entropy in nats

so D lies in [0, ln 2]. Masked keys have probability 0 and add nothing; rows of padding do not count. The probabilities
are those of eager attention, a few windows of one layer at a time, reduced in blocks of rows.

Legend: B windows, S tokens, Q query heads, G KV groups, M heads or groups that compete with each other (a cell).
"""

import bisect
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import Batch, count_real_tokens, select_rows
from prunelit.calibration.paired_streams import PairedStreams
from prunelit.core.plan import LayerPlan, LayerShape
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.modes import use_eval_mode
from prunelit.planning import removal_steps
from prunelit.runtime.distributed import sum_over_ranks

QUERY_ROWS = 4096
"""Approximate number of query rows in the mean; their windows are sampled at equal distances."""

_SCORES_AT_ONCE = 2**24  # limit of the probabilities [B, Q, S, S] of one forward pass with several windows
_ELEMENTS_AT_ONCE = 2**20  # limit of the probabilities [rows, Q, keys] of one block of rows


# Divergence ----------------------------------------------------------------------------------------------------------


class Divergence:
    """Mean divergence between all pairs of heads, summed in float64.

    Args:
        heads: number of heads, Q.
        device: device of the sums.

    Example:
        >>> divergence = Divergence(heads=2)
        >>> divergence.add_rows(torch.eye(2).view(1, 2, 1, 2))  # two heads with disjoint attention: D = ln 2
        >>> divergence.compute_mean()
        tensor([[0.0000, 0.6931],
                [0.6931, 0.0000]], dtype=torch.float64)
    """

    def __init__(self, heads: int, device: torch.device | None = None):
        self.total = torch.zeros(heads, heads, dtype=torch.float64, device=device)  # above the diagonal only
        self.rows = 0

    @torch.no_grad()
    def add_rows(self, probabilities: Tensor, mask: Tensor | None = None) -> None:
        """Add the query rows of a batch.

        Args:
            probabilities: [B, Q, S, keys] attention probabilities.
            mask: [B, S], 0 where the query is padding; None: no padding.
        """
        rows = probabilities.transpose(1, 2).flatten(0, 1)  # [B * S, Q, keys]
        if mask is not None:
            rows = rows[mask.reshape(-1).bool()]
        heads, keys = rows.shape[1:]
        for block in rows.split(max(1, _ELEMENTS_AT_ONCE // (heads * keys))):
            p = block.float()
            p = p / p.sum(-1, keepdim=True)  # probabilities rounded to half precision do not sum to 1
            entropy = torch.special.entr(p).sum(-1)  # [rows, Q]
            for head in range(heads - 1):
                others = slice(head + 1, heads)
                mixed_entropy = torch.special.entr((p[:, head, None] + p[:, others]) / 2).sum(-1)
                divergence = mixed_entropy - (entropy[:, head, None] + entropy[:, others]) / 2
                self.total[head, others] += divergence.sum(0, dtype=torch.float64)
        self.rows += len(rows)

    def compute_mean(self) -> Tensor | None:
        """Compute the mean over the rows of all ranks; every rank has to call it.

        Returns:
            [Q, Q], symmetric, 0 on the diagonal; None if there are no rows.
        """
        rows = int(sum_over_ranks(torch.tensor(self.rows, device=self.total.device)))
        mean = sum_over_ranks(self.total.clone()).clamp_min(0) / max(1, rows)
        return mean + mean.T if rows else None


def compute_group_divergence(divergence: Tensor, size: int) -> Tensor:
    """Compute the divergence between KV groups from the divergence between their heads.

    From group a to group b it is the mean over the heads of a of the smallest divergence to a head of b; the larger of
    both directions counts.

    Args:
        divergence: [Q, Q].
        size: query heads of a group.

    Returns:
        [G, G].

    Example:
        >>> compute_group_divergence(torch.tensor([[0.0, 0.3], [0.3, 0.0]]), size=1)
        tensor([[0.0000, 0.3000],
                [0.3000, 0.0000]])
    """
    groups = len(divergence) // size
    directed = divergence.view(groups, size, groups, size).amin(3).mean(1)
    return torch.maximum(directed, directed.T)


@torch.no_grad()
def measure_head_divergence(decoder: Decoder, batches: Sequence[Batch]) -> list[Tensor | None]:
    """Measure the divergence between the heads of every layer of the dense model.

    Args:
        decoder: the model; left as it was.
        batches: calibration batches, the same list on every rank; the ranks share the work.

    Returns:
        [Q, Q] of every layer; None for a layer without attention, and for all layers where the model does not return
        its attention probabilities (with a warning).

    Example: see `tests/callbacks/greedy_output/test_attention_similarity.py`.
    """
    if not any(layer.has_attention for layer in decoder):
        return [None] * len(decoder.layers)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    most_heads = max(layer.shape.query_heads for layer in decoder)
    divergences = [Divergence(layer.shape.query_heads, decoder.device) for layer in decoder]
    mask: list[Tensor | None] = [None]
    with (
        use_eval_mode(decoder.model),
        _watch_probabilities(decoder, decoder.layers, partial(_add_probabilities, divergences, mask)),
    ):
        for number, _, windows in _sample_windows(batches, most_heads):
            if number % world == rank:
                mask[0] = windows.get("attention_mask")
                decoder.backbone(use_cache=False, **{name: value.to(decoder.device) for name, value in windows.items()})
    means = [divergence.compute_mean() for divergence in divergences]
    if all(mean is None for mean in means) and not rank:
        warnings.warn(
            f"{type(decoder.model).__name__}: its attention does not return probabilities; heads are chosen by their "
            "second moment alone",
            stacklevel=2,
        )
    return [mean if layer.has_attention else None for layer, mean in zip(decoder, means, strict=True)]


@torch.no_grad()
def measure_layer_divergence(streams: PairedStreams, batches: Sequence[Batch]) -> Tensor | None:
    """Measure the divergence between the heads of the current layer on the cut stream.

    Args:
        streams: has entered the layer.
        batches: the batches that `streams` was made with.

    Returns:
        [Q, Q]; None where the model does not return its attention probabilities.

    Example: see `tests/callbacks/greedy_output/test_attention_similarity.py`.
    """
    layer, decoder = streams.layer, streams.decoder
    divergence = Divergence(layer.shape.query_heads, decoder.device)
    mask: list[Tensor | None] = [None]
    places = {number: place for place, (number, _) in enumerate(streams.own_batches)}
    with (
        use_eval_mode(decoder.model),
        _watch_probabilities(decoder, [layer], partial(_add_probabilities, {layer.index: divergence}, mask)),
    ):
        for number, rows, windows in _sample_windows(batches, layer.shape.query_heads):
            if number in places:
                hidden = streams.cut_streams[places[number]]
                mask[0] = windows.get("attention_mask")
                streams.partial_forward.run_layers(
                    windows, None if hidden is None else hidden[rows], layer.index, layer.index + 1
                )
    return divergence.compute_mean()


def _add_probabilities(
    divergences: Sequence[Divergence] | Mapping[int, Divergence],
    mask: Sequence[Tensor | None],
    layer: Layer,
    probabilities: Tensor,
) -> None:
    """Add the rows of a layer; `mask` holds the padding mask of the windows that are running."""
    row_mask = None if mask[0] is None else mask[0].to(probabilities.device)
    divergences[layer.index].add_rows(probabilities, row_mask)


def _sample_windows(batches: Sequence[Batch], heads: int) -> Iterator[tuple[int, list[int], Batch]]:
    """Sample windows at equal distances, about `QUERY_ROWS` tokens in all.

    Yields:
        The number of a batch, some of its rows, and these rows as a batch.
    """
    distance = max(1, math.ceil(sum(map(count_real_tokens, batches)) / QUERY_ROWS))
    windows_before = 0
    for number, batch in enumerate(batches):
        windows, length = batch["input_ids"].shape
        rows = [row for row in range(windows) if (windows_before + row) % distance == 0]
        windows_before += windows
        rows_at_once = max(1, _SCORES_AT_ONCE // (heads * length * length))
        for start in range(0, len(rows), rows_at_once):
            sampled_rows = rows[start : start + rows_at_once]
            yield number, sampled_rows, select_rows(batch, sampled_rows)


@contextmanager
def _watch_probabilities(
    decoder: Decoder, layers: Sequence[Layer], visit: Callable[[Layer, Tensor], None]
) -> Iterator[None]:
    """Use eager attention meanwhile, and call `visit` with the probabilities [B, Q, S, keys] of each layer."""
    config, handles = decoder.config, []
    # Fused kernels never form the probabilities; transformers looks the implementation up in the config at each call.
    implementation = config._attn_implementation

    def visit_output(layer: Layer, module: nn.Module, args: object, output: object) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[1] == layer.shape.query_heads:
            visit(layer, weights)

    try:
        config._attn_implementation = "eager"
        for layer in layers:
            if layer.has_attention:
                handles.append(layer.attention.register_forward_hook(partial(visit_output, layer)))
        yield
    finally:
        config._attn_implementation = implementation
        for handle in handles:
            handle.remove()


# Units to remove -----------------------------------------------------------------------------------------------------


def find_candidates(divergence: Sequence[Sequence[float]], tau: float) -> dict[int, float]:
    """Find the heads that are close to a head which is not itself a candidate (Algorithm 2 of the paper).

    Pairs are scanned row by row; i becomes a candidate if D_ij < tau and neither i nor j is one yet.

    Args:
        divergence: [M, M].
        tau: threshold in nats.

    Returns:
        {candidate: its smallest divergence to a head that was not a candidate when it was scanned}.

    Example:
        >>> find_candidates([[0.0, 0.1, 0.5], [0.1, 0.0, 0.5], [0.5, 0.5, 0.0]], tau=0.2)
        {0: 0.1}
    """
    closest_by_candidate: dict[int, float] = {}
    for i, row in enumerate(divergence):
        closest = min(
            (value for j, value in enumerate(row) if i != j and j not in closest_by_candidate), default=math.inf
        )
        if closest < tau:
            closest_by_candidate[i] = closest
    return closest_by_candidate


@dataclass(frozen=True)
class Cell:
    """Heads, or KV groups, that compete with each other.

    Attributes:
        divergence: [M][M].
        moments: [M], larger = stays.
        most: number of units that may be removed.

    Example: see `tests/callbacks/greedy_output/test_attention_similarity.py`.
    """

    divergence: Sequence[Sequence[float]]
    moments: Sequence[float]
    most: int


CellUnit = tuple[int, int]
"""Number of the cell, and number of the unit in the cell."""


def rank_similar_units(cells: Sequence[Cell], tau: float) -> list[CellUnit]:
    """Rank the candidates of all cells by their divergence, the smallest first.

    Args:
        cells: the cells; of each not more candidates are taken than may be removed.
        tau: threshold in nats.

    Example:
        >>> cell = Cell([[0.0, 0.1, 0.5], [0.1, 0.0, 0.5], [0.5, 0.5, 0.0]], [1.0, 2.0, 3.0], most=2)
        >>> rank_similar_units([cell], tau=0.2)
        [(0, 0)]
    """
    ranked: list[tuple[float, int, int]] = []
    for number, cell in enumerate(cells):
        candidates = sorted((value, unit) for unit, value in find_candidates(cell.divergence, tau).items())
        ranked += [(value, number, unit) for value, unit in candidates[: cell.most]]
    return [(number, unit) for _, number, unit in sorted(ranked)]


def select_redundant_units(cells: Sequence[Cell], count: int, limit: float) -> list[CellUnit]:
    """Select `count` units to remove, in order: similar units first, then those of the smallest second moment.

    The common threshold of all cells is found by bisection: the smallest one that gives at least `count` candidates, of
    which those of the smallest divergence are selected. If `limit` gives too few, second moments decide on the others.

    Args:
        cells: sets of units that compete with each other.
        count: number of units to select.
        limit: largest threshold in nats; 0: second moments alone.

    Example:
        >>> cell = Cell([[0.0, 0.1, 0.5], [0.1, 0.0, 0.5], [0.5, 0.5, 0.0]], [3.0, 2.0, 1.0], most=2)
        >>> select_redundant_units([cell], count=2, limit=0.2)
        [(0, 0), (0, 2)]
    """
    values = {value for cell in cells for i, row in enumerate(cell.divergence) for value in row[i + 1 :]}
    # Just above each divergence: candidates need a divergence below the threshold.
    taus = [math.nextafter(value, math.inf) for value in sorted(values) if value < limit]
    place = bisect.bisect_left(taus, count, key=lambda tau: len(rank_similar_units(cells, tau)))
    selected = rank_similar_units(cells, taus[min(place, len(taus) - 1)])[:count] if taus else []
    by_moment = sorted((m, number, unit) for number, cell in enumerate(cells) for unit, m in enumerate(cell.moments))
    room = [
        cell.most - sum(number == selected_cell for selected_cell, _ in selected) for number, cell in enumerate(cells)
    ]
    for _, number, unit in by_moment:
        if len(selected) < count and room[number] > 0 and (number, unit) not in selected:
            selected.append((number, unit))
            room[number] -= 1
    return selected


def choose_heads(
    layer_plan: LayerPlan, shape: LayerShape, scores: LayerScores, divergence: Tensor | None, limit: float
) -> LayerPlan:
    """Choose the remaining KV groups of a layer, or the remaining query heads of every group, by similarity.

    Args:
        layer_plan: says how many remain.
        shape: shape of the layer.
        scores: second moments; a group has the sum of its heads.
        divergence: [Q, Q]; None: second moments alone.
        limit: see `select_redundant_units`.

    Returns:
        `layer_plan` with as many other heads.

    Example: see `tests/callbacks/greedy_output/test_attention_similarity.py`.
    """
    size, groups, moments = shape.group_size, shape.kv_groups, cast(Tensor, scores.heads)
    limit = limit if divergence is not None else 0.0
    head_divergence = torch.zeros(groups * size, groups * size) if divergence is None else divergence
    if (removed_count := groups - len(layer_plan.kv_groups)) > 0:
        cell = Cell(
            compute_group_divergence(head_divergence, size).tolist(),
            moments.view(groups, size).sum(1).tolist(),
            groups - 1,
        )
        removed = {group for _, group in select_redundant_units([cell], removed_count, limit)}
        remaining = tuple(group for group in range(groups) if group not in removed)
        heads = tuple(head for head in range(shape.query_heads) if head // size in remaining)
        return replace(layer_plan, kv_groups=remaining, query_heads=heads)
    removed = set()
    for start in range(0, shape.query_heads, size):
        members = slice(start, start + size)
        cell = Cell(head_divergence[members, members].tolist(), moments[members].tolist(), size - 1)
        removed |= {
            start + head
            for _, head in select_redundant_units([cell], size - len(layer_plan.query_heads) // groups, limit)
        }
    return replace(layer_plan, query_heads=tuple(head for head in range(shape.query_heads) if head not in removed))


_GROUP_OFFSET = 1e6  # larger than any standardised score


def rank_groups_globally(
    shapes: Sequence[LayerShape],
    scores: Sequence[LayerScores],
    divergences: Sequence[Tensor | None],
    layer_plans: Sequence[LayerPlan],
    protected: Collection[int],
    min_kept: float,
    limit: float,
    tau: float | None = None,
) -> list[LayerScores]:
    """Rank the KV groups of all layers by one threshold, in the form of scores.

    In ascending order come the redundant groups, then the channels, then the other groups.

    Args:
        shapes: shape of every layer.
        scores: second moments of every layer, larger = stays; standardised here per layer.
        divergences: [Q, Q] of every layer; None: the groups of the layer stay.
        layer_plans: say how many groups are removed from all layers together, unless `tau` is given.
        protected: indices of the layers that are left alone.
        min_kept: least share of a layer's groups that remains.
        limit: see `select_redundant_units`.
        tau: threshold in nats; None: found by bisection, see `select_redundant_units`.

    Returns:
        Scores of every layer, to select units of all layers in one list.

    Example: see `prunelit.callbacks.greedy_output.callback`, which uses it.
    """
    heads = [None if s.heads is None else removal_steps.standardize_scores(s.heads.double().cpu()) for s in scores]
    cells: list[Cell] = []
    groups: list[Tensor] = []  # [G, Q / G] of the layers in `cells`
    count = 0
    for index, (shape, head_scores, divergence) in enumerate(zip(shapes, heads, divergences, strict=True)):
        if head_scores is None or divergence is None or not shape.heads_prunable or index in protected:
            continue
        groups.append(head_scores.view(shape.kv_groups, shape.group_size))
        most = shape.kv_groups - max(1, math.ceil(min_kept * shape.kv_groups - 1e-9))
        group_divergence = compute_group_divergence(divergence, shape.group_size).tolist()
        cells.append(Cell(group_divergence, groups[-1].sum(1).tolist(), most))
        count += shape.kv_groups - len(layer_plans[index].kv_groups)
    redundant = select_redundant_units(cells, count, limit) if tau is None else rank_similar_units(cells, tau)
    # Views of `heads`: groups that are not redundant move above all channels, redundant ones below.
    for values in groups:
        values += _GROUP_OFFSET
    for order, (number, group) in enumerate(redundant):
        groups[number][group] = order - _GROUP_OFFSET
    channels = [
        None if s.channels is None else removal_steps.standardize_scores(s.channels.double().cpu()) for s in scores
    ]
    return [LayerScores(*pair) for pair in zip(heads, channels, strict=True)]

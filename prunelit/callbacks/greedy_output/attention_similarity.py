"""Similarity of attention heads: Jensen-Shannon divergence of their attention probabilities, and what to cut by it.

For heads i and j, with P the probabilities that a head gives to the keys of one query row,

    D_ij = mean over query rows of  H((P_i + P_j) / 2) - (H(P_i) + H(P_j)) / 2        H: entropy in nats

so D lies in [0, ln 2]. Masked keys have probability 0 and add nothing; rows of padding do not count. Probabilities are
those of eager attention, seen for a few windows of one layer at a time and reduced in blocks of rows.

Legend: B windows, S tokens, Q query heads, G KV groups, M heads or groups that compete with each other (a cell).
"""

import bisect
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import Batch, count_real_tokens
from prunelit.calibration.paired_streams import PairedStreams
from prunelit.core.plan import LayerPlan, LayerShape
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.modes import use_eval_mode
from prunelit.planning import removal_steps
from prunelit.runtime.distributed import sum_over_ranks

QUERY_ROWS = 4096
"""Query rows that the mean is taken over, about; windows are taken at equal distances."""

_SCORES_AT_ONCE = 2**24  # probabilities [B, Q, S, S] of one forward pass, if it has more than one window
_ELEMENTS_AT_ONCE = 2**20  # of a block of rows, all heads


# Divergence ----------------------------------------------------------------------------------------------------------


class Divergence:
    """Mean divergence between all pairs of heads, summed in float64.

    Args:
        heads: Q.
        device: of the sums.
    """

    def __init__(self, heads: int, device: torch.device | None = None):
        self.total = torch.zeros(heads, heads, dtype=torch.float64, device=device)  # above the diagonal
        self.rows = 0

    @torch.no_grad()
    def add_rows(self, probabilities: Tensor, mask: Tensor | None = None) -> None:
        """Add query rows.

        Args:
            probabilities: [B, Q, S, keys].
            mask: [B, S], 0 where a query is padding.
        """
        rows = probabilities.transpose(1, 2).flatten(0, 1)  # [B * S, Q, keys]
        if mask is not None:
            rows = rows[mask.reshape(-1).bool()]
        heads, keys = rows.shape[1:]
        for block in rows.split(max(1, _ELEMENTS_AT_ONCE // (heads * keys))):
            p = block.float()
            p = p / p.sum(-1, keepdim=True)  # half precision rounds
            entropy = torch.special.entr(p).sum(-1)  # [rows, Q]
            for head in range(heads - 1):
                others = slice(head + 1, heads)
                mixed = torch.special.entr((p[:, head, None] + p[:, others]) / 2).sum(-1)
                found = mixed - (entropy[:, head, None] + entropy[:, others]) / 2
                self.total[head, others] += found.sum(0, dtype=torch.float64)
        self.rows += len(rows)

    def compute_mean(self) -> Tensor | None:
        """[Q, Q] over all ranks, symmetric, 0 on the diagonal; None if no rank saw a row. Every rank calls it."""
        rows = int(sum_over_ranks(torch.tensor(self.rows, device=self.total.device)))
        mean = sum_over_ranks(self.total.clone()).clamp_min(0) / max(1, rows)
        return mean + mean.T if rows else None


def compute_group_divergence(divergence: Tensor, size: int) -> Tensor:
    """Divergence between KV groups [G, G], from that between their heads [Q, Q].

    From group a to b: mean over the heads of a of the smallest divergence to a head of b; the larger of both ways.

    Args:
        divergence: [Q, Q].
        size: query heads in a group.
    """
    groups = len(divergence) // size
    directed = divergence.view(groups, size, groups, size).amin(3).mean(1)
    return torch.maximum(directed, directed.T)


@torch.no_grad()
def measure_head_divergence(decoder: Decoder, batches: Sequence[Batch]) -> list[Tensor | None]:
    """[Q, Q] of every layer; None for one without attention, and of all where the model hides its probabilities.

    Args:
        decoder: the model; left as it was.
        batches: the same list on every rank; the ranks share the work.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    most = max((layer.shape.query_heads for layer in decoder), default=1)
    found = [Divergence(layer.shape.query_heads, decoder.device) for layer in decoder]
    mask: list[Tensor | None] = [None]
    with (
        use_eval_mode(decoder.model),
        _watch_probabilities(decoder, decoder.layers, partial(_add_probabilities, found, mask)),
    ):
        for number, _, part in _sample_windows(batches, most):
            if number % world == rank:
                mask[0] = part.get("attention_mask")
                decoder.backbone(use_cache=False, **{name: value.to(decoder.device) for name, value in part.items()})
    means = [divergence.compute_mean() for divergence in found]
    if all(mean is None for mean in means) and any(layer.has_attention for layer in decoder) and not rank:
        warnings.warn(
            f"{type(decoder.model).__name__}: its attention does not return probabilities; heads are chosen by their "
            "second moment alone",
            stacklevel=2,
        )
    return [mean if layer.has_attention else None for layer, mean in zip(decoder, means, strict=True)]


@torch.no_grad()
def measure_layer_divergence(lock: PairedStreams, batches: Sequence[Batch]) -> Tensor | None:
    """[Q, Q] of the layer at hand on the cut stream; None where the model hides its probabilities.

    Args:
        lock: it has entered the layer.
        batches: the list that `lock` was made with.
    """
    layer, decoder = lock.layer, lock.decoder
    found = Divergence(layer.shape.query_heads, decoder.device)
    mask: list[Tensor | None] = [None]
    places = {number: place for place, (number, _) in enumerate(lock.own_batches)}
    with (
        use_eval_mode(decoder.model),
        _watch_probabilities(decoder, [layer], partial(_add_probabilities, {layer.index: found}, mask)),
    ):
        for number, rows, part in _sample_windows(batches, layer.shape.query_heads):
            if number in places:
                hidden = lock.cut_streams[places[number]]
                mask[0] = part.get("attention_mask")
                lock.partial_forward.run_layers(
                    part, None if hidden is None else hidden[rows], layer.index, layer.index + 1
                )
    return found.compute_mean()


def _add_probabilities(found: Any, mask: list[Tensor | None], layer: Layer, probabilities: Tensor) -> None:
    now = mask[0]
    found[layer.index].add_rows(probabilities, None if now is None else now.to(probabilities.device))


def _sample_windows(batches: Sequence[Batch], heads: int) -> Iterator[tuple[int, list[int], Batch]]:
    """Windows at equal distances, about ROWS tokens: (number of the batch, its rows, these rows as a batch)."""
    apart = max(1, math.ceil(sum(map(count_real_tokens, batches)) / QUERY_ROWS))
    seen = 0
    for number, batch in enumerate(batches):
        windows, length = batch["input_ids"].shape
        rows = [row for row in range(windows) if (seen + row) % apart == 0]
        seen += windows
        together = max(1, _SCORES_AT_ONCE // (heads * length * length))
        for start in range(0, len(rows), together):
            some = rows[start : start + together]
            names = [name for name in ("input_ids", "attention_mask") if name in batch]
            yield number, some, {name: batch[name][some] for name in names}


@contextmanager
def _watch_probabilities(
    decoder: Decoder, layers: Sequence[Layer], see: Callable[[Layer, Tensor], None]
) -> Iterator[None]:
    """Eager attention for a while, and `see` called with each layer's probabilities [B, Q, S, keys]."""
    config, handles = decoder.config, []
    before = config._attn_implementation

    def after(layer: Layer, module: nn.Module, args: Any, output: Any) -> None:
        found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(found, Tensor) and found.dim() == 4 and found.shape[1] == layer.shape.query_heads:
            see(layer, found)

    try:
        config._attn_implementation = "eager"
        for layer in layers:
            if layer.has_attention:
                handles.append(layer.attention.register_forward_hook(partial(after, layer)))
        yield
    finally:
        config._attn_implementation = before
        for handle in handles:
            handle.remove()


# What goes -----------------------------------------------------------------------------------------------------------


def find_candidates(divergence: Sequence[Sequence[float]], tau: float) -> dict[int, float]:
    """Algorithm 2 of the paper: heads that are close to one that is not itself a candidate.

    Pairs are scanned row by row; i becomes a candidate if D_ij < tau and neither i nor j is one yet.

    Args:
        divergence: [M, M].
        tau: threshold in nats.

    Returns:
        The candidates, each with its smallest divergence to one that it could have gone for.
    """
    found: dict[int, float] = {}
    for i, row in enumerate(divergence):
        closest = min((value for j, value in enumerate(row) if i != j and j not in found), default=math.inf)
        if closest < tau:
            found[i] = closest
    return found


@dataclass(frozen=True)
class Cell:
    """Heads, or KV groups, that compete with each other.

    Attributes:
        divergence: [M][M].
        moments: [M], larger = keep.
        most: so many may go.
    """

    divergence: Sequence[Sequence[float]]
    moments: Sequence[float]
    most: int


CellUnit = tuple[int, int]
"""Number of the cell, number in the cell."""


def rank_similar_units(cells: Sequence[Cell], tau: float) -> list[CellUnit]:
    """Candidates of all cells, those of smallest divergence first; no more of a cell than may go."""
    found: list[tuple[float, int, int]] = []
    for number, cell in enumerate(cells):
        gone = sorted((value, unit) for unit, value in find_candidates(cell.divergence, tau).items())
        found += [(value, number, unit) for value, unit in gone[: cell.most]]
    return [(number, unit) for _, number, unit in sorted(found)]


def select_redundant_units(cells: Sequence[Cell], count: int, limit: float) -> list[CellUnit]:
    """`count` units in the order in which they go: candidates first, then those of least moment.

    The threshold of all cells is found by bisection: the smallest that gives at least `count` candidates, of which the
    closest go. Where even `limit` gives too few, second moments decide on the others.

    Args:
        cells: in which units compete.
        count: of units that go.
        limit: largest threshold in nats; 0 leaves all to second moments.
    """
    values = {value for cell in cells for i, row in enumerate(cell.divergence) for value in row[i + 1 :]}
    taus = [math.nextafter(value, math.inf) for value in sorted(values) if value < limit]
    place = bisect.bisect_left(taus, count, key=lambda tau: len(rank_similar_units(cells, tau)))
    found = rank_similar_units(cells, taus[min(place, len(taus) - 1)])[:count] if taus else []
    rest = sorted((m, number, unit) for number, cell in enumerate(cells) for unit, m in enumerate(cell.moments))
    room = [cell.most - sum(number == of for of, _ in found) for number, cell in enumerate(cells)]
    for _, number, unit in rest:
        if len(found) < count and room[number] > 0 and (number, unit) not in found:
            found.append((number, unit))
            room[number] -= 1
    return found


def choose_heads(
    kept: LayerPlan, shape: LayerShape, scores: LayerScores, divergence: Tensor | None, limit: float
) -> LayerPlan:
    """As many KV groups, or query heads of every group, as `kept` has: those that `select_redundant_units` leaves.

    Args:
        kept: how many stay.
        shape: of the layer.
        scores: second moments; a group has the sum of its heads.
        divergence: [Q, Q]; None: second moments decide.
        limit: see `select_redundant_units`.
    """
    size, groups, moments = shape.group_size, shape.kv_groups, cast(Tensor, scores.heads)
    limit = limit if divergence is not None else 0.0
    between = torch.zeros(groups * size, groups * size) if divergence is None else divergence
    if (gone := groups - len(kept.kv_groups)) > 0:
        cell = Cell(
            compute_group_divergence(between, size).tolist(), moments.view(groups, size).sum(1).tolist(), groups - 1
        )
        lost = {group for _, group in select_redundant_units([cell], gone, limit)}
        stay = tuple(group for group in range(groups) if group not in lost)
        heads = tuple(head for head in range(shape.query_heads) if head // size in stay)
        return replace(kept, kv_groups=stay, query_heads=heads)
    lost = set()
    for start in range(0, shape.query_heads, size):
        of = slice(start, start + size)
        cell = Cell(between[of, of].tolist(), moments[of].tolist(), size - 1)
        lost |= {
            start + head for _, head in select_redundant_units([cell], size - len(kept.query_heads) // groups, limit)
        }
    return replace(kept, query_heads=tuple(head for head in range(shape.query_heads) if head not in lost))


_GROUP_OFFSET = 1e6  # further than any standardised score


def rank_groups_globally(
    shapes: Sequence[LayerShape],
    scores: Sequence[LayerScores],
    divergences: Sequence[Tensor | None],
    kept: Sequence[LayerPlan],
    whole: Collection[int],
    min_kept: float,
    limit: float,
    tau: float | None = None,
) -> list[LayerScores]:
    """Scores that rank KV groups of all layers by one threshold: redundant ones, then channels, then other groups.

    Args:
        shapes: one per layer.
        scores: second moments, larger = keep; given mean 0 and deviation 1 in each layer.
        divergences: [Q, Q] of each layer.
        kept: says how many groups go from all layers together, where `tau` does not.
        whole: layers that are left alone.
        min_kept: least share of a layer's groups that stays.
        limit: see `select_redundant_units`.
        tau: threshold in nats; None: by bisection, see `select_redundant_units`.
    """
    heads = [None if s.heads is None else removal_steps.standardize_scores(s.heads.double().cpu()) for s in scores]
    cells: list[Cell] = []
    groups: list[Tensor] = []  # [G, Q / G] of the layers in `cells`
    count = 0
    for index, (shape, own, divergence) in enumerate(zip(shapes, heads, divergences, strict=True)):
        if own is None or divergence is None or not shape.heads_prunable or index in whole:
            continue
        groups.append(own.view(shape.kv_groups, shape.group_size))
        most = shape.kv_groups - max(1, math.ceil(min_kept * shape.kv_groups - 1e-9))
        between = compute_group_divergence(divergence, shape.group_size).tolist()
        cells.append(Cell(between, groups[-1].sum(1).tolist(), most))
        count += shape.kv_groups - len(kept[index].kv_groups)
    gone = select_redundant_units(cells, count, limit) if tau is None else rank_similar_units(cells, tau)
    for values in groups:
        values += _GROUP_OFFSET
    for order, (number, group) in enumerate(gone):
        groups[number][group] = order - _GROUP_OFFSET
    channels = [
        None if s.channels is None else removal_steps.standardize_scores(s.channels.double().cpu()) for s in scores
    ]
    return [LayerScores(*pair) for pair in zip(heads, channels, strict=True)]

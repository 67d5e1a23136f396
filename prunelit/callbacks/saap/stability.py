"""Exchange scores among the least important units, so that those of unstable importance are removed first.

Source: ours, instead of removing the most volatile units of all, see `prunelit.callbacks.saap.callback`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

UnitKey = tuple[str, int]
"""Kind of unit ("heads" or "channels") and index of the layer."""

UnitValues = dict[UnitKey, Tensor]
"""One number per unit of a kind in a layer."""


def trade_scores(scores: UnitValues, asi: UnitValues, pools: Mapping[UnitKey, Sequence[int]], count: int) -> None:
    """Redistribute the scores of the candidates in place: the lowest to the one of largest ASI, and so on.

    Args:
        scores: larger = stays. Units outside their pool are raised above all candidates.
        asi: volatility of the scores.
        pools: units of each kind and layer that may be removed, those of lowest score.
        count: number of candidates, the lowest scores of all pools.

    Example:
        >>> key = ("channels", 0)
        >>> scores, asi = {key: torch.tensor([1.0, 2.0, 3.0])}, {key: torch.tensor([0.1, 0.9, 0.5])}
        >>> trade_scores(scores, asi, {key: [0, 1, 2]}, count=2)
        >>> scores[key]
        tensor([2., 1., 3.])
    """
    score_lists, asi_lists = ({key: units[key].tolist() for key in pools} for units in (scores, asi))
    candidates = sorted((score_lists[key][unit], key, unit) for key, units in pools.items() for unit in units)[:count]
    by_volatility = sorted(candidates, key=lambda candidate: -asi_lists[candidate[1]][candidate[2]])
    highest = candidates[-1][0] if candidates else 0.0
    for key, units in pools.items():
        outside_pool = torch.ones(len(scores[key]), dtype=torch.bool)
        outside_pool[list(units)] = False
        scores[key][outside_pool] += highest * (scores[key][outside_pool] <= highest)
    for (score, _, _), (_, key, unit) in zip(candidates, by_volatility, strict=True):
        scores[key][unit] = score

"""Of the least important units those of unstable importance go first: candidates trade their scores.

Source: ours, in place of cutting what is most volatile outright, see `prunelit.callbacks.saap.callback`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

UnitKey = tuple[str, int]
"""Kind, "heads" or "channels", and layer."""

UnitValues = dict[UnitKey, Tensor]
"""One number for each unit of a kind in a layer."""


def trade_scores(scores: UnitValues, asi: UnitValues, pools: Mapping[UnitKey, Sequence[int]], count: int) -> None:
    """Give the candidates each other's scores, in place: the lowest to the one of largest ASI, and so on.

    Args:
        scores: larger = keep. What is not in its pool comes to lie above all candidates.
        asi: volatility of the scores.
        pools: of each kind and layer the units that may go, those of lowest score.
        count: so many candidates, the lowest scores of all pools.
    """
    plain, unstable = ({key: units[key].tolist() for key in pools} for units in (scores, asi))
    candidates = sorted((plain[key][unit], key, unit) for key, units in pools.items() for unit in units)[:count]
    first_to_go = sorted(candidates, key=lambda candidate: -unstable[candidate[1]][candidate[2]])
    top = candidates[-1][0] if candidates else 0.0
    for key, units in pools.items():
        stays = torch.ones(len(scores[key]), dtype=torch.bool)
        stays[list(units)] = False
        scores[key][stays] += top * (scores[key][stays] <= top)
    for (score, _, _), (_, key, unit) in zip(candidates, first_to_go, strict=True):
        scores[key][unit] = score
